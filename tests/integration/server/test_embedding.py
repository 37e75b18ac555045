"""The parts in a process of somebody else's: replay into a state, the application without socket, the listener with other times."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed

from cellos.eventlog.connect import Settings, connect
from cellos.server import ServerState, create_app, ensure_stream, main, protocol, replay
from cellos.server.config import Address
from cellos.server.follow import Follower

TOKEN = "t"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
SECONDS = 60.0


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await test

    asyncio.run(bounded())


async def with_server(url: str, test: Callable[[str, ServerState], Awaitable[None]]) -> None:
    """A whole server in this loop."""
    state = ServerState(token=TOKEN)
    follower = Follower(state, Settings(url=url))
    following = asyncio.create_task(follower.run())
    await follower.settled.wait()
    server = await main.open_server(create_app(state), Address("127.0.0.1", 0), "listening")
    try:
        await test(server.address, state)
    finally:
        await server.end()
        following.cancel()
        await asyncio.wait({following})


def test_replay_reads_what_there_is(nats: Any, log: Any, cell_event: Callable[..., bytes]) -> None:
    async def test() -> None:
        client = await connect(Settings(url=nats.url), name="test")
        try:
            await ensure_stream(client)
            state = ServerState(token=TOKEN, client=client)
            assert await replay(state, client) == 0
            await client.jetstream().publish("cellos.events.cells", cell_event("c1"))
            await client.jetstream().publish("cellos.events.cells", cell_event("c2"))
            state = ServerState(token=TOKEN, client=client)
            assert await replay(state, client) == state.cursor == 2
            transport = httpx2.ASGITransport(create_app(state))
            async with httpx2.AsyncClient(transport=transport, base_url="http://in.process", headers=AUTHORIZATION) as http:
                assert [each["id"] for each in (await http.get("/v1/cells")).json()] == ["c1", "c2"]
                assert [each["seq"] for each in (await http.get("/v1/events")).json()["events"]] == [1, 2]
        finally:
            await client.close()

    run(test())


def test_a_dead_client_is_found_by_its_silence(nats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "PING_SECONDS", 0.1)
    monkeypatch.setattr(main, "PONG_SECONDS", 0.3)

    async def test(address: str, state: ServerState) -> None:
        url = f"ws://{address}/ws/events"
        async with open_websocket(url, additional_headers=AUTHORIZATION, proxy=None) as alive:
            host, port = address.rsplit(":", 1)
            reader, writer = await asyncio.open_connection(host, int(port))
            head = "GET /ws/events HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            writer.write(f"{head}Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            said = await reader.read()  # pings that nobody answers, to the end
            assert said[0] == 0x89
            assert (1011).to_bytes(2, "big") + b"keepalive ping timeout" in said
            writer.close()
            await alive.send("still here")
            state.apply(1, "cellos.events.x", b"{}")
            assert json.loads(await alive.recv())["seq"] == 1

    run(with_server(nats.url, test))


def test_a_head_that_does_not_come_is_not_waited_for(nats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)

    async def test(address: str, state: ServerState) -> None:
        host, port = address.rsplit(":", 1)
        for begun in (b"", b"GET /v1/cells HTTP/1.1\r\nHost:"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(begun)
            assert await reader.read() == b""
            writer.close()

    run(with_server(nats.url, test))


def test_there_is_an_end_to_connections(nats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_most_connections", lambda: 2)

    async def test(address: str, state: ServerState) -> None:
        host, port = address.rsplit(":", 1)
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        with pytest.raises((httpx2.TransportError, OSError)):
            async with httpx2.AsyncClient(trust_env=False, headers=AUTHORIZATION) as http:
                await http.get(f"http://{address}/v1/version")
        for _, writer in held:
            writer.close()

    run(with_server(nats.url, test))


def test_a_websocket_of_a_log_that_is_gone_is_refused(nats: Any) -> None:
    async def test(address: str, state: ServerState) -> None:
        nats.kill()
        async with open_websocket(f"ws://{address}/ws/events?since=99", additional_headers=AUTHORIZATION, proxy=None) as connection:
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "subscribe failed")

    run(with_server(nats.url, test))
