"""A real NATS server with the stream of events, a connection to it, and lines to it that lose things."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cellos.eventlog.connect import LogClient, Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.stream import ensure_stream

SECONDS = 60.0
"""After which a test gives up."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    client: LogClient
    log: EventLog

    async def write(self, count: int, *, begin: int = 0, subject: str = "cellos.events.cells", payload: bytes = b"{}") -> None:
        """So many events, all acknowledged; their ids are e0, e1, …"""
        for number in range(begin, begin + count):
            await self.log.publish(f"{subject}.{number}", payload, message_id=f"e{number}")


@contextlib.asynccontextmanager
async def opened(url_or_settings: str | Settings, **stream: Any) -> AsyncIterator[Opened]:
    settings = Settings(url=url_or_settings) if isinstance(url_or_settings, str) else url_or_settings
    client = await connect(settings, name="test")
    try:
        await ensure_stream(client, **({"max_bytes": 64 << 20} | stream))
        yield Opened(client=client, log=EventLog(client))
    finally:
        await client.close()


@pytest.fixture
def open_log() -> Callable[..., contextlib.AbstractAsyncContextManager[Opened]]:
    """A connection, and the stream made."""
    return opened


@pytest.fixture
def run() -> Callable[[Awaitable[None]], None]:
    """Runs a test's coroutine, for a bounded time."""

    def go(test: Awaitable[None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SECONDS):
                await test

        asyncio.run(bounded())

    return go


@pytest.fixture
def until() -> Callable[..., Awaitable[Any]]:
    """Asks again until the answer is true, or no error is raised."""

    async def ask(question: Callable[[], Awaitable[Any]], *errors: type[Exception]) -> Any:
        while True:
            with contextlib.suppress(*errors):
                if answer := await question():
                    return answer
            await asyncio.sleep(0.01)

    return ask


class Line:
    """A TCP relay to a server. What comes from it goes through `answers`: bytes to pass on, or None, which cuts the line."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: Callable[[bytes], bytes | None] = lambda data: data
        self.connections = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Line:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        current = asyncio.current_task()
        assert current is not None
        self._tasks.add(current)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there = await asyncio.open_connection("127.0.0.1", self.port)
            forth = asyncio.create_task(self._relay(reader, there[1], lambda data: data))
            back = asyncio.create_task(self._relay(there[0], writer, self._answer))
            try:
                await asyncio.wait({forth, back}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (forth, back):
                    task.cancel()
                await asyncio.gather(forth, back, return_exceptions=True)
                there[1].transport.abort()
                writer.transport.abort()
        self._tasks.discard(current)

    def _answer(self, data: bytes) -> bytes | None:
        return self.answers(data)

    @staticmethod
    async def _relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter, change: Callable[[bytes], bytes | None]) -> None:
        while data := await source.read(1 << 16):
            passed = change(data)
            if passed is None:
                return
            sink.write(passed)
            await sink.drain()


@pytest.fixture
def line() -> Callable[[int], Line]:
    return Line
