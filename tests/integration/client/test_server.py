from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.websockets import WebSocket

from cellos.client.address import Address
from cellos.client.server import Made, Server
from cellos.errors import CursorExpired, ServerError, ServerProblem, ServerUnreachable

ID = "0198f0c4-7d5e-4a31-9c55-8a5d1f0e2b11"
MADE = {"id": ID, "name": "demo", "status": "PENDING"}


class Waits(list[float]):
    """The pauses that were made: none takes time."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def server(plane: Any, waits: Waits) -> Iterator[Server]:
    with Server(plane.address, environment={}, sleep=waits) as server:
        yield server


def targets(plane: Any) -> list[str]:
    return [f"{each.method} {each.target}" for each in plane.seen]


class TestRequests:
    def test_each_is_one_with_the_token(self, plane: Any, server: Server, token: str) -> None:
        plane.answers = [{"server": {"version": "1"}}, {"id": "a/b"}, {"id": ID}, {"name": "demo"}]
        assert server.version() == {"server": {"version": "1"}}
        assert server.cell("a/b") == {"id": "a/b"}
        assert server.formation(ID) == {"id": ID}
        assert server.formation("demo-1") == {"name": "demo"}
        assert targets(plane) == [
            "GET /v1/version",
            "GET /v1/cells/a%2Fb",
            f"GET /v1/formations/{ID}",
            "GET /v1/formations/by-name/demo%2D1",
        ]
        assert {each.headers["authorization"] for each in plane.seen} == {f"Bearer {token}"}

    def test_lists(self, plane: Any, server: Server) -> None:
        plane.answers = [[{"id": "a"}], {"formations": [{"id": ID}], "cursor": 7}]
        assert server.cells(state="running", formation="f g", limit=5) == [{"id": "a"}]
        assert server.formations() == [{"id": ID}]
        assert targets(plane) == ["GET /v1/cells?state=running&formation=f+g&limit=5", "GET /v1/formations"]

    def test_events(self, plane: Any, server: Server) -> None:
        plane.answers = [lambda _: Response(b'{"events":[{"seq":3,"event":{"b": 1.0, "a":2}}],"cursor":3}')]
        page = server.events(since=2, limit=1)
        assert (page.cursor, [(each.seq, bytes(each.event)) for each in page.events]) == (3, [(3, b'{"b": 1.0, "a":2}')])
        assert targets(plane) == ["GET /v1/events?since=2&limit=1"]

    def test_what_cannot_be_read_is_an_error(self, plane: Any, server: Server) -> None:
        plane.answers = [lambda _: Response(b"<html>")]
        with pytest.raises(ServerError, match="GET /v1/version: cannot read the answer"):
            server.version()

    def test_an_address_with_a_path(self, plane: Any) -> None:
        plane.answers = [{}]
        with Server(Address(url=f"{plane.address.url}/cells", token=plane.address.token, given=True), environment={}) as server:
            server.version()
        assert targets(plane) == ["GET /cells/v1/version"]

    def test_a_proxy_has_no_part_in_what_stays_on_this_host(self, plane: Any) -> None:
        plane.answers = [{}]
        proxies = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        with Server(plane.address, environment=proxies, pauses=()) as server:
            assert server.version() == {}
            assert [each.seq for each in _some(server, plane, 1)] == [1]


class TestPages:
    def test_all_of_them(self, plane: Any, server: Server) -> None:
        first = JSONResponse([{"id": "a"}], headers={"Link": '</v1/cells?after=a>; rel="next"'})
        plane.answers = [lambda _: first, [{"id": "b"}]]
        assert server.cells() == [{"id": "a"}, {"id": "b"}]
        assert targets(plane) == ["GET /v1/cells", "GET /v1/cells?after=a"]

    def test_no_more_than_asked_for(self, plane: Any, server: Server) -> None:
        plane.answers = [lambda _: JSONResponse([{"id": "a"}, {"id": "b"}], headers={"Link": '</v1/cells?after=b>; rel="next"'})]
        assert server.cells(limit=2) == [{"id": "a"}, {"id": "b"}]
        assert len(plane.seen) == 1

    @pytest.mark.parametrize("link", ["http://evil.example/v1/cells?x", "//evil.example/v1/cells?x", "/v1/other?x", "/v1/cells"])
    def test_the_token_goes_nowhere_else(self, plane: Any, server: Server, link: str) -> None:
        plane.answers = [lambda _: JSONResponse([], headers={"Link": f'<{link}>; rel="next"'})]
        with pytest.raises(ServerError, match="lies elsewhere"):
            server.cells()
        assert len(plane.seen) == 1


class TestRefusals:
    def test_a_problem_is_typed(self, plane: Any, server: Server, refuse: Any) -> None:
        plane.answers = [refuse("not-found", "cell x not found")]
        with pytest.raises(ServerProblem) as raised:
            server.cell("x")
        error = raised.value
        assert (error.type, error.title, error.status, error.detail) == ("/problems/not-found", "Not Found", 404, "cell x not found")
        assert str(error) == "server: Not Found: cell x not found"

    def test_of_the_token(self, plane: Any) -> None:
        with Server(Address(url=plane.address.url, token="wrong", given=True), environment={}) as server:
            with pytest.raises(ServerProblem, match="invalid token"):
                server.cells()
            with pytest.raises(ServerProblem, match="invalid token"):
                next(server.follow(since=0))

    def test_of_somebody_between(self, plane: Any, server: Server) -> None:
        plane.answers = [lambda _: PlainTextResponse("teapot", 418)]
        with pytest.raises(ServerProblem, match="server: HTTP 418 I'm a Teapot: teapot"):
            server.cells()

    def test_a_redirect_is_not_followed(self, plane: Any, server: Server) -> None:
        plane.answers = [lambda _: RedirectResponse("http://evil.example/")]
        with pytest.raises(ServerProblem, match="HTTP 307"):
            server.cells()


class TestRepeating:
    def test_a_get(self, plane: Any, server: Server, refuse: Any, waits: Waits) -> None:
        plane.answers = [refuse("service-unavailable"), refuse("service-unavailable", **{"Retry-After": "2"}), [{"id": "a"}]]
        assert server.cells() == [{"id": "a"}]
        assert waits == [0.1, 2.0]

    def test_not_for_ever(self, plane: Any, server: Server, refuse: Any, waits: Waits) -> None:
        plane.answers = [refuse("service-unavailable", "later", **{"Retry-After": "86400"})]
        with pytest.raises(ServerProblem, match="Event store unavailable: later"):
            server.cells()
        assert waits == [5.0, 5.0, 5.0]
        assert len(plane.seen) == 4

    @pytest.mark.parametrize("name", ["bad-request", "not-found", "conflict", "internal"])
    def test_not_what_stays_wrong(self, plane: Any, server: Server, refuse: Any, name: str) -> None:
        plane.answers = [refuse(name)]
        with pytest.raises(ServerProblem):
            server.cells()
        assert len(plane.seen) == 1

    def test_a_post_with_the_same_key(self, plane: Any, server: Server, refuse: Any) -> None:
        plane.answers = [refuse("service-unavailable"), MADE]
        assert server.apply(b'{"name":"demo"}') == Made(id=ID, name="demo", status="PENDING")
        assert [(each.method, each.body) for each in plane.seen] == [("POST", b'{"name":"demo"}')] * 2
        (key,) = {each.headers["idempotency-key"] for each in plane.seen}
        assert UUID(key).version == 7
        server.apply(b"{}")
        assert plane.seen[-1].headers["idempotency-key"] != key

    def test_a_key_that_is_given(self, plane: Any, server: Server) -> None:
        plane.answers = [MADE]
        server.apply(b"{}", key="mine")
        assert plane.seen[0].headers["idempotency-key"] == "mine"

    @pytest.mark.parametrize(("ident", "count"), [(ID, 4), ("demo", 1)])
    def test_a_delete_by_id_and_not_by_name(self, plane: Any, server: Server, refuse: Any, ident: str, count: int) -> None:
        plane.answers = [refuse("service-unavailable")]
        with pytest.raises(ServerProblem):
            server.delete(ident)
        assert len(plane.seen) == count

    def test_a_server_that_comes_back(self, stopped_plane: Any) -> None:
        plane, start = stopped_plane
        plane.answers = [Response(status_code=204)]

        def sleep(_: float) -> None:
            plane.answers = [lambda _: Response(status_code=204)]
            start()

        with Server(plane.address, environment={}, sleep=sleep) as server:
            server.delete("demo")  # nothing of the first one arrived
        assert targets(plane) == ["DELETE /v1/formations/by-name/demo"]

    def test_nobody_there(self, stopped_plane: Any, waits: Waits) -> None:
        plane, _ = stopped_plane
        with Server(plane.address, environment={}, sleep=waits) as server:
            with pytest.raises(ServerUnreachable, match=rf"no answer from {plane.address.url}: Connection refused") as raised:
                server.apply(b"{}")
            assert not raised.value.sent
            assert waits == [0.1, 0.3, 0.9]
            with pytest.raises(ServerUnreachable, match="Connection refused"):
                next(server.follow(since=0))

    def test_an_answer_that_never_comes(self, plane: Any, waits: Waits) -> None:
        given_up = threading.Event()

        def slow(_: Any) -> Response:
            given_up.wait(20)
            return JSONResponse(MADE)

        plane.answers = [slow]
        options: dict[str, Any] = {"sleep": waits, "timeout_ms": 100, "pauses": (0.1,)}
        with Server(plane.address, environment={}, **options) as server, pytest.raises(ServerUnreachable) as raised:
            server.apply(b"{}")
        given_up.set()
        assert raised.value.sent
        assert waits == [0.1]


# ---------------------------------------------------------------- following


def _some(server: Server, plane: Any, count: int, **options: Any) -> list[Any]:
    plane.fill(count)
    return list(itertools.islice(server.follow(since=0, **options), count))


class TestFollow:
    def test_from_a_cursor(self, plane: Any, server: Server) -> None:
        plane.fill(5)
        found = list(itertools.islice(server.follow(since=2, subject="cellos.events.>"), 3))
        assert [each.seq for each in found] == [3, 4, 5]
        assert [json.loads(bytes(each.event))["id"] for each in found] == ["e3", "e4", "e5"]
        assert targets(plane) == ["WS /ws/events?since=2&subject=cellos.events.%3E"]

    def test_from_now_on(self, plane: Any, server: Server) -> None:
        plane.fill(3)

        async def later(socket_: WebSocket) -> None:
            plane.fill(2)
            await plane.tail(socket_)

        plane.streams = [later]
        assert [each.seq for each in itertools.islice(server.follow(), 2)] == [4, 5]
        assert targets(plane)[1] == "WS /ws/events?since=3"

    def test_no_gap_and_no_duplicate_over_connections_that_are_lost(self, plane: Any, server: Server) -> None:
        async def twice(socket_: WebSocket) -> None:
            """Sends what was sent before, too."""
            for seq, event in plane.log[:6]:
                await socket_.send_text(f'{{"seq":{seq},"event":{event.decode()}}}')
            await socket_.close(1012)

        async def cut(socket_: WebSocket) -> None:
            await plane.send(socket_, 1)
            raise WebSocketGoneError

        plane.streams = [plane.part(3), plane.part(0), twice, cut, plane.part(1, 1008, "no upstream broker configured")]
        notes: list[str] = []
        assert [each.seq for each in _some(server, plane, 20, note=notes.append)] == list(range(1, 21))
        assert [each.target for each in plane.seen] == [f"/ws/events?since={cursor}" for cursor in (0, 3, 3, 6, 7, 8)]
        url = plane.address.url
        assert notes[:2] == ["the stream of events was closed with 1001; trying again", f"connected to {url} again"]

    def test_pauses_grow_while_nothing_comes_and_fall_back_after(self, plane: Any, server: Server, waits: Waits) -> None:
        plane.streams = [*(plane.part(0) for _ in range(4)), plane.part(1), plane.part(1)]
        _some(server, plane, 3)
        bounds = [0.2, 0.4, 0.8, 1.6, 0.2, 0.2]
        assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))

    def test_a_server_that_restarts(self, stopped_plane: Any) -> None:
        plane, start = stopped_plane
        plane.fill(2)
        running = start()
        tried = 0

        def sleep(_: float) -> None:
            nonlocal tried
            tried += 1
            if tried == 3:  # not at once
                plane.fill(2)
                start()

        with Server(plane.address, environment={}, sleep=sleep) as server:
            stream = server.follow(since=0)
            assert [next(stream).seq, next(stream).seq] == [1, 2]
            running.__exit__()
            assert [next(stream).seq, next(stream).seq] == [3, 4]
            stream.close()  # type: ignore[attr-defined]  # a generator
        assert tried == 3

    def test_events_that_are_gone(self, plane: Any, server: Server) -> None:
        async def expire(socket_: WebSocket) -> None:
            await plane.send(socket_, 2)
            await socket_.send_text('{"type":"/problems/ws/retention-exhausted","title":"…","oldest_seq":9}')
            await socket_.close(4410, "retention-exhausted")

        plane.fill(2)
        plane.streams = [expire]
        stream = server.follow(since=0)
        assert [next(stream).seq, next(stream).seq] == [1, 2]
        with pytest.raises(CursorExpired, match="no events follow 2: the oldest that is left is 9") as raised:
            next(stream)
        assert raised.value.oldest == 9

    def test_a_subject_that_is_refused(self, plane: Any, server: Server) -> None:
        plane.streams = [plane.part(0, 1008, "subscribe failed")]
        with pytest.raises(ServerError, match="/ws/events was closed: subscribe failed"):
            next(server.follow(since=0, subject="other.>"))

    def test_a_token_that_is_not_taken_any_more(self, plane: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        plane.fill(1)
        plane.streams = [plane.part(1)]
        stream = server.follow(since=0)
        next(stream)
        monkeypatch.setitem(server._headers, "Authorization", "Bearer other")
        with pytest.raises(ServerProblem, match="invalid token"):
            next(stream)

    def test_large_events(self, plane: Any, server: Server) -> None:
        event = json.dumps({"id": "x", "data": "y" * (2 << 20)}).encode()
        plane.log = [(1, event)]
        assert msgspec.json.decode(next(server.follow(since=0)).event) == json.loads(event)


def test_without_a_token_none_is_sent(plane: Any) -> None:
    with Server(Address(url=plane.address.url, token=None, given=True), environment={}) as server:
        for call in (server.cells, lambda: next(server.follow(since=0))):
            with pytest.raises(ServerProblem, match="Unauthorized"):
                call()
    assert [each.headers.get("authorization") for each in plane.seen] == [None, None]


class TestTls:
    def test_with_the_authority_that_is_named(self, secure_plane: Any, certificates: Path) -> None:
        secure_plane.answers = [[{"id": "a"}]]
        with Server(secure_plane.address, environment={"CELLOS_CA_BUNDLE": str(certificates / "ca.pem")}) as server:
            assert server.cells() == [{"id": "a"}]
            assert [each.seq for each in _some(server, secure_plane, 2)] == [1, 2]

    def test_not_without(self, secure_plane: Any, waits: Waits) -> None:
        with Server(secure_plane.address, environment={}, sleep=waits) as server:
            for call in (server.cells, lambda: next(server.follow(since=0))):
                with pytest.raises(ServerUnreachable, match="certificate verify failed"):
                    call()
        assert secure_plane.seen == []


def test_the_example_of_the_page(plane: Any, token: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/how-to/control-plane.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    plane.answers = [[{"id": "a", "outcome": "failed"}, {"id": "b", "outcome": None}]]
    plane.fill(2)
    plane.streams = [plane.part(2, 1008, "enough")]
    ours = {"CELLOS_SERVER": plane.address.url, "CELLOS_SERVER_API_TOKEN": token, "CELLOS_STATE_DIR": str(tmp_path / "state")}
    done = subprocess.run([sys.executable, "-c", example], env=os.environ | ours, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [f"{seq} {event!r}" for seq, event in plane.log]
    assert done.stderr.splitlines()[-1] == "cellos.errors.ServerError: server: /ws/events was closed: enough"


class WebSocketGoneError(Exception):
    """Ends a connection without a Close frame."""
