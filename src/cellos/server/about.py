"""GET /v1/version, and the plain HTTP request to a path that wants a WebSocket."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope

from cellos import __version__
from cellos.core.problem import problem, problem_of_status
from cellos.server.query import read_query, unsigned
from cellos.server.replies import Refused, Reply, json_reply
from cellos.server.requests import header
from cellos.server.state import ServerState

API_VERSION = "v1"
BUILD_PROFILE = "release"


async def get_version(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """Who answers. `gitSha` is absent where nobody said it."""
    server = {"version": __version__, "buildProfile": BUILD_PROFILE}
    if state.git_sha is not None:
        server = {"version": __version__, "gitSha": state.git_sha, "buildProfile": BUILD_PROFILE}
    return json_reply(msgspec.json.encode({"server": server, "api": {"version": API_VERSION}}))


async def no_upgrade(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """Raises Refused: 426 where the connection could never become a WebSocket, else 400 with what is missing."""
    unsigned(read_query(scope["query_string"], ("subject", "since")), "since")
    if scope.get("http_version") == "1.0":
        raise Refused(problem_of_status(426, "WebSockets need HTTP/1.1"), headers=((b"upgrade", b"websocket"),))
    if b"upgrade" not in (header(scope, b"connection") or b"").lower():
        raise Refused(problem("bad-request", "Connection header did not include 'upgrade'"))
    raise Refused(problem("bad-request", "Upgrade header did not include 'websocket'"))
