"""A control plane of the tests' own: a real HTTP and WebSocket server that answers what a test tells it to, on a port that stays."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from cellos.client.address import Address
from cellos.core.problem import problem
from cellos.testing.nats_server import reserve_port

TOKEN = "token-of-the-test"
Answer = Callable[[Request], Response]
Stream = Callable[[WebSocket], Awaitable[None]]


@dataclass
class Seen:
    """A request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


def refusal(name: Any, detail: str, **headers: str) -> Response:
    what = problem(name, detail)
    return Response(what.body(), what.status, headers, "application/problem+json")


@dataclass
class ControlPlane:
    """`answers` are taken one by one, the last one stays; each is JSON, or a function of the request. `log` are the events that it has."""

    port: int = 0
    scheme: str = "http"
    answers: list[Any] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    log: list[tuple[int, bytes]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    """What becomes of the connections to /ws/events, one by one; afterwards, `tail`."""

    @property
    def address(self) -> Address:
        return Address(url=f"{self.scheme}://127.0.0.1:{self.port}", token=TOKEN, given=True)

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        target = request.scope["raw_path"].decode() + (f"?{request.url.query}" if request.url.query else "")
        self.seen.append(Seen(request.method, target, dict(request.headers), body))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return refusal("unauthorized", "invalid token")
        if request.url.path == "/v1/events" and not self.answers:
            since = int(request.query_params["since"])
            last = self.log[-1][0] if self.log else 0
            return JSONResponse({"events": [], "cursor": min(since, last)})
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(request) if callable(answer) else JSONResponse(answer)

    async def stream(self, socket_: WebSocket) -> None:
        query = f"?{socket_.url.query}" if socket_.url.query else ""
        self.seen.append(Seen("WS", socket_.url.path + query, dict(socket_.headers), b""))
        if socket_.headers.get("authorization") != f"Bearer {TOKEN}":
            await socket_.send_denial_response(refusal("unauthorized", "invalid token"))
            return
        await socket_.accept()
        await (self.streams.pop(0) if self.streams else self.tail)(socket_)

    async def tail(self, socket_: WebSocket) -> None:
        """Everything behind the cursor, then nothing."""
        await self.send(socket_, len(self.log))
        try:
            await socket_.receive()
        except WebSocketDisconnect:
            pass

    async def send(self, socket_: WebSocket, count: int) -> None:
        """The next events behind the cursor."""
        since = int(socket_.query_params.get("since", 0))
        for seq, event in [each for each in self.log if each[0] > since][:count]:
            await socket_.send_text(f'{{"seq":{seq},"event":{event.decode()}}}')

    def fill(self, count: int) -> None:
        first = self.log[-1][0] + 1 if self.log else 1
        self.log += [(seq, json.dumps({"id": f"e{seq}", "type": "t"}).encode()) for seq in range(first, first + count)]

    def part(self, count: int, code: int = 1001, reason: str = "") -> Stream:
        """A connection that ends after some events."""

        async def end(socket_: WebSocket) -> None:
            await self.send(socket_, count)
            await socket_.close(code, reason)

        return end


class Running:
    """A uvicorn in a thread; use with `with`."""

    def __init__(self, plane: ControlPlane, **options: Any) -> None:
        app = Starlette(
            routes=[
                WebSocketRoute("/ws/events", plane.stream),
                Route("/{path:path}", plane.answer, methods=["GET", "POST", "DELETE"]),
            ]
        )
        self._socket = socket.create_server(("127.0.0.1", plane.port))
        plane.port = self._socket.getsockname()[1]
        config = uvicorn.Config(app, log_config=None, ws="websockets-sansio", timeout_graceful_shutdown=1, lifespan="off", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])))

    def __enter__(self) -> Running:
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self._server.started
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        self._socket.close()
        assert not self._thread.is_alive()


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    plane = ControlPlane()
    with Running(plane):
        yield plane


@pytest.fixture
def secure_plane(certificates: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(scheme="https")
    with Running(plane, ssl_certfile=certificates / "server.pem", ssl_keyfile=certificates / "server.key"):
        yield plane


@pytest.fixture
def token() -> str:
    return TOKEN


@pytest.fixture
def refuse() -> Callable[..., Answer]:
    """An answer that is a problem."""
    return lambda name, detail="", **headers: lambda _: refusal(name, detail, **headers)


@pytest.fixture
def stopped_plane() -> Iterator[tuple[ControlPlane, Callable[[], Running]]]:
    """One that does not run yet, on a port of its own, and what starts it."""
    plane = ControlPlane()
    plane.port = reserve_port(plane)
    running: list[Running] = []

    def start() -> Running:
        running.append(Running(plane).__enter__())
        return running[-1]

    yield plane, start
    for each in running:
        each.__exit__()
