"""/ws/events against a real NATS server: every event once, in order, in its own bytes; and every way to be closed."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cellos.testing.server_process import TOKEN

AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
SECONDS = 60.0


@pytest.fixture
def listen(request: pytest.FixtureRequest) -> Iterator[Callable[..., ClientConnection]]:
    """Listens to the server of the test, or to another one."""
    with ExitStack() as stack:

        def go(query: str = "", *, server: Any = None) -> ClientConnection:
            server = server or request.getfixturevalue("api").server
            url = f"ws://{server.address}/ws/events{query}"
            opening = connect(url, additional_headers=AUTHORIZATION, proxy=None, open_timeout=SECONDS, close_timeout=2, max_queue=4)
            return stack.enter_context(opening)

        yield go


def frames(connection: ClientConnection, count: int) -> list[str]:
    return [str(connection.recv(SECONDS)) for _ in range(count)]


def sequences(connection: ClientConnection, count: int) -> list[int]:
    return [json.loads(frame)["seq"] for frame in frames(connection, count)]


def closed(connection: ClientConnection) -> tuple[int, str, list[str]]:
    """How it ended, and what came before that."""
    before = []
    try:
        while True:
            before.append(str(connection.recv(SECONDS)))
    except ConnectionClosed as error:
        end = error.rcvd
    assert end is not None
    return end.code, end.reason, before


def listening(api: Any, clients: int = 1) -> None:
    """Until so many clients listen: what is written then is new to them."""
    deadline = time.monotonic() + SECONDS
    while f"cellos_websocket_clients {clients}.0" not in api.client.get(f"http://{api.server.admin}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def api(nats: Any, start: Callable[..., Any]) -> Any:
    return start(nats.url, CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")


def test_an_event_is_passed_on_as_it_is(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    log.write(("cellos.events.cells", cell_event("old")))
    connection = listen()
    listening(api)
    payload = cell_event("café")
    sequence = log.write(("cellos.events.cells", payload))
    assert frames(connection, 1) == [f'{{"seq":{sequence},"event":{payload.decode()}}}']


def test_what_no_client_could_read_is_left_out(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    live, past = listen(), None
    listening(api)
    log.write(
        ("cellos.events.x", b"no json"),
        ("cellos.events.x", b'{"a":"\xff"}'),
        ("cellos.events.x", b"[1]"),
        ("cellos.events.x", b""),
        ("cellos.events.cells", cell_event("good")),
    )
    past = listen("?since=0")
    assert sequences(live, 1) == sequences(past, 1) == [5]
    page = api.get("/v1/events?limit=4").json()
    assert page == {"events": [], "cursor": 4}
    assert [each["seq"] for each in api.get("/v1/events?since=4").json()["events"]] == [5]
    assert api.get("/v1/cells/good").status_code == 200


def test_pages_of_one_subject(api: Any, log: Any, cell_event: Callable[..., bytes]) -> None:
    log.write(*((f"cellos.events.runs.{'ab'[number % 2]}.m.1", cell_event(f"c{number}")) for number in range(250)))
    page = api.get("/v1/events?limit=100&subject=cellos.events.runs.a.%3E").json()
    assert [each["seq"] for each in page["events"]] == list(range(1, 200, 2))
    rest = api.get(f"/v1/events?since={page['cursor']}&subject=cellos.events.runs.a.%3E").json()
    assert [each["seq"] for each in rest["events"]] == list(range(201, 250, 2))
    assert api.get("/v1/events?subject=cellos.events.runs.c.%3E").json()["events"] == []


def test_since_resumes_without_gap_or_repetition(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    """While events are written all the time, at every stage of a client's way from the past to the present."""
    total = 3000
    writer = threading.Thread(target=log.write, args=[("cellos.events.cells", cell_event(f"c{number % 7}")) for number in range(total)])
    writer.start()
    begun = 0
    while begun < total:
        connection = listen(f"?since={begun}")
        got = sequences(connection, min(611, total - begun))
        assert got == list(range(begun + 1, begun + 1 + len(got)))
        begun = got[-1]
        connection.close()
    writer.join()


def test_snapshot_then_stream_misses_nothing(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    log.write(*(("cellos.events.cells", cell_event(f"c{number}")) for number in range(5)))
    api.until("/v1/cells/c4", lambda answer: answer.status_code == 200)
    cursor = api.get("/v1/formations").json()["cursor"]
    assert cursor == 5
    log.write(("cellos.events.cells", cell_event("next")))
    assert sequences(listen(f"?since={cursor}"), 1) == [6]


@pytest.mark.parametrize(
    ("subject", "wanted"),
    [
        ("", [1, 2, 3, 4]),
        ("cellos.events.>", [1, 2, 3, 4]),
        (">", [1, 2, 3, 4]),
        ("cellos.events.a.>", [1, 2]),
        ("cellos.events.*.x", [1, 3]),
        ("cellos.events.b.x", [3]),
        ("cellos.events.c", [4]),
    ],
)
def test_a_filter_chooses(shared: Any, listen: Any, cell_event: Callable[..., bytes], subject: str, wanted: list[int]) -> None:
    server = shared.api.server
    listening(shared.api, 0)
    live = listen(f"?subject={subject}", server=server)
    listening(shared.api)
    since = shared.log.write(*((f"cellos.events.{rest}", cell_event("c")) for rest in ("a.x", "a.y.z", "b.x", "c"))) - 4
    past = listen(f"?since={since}&subject={subject}", server=server)
    assert sequences(live, len(wanted)) == sequences(past, len(wanted)) == [since + number for number in wanted]


@pytest.mark.parametrize(
    "subject", ["other.>", "cellos.*.x", "cellos.events", "cellos.events.", "cellos..x", "cellos.events.>.x", "a%20b", "*"]
)
def test_no_filter_of_events(shared: Any, listen: Any, subject: str) -> None:
    assert closed(listen(f"?subject={subject}", server=shared.api.server)) == (1008, "subscribe failed", [])


def test_what_clients_say_means_nothing(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    connection = listen()
    connection.send("hello")
    connection.send(b"\x00" * 65536)
    listening(api)
    log.write(("cellos.events.cells", cell_event("c")))
    assert sequences(connection, 1) == [1]


def test_text_that_is_no_utf8_ends_it_and_leaves_no_traceback(api: Any, listen: Any) -> None:
    connection = listen()
    connection.send(b"\xff\xfe", text=True)
    assert closed(connection)[0] == 1007
    assert complaints(api) == []


def complaints(api: Any) -> list[dict[str, Any]]:
    """What the server's log has to complain of, once it has ended."""
    api.server.stop()
    return [record for record in api.server.log if record["level"] != "INFO"]


def test_too_large_a_message_ends_it(shared: Any, listen: Any) -> None:
    connection = listen(server=shared.api.server)
    connection.send("x" * 65537)
    assert closed(connection)[0] == 1009


@pytest.mark.parametrize("since", [0, 1, 3])
def test_a_cursor_older_than_the_log(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes], since: int) -> None:
    log.write(*(("cellos.events.cells", cell_event("c")) for _ in range(8)))
    log.purge(6)
    again = api  # the server that lived through it has nothing in memory, as nobody listened
    code, reason, before = closed(listen(f"?since={since}", server=again.server))
    assert (code, reason) == (4410, "retention-exhausted")
    (frame,) = map(json.loads, before)
    assert list(frame.items()) == [
        ("type", "/problems/ws/retention-exhausted"),
        ("title", "Cursor older than stream retention"),
        ("oldest_seq", 6),
    ]
    assert sequences(listen("?since=5"), 3) == [6, 7, 8]


def test_a_cursor_of_another_log(api: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    log.write(("cellos.events.cells", cell_event("c")))
    assert closed(listen("?since=99"))[:2] == (4410, "retention-exhausted")
    assert closed(listen("?since=18446744073709551615"))[:2] == (4410, "retention-exhausted")


def test_a_log_that_was_made_anew(api: Any, nats: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    log.write(*(("cellos.events.cells", cell_event(f"old{number}")) for number in range(3)))
    connection = listen("?since=0")
    assert sequences(connection, 3) == [1, 2, 3]
    log.recreate()
    log.write(("cellos.events.cells", cell_event("new")))
    assert closed(connection)[:2] == (4410, "retention-exhausted")
    api.until("/v1/cells/new", lambda answer: answer.status_code == 200)
    assert [each["id"] for each in api.get("/v1/cells").json()] == ["new"]
    assert api.get("/v1/formations").json()["cursor"] == 1
    assert sequences(listen("?since=0"), 1) == [1]


def test_a_restart_of_nats_is_not_noticed(api: Any, nats: Any, log: Any, listen: Any, cell_event: Callable[..., bytes]) -> None:
    connection = listen()
    listening(api)
    log.write(("cellos.events.cells", cell_event("one")))
    assert sequences(connection, 1) == [1]
    nats.kill()
    nats.start()
    log.write(("cellos.events.cells", cell_event("two")))
    assert sequences(connection, 1) == [2]


def test_the_end_of_the_server_is_told(api: Any, listen: Any) -> None:
    connections = [listen() for _ in range(3)]
    listening(api, 3)
    ends: list[Any] = []
    threads = [threading.Thread(target=lambda each=each: ends.append(closed(each)[:2])) for each in connections]
    for thread in threads:
        thread.start()
    assert api.server.stop() == 0
    for thread in threads:
        thread.join()
    assert ends == [(1012, "")] * 3


def test_a_slow_client_is_closed_and_nobody_else_notices(api: Any, log: Any, listen: Any) -> None:
    slow = listen()
    quick = listen()
    listening(api, 2)
    got: list[int] = []
    for _ in range(15):  # never more on its way to the quick one than it may have
        log.write(*(("cellos.events.big", json.dumps({"type": "t", "pad": "x" * 300_000}).encode()) for _ in range(6)))
        got += sequences(quick, 6)
    assert got == list(range(1, 91))
    code, reason, before = closed(slow)
    assert (code, reason) == (4408, "slow-client")
    read = [json.loads(frame)["seq"] for frame in before]
    assert read == list(range(1, len(read) + 1))
    assert len(read) < 90
    assert sequences(listen(f"?since={read[-1]}"), 90 - len(read)) == list(range(read[-1] + 1, 91))


HANDSHAKE = {
    "Host": "x",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(),
    **AUTHORIZATION,
}


def ask(api: Any, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """One request as it stands, and the answer."""
    host, port = api.server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        raw = b""
        while b"\r\n\r\n" not in raw or (b"101" not in raw[:20] and raw.partition(b"\r\n\r\n")[2][-1:] != b"}"):
            part = connection.recv(65536)
            if not part:
                break
            raw += part
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *rest = head.decode().split("\r\n")
    return int(status.split()[1]), {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}, body


def test_a_handshake(shared: Any) -> None:
    status, headers, _ = ask(
        shared.api, "/ws/events", {**HANDSHAKE, "Sec-WebSocket-Protocol": "chat", "Sec-WebSocket-Extensions": "permessage-deflate"}
    )
    assert status == 101
    assert headers["access-control-allow-origin"] == "*"
    assert not {"sec-websocket-protocol", "sec-websocket-extensions"} & headers.keys()


@pytest.mark.parametrize(
    ("path", "change", "status"),
    [
        ("/ws/events", {"Authorization": ""}, 401),
        ("/ws/events?token=a%20token%20for%20tests", {"Authorization": None}, 401),
        ("/ws/events", {"Authorization": "Bearer wrong", "Sec-WebSocket-Key": None}, 401),
        ("/ws/events?since=x", {}, 400),
        ("/ws/events?since=-1", {}, 400),
        ("/ws/events", {"Connection": None}, 400),
        ("/ws/events", {"Upgrade": None}, 400),
        ("/ws/events", {"Sec-WebSocket-Version": None}, 400),
        ("/ws/events", {"Sec-WebSocket-Version": "8"}, 400),
        ("/ws/events", {"Sec-WebSocket-Key": None}, 400),
        ("/ws/events", {"Sec-WebSocket-Key": "short"}, 400),
        ("/ws/nothing", {}, 404),
        ("/v1/cells", {}, 404),
    ],
)
def test_a_handshake_that_is_refused(shared: Any, path: str, change: dict[str, str | None], status: int) -> None:
    headers = {name: value for name, value in (HANDSHAKE | change).items() if value is not None}
    found, answer, body = ask(shared.api, path, headers)
    assert found == status
    assert answer["content-type"] == "application/problem+json"
    assert json.loads(body)["status"] == status
    assert list(json.loads(body)) == ["type", "title", "status", "detail"]
    assert ("www-authenticate" in answer) == (status == 401)


def test_refused_handshakes_are_nothing_to_complain_of(api: Any) -> None:
    for change in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Sec-WebSocket-Key": "short"}):
        assert ask(api, "/ws/events", HANDSHAKE | change)[0] in {400, 401}
    assert complaints(api) == []
