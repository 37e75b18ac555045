"""Servers are killed, stopped, paused and wiped while others write and read: what was acknowledged is there, once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellos.errors import EventLogError, LogUnreachable, NoStream, OutcomeUnknown, Rebuild, WrongSequence
from cellos.eventlog.connect import LogClient, Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.reader import Reader
from cellos.eventlog.stored import Stored
from cellos.eventlog.stream import ensure_stream
from cellos.testing.nats_server import NatsServer

SECONDS = 120.0
WRITERS = 4
MAX_BYTES = 64 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(str(tmp_path / "nats")) as started:
        yield started


class Writer:
    """Writes a run's events, each behind the one before, and goes on until each is settled, whatever happens."""

    def __init__(self, client: LogClient, number: int) -> None:
        self.subject = f"cellos.events.runs.f.m{number}.1"
        self.acknowledged: list[str] = []
        self._log = EventLog(client)
        self._last = 0

    async def write(self, count: int) -> None:
        for number in range(count):
            message_id = f"{self.subject}-{number}"
            self._last = await self._settled(message_id)
            self.acknowledged.append(message_id)

    async def _settled(self, message_id: str) -> int:
        while True:
            with contextlib.suppress(LogUnreachable, NoStream):
                try:
                    ack = await self._log.publish(self.subject, b"{}", message_id=message_id, expected_last=self._last, timeout=1)
                    return ack.sequence
                except (OutcomeUnknown, WrongSequence):
                    settled = await self._log.settle(self.subject, message_id)
                    if settled is not None:
                        return settled.sequence
            await asyncio.sleep(0.01)


async def until(is_so: Callable[[], bool]) -> None:
    while True:
        if is_so():
            return
        await asyncio.sleep(0.001)


async def read_all(client: LogClient, count: int) -> list[Stored]:
    found: list[Stored] = []
    async with Reader(client) as reader:
        while len(found) < count:
            found += await reader.read()
    return found


def bounded(test: Callable[[], object]) -> None:
    async def go() -> None:
        async with asyncio.timeout(SECONDS):
            await test()  # type: ignore[misc]

    asyncio.run(go())


@pytest.mark.parametrize("end", ["kill", "stop", "pause"])
def test_nothing_acknowledged_is_missing_and_nothing_is_there_twice(server: NatsServer, end: str) -> None:
    """Each write is guarded, so an event written twice would show as one too many; settling finds those whose answer was lost."""
    each = 60

    async def test() -> None:
        clients = [await connect(Settings(url=server.url), name=f"writer-{number}") for number in range(2)]
        await ensure_stream(clients[0], max_bytes=MAX_BYTES)
        writers = [Writer(clients[number % 2], number) for number in range(WRITERS)]
        live = asyncio.create_task(read_all(clients[0], WRITERS * each))
        writing = [asyncio.create_task(writer.write(each)) for writer in writers]
        for share in (0.1, 0.3, 0.5, 0.8):
            await until(lambda: sum(len(writer.acknowledged) for writer in writers) >= share * WRITERS * each)  # noqa: B023
            if end == "pause":
                server.pause()
                await asyncio.sleep(random.Random(share).uniform(0.2, 1.2))  # around the time-out of the writes
                server.go_on()
            else:
                getattr(server, end)()
                server.start()
        await asyncio.gather(*writing)
        found = await live
        anew = await read_all(clients[1], WRITERS * each)
        assert found == anew
        assert [stored.sequence for stored in found] == list(range(1, WRITERS * each + 1))
        for writer in writers:
            assert [stored.message_id for stored in found if stored.subject == writer.subject] == writer.acknowledged
        for client in clients:
            await client.close()

    bounded(test)


def test_a_wiped_server_begins_anew_for_its_readers(server: NatsServer) -> None:
    async def test() -> None:
        client = await connect(Settings(url=server.url), name="test")
        await ensure_stream(client, max_bytes=MAX_BYTES)
        log = EventLog(client)

        async def write(prefix: str, count: int) -> None:
            for number in range(count):
                await log.publish("cellos.events.x", b"{}", message_id=f"{prefix}{number}")

        await write("before", 20)
        rebuilds: list[str] = []
        found: list[str | None] = []

        async def follow() -> None:
            while True:
                reader = Reader(client, on_missing=lambda: ensure_stream(client, max_bytes=MAX_BYTES))
                found.clear()
                async with reader:
                    try:
                        while found[-1:] != ["after24"]:
                            found.extend(stored.message_id for stored in await reader.read())
                    except Rebuild as error:
                        rebuilds.append(error.reason)
                    else:
                        return

        following = asyncio.create_task(follow())
        await until(lambda: len(found) == 20)
        server.kill()
        shutil.rmtree(f"{server.directory}/store")
        server.start()
        while True:
            with contextlib.suppress(EventLogError):
                await write("after", 25)
                break
            await asyncio.sleep(0.01)
        await following
        assert rebuilds == ["recreated"]
        assert found == [f"after{number}" for number in range(25)]
        await client.close()

    bounded(test)


OWNER = """
import asyncio, sys
from cellos.eventlog.embedded import EmbeddedNats

async def main():
    async with EmbeddedNats(sys.argv[1], port=int(sys.argv[2])) as nats:
        print(nats.url_with_credentials, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_owners_of_an_embedded_server_are_killed_one_after_the_other(tmp_path: Path) -> None:
    def start(port: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "nats"), port], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        return process, process.stdout.readline().strip()

    def end(process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout
        process.stdout.close()

    async def test() -> None:
        process, url = start("-1")
        try:
            client = await connect(Settings(url=url), name="test")
            await ensure_stream(client, max_bytes=MAX_BYTES)
            writer = Writer(client, 1)
            writing = asyncio.create_task(writer.write(90))
            for count in (20, 50):
                await until(lambda: len(writer.acknowledged) >= count)  # noqa: B023
                end(process)
                process, again = start(url.rpartition(":")[2])
                assert again == url
            await writing
            assert [stored.message_id for stored in await read_all(client, 90)] == writer.acknowledged
            await client.close()
        finally:
            end(process)

    bounded(test)
