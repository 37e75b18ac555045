"""What handlers take from a request: its body, within a size and a time, an id in the path, a header."""

from __future__ import annotations

import asyncio
import re

from starlette.types import Receive, Scope

from cellos.core.problem import problem, problem_of_status
from cellos.server.replies import Header, Refused

BODY_SECONDS = 30.0
BODY_CAME = "cellos.body_came"
"""In the scope of a request whose body is all there: nothing has to be waited for."""
_CLOSE: tuple[Header, ...] = ((b"connection", b"close"),)  # the rest of the body is not worth reading
_HEX = "[0-9a-fA-F]"
_HYPHENATED = f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}"
_UUID = re.compile(rf"(?:{_HEX}{{32}}|{_HYPHENATED}|\{{{_HYPHENATED}\}}|urn:uuid:{_HYPHENATED})")


class Gone(Exception):  # no error: nobody waits for the answer any more
    """The client closed the connection before its request was complete."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises Refused (larger than `limit` bytes, or too slow), Gone."""
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > limit:
        raise _too_large()
    if BODY_CAME in scope:
        return await _read(receive, limit)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read(receive, limit)
    except TimeoutError:
        text = f"the request body did not arrive within {BODY_SECONDS:g} s"
        raise Refused(problem_of_status(408, text), headers=_CLOSE) from None


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large()
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large() -> Refused:
    return Refused(problem("payload-too-large", "Failed to buffer the request body: length limit exceeded"), headers=_CLOSE)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name (lower case)."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def if_match(scope: Scope) -> bytes | None:
    """The condition of a request, all its headers as one list; None where it has none."""
    given = [value for key, value in scope["headers"] if key == b"if-match"]
    return b",".join(given) if given else None


def path_uuid(scope: Scope) -> str:
    """The id in the path, as records have it: lower case, with hyphens. Raises Refused."""
    text: str = scope["path_params"]["id"]
    if _UUID.fullmatch(text) is None:
        shown = text[:80].encode("unicode_escape").decode()
        raise Refused(problem("bad-request", f"Invalid URL: UUID parsing failed: {shown!r} is not a UUID"))
    digits = re.sub("[^0-9a-f]", "", text.lower().removeprefix("urn:uuid:"))
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
