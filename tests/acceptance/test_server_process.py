"""`cellos-server` as its operator meets it: variables, order of start, log, outages, signals, snapshots."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cellos.testing.nats_server import NatsServer
from cellos.testing.server_process import TOKEN, ServerProcess

SECONDS = 60.0
DOCUMENT = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}]}
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(str(tmp_path / "nats")) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def go(nats_url: str, **variables: str) -> ServerProcess:
        started.append(ServerProcess(nats_url, **variables))
        started[-1].start()
        return started[-1]

    yield go
    for server in started:
        server.stop()


def ask(server: ServerProcess, method: str, path: str, **options: Any) -> Any:
    return httpx2.request(method, server.url + path, headers=AUTHORIZATION, timeout=SECONDS, trust_env=False, **options)


def admin(server: ServerProcess, path: str) -> Any:
    return httpx2.get(f"http://{server.admin}{path}", timeout=SECONDS, trust_env=False)


def until(question: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not wanted(answer := question()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.02)
    return answer


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    """A start that is expected to end by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CELLOS_")}
    command = [sys.executable, "-m", "cellos.server.main"]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60, check=False)


# --- variables ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "CELLOS_SERVER_API_TOKEN must be set (fail-closed)"),
        ({"CELLOS_SERVER_API_TOKEN": ""}, "CELLOS_SERVER_API_TOKEN must not be empty"),
        ({"CELLOS_SERVER_API_TOKEN": " \t"}, "CELLOS_SERVER_API_TOKEN must not be empty"),
        ({"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_SERVER_READ_TOKEN": "t"}, "CELLOS_SERVER_READ_TOKEN"),
        ({"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_SERVER_BIND": ""}, "CELLOS_SERVER_BIND"),
        ({"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_SERVER_BIND": "localhost"}, "CELLOS_SERVER_BIND"),
        (
            {"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_SERVER_BIND": "192.0.2.1:0", "CELLOS_NATS_URL": "nats://127.0.0.1:9"},
            "binding 192.0.2.1:0",
        ),
        ({"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_NATS_URL": "http://x"}, "CELLOS_NATS_URL"),
        ({"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_EVENT_VERIFY_KEYS_PATH": "/nowhere"}, "CELLOS_EVENT_VERIFY_KEYS_PATH"),
        ({"CELLOS_SERVER_API_TOKEN": "t", "CELLOS_SERVER_STATE_DIR": "/proc/nowhere"}, "CELLOS_SERVER_STATE_DIR"),
    ],
)
def test_what_cannot_work_is_said_and_ends_it(variables: dict[str, str], text: str) -> None:
    done = run(**variables)
    assert done.returncode == 1
    assert not done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["level"], line["fields"]["message"]) == ("ERROR", "cellos-server fatal")
    assert text in line["fields"]["error"]


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "cellos.server.main"]
    for option, said, code in (("--version", "cellos-server 0.", 0), ("--help", "Usage: cellos-server", 0)):
        done = subprocess.run([*command, option], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout.startswith(said), done.stderr) == (code, True, "")
    done = subprocess.run([*command, "--port=1"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.startswith("Error: ")) == (1, "", True)


# --- start and log ------------------------------------------------------------------------------------------------------------------------


def test_the_log_is_json_in_the_order_of_the_start(nats: NatsServer, start: Callable[..., ServerProcess]) -> None:
    server = start(nats.url, CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")
    assert [line["fields"]["message"] for line in server.log] == [
        "cellos-server admin listening",
        "connected to NATS",
        "replay_complete",
        "cellos-server listening",
    ]
    for line in server.log:
        assert list(line) == ["timestamp", "level", "fields", "target"]
        assert line["level"] == "INFO"
    replay = server.find("replay_complete")
    assert replay is not None
    assert {name: replay[name] for name in ("cursor", "formations", "events_seen", "events_applied")} == {
        "cursor": 0,
        "formations": 0,
        "events_seen": 0,
        "events_applied": 0,
    }
    host, port = server.address.rsplit(":", 1)
    assert (host, int(port) > 0) == ("127.0.0.1", True)
    assert server.stop() == 0
    assert [line["fields"]["message"] for line in server.log][4] == "shutdown signal received; draining"


def test_credentials_are_in_no_line(tmp_path: Path, start: Callable[..., ServerProcess]) -> None:
    settings = 'authorization { user: "cellos", password: "s3cr3t-of-nats" }'
    with NatsServer(str(tmp_path / "nats"), settings=settings) as nats:
        url = nats.url.replace("//", "//cellos:s3cr3t-of-nats@")
        server = start(url, RUST_LOG="trace", CELLOS_SERVER_READ_TOKEN="only-to-read")
        assert ask(server, "POST", "/v1/formations", json=DOCUMENT).status_code == 201
        assert ask(server, "GET", "/v1/cells").status_code == 200
        nats.stop()
        until(lambda: server.find("no event log; trying again"), lambda found: found is not None)
        server.stop()
    text = json.dumps(server.log)
    assert "connected to NATS" in text
    for secret in ("s3cr3t-of-nats", TOKEN, "only-to-read"):
        assert secret not in text


def test_levels_of_the_log(nats: NatsServer, start: Callable[..., ServerProcess]) -> None:
    server = start(nats.url, RUST_LOG="warn,cellos.server=info")
    assert {line["target"].split(".")[0] for line in server.log} == {"cellos"}
    ask(server, "GET", "/v1/cells")
    assert server.find("request") is None
    chatty = start(nats.url, RUST_LOG="debug")
    ask(chatty, "GET", "/v1/cells")
    assert chatty.wait_for("request") == {"message": "request", "method": "GET", "path": "/v1/cells", "status": 200}


def test_the_api_has_no_page_and_the_admin_listener_no_token(nats: NatsServer, start: Callable[..., ServerProcess]) -> None:
    server = start(nats.url, CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")
    for path in ("/healthz", "/readyz", "/metrics", "/", "/index.html"):
        assert ask(server, "GET", path).status_code == 404
    assert admin(server, "/healthz").json() == {"status": "ok"}
    assert admin(server, "/readyz").json() == {"status": "ready", "log": "live", "cursor": 0}
    ask(server, "POST", "/v1/formations", json=DOCUMENT)
    assert "cellos_cursor 2.0" in admin(server, "/metrics").text
    assert 'cellos_records{kind="formations"} 1.0' in admin(server, "/metrics").text
    assert admin(server, "/v1/cells").status_code == 404


def test_what_is_no_http_is_a_problem(nats: NatsServer, start: Callable[..., ServerProcess]) -> None:
    server = start(nats.url)
    host, port = server.address.rsplit(":", 1)
    for raw, status, why in (
        (b"NONSENSE\r\n\r\n", b"400 Bad Request", b"not an HTTP request"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b"400 Bad Request", b"not an HTTP request"),
        (b"GET / HTTP/1.1\r\nx y\r\n\r\n", b"400 Bad Request", b"not an HTTP request"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n", b"431 Request Header Fields Too Large", b"more than 32 KiB"),
        (b"BREW /v1/cells HTTP/1.1\r\nhost: x\r\n\r\n", b"501 Not Implemented", b"no route has this method"),
    ):
        with socket.create_connection((host, int(port)), SECONDS) as connection:
            connection.sendall(raw)
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # it does not read to the end what it refuses
                while part := connection.recv(65536):
                    answer += part
        assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
        assert b"application/problem+json" in answer
        assert why in answer
    assert ask(server, "GET", "/v1/version").status_code == 200


# --- outages ------------------------------------------------------------------------------------------------------------------------------


def test_it_serves_without_nats_and_finds_it_when_it_comes(tmp_path: Path, start: Callable[..., ServerProcess]) -> None:
    nats = NatsServer(str(tmp_path / "nats"))
    server = start(nats.url, CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")
    assert ask(server, "GET", "/v1/cells").json() == []
    assert ask(server, "GET", "/v1/formations").json() == {"formations": [], "cursor": 0}
    for answer in (ask(server, "POST", "/v1/formations", json=DOCUMENT), ask(server, "GET", "/v1/events")):
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/service-unavailable")
        assert "retry-after" in answer.headers
    assert (admin(server, "/healthz").status_code, admin(server, "/readyz").status_code) == (200, 503)
    with connect(f"ws://{server.address}/ws/events", additional_headers=AUTHORIZATION, proxy=None, open_timeout=SECONDS) as connection:
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(SECONDS)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "no upstream broker configured")
    try:
        nats.start()
        until(lambda: admin(server, "/readyz").status_code, lambda code: code == 200)
        assert ask(server, "POST", "/v1/formations", json=DOCUMENT).status_code == 201
    finally:
        server.stop()
        nats.stop()


def test_it_lives_through_an_outage_and_loses_nothing(nats: NatsServer, start: Callable[..., ServerProcess]) -> None:
    server = start(nats.url, CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")
    first = ask(server, "POST", "/v1/formations", json=DOCUMENT).json()["id"]
    nats.kill()
    until(lambda: admin(server, "/readyz").status_code, lambda code: code == 503)
    assert ask(server, "GET", f"/v1/formations/{first}").status_code == 200
    answer = ask(server, "GET", "/v1/events")
    assert (answer.status_code, answer.json()["detail"]) == (503, "Event store is temporarily unreachable; retry later")
    assert ask(server, "POST", "/v1/formations", json={**DOCUMENT, "name": "lost"}).status_code == 503
    assert ask(server, "DELETE", f"/v1/formations/{first}").status_code == 503
    nats.start()
    until(lambda: admin(server, "/readyz").status_code, lambda code: code == 200)
    until(lambda: ask(server, "POST", "/v1/formations", json={**DOCUMENT, "name": "next"}).status_code, lambda code: code == 201)
    names = [each["name"] for each in ask(server, "GET", "/v1/formations").json()["formations"]]
    assert sorted(names) == ["demo", "next"]


def test_a_nats_that_does_not_answer_keeps_nobody_waiting(nats: NatsServer, start: Callable[..., ServerProcess]) -> None:
    server = start(nats.url)
    nats.pause()
    try:
        assert ask(server, "GET", "/v1/events").status_code == 503
        assert ask(server, "GET", "/v1/formations").status_code == 200
        late = ask(
            server,
            "POST",
            "/v1/formations",
            json=DOCUMENT,
        )
        assert late.status_code == 503
    finally:
        nats.go_on()


# --- snapshots ----------------------------------------------------------------------------------------------------------------------------


def test_a_snapshot_saves_the_replay(nats: NatsServer, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    server = start(nats.url, CELLOS_SERVER_STATE_DIR=state)
    ask(server, "POST", "/v1/formations", json=DOCUMENT)
    listed = ask(server, "GET", "/v1/formations").content
    server.stop()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state/projection.snapshot").stat().st_mode) == 0o600
    again = start(nats.url, CELLOS_SERVER_STATE_DIR=state)
    loaded, replay = again.find("snapshot loaded"), again.find("replay_complete")
    assert loaded is not None
    assert replay is not None
    assert (loaded["cursor"], replay["events_seen"]) == (2, 0)
    assert ask(again, "GET", "/v1/formations").content == listed
    other = run(CELLOS_SERVER_API_TOKEN="t", CELLOS_SERVER_STATE_DIR=state, CELLOS_NATS_URL=nats.url)
    assert (other.returncode, "another server uses it" in other.stdout) == (1, True)


@pytest.mark.parametrize("fault", ["torn", "foreign"])
def test_a_snapshot_that_cannot_be_used_is_set_aside(
    nats: NatsServer, start: Callable[..., ServerProcess], tmp_path: Path, fault: str
) -> None:
    state = tmp_path / "state"
    server = start(nats.url, CELLOS_SERVER_STATE_DIR=str(state))
    ask(server, "POST", "/v1/formations", json=DOCUMENT)
    listed = ask(server, "GET", "/v1/formations").content
    server.stop()
    kept = state / "projection.snapshot"
    if fault == "torn":
        kept.write_bytes(kept.read_bytes()[:-7])
    else:
        nats.stop()
        nats = NatsServer(str(tmp_path / "other"))
        nats.start()
        listed = b'{"formations":[],"cursor":0}'
    try:
        again = start(nats.url, CELLOS_SERVER_STATE_DIR=str(state))
        again.wait_for("snapshot set aside; the log is read from its beginning")
        until(lambda: ask(again, "GET", "/v1/formations").content, lambda found: found == listed)
        assert [path.name.split("-")[0] for path in state.iterdir() if path.name not in {"lock", "projection.snapshot"}] == [
            {"torn": "projection.snapshot.damaged", "foreign": "projection.snapshot.foreign"}[fault]
        ]
        again.stop()
    finally:
        nats.stop()


def test_without_the_snapshot_of_what_nats_was_down_for(nats: NatsServer, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """The lists of the last time are served before NATS is there."""
    state = str(tmp_path / "state")
    server = start(nats.url, CELLOS_SERVER_STATE_DIR=state)
    ask(server, "POST", "/v1/formations", json=DOCUMENT)
    listed = ask(server, "GET", "/v1/formations").content
    server.stop()
    nats.stop()
    again = start(nats.url, CELLOS_SERVER_STATE_DIR=state)
    assert ask(again, "GET", "/v1/formations").content == listed
    again.stop()


def test_skipping_the_replay(nats: NatsServer, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    first = start(nats.url)
    ask(first, "POST", "/v1/formations", json=DOCUMENT)
    state = tmp_path / "state"
    server = start(nats.url, CELLOS_SERVER_SKIP_REPLAY="TRUE", CELLOS_SERVER_STATE_DIR=str(state), CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")
    assert ask(server, "GET", "/v1/formations").json() == {"formations": [], "cursor": 2}
    assert [each["seq"] for each in ask(server, "GET", "/v1/events").json()["events"]] == [1, 2]
    assert "skipped" in admin(server, "/readyz").json()["replay"]
    ask(first, "POST", "/v1/formations", json={**DOCUMENT, "name": "new"})
    found = until(lambda: ask(server, "GET", "/v1/formations").json(), lambda body: body["cursor"] == 4)
    assert [each["name"] for each in found["formations"]] == ["new"]
    server.stop()
    assert not state.exists()


# --- the end ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(nats: NatsServer, start: Callable[..., ServerProcess], number: int) -> None:
    server = start(nats.url)
    server.signal(number)
    assert server.wait() == 0
    assert server.find("cellos-server ended") is not None


def test_a_signal_ends_it_before_it_serves(tmp_path: Path) -> None:
    """Also while it waits for a NATS that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = ServerProcess(f"nats://127.0.0.1:{silent.getsockname()[1]}", CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0")
        server.launch()
        server.wait_for("cellos-server admin listening")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_request_under_way_is_answered_and_the_second_signal_waits_for_nothing(
    nats: NatsServer, start: Callable[..., ServerProcess]
) -> None:
    for second in (False, True):
        server = start(nats.url)
        host, port = server.address.rsplit(":", 1)
        body = json.dumps({**DOCUMENT, "name": f"n{second}"}).encode()
        with socket.create_connection((host, int(port)), SECONDS) as connection:
            head = f"POST /v1/formations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[:5])
            connection.sendall(body[5:10])
            ask(server, "GET", "/v1/version")  # by then the head was read
            server.signal(signal.SIGTERM)
            server.wait_for("shutdown signal received; draining")
            if second:
                server.signal(signal.SIGTERM)
                assert server.wait() == 128 + signal.SIGTERM
            else:
                connection.sendall(body[10:])
                assert connection.recv(65536).startswith(b"HTTP/1.1 201 ")
                assert server.wait() == 0
