"""What everybody who hands out a bucket promises, over a real S3 API in a process of its own, a directory, and the one in memory."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cellos.core.objects import Entry, ObjectStore
from cellos.errors import ConfigError, StoreError, StoreUnfit, StoreUnreachable
from cellos.fleet.store import open_store, prove
from cellos.testing.object_store import MemoryStore

Run = Callable[[Callable[[ObjectStore], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["memory", "file", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Do something with an empty store."""
    environment: dict[str, str] = {}
    url = f"file://{tmp_path}/a%20bucket"
    if request.param == "s3":
        s3 = request.getfixturevalue("s3_server")
        environment, url = s3.environment, f"s3://{s3.bucket}/{uuid.uuid4()}"

    def on_a_store(work: Callable[[ObjectStore], Coroutine[Any, Any, None]]) -> None:
        async def with_store() -> None:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                store = MemoryStore(page=3) if request.param == "memory" else open_store(url, environment, request_seconds=30)
            await work(store)

        asyncio.run(with_store())

    return on_a_store


async def keys(store: ObjectStore, prefix: str) -> list[str]:
    return [entry.key async for page in store.pages(prefix) for entry in page]


def test_an_object_is_created_once(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        assert await store.create("a/one.json", b"first")
        assert not await store.create("a/one.json", b"second")
        found = await store.read("a/one.json", 100)
        assert found is not None
        assert (found.body, found.fault) == (b"first", None)

    run(work)


def test_of_many_who_create_it_at_once_one_has_done_it(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        bodies = [f"{number}".encode() * 1000 for number in range(20)]
        created = await asyncio.gather(*(store.create("a/one.json", body) for body in bodies))
        assert created.count(True) == 1
        found = await store.read("a/one.json", 100_000)
        assert found is not None
        assert found.body == bodies[created.index(True)]

    run(work)


def test_what_was_written_is_read_and_can_be_removed(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        assert await store.read("a/one.json", 100) is None
        assert await store.look("a/one.json") is None
        await store.remove("a/one.json")
        await store.write("a/one.json", b"first")
        before = await store.look("a/one.json")
        await store.write("a/one.json", b"")
        found, after = await store.read("a/one.json", 100), await store.look("a/one.json")
        assert found is not None
        assert before is not None
        assert after is not None
        assert (found.body, found.entry.size, before.size, after.size) == (b"", 0, 5, 0)
        assert before.etag != after.etag
        await store.remove("a/one.json")
        assert await store.look("a/one.json") is None
        assert await store.create("a/one.json", b"again")

    run(work)


def test_times_are_the_store_s_and_go_on(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        await store.write("a/one.json", b"1")
        one = await store.look("a/one.json")
        await store.write("a/two.json", b"2")
        two = await store.look("a/two.json")
        assert one is not None
        assert two is not None
        assert one.modified_ns <= two.modified_ns <= time.time_ns() + 10**9
        assert time.time_ns() - one.modified_ns < 600 * 10**9

    run(work)


def test_only_the_size_of_a_large_object_is_read(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        await store.write("a/large.json", b"x" * 11)
        exact, over = await store.read("a/large.json", 11), await store.read("a/large.json", 10)
        assert exact is not None
        assert over is not None
        assert (exact.body, exact.fault) == (b"x" * 11, None)
        assert (over.body, over.fault, over.too_large) == (b"", "11 bytes; at most 10 are read", True)
        await store.copy("a/large.json", "b/large.json")
        await store.copy("a/nothing.json", "b/nothing.json")
        copied = await store.read("b/large.json", 11)
        assert copied is not None
        assert copied.body == exact.body
        assert await keys(store, "b/") == ["b/large.json"]

    run(work)


def test_a_listing_has_what_lies_below_a_prefix(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        names = [f"a/{number}.json" for number in range(7)] + ["a/7/1.json", "a/7/2.json"]
        for name in [*names, "ab/1.json", "b/1.json"]:
            await store.create(name, b"")
        assert sorted(await keys(store, "a/")) == sorted(names)
        assert await keys(store, "a/7/") == ["a/7/1.json", "a/7/2.json"]
        assert await keys(store, "a/8/") == []
        async for page in store.pages("a/"):
            assert [entry.key for entry in page] == sorted(entry.key for entry in page)
            looked = await store.look(page[0].key)
            assert looked is not None
            assert (looked.size, looked.etag, looked.modified_ns // 10**9) == (page[0].size, page[0].etag, page[0].modified_ns // 10**9)

    run(work)


def test_a_store_is_proved_by_what_it_does(run: Run) -> None:
    async def work(store: ObjectStore) -> None:
        entry = await prove(store, "agents/1.json", (b"first", b"second"))
        assert entry.key == "agents/1.json"
        with pytest.raises(StoreUnreachable, match="could not be created"):  # a 409 looks like this, too: one tries again, with another key
            await prove(store, "agents/1.json", (b"first", b"second"))

    run(work)


class Careless(MemoryStore):
    """A store that does not know of conditions."""

    async def create(self, key: str, body: bytes) -> bool:
        self.put(key, body)
        return True


class Forgetful(MemoryStore):
    """A store that does not show what was written."""

    async def look(self, key: str) -> Entry | None:
        return None


@pytest.mark.parametrize(("store", "why"), [(Careless(), "does not honour create-if-absent"), (Forgetful(), "is not there")])
def test_a_store_that_cannot_be_trusted_is_refused(store: ObjectStore, why: str) -> None:
    with pytest.raises(StoreUnfit, match=why):
        asyncio.run(prove(store, "agents/1.json", (b"first", b"second")))


@pytest.fixture
def directory(tmp_path: Path) -> tuple[ObjectStore, Path]:
    place = tmp_path / "bucket"
    return open_store(f"file://{place}", {}, request_seconds=30), place


def test_a_directory_gives_no_link_and_no_pipe_for_a_document(directory: tuple[ObjectStore, Path], tmp_path: Path) -> None:
    store, place = directory
    (place / "a").mkdir()
    (tmp_path / "secret").write_text("password")
    (place / "a/link.json").symlink_to(tmp_path / "secret")
    (place / "a/gone.json").symlink_to(tmp_path / "nothing")
    (place / "a/directory.json").mkdir()
    os.mkfifo(place / "a/pipe.json")

    async def work() -> None:
        for name in ("a/link.json", "a/gone.json", "a/pipe.json", "a/directory.json"):
            found = await store.read(name, 100)
            assert found is not None
            assert (found.body, found.fault, found.too_large) == (b"", "not a regular file", False)
            assert await store.look(name) == found.entry
        await store.copy("a/link.json", "b/link.json")
        assert await store.look("b/link.json") is None
        await store.remove("a/link.json")
        assert (tmp_path / "secret").read_text() == "password"

    asyncio.run(work())


def test_a_directory_that_cannot_be_written_is_told(directory: tuple[ObjectStore, Path]) -> None:
    store, place = directory
    (place / "a").write_text("in the way")

    async def work() -> None:
        with pytest.raises(StoreError):
            await store.create("a/one.json", b"")

    asyncio.run(work())


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file://relative/path", "not a directory"),
        ("file://", "not a directory"),
        ("ftp://bucket", "no store of this kind"),
        ("s3://", "not s3://BUCKET"),
        ("s3://key:secret@bucket", "not s3://BUCKET"),
        ("s3://bucket?x=1", "not s3://BUCKET"),
        ("file:///proc/1/nothing", "file:///proc/1/nothing"),
    ],
)
def test_urls_that_cannot_be_used(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as told:
        open_store(url, {}, request_seconds=5)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    "value",
    ["foo", "localhost:9000", "http://", "ftp://host", "http://host:port", "http://host:0", "http://user:secret@host", " http://host"],
)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_an_endpoint_that_is_no_url_is_told_by_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: not a URL of an S3 API") as told:
        open_store("bucket", {name: value}, request_seconds=5)
    assert "secret" not in str(told.value)
    open_store("bucket", {name: "https://[::1]:9000/path"}, request_seconds=5)


def test_nobody_at_the_endpoint_is_not_an_answer() -> None:
    with pytest.MonkeyPatch.context() as patch:
        environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalr"}
        for name, value in environment.items():
            patch.setenv(name, value)
        store = open_store("bucket", environment, request_seconds=5)

    async def work() -> None:
        for call in (store.create("a", b""), store.read("a", 1), store.look("a"), store.remove("a"), keys(store, "a/")):
            with pytest.raises(StoreUnreachable) as told:
                await call
            assert "nobody answers there; AWS_ENDPOINT_URL and AWS_REGION" in str(told.value)
            assert "wJalr" not in str(told.value)

    asyncio.run(work())


def test_a_bucket_that_does_not_exist_is_told(s3_server: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        store = open_store("no-such-bucket", s3_server.environment, request_seconds=30)
    with pytest.raises(
        StoreError, match=r"PUT http://\S+/no-such-bucket/a: 404 Not Found: NoSuchBucket: .* \(make the bucket, or name another;"
    ):
        asyncio.run(store.create("a", b""))


def test_missing_credentials_are_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked is a proxy that refuses: the address is one that answers on machines of AWS."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    store = open_store("bucket", {}, request_seconds=5)
    with pytest.raises(StoreUnreachable, match="no AWS credentials: neither AWS_ACCESS_KEY_ID"):
        asyncio.run(store.create("a", b""))
