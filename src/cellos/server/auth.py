"""The gate before everything else: who shows the token comes in. Nothing of a request is looked at before, not even its path.

Two tokens at most: one for everything, and one, if configured, that may only read.
"""

from __future__ import annotations

import hashlib
import hmac
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from cellos.core.problem import problem, problem_of_status
from cellos.server.replies import preflight, problem_reply

READING = frozenset({"GET", "HEAD"})
_SCHEME = b"Bearer "
_VISIBLE = re.compile(rb"[\t\x20-\x7e]*").fullmatch
_CHALLENGE = ((b"www-authenticate", b'Bearer realm="cellos"'),)


class Tokens:
    """What opens the gate. Digests are kept and compared: that takes the same time whatever is shown."""

    def __init__(self, token: str, *, read_only: str | None = None) -> None:
        if not token.strip() or (read_only is not None and not read_only.strip()):
            raise ValueError("a token must not be empty")
        self._all = _digest(token.encode())
        self._reading = _digest(read_only.encode()) if read_only is not None else None

    def fault(self, header: bytes | None) -> str | None:
        """Why a value of the Authorization header opens nothing; None where it opens something."""
        if header is None:
            return "missing Authorization header"
        if _VISIBLE(header) is None:
            return "non-ascii Authorization header"
        if not header.startswith(_SCHEME):
            return "expected Bearer scheme"
        shown = _digest(header[len(_SCHEME) :])
        may_all = hmac.compare_digest(shown, self._all)
        may_read = self._reading is not None and hmac.compare_digest(shown, self._reading)
        return None if may_all or may_read else "invalid token"

    def may_write(self, header: bytes | None) -> bool:
        """Whether a value that opens the gate may also change something."""
        return header is not None and hmac.compare_digest(_digest(header[len(_SCHEME) :]), self._all)

    def __repr__(self) -> str:
        return "Tokens()"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class Gate:
    """ASGI middleware. OPTIONS passes for everybody and is answered here: a browser sends no token with it."""

    def __init__(self, app: ASGIApp, *, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        method = scope.get("method", "GET")  # a WebSocket begins as a GET
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if method == "OPTIONS":
            return await preflight()(scope, receive, send)
        header = _authorization(scope)
        fault = self._tokens.fault(header)
        if fault is not None:
            return await problem_reply(problem("unauthorized", fault), headers=_CHALLENGE)(scope, receive, send)
        if method not in READING and not self._tokens.may_write(header):
            return await problem_reply(problem_of_status(403, "this token may only read"))(scope, receive, send)
        return await self._app(scope, receive, send)


def _authorization(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            found: bytes = value
            return found
    return None
