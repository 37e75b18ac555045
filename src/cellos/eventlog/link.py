"""A connection that reads from a stream, on asyncio without nats-py, whose parser costs more than a whole replay may.

`open_link` logs in as `connect` does, with the same settings. Whatever goes wrong afterwards ends the link, with the reason in `failure`.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import msgspec
from msgspec import Struct

from cellos.errors import CellosError, LogUnreachable
from cellos.eventlog.connect import CONNECT_SECONDS, Settings, describe, login, tls_context, wants_tls
from cellos.eventlog.nats_url import Server
from cellos.eventlog.stored import Stored
from cellos.eventlog.wire import Control, Wire, WireError

_ANSWERS_SID = b"1"
_CLIENT_VERSION = "1"


class _Info(Struct):
    """The members of INFO that matter to a reader."""

    nonce: str = ""
    tls_required: bool = False
    tls_available: bool = False
    max_payload: int = 1 << 20
    version: str = ""


class Link(asyncio.Protocol):
    """A connection. `on_items` gets what a consumer sends, and every status, in order; it is not called after the end."""

    def __init__(self, on_items: Callable[[list[Stored | Control]], None], on_end: Callable[[], None]) -> None:
        self.failure: str | None = None
        self._resting = False
        self.wire = Wire()
        self.inbox = f"_INBOX.{os.urandom(11).hex()}"
        self.info = _Info()
        self._on_items = on_items
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._tcp: asyncio.Transport | None = None
        """Below TLS, if there is any."""
        self._answers: dict[bytes, asyncio.Future[Control]] = {}
        self._lines: deque[Control] | None = deque()
        """What came while logging in."""
        self._line_came = asyncio.Event()
        self._asked = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol. It may come after our end: whoever waited for it was cancelled in that moment."""
        self._transport = self._tcp = cast("asyncio.Transport", transport)
        if self.failure is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self.fail(describe(error) if error else "the server closed the connection")

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        if self.failure is not None:
            return
        controls = self.wire.controls
        try:
            items = self.wire.feed(data)
        except WireError as error:
            self.fail(error.text)
            return
        if self.wire.controls != controls:
            items = [item for item in items if isinstance(item, Stored) or self._is_for_owner(item)]
        if items and self.failure is None:
            self._on_items(items)

    def send(self, data: bytes) -> None:
        """Queue bytes."""
        if self._transport is not None and self.failure is None:
            self._transport.write(data)

    def rest(self, seconds: float) -> None:
        """Read nothing for so long."""
        if self._transport is not None and self.failure is None and not self._resting:
            self._resting = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._resting = False
        if self._transport is not None and self.failure is None:
            self._transport.resume_reading()

    def publish(self, subject: str, reply: str, payload: bytes) -> None:
        """Queue one message; its answer goes to `reply`, below the inbox."""
        self.send(b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), reply.encode(), len(payload), payload))

    async def request(self, subject: str, body: Any, seconds: float = CONNECT_SECONDS) -> bytes:
        """The answer to one message. Raises LogUnreachable."""
        reply, payload = self.new_reply(), b"" if body is None else msgspec.json.encode(body)
        message = b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), reply, len(payload), payload)
        try:
            found = await self.answer(reply, message, seconds)
        except TimeoutError as error:
            raise LogUnreachable(f"{subject}: no answer in time") from error
        if found.has_no_responders:
            raise LogUnreachable(f"{subject}: nobody answers")
        return found.data

    def new_reply(self) -> bytes:
        """A subject for one answer."""
        self._asked += 1
        return b"%s.r.%d" % (self.inbox.encode(), self._asked)

    async def answer(self, reply: bytes, data: bytes, seconds: float) -> Control:
        """Send bytes; what comes to `reply`. Raises LogUnreachable, TimeoutError."""
        if self.failure is not None:
            raise LogUnreachable(self.failure)
        loop = asyncio.get_running_loop()
        answer = self._answers[reply] = loop.create_future()
        self.send(data)
        timer = loop.call_later(seconds, _give_up, answer)  # asyncio.timeout is twice as much work
        try:
            found: Control = await answer
            return found
        finally:
            timer.cancel()
            del self._answers[reply]

    def close(self) -> None:
        """After what is queued was sent. Idempotent."""
        if self.failure is None and self._transport is not None and self._tcp is not None:
            self._transport.close()
            self._tcp.close()  # TLS would wait for the farewell of a server that may be gone
            self._transport = None
        self.fail("closed")

    def fail(self, why: str) -> None:
        """End it, for this reason. Idempotent."""
        if self.failure is not None:
            return
        self.failure = why
        if self._transport is not None:
            self._transport.abort()
        self._line_came.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(LogUnreachable(why))
        self._on_end()

    async def log_in(self, settings: Settings, server: Server, name: str) -> None:
        """INFO, TLS, CONNECT, PING and PONG. Raises EventLogError, OSError."""
        self.info = msgspec.json.decode((await self._next(b"INFO")).text, type=_Info)
        if wants_tls(settings, server) or self.info.tls_required:
            await self._secure(settings, server)
        options = {
            "verbose": False,
            "pedantic": False,
            "headers": True,
            "no_responders": True,
            "echo": False,
            "protocol": 1,
            "lang": "python",
            "name": name,
            "version": _CLIENT_VERSION,
        } | login(settings, server, self.info.nonce)
        hello = (b"CONNECT " + msgspec.json.encode(options), b"SUB %s.> %s" % (self.inbox.encode(), _ANSWERS_SID), b"PING", b"")
        self.send(b"\r\n".join(hello))
        await self._next(b"PONG")
        self._lines = None

    async def _secure(self, settings: Settings, server: Server) -> None:
        if not (self.info.tls_required or self.info.tls_available):
            raise LogUnreachable("the server offers no TLS")
        if self.wire.buffered or self._transport is None:  # it came in the clear, so anybody may have sent it
            raise LogUnreachable("more than INFO came before TLS began")
        context = tls_context(settings)
        loop = asyncio.get_running_loop()
        self._transport = await loop.start_tls(self._transport, self, context, server_hostname=server.host)

    async def _next(self, verb: bytes) -> Control:
        while not self._lines:
            if self.failure is not None:
                raise LogUnreachable(self.failure)
            self._line_came.clear()
            await self._line_came.wait()
        found = self._lines.popleft()
        if found.verb != verb:
            raise LogUnreachable(f"unexpected {found.verb[:20]!r}; is this a NATS server?")
        return found

    def _is_for_owner(self, item: Control) -> bool:
        """Take what is ours."""
        if item.verb == b"MSG":
            answer = self._answers.get(item.text)
            if answer is None:
                return True
            if not answer.done():
                answer.set_result(item)
        elif item.verb == b"PING":
            self.send(b"PONG\r\n")
        elif item.verb == b"-ERR":
            self.fail(f"the server says: {_text(item.text)}")
        elif self._lines is not None:
            self._lines.append(item)
            self._line_came.set()
        elif item.verb not in {b"INFO", b"PONG", b"+OK"}:
            self.fail(f"unexpected {item.verb[:20]!r}; is this a NATS server?")
        return False


async def open_link(
    settings: Settings, server: Server, *, name: str, on_items: Callable[[list[Stored | Control]], None], on_end: Callable[[], None]
) -> Link:
    """A link to one server that let us in. Raises LogUnreachable."""
    loop = asyncio.get_running_loop()
    link = Link(on_items, on_end)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await loop.create_connection(lambda: link, server.host, server.port)
            await link.log_in(settings, server, name)
    except BaseException as error:
        link.close()
        if isinstance(error, OSError | TimeoutError | CellosError | msgspec.DecodeError):
            why = error.text if isinstance(error, CellosError) else describe(error)
            raise LogUnreachable(f"{server.shown}: {why}") from error
        raise
    return link


def _give_up(answer: asyncio.Future[Control]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def _text(line: bytes) -> str:
    """Of -ERR."""
    return line.strip().strip(b"'").decode("utf-8", "replace")
