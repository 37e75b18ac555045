"""The application: the token first, then the route, then whatever a handler answers; all that goes wrong becomes a problem document."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send

from cellos.core.problem import MEDIA_TYPE, method_not_allowed, no_route, problem
from cellos.errors import CellosError, EventLogError, FormationRejected
from cellos.server.auth import Gate
from cellos.server.replies import CORS, Refused, Reply, problem_reply
from cellos.server.requests import Gone
from cellos.server.routes import ROUTES, STREAM_PATH, Operation
from cellos.server.state import ServerState, unavailable
from cellos.server.websocket import EventStream

_log = logging.getLogger("cellos.server.http")


def create_app(state: ServerState) -> Starlette:
    """The control plane as an ASGI application, without socket, NATS or task of its own: `state` is all that it knows."""
    app = Starlette(
        routes=[
            *(StarletteRoute(route.path, _Endpoint(state, route.operations)) for route in ROUTES),
            WebSocketRoute(STREAM_PATH, EventStream(state)),
        ],
        middleware=[Middleware(Gate, tokens=state.tokens)],
        exception_handlers={Exception: _internal},
    )
    app.router.redirect_slashes = False
    app.router.default = _no_route
    return app


class _Endpoint:
    """One path. HEAD is answered as GET is."""

    def __init__(self, state: ServerState, operations: tuple[Operation, ...]) -> None:
        self._state = state
        self._operations = {each.method: each for each in operations}
        if "GET" in self._operations:
            self._operations["HEAD"] = self._operations["GET"]
        order = [method for method in ("POST", "GET", "HEAD", "DELETE") if method in self._operations]
        self._allow = ((b"allow", ",".join(order).encode()),)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = self._operations.get(scope["method"])
        if operation is None:
            reply = problem_reply(method_not_allowed(scope["method"], scope["path"]), headers=self._allow)
        else:
            try:
                reply = await operation.handler(self._state, scope, receive)
            except Gone:
                return
            except CellosError as error:
                reply = refusal(error)
        if _log.isEnabledFor(logging.DEBUG):
            fields = {"method": scope["method"], "path": scope["path"][:200], "status": reply.status}
            _log.debug("request", extra={"fields": fields})
        await reply(scope, receive, send)


def refusal(error: CellosError) -> Reply:
    """The answer that an error stands for. Raises whatever no route should let through."""
    if isinstance(error, Refused):
        return problem_reply(error.problem, headers=error.headers)
    if isinstance(error, FormationRejected):
        return problem_reply(error.problem)
    if isinstance(error, EventLogError):
        _log.warning("event log not available", extra={"fields": {"error": str(error), "code": error.code}})
        return refusal(unavailable())
    raise error


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    await problem_reply(no_route(scope["path"]))(scope, receive, send)


async def _internal(request: Request, error: Exception) -> Response:
    """500. What happened is raised again and logged; nothing of it is told."""
    body = problem("internal", "an unexpected error; the server's log has the details").body()
    return Response(body, status_code=500, media_type=MEDIA_TYPE, headers={name.decode(): value.decode() for name, value in CORS})
