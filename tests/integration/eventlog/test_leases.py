"""Leases on a real server: compare-and-set, deletion, who is there, and what a watcher is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import pytest

from cellos.errors import LogUnreachable, NoStream, WrongSequence
from cellos.eventlog import leases as module
from cellos.eventlog.api import ask
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.leases import ControllerLease, Lease, Leases, NodeLease, ensure_leases, read_controller, read_node
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]
NODE = NodeLease(
    node="n",
    life="l",
    host="h",
    pid=1,
    pool="default",
    classes=("base", "limits"),
    slots=2,
    slots_free=1,
    memory_bytes=1 << 30,
    memory_free=1 << 29,
    cpu_micros=2_000_000,
    cpu_free=1_000_000,
    lease_ms=15_000,
    started_at="2026-01-01T00:00:00Z",
)


async def told(watcher: AsyncIterator[Mapping[str, Lease]], wanted: dict[str, bytes]) -> None:
    """Until the watcher is told exactly these keys and values."""
    async for now in watcher:
        if {key: lease.value for key, lease in now.items()} == wanted:
            return


def test_a_key_is_made_renewed_and_removed_by_whoever_knows_its_revision(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            leases = Leases(opened.client)
            first = await leases.put("nodes.a", b"1", 0)  # the bucket is made on the way
            with pytest.raises(WrongSequence):
                await leases.put("nodes.a", b"x", 0)
            second = await leases.put("nodes.a", b"2", first)
            with pytest.raises(WrongSequence):
                await leases.delete("nodes.a", first)
            (entry,) = await leases.entries()
            assert (entry.key, entry.value, entry.revision) == ("nodes.a", b"2", second)
            await leases.delete("nodes.a", second)
            assert await leases.entries() == []
            with pytest.raises(WrongSequence):
                await leases.put("nodes.a", b"3", second)  # who was declared dead does not come back
            await leases.put("controllers.c", b"", None)
            await leases.put("controllers.c", b"again", None)
            assert [lease.value for lease in await leases.entries("controllers.")] == [b"again"]
            assert await leases.entries("nodes.") == []

    run(test())


def test_of_a_renewal_and_a_deletion_at_once_one_wins(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as one, open_log(server.url) as other:
            node, controller = Leases(one.client), Leases(other.client)
            for number in range(20):
                key = f"nodes.{number}"
                seen = await node.put(key, b"1", 0)
                answers = await asyncio.gather(node.put(key, b"2", seen), controller.delete(key, seen), return_exceptions=True)
                assert sum(isinstance(answer, WrongSequence) for answer in answers) == 1
                is_there = [lease.key for lease in await node.entries(key)] != [] or key in [lease.key for lease in await node.entries()]
                assert is_there == isinstance(answers[1], WrongSequence)

    run(test())


def test_a_watcher_is_told_of_every_key_and_of_its_end(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, open_log(server.url) as other:
            leases, watched = Leases(opened.client), Leases(other.client).watch()
            a = await leases.put("nodes.a", b"1", 0)
            await told(watched, {"nodes.a": b"1"})
            b = await leases.put("nodes.b", b"1", 0)
            a = await leases.put("nodes.a", b"2", a)
            await told(watched, {"nodes.a": b"2", "nodes.b": b"1"})
            await leases.delete("nodes.b", b)
            await told(watched, {"nodes.a": b"2"})
            await ask(opened.client, f"STREAM.DELETE.{module.STREAM}")
            await told(watched, {})
            await leases.put("nodes.c", b"1", 0)
            await told(watched, {"nodes.c": b"1"})
            await watched.aclose()

    run(test())


def test_a_watcher_survives_the_server(server: NatsServer, open_log: Open, run: Run, until: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, open_log(server.url) as other:
            leases, watched = Leases(opened.client), Leases(other.client).watch()
            seen = await leases.put("nodes.a", b"1", 0)
            await told(watched, {"nodes.a": b"1"})
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            await until(lambda: leases.put("nodes.a", b"2", seen), Exception)
            await told(watched, {"nodes.a": b"2"})
            await watched.aclose()

    run(test())


def test_the_bucket_is_one_for_other_clients_of_nats_too(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await ensure_leases(opened.client)
            await ensure_leases(opened.client)
            theirs = await opened.client.jetstream().key_value(module.BUCKET)
            leases = Leases(opened.client)
            revision = await leases.put("nodes.a", b"1", 0)
            entry = await theirs.get("nodes.a")
            assert (entry.value, entry.revision) == (b"1", revision)
            await theirs.delete("nodes.a")
            assert await leases.entries() == []
            await theirs.put("nodes.a", b"2")
            assert [lease.value for lease in await leases.entries()] == [b"2"]
            await leases.delete("nodes.a", None)
            assert await theirs.history("nodes.a")  # the marker
            with pytest.raises(Exception, match="key not found"):
                await theirs.get("nodes.a")

    run(test())


def test_markers_of_deleted_keys_go_by_themselves(
    server: NatsServer, open_log: Open, run: Run, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MARKER_SECONDS", 1)

    async def test() -> None:
        async with open_log(server.url) as opened:
            leases = Leases(opened.client)
            await leases.delete("nodes.a", await leases.put("nodes.a", b"1", 0))
            await until(empty)

    async def empty() -> bool:
        async with open_log(server.url) as opened:
            return bool(msgspec.json.decode(await ask(opened.client, f"STREAM.INFO.{module.STREAM}"))["state"]["messages"] == 0)

    run(test())


def test_another_stream_of_that_name_is_refused(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await ask(opened.client, f"STREAM.CREATE.{module.STREAM}", {"name": module.STREAM, "subjects": ["$KV.CELLOS_LEASES.>"]})
            with pytest.raises(NoStream, match="max_msgs_per_subject is -1, not 1"):
                await ensure_leases(opened.client)

    run(test())


def test_what_a_lease_says_is_read_back() -> None:
    lease = Lease("nodes.l", msgspec.json.encode(NODE), 1, 0)
    assert read_node(lease) == NODE
    assert b'"slotsFree":1' in lease.value
    assert read_controller(lease) is None
    controller = ControllerLease(controller="c", host="h", pid=1, lease_ms=1, started_at="t")
    assert read_controller(Lease("controllers.c", msgspec.json.encode(controller), 1, 0)) == controller
    assert read_node(Lease("nodes.l", b"{}", 1, 0)) is None


def test_nobody_who_could_tell_is_not_nobody_alive(make_server: Callable[..., NatsServer], run: Run) -> None:
    """A server of a cluster that has just started, or one without JetStream, does not answer: no node is declared dead for that."""

    async def test() -> None:
        for options in ({}, {"jetstream": False}):
            client = await connect(Settings(url=make_server(**options).url), name="test")
            leases = Leases(client)
            if options:
                with pytest.raises(NoStream, match="nobody answers"):
                    await leases.entries()
            else:
                assert await leases.entries() == []  # here somebody says that there is no bucket
                config = module.bucket_config() | {"allow_direct": False}
                await ask(client, f"STREAM.CREATE.{module.STREAM}", config)
                with pytest.raises(LogUnreachable, match="has the stream allow_direct"):
                    await leases.entries()
            await client.close()

    run(test())
