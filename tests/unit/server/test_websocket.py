"""The stream in process: over ASGI's own messages, as a server does it that does not know our protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from cellos.server.hub import SLOW
from cellos.server.websocket import LOW_WATER_BYTES, QueueOutlet


def test_without_a_log_there_is_no_stream(served: Any) -> None:
    with served.client.websocket_connect("/ws/events") as connection, pytest.raises(WebSocketDisconnect) as closed:
        connection.receive_text()
    assert (closed.value.code, closed.value.reason) == (1008, "no upstream broker configured")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/ws/events", {"Authorization": "Bearer wrong"}, 401),
        ("/ws/events?since=x", {}, 400),
        ("/ws/events?since=1&since=2", {}, 400),
        ("/ws/other", {}, 404),
    ],
)
def test_refusals_are_problems(served: Any, is_problem: Any, path: str, headers: dict[str, str], status: int) -> None:
    with pytest.raises(WebSocketDenialResponse) as refused, served.client.websocket_connect(path, headers=headers):
        pass
    kind = {401: "unauthorized", 400: "bad-request", 404: "not-found"}[status]
    is_problem(refused.value, status, kind)


def test_messages_go_out_in_order_and_the_close_frame_last() -> None:
    async def go() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        outlet = QueueOutlet()
        running = asyncio.create_task(outlet.run(send))
        outlet.say(b'"a"')
        await outlet.drained()
        outlet.say(b'"' + b"x" * LOW_WATER_BYTES + b'"')
        assert outlet.waiting > LOW_WATER_BYTES
        await outlet.drained()
        assert outlet.waiting <= LOW_WATER_BYTES
        outlet.close(SLOW)
        outlet.say(b"late")
        outlet.close(SLOW)
        await running
        assert outlet.closed
        assert [message["type"] for message in sent] == ["websocket.send", "websocket.send", "websocket.close"]
        assert (sent[0]["text"], sent[2]["code"], sent[2]["reason"]) == ('"a"', 4408, "slow-client")

    asyncio.run(go())


def test_a_client_that_is_gone_keeps_nobody_waiting() -> None:
    async def go() -> None:
        async def send(message: Any) -> None:
            raise OSError("gone")

        outlet = QueueOutlet()
        running = asyncio.create_task(outlet.run(send))
        outlet.say(b"x" * (LOW_WATER_BYTES + 1))
        await outlet.drained()
        await running
        assert outlet.closed

    asyncio.run(go())
