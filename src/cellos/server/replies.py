"""Answers: whole bodies with their headers, as ASGI applications, for requests and for WebSocket handshakes that are refused.

Every answer of the server is made here, so every one has the CORS headers: a page may read, and with no other method than GET.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from http import HTTPStatus

from starlette.types import Receive, Scope, Send

from cellos.core.problem import Problem, problem_of_status
from cellos.errors import CellosError

Header = tuple[bytes, bytes]

CORS: tuple[Header, ...] = (
    (b"access-control-allow-origin", b"*"),
    (b"vary", b"origin, access-control-request-method, access-control-request-headers"),
)
_JSON: Header = (b"content-type", b"application/json")
_PROBLEM: Header = (b"content-type", b"application/problem+json")
_PREFLIGHT: tuple[Header, ...] = (
    (b"access-control-allow-methods", b"GET,OPTIONS"),
    (b"access-control-allow-headers", b"authorization,content-type"),
)


class Refused(CellosError):
    """A request is answered with a problem. `headers` go with it."""

    code = "refused"

    def __init__(self, problem: Problem, *, headers: Sequence[Header] = ()) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.headers = tuple(headers)


class Reply:
    """One whole answer. A HEAD request gets the headers of its GET."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, body: bytes, *, status: int = 200, headers: Sequence[Header] = ()) -> None:
        self.body = body
        self.status = status
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        body = self.body
        headers = [*CORS, *self.headers]
        if self.status not in {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}:
            headers.append((b"content-length", b"%d" % len(body)))
        kind = "http.response"
        if scope["type"] == "websocket":
            kind = "websocket.http.response"
        elif scope["method"] == "HEAD":
            body = b""
        await send({"type": f"{kind}.start", "status": self.status, "headers": headers})
        await send({"type": f"{kind}.body", "body": body})


class StreamedReply(Reply):
    """A body that is made while it is sent; its end is the end of `parts`, or the client's patience."""

    __slots__ = ("_parts",)

    def __init__(self, parts: AsyncGenerator[bytes], *, headers: Sequence[Header] = ()) -> None:
        super().__init__(b"", headers=headers)
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        await send({"type": "http.response.start", "status": self.status, "headers": [*CORS, *self.headers]})
        if scope["method"] != "HEAD":
            gone = asyncio.create_task(_gone(receive))
            try:
                await self._send(send, gone)
            finally:
                gone.cancel()
        await self._parts.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, gone: asyncio.Task[None]) -> None:
        while True:
            following = asyncio.ensure_future(anext(self._parts, None))
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.wait({following})
                return
            part = following.result()
            if part is None:
                return
            await send({"type": "http.response.body", "body": part, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_reply(body: bytes, *, status: int = 200, headers: Sequence[Header] = ()) -> Reply:
    """A body that is JSON already."""
    return Reply(body, status=status, headers=(_JSON, *headers))


def entity_tag(body: bytes) -> bytes:
    """That of a record, whose bytes these are."""
    return b'"%s"' % hashlib.blake2b(body, digest_size=12).hexdigest().encode()


def require_match(condition: bytes | None, record: bytes) -> None:
    """RFC 9110, 13.1.1: a list of tags or `*`, compared strongly; None where a request has no condition. Raises Refused: 412."""
    if condition is not None and not {each.strip() for each in condition.split(b",")} & {entity_tag(record), b"*"}:
        raise Refused(problem_of_status(412, "If-Match does not hold the ETag of the record as it is now; nothing was done"))


def tagged_reply(body: bytes, scope: Scope, etag: bytes | None = None, *, headers: Sequence[Header] = ()) -> Reply:
    """The same with an entity tag: `etag`, or that of the bytes. A request that has these bytes already gets 304 and none of them."""
    tag = etag or entity_tag(body)
    headers = ((b"etag", tag), *headers)
    for name, value in scope["headers"]:
        if name == b"if-none-match" and _names(value, tag):
            return Reply(b"", status=304, headers=headers)
    return json_reply(body, headers=headers)


def _names(condition: bytes, tag: bytes) -> bool:
    """RFC 9110, 13.1.2: a list of tags or `*`, compared weakly."""
    return any(each.strip().removeprefix(b"W/") in {tag, b"*"} for each in condition.split(b","))


def problem_reply(problem: Problem, *, headers: Sequence[Header] = ()) -> Reply:
    """A problem document (RFC 9457)."""
    return Reply(problem.body(), status=problem.status, headers=(_PROBLEM, *headers))


def no_content() -> Reply:
    """Done, and there is nothing to say."""
    return Reply(b"", status=204)


def preflight() -> Reply:
    """What a browser asks before it asks: GET is allowed, POST and DELETE are not."""
    return Reply(b"", headers=_PREFLIGHT)
