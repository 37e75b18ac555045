"""How uvicorn speaks HTTP and WebSocket for us: frames go out as they are, refusals are problems, and a request's head has its limits.

Passed to uvicorn as `http` and `ws` of its Config. The application finds the way to its client in the scope's extension `cellos.outlet`,
and a faulty WebSocket handshake in `cellos.handshake`: it shall be answered like any other request, the token first.
"""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.transports import BaseTransport
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from httptools import HttpParserInvalidMethodError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from cellos.core.problem import Problem, problem, problem_of_status
from cellos.server.hub import NOT_UTF8, CloseReason, Frame, text_frame
from cellos.server.replies import CORS
from cellos.server.requests import BODY_CAME

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

OUTLET = "cellos.outlet"
HANDSHAKE = "cellos.handshake"
HEAD_SECONDS = 10.0
MAX_HEAD_BYTES = 32 << 10
CLOSE_SECONDS = 20.0
"""How long a client may take to read what waits for it, and to answer the Close frame behind that."""
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S+ HTTP/1\.[01]\r?\n")


class EventProtocol(WebSocketsSansIOProtocol):
    """A WebSocket that is also an `Outlet`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.close_timeout = CLOSE_SECONDS
        self.conn = _Handshake(extensions=[], max_size=self.config.ws_max_size, logger=self.logger)

    def handle_connect(self, event: Request) -> None:
        """The task of the application does not run before the loop's next turn: the scope can still be added to."""
        super().handle_connect(event)
        extensions = cast("dict[str, Any]", self.scope["extensions"])
        extensions[OUTLET] = self
        extensions[HANDSHAKE] = cast("_Handshake", self.conn).refusal

    def data_received(self, data: bytes) -> None:
        """As the base; a request line that is not ASCII ends the connection without a traceback."""
        try:
            super().data_received(data)
        except UnicodeError:
            self.transport.abort()

    async def send(self, message: ASGISendEvent) -> None:
        """As the base; a handshake that was refused is complete, and nothing that the log has to complain of."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True

    def send_receive_event_to_app(self) -> None:
        """As the base; text that is no UTF-8 ends the connection without a traceback."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.send_close(NOT_UTF8.code)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def write(self, frames: Sequence[Frame], wire: bytes) -> None:
        """Nothing is said about fragments to `conn`: these are whole messages."""
        if not self.closed:
            self.transport.write(wire)

    def say(self, text: bytes) -> None:
        """A message that is no event."""
        if not self.closed:
            self.transport.write(text_frame(text))

    def close(self, why: CloseReason) -> None:
        """A client that does not answer is cut off: it may have stopped reading, and then nothing would ever be flushed."""
        if self.closed:
            return
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": why.code, "reason": why.reason})
        self.conn.send_close(why.code, why.reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.abort)

    @property
    def waiting(self) -> int:
        """What the kernel has not taken yet."""
        return self.transport.get_write_buffer_size()

    @property
    def closed(self) -> bool:
        """Also on our side only."""
        return self.close_sent or self.disconnected or self.transport.is_closing()

    async def drained(self) -> None:
        """By the flow control of uvicorn."""
        await self.writable.wait()


class _Handshake(ServerProtocol):
    """Keeps why a handshake is faulty, instead of the library's answer to it."""

    refusal: Response | None = None

    def accept(self, request: Request) -> Response:
        response = super().accept(request)
        if response.status_code == 101:
            return response
        self.refusal = response
        return Response(101, "", Headers({"Date": ""}))  # never sent: the application refuses


class HeadProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a limit on the time and the size of a request's head, and a problem for what is no HTTP."""

    most_connections = 1 << 20
    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _in_head = False
    _received = b""

    def connection_made(self, transport: BaseTransport) -> None:
        """A client that sends nothing is a client that waits for its first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._start_timer()
        if len(self.connections) > self.most_connections:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Most heads come in one piece: only the rest of one is waited for."""
        self._received = data
        super().data_received(data)
        self._received = b""
        if self._in_head and self._timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._in_head = True
        self._stop_timer()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        cast("dict[str, Any]", self.scope)[BODY_CAME] = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """A problem. Whether the token was right cannot be known."""
        found = self._fault()
        body = found.body()
        line = f"HTTP/1.1 {found.status} {HTTPStatus(found.status).phrase}".encode()
        head = [line, *(b"%s: %s" % header for header in CORS), b"content-type: application/problem+json"]
        self.transport.write(b"\r\n".join([*head, b"content-length: %d" % len(body), b"connection: close", b"", body]))
        self.transport.close()

    def _fault(self) -> Problem:
        """Why the parser gave up, whose error is being handled. It knows methods by a list."""
        if self._head > MAX_HEAD_BYTES:
            return problem_of_status(431, f"the head of the request has more than {MAX_HEAD_BYTES >> 10} KiB")
        if isinstance(sys.exception(), HttpParserInvalidMethodError) and _REQUEST_LINE.match(self._received):
            return problem("method-not-allowed", "no route has this method", status=501)
        return problem("bad-request", "not an HTTP request")

    def _count(self, length: int) -> None:
        self._head += length
        if self._head > MAX_HEAD_BYTES:
            raise ValueError("head of the request too large")  # httptools makes it a parser error

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited_http(most_connections: int) -> type[HeadProtocol]:
    """The protocol for a server that takes so many connections, WebSockets among them; further ones are cut off."""
    return type("LimitedHeadProtocol", (HeadProtocol,), {"most_connections": most_connections})
