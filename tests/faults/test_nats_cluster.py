"""A cluster of three NATS servers loses one, then two: nothing acknowledged is lost or there twice, and all goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest

from cellos.core.formation.runs import Attempt, work_subject
from cellos.errors import EventLogError
from cellos.eventlog.api import STREAM, ask
from cellos.eventlog.connect import LogClient, Settings, connect
from cellos.eventlog.leases import ensure_leases
from cellos.eventlog.log import EventLog
from cellos.eventlog.output import ensure_output
from cellos.eventlog.reader import Reader
from cellos.eventlog.run_log import RunPublisher
from cellos.eventlog.stream import ensure_stream
from cellos.eventlog.work import WorkQueue
from cellos.testing.nats_cluster import NatsCluster, leader_of
from cellos.testing.server_process import TOKEN, ServerProcess

SECONDS = 90.0
"""An election takes four to nine of them, and there may be two."""
MAX_BYTES = 64 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    with NatsCluster(str(tmp_path_factory.mktemp("cluster"))) as started:
        yield started


@pytest.fixture(scope="module")
def server(cluster: NatsCluster) -> Iterator[ServerProcess]:
    with ServerProcess(cluster.url, CELLOS_NATS_STREAM_REPLICAS="3") as started:
        yield started


@contextlib.asynccontextmanager
async def opened(cluster: NatsCluster) -> AsyncIterator[LogClient]:
    """A connection, and every stream that we make."""
    client = await connect(Settings(url=cluster.url), name="test")
    try:
        await answered(lambda: ensure_stream(client, replicas=3, max_bytes=MAX_BYTES))
        for ensure in (ensure_leases, ensure_output):
            await answered(lambda: ensure(client, replicas=3))  # noqa: B023  # called at once
        yield client
    finally:
        await client.close()


def bounded(test: Callable[[], Any]) -> None:
    async def go() -> None:
        async with asyncio.timeout(SECONDS):
            await test()

    asyncio.run(go())


async def answered(question: Callable[[], Any]) -> Any:
    """Asked again for as long as there is no leader who could answer."""
    while True:
        with contextlib.suppress(EventLogError):
            return await question()
        await asyncio.sleep(0.05)


async def replicas(client: LogClient, stream: str) -> list[bool]:
    """Whether each replica beside the leader has everything."""
    info = json.loads(await ask(client, f"STREAM.INFO.{stream}"))
    assert info["config"]["num_replicas"] == 3
    return [each["current"] and not each.get("offline", False) for each in info["cluster"]["replicas"]]


async def complete(client: LogClient) -> None:
    """Until every member has the whole log."""
    while True:
        if await answered(lambda: replicas(client, STREAM)) == [True, True]:
            return
        await asyncio.sleep(0.05)


class Poster(threading.Thread):
    """Posts documents one after the other, each with its key until it is acknowledged."""

    def __init__(self, server: ServerProcess, number: int, count: int, progress: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.acknowledged: dict[str, str] = {}
        self.refused = 0
        self._names = [f"p{number}.{each}" for each in range(count)]
        self._server = server
        self._progress = progress

    def run(self) -> None:
        with httpx2.Client(timeout=SECONDS, trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            for name in self._names:
                document = {"name": name, "coordinator": "a", "members": [{"id": "a"}]}
                while name not in self.acknowledged:
                    answer = client.post(f"{self._server.url}/v1/formations", json=document, headers={"Idempotency-Key": name})
                    assert answer.status_code in {201, 503}, answer.text
                    if answer.status_code == 201:
                        self.acknowledged[name] = answer.json()["id"]
                    else:
                        self.refused += 1
                self._progress.release()


def formations(server: ServerProcess) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx2.get(f"{server.url}/v1/formations", headers=headers, timeout=SECONDS, trust_env=False)
    assert answer.status_code == 200
    return {each["name"]: each["id"] for each in answer.json()["formations"]}


async def ids(reader: Reader, last: str) -> list[str | None]:
    """Of everything from the beginning to the message of this id."""
    found: list[str | None] = []
    while last not in found:
        found += [stored.message_id for stored in await reader.read()]
    return found


async def take(client: LogClient, count: int) -> list[str]:
    """The subjects of so much work, in the order in which it came."""
    found: list[str] = []
    async with WorkQueue(client, "default", ["base"]) as queue:
        while len(found) < count:
            for item in await queue.take(count, 1.0):
                await item.ack()
                if item.subject not in found:  # it may come again where the ack was lost
                    found.append(item.subject)
    return found


def test_the_leader_dies_while_others_write_and_read(cluster: NatsCluster, server: ServerProcess) -> None:
    each = 30

    async def test() -> None:
        async with opened(cluster) as client, Reader(client) as reader:
            for stream in (STREAM, "CELLOS_OUTPUT", "KV_CELLOS_LEASES"):
                assert await answered(lambda: replicas(client, stream)) is not None  # noqa: B023
            log = EventLog(client)
            live = asyncio.create_task(ids(reader, "last"))
            run = RunPublisher(log, "cellos.events.runs.f.m.1", last_sequence=0)
            work = [RunPublisher(log, work_subject("default", "base", Attempt("f", "m", number)), last_sequence=0) for number in (1, 2)]
            taken = asyncio.create_task(take(client, 2))
            work[0].add("work1", b"{}")
            await work[0].drained()
            progress = threading.Semaphore(0)
            posters = [Poster(server, number, each, progress) for number in range(2)]
            for poster in posters:
                poster.start()
            for number in range(50):
                run.add(f"run{number}", b"{}")
            for _ in range(each):
                assert await asyncio.to_thread(progress.acquire, timeout=SECONDS)
            dead = cluster.members[await leader_of(client)]
            dead.kill()
            for number in range(50, 100):
                run.add(f"run{number}", b"{}")
            work[1].add("work2", b"{}")
            await run.drained()
            assert await taken == [publisher.subject for publisher in work]
            for poster in posters:
                await asyncio.to_thread(poster.join, SECONDS)
                assert not poster.is_alive()
            dead.start()
            await log.publish("cellos.events.last", b"{}", message_id="last")
            seen = await live
            assert [each for each in seen if each is not None and each.startswith("run")] == [f"run{number}" for number in range(100)]
            assert len(set(seen)) == len(seen)
            acknowledged = posters[0].acknowledged | posters[1].acknowledged
            assert formations(server) == acknowledged
            await complete(client)
            with ServerProcess(dead.url) as other:  # which asks the member that was dead
                assert formations(other) == acknowledged

    bounded(test)


def test_without_two_of_three_nothing_is_acknowledged_and_everything_can_be_read(cluster: NatsCluster, server: ServerProcess) -> None:
    async def test() -> None:
        async with opened(cluster) as client:
            log = EventLog(client)
            await complete(client)
            only = await connect(Settings(url=cluster.members["n1"].url), name="test")
            assert [each.netloc for each in only.servers] == [cluster.members["n1"].address]  # of those that the cluster announces, none
            await only.close()
            before = formations(server)
            assert before
            dead = list(cluster.members.values())[:2]
            for member in dead:
                member.kill()
            with pytest.raises(EventLogError):
                await log.publish("cellos.events.alone", b"{}", message_id="alone", expected_last=0, timeout=1)
            assert formations(server) == before
            for member in dead:
                member.start()
            run = RunPublisher(log, "cellos.events.alone", last_sequence=0)  # settles what may have been written after all
            run.add("alone", b"{}")
            await run.drained()
            last = await answered(lambda: log.last("cellos.events.alone"))  # the leader says that
            assert (last.sequence, last.message_id) == (run.last_sequence, "alone")
            await complete(client)  # a page may come from any member, and from one that has just come back without the end
            while not (found := await answered(lambda: log.read(0, 9, subject="cellos.events.alone"))):  # noqa: ASYNC110  # others say when
                await asyncio.sleep(0.05)
            assert [stored.message_id for stored in found] == ["alone"]

    bounded(test)
