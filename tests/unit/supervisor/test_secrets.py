from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.ports import Listener
from cellos.supervisor.secrets import (
    CONNECTION_SECONDS,
    MAX_CONNECTIONS,
    MAX_REQUEST_BYTES,
    Entry,
    SecretSession,
    answer,
)

PATIENCE_SECONDS = 20
VALUES = {"API_TOKEN": "s3cret-value", "other": 'päss ✓ "\\\n', "long": "x" * (1 << 20)}


TOKEN = b"t0ken"
ENTRIES = {"key": Entry(b'{"value":"s3cret"}\n', 5)}


class TestAnswer:
    def ask(self, request: Any, elapsed: float = 0.0) -> bytes | None:
        line = request if isinstance(request, bytes) else json.dumps(request).encode()
        given = answer(line, token=TOKEN, entries=ENTRIES, elapsed=elapsed)
        return given and given.line

    def test_a_value(self) -> None:
        assert self.ask({"token": "t0ken", "key": "key"}) == b'{"value":"s3cret"}\n'
        assert self.ask({"key": "key", "token": "t0ken", "more": [1]}) == b'{"value":"s3cret"}\n'

    @pytest.mark.parametrize("token", ["", "t0keN", "t0ken ", "t0ke", "t0kenn", "ť0ken", "\0"])
    @pytest.mark.parametrize("key", ["key", "none"])
    def test_who_is_not_authorized_learns_nothing_else(self, token: str, key: str) -> None:
        assert self.ask({"token": token, "key": key}, elapsed=100) == b'{"error":"unauthorized"}\n'

    @pytest.mark.parametrize("key", ["none", "", "KEY", 'k"'])
    def test_an_unknown_key(self, key: str) -> None:
        given = self.ask({"token": "t0ken", "key": key})
        assert given is not None
        assert json.loads(given) == {"error": f'unknown secret key "{key}"'}

    def test_an_entry_has_its_time(self) -> None:
        request = {"token": "t0ken", "key": "key"}
        assert self.ask(request, elapsed=4.9) == b'{"value":"s3cret"}\n'
        assert self.ask(request, elapsed=5.0) == b'{"error":"secret expired"}\n'

    def test_which_is_at_least_a_second(self) -> None:
        entries = {"key": Entry(b"value\n", 0)}
        line = b'{"token":"t0ken","key":"key"}'
        told = [answer(line, token=TOKEN, entries=entries, elapsed=elapsed) for elapsed in (0.9, 1.0)]
        assert [each and each.key for each in told] == ["key", None]

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"{}",
            b"null",
            b"[]",
            b"get key",
            b'{"token":"t0ken"}',
            b'{"token":"t0ken","key":1}',
            b'{"token":["t0ken"],"key":"key"}',
            b'{"token":"t0ken","key":"key"}x',
            b'{"token":"t0ken","key":"\xff"}',
            b'{"token":"t0ken","key":"\\ud800"}',
            b"[" * 4000,
            b'{"x":' + b"[" * 4000,
        ],
    )
    def test_what_is_no_request_gets_nothing(self, line: bytes) -> None:
        assert self.ask(line) is None

    @given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), lambda each: st.dictionaries(st.text(), each)).map(json.dumps))
    def test_nobody_gets_a_value_without_the_token(self, line: bytes | str) -> None:
        given = answer(line.encode() if isinstance(line, str) else line, token=TOKEN, entries=ENTRIES, elapsed=0)
        assert given is None or given.key is None


class Place:
    """A session on a socket of this test, and clients of it."""

    def __init__(self, place: Path) -> None:
        self.path = str(place / "s")
        self.now = 1000.0
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(self.path)
        bound.listen(64)
        self.session = SecretSession(
            Listener(descriptor=bound.detach(), path=self.path),
            VALUES,
            ttl_seconds={"API_TOKEN": 60, "other": 2, "long": 60},
            mode="runtimeBroker",
            monotonic=lambda: self.now,
        )
        self.token = self.session.environment["CELLOS_RUNTIME_SECRET_TOKEN"]
        self.clients = ExitStack()

    def connect(self) -> socket.socket:
        client = self.clients.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(PATIENCE_SECONDS)
        client.connect(self.path)
        return client

    def request(self, key: str = "API_TOKEN", **change: str) -> bytes:
        return json.dumps({"token": self.token, "key": key} | change).encode() + b"\n"

    def ask(self, *pieces: bytes, end: bool = False) -> bytes:
        """All that comes back for a request, or b"" where the connection is closed without."""
        client = self.connect()
        try:
            for piece in pieces:
                client.sendall(piece)
            if end:
                client.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass
        return rest(client)


def rest(client: socket.socket) -> bytes:
    found = b""
    try:
        while data := client.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    place = Place(Path())
    with place.session:
        yield place
        place.clients.close()


class TestSession:
    def test_a_command_is_told_where_and_how(self, place: Place) -> None:
        assert place.session.environment == {
            "CELLOS_SECRET_DELIVERY": "runtimeBroker",
            "CELLOS_RUNTIME_SECRET_SOCKET": place.path,
            "CELLOS_RUNTIME_SECRET_TOKEN": place.token,
        }
        assert len(place.token) == 64

    def test_each_session_has_a_token_of_its_own(self, place: Place, tmp_path: Path) -> None:
        (tmp_path / "2").mkdir()
        other = Place(Path("2"))
        other.session.close()
        assert other.token != place.token

    @pytest.mark.parametrize("key", VALUES)
    def test_values_are_exact(self, place: Place, key: str) -> None:
        given = place.ask(place.request(key))
        assert given.endswith(b"\n")
        assert json.loads(given) == {"value": VALUES[key]}

    def test_errors(self, place: Place) -> None:
        assert place.ask(place.request(token="wrong")) == b'{"error":"unauthorized"}\n'
        assert json.loads(place.ask(place.request("none"))) == {"error": 'unknown secret key "none"'}
        assert place.ask(b"no request\n") == b""

    def test_each_key_has_its_time(self, place: Place) -> None:
        place.now += 2
        assert place.ask(place.request("other")) == b'{"error":"secret expired"}\n'
        assert json.loads(place.ask(place.request("API_TOKEN"))) == {"value": VALUES["API_TOKEN"]}

    def test_only_what_was_given_out_counts_as_fetched(self, place: Place) -> None:
        assert place.session.fetched == frozenset()
        place.ask(place.request("other", token="wrong"))
        place.ask(place.request("none"))
        place.ask(place.request("API_TOKEN"))
        place.now += 60
        place.ask(place.request("long"))
        place.session.close()
        assert place.session.fetched == {"API_TOKEN"}

    def test_what_was_given_out_in_part_was_given_out(self, place: Place) -> None:
        client = place.connect()
        client.sendall(place.request("long"))
        client.recv(1)
        place.session.close()
        assert place.session.fetched == {"long"}

    def test_a_request_may_come_in_pieces(self, place: Place) -> None:
        request = place.request()
        assert json.loads(place.ask(*(request[at : at + 1] for at in range(len(request))))) == {"value": VALUES["API_TOKEN"]}

    def test_the_end_of_what_is_sent_ends_a_request_too(self, place: Place) -> None:
        assert json.loads(place.ask(place.request().removesuffix(b"\n"), end=True)) == {"value": VALUES["API_TOKEN"]}

    def test_one_request_per_connection(self, place: Place) -> None:
        assert place.ask(place.request() * 2).count(b"\n") == 1

    def test_it_shows_no_value(self, place: Place) -> None:
        assert repr(place.session) == "SecretSession(3 keys)"

    def test_one_that_cannot_be_made_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        before = os.listdir("/proc/self/fd")

        def refuse(*_: object) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "eventfd", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            Place(Path())
        assert os.listdir("/proc/self/fd") == before

    def test_the_thread_of_one_that_cannot_start_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        before = os.listdir("/proc/self/fd")
        place = Place(Path())

        def refuse(*_: object) -> int:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("cellos.supervisor.secrets._thread.start_new_thread", refuse)
        with pytest.raises(OSError, match="this process may have no more threads"), place.session:
            pass
        assert os.listdir("/proc/self/fd") == before


class TestHostileClients:
    def test_a_request_that_is_too_long_gets_nothing(self, place: Place) -> None:
        filler = place.request(filler="x" * (MAX_REQUEST_BYTES - len(place.request(filler=""))))
        assert len(filler) == MAX_REQUEST_BYTES
        assert json.loads(place.ask(filler)) == {"value": VALUES["API_TOKEN"]}
        assert place.ask(b" " + filler) == b""
        assert place.ask(b" " * (MAX_REQUEST_BYTES + 1)) == b""
        assert place.ask(b" " * MAX_REQUEST_BYTES, end=True) == b""

    def test_a_silent_one_keeps_nobody_waiting(self, place: Place) -> None:
        silent = place.connect()
        half = place.connect()
        half.sendall(place.request()[:10])
        assert json.loads(place.ask(place.request())) == {"value": VALUES["API_TOKEN"]}
        half.sendall(place.request()[10:])
        assert json.loads(rest(half)) == {"value": VALUES["API_TOKEN"]}
        silent.sendall(place.request())
        assert json.loads(rest(silent)) == {"value": VALUES["API_TOKEN"]}

    def test_one_that_does_not_read_keeps_nobody_waiting(self, place: Place) -> None:
        deaf = place.connect()
        deaf.sendall(place.request("long"))
        assert json.loads(place.ask(place.request("long"))) == {"value": VALUES["long"]}
        assert json.loads(rest(deaf)) == {"value": VALUES["long"]}

    @pytest.mark.parametrize("sent", ["nothing", "half a request", "a request whose answer is not read"])
    def test_its_time_ends(self, place: Place, sent: str) -> None:
        client = place.connect()
        request = place.request("long")
        client.sendall({"nothing": b"", "half a request": request[:5]}.get(sent, request))
        if sent.startswith("a request"):
            client.recv(1)
        place.ask(place.request())  # whoever is answered came later, so `client` has been accepted
        place.now += CONNECTION_SECONDS
        place.ask(place.request())  # wakes the session, which looks at its clock
        assert len(rest(client)) < len(VALUES["long"])

    def test_so_many_at_once_and_the_others_in_order(self, place: Place) -> None:
        silent = [place.connect() for _ in range(MAX_CONNECTIONS)]
        waiting = place.connect()
        waiting.sendall(place.request())
        waiting.settimeout(0.05)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        waiting.settimeout(PATIENCE_SECONDS)
        silent[7].close()
        assert json.loads(rest(waiting)) == {"value": VALUES["API_TOKEN"]}

    def test_many_from_many_threads(self, place: Place) -> None:
        answers: list[bytes] = []

        def ask() -> None:
            answers.extend(place.ask(place.request(key)) for key in VALUES)

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(json.loads(each)["value"] for each in answers) == sorted([*VALUES.values()] * 16)

    def test_one_that_hangs_up_harms_nobody(self, place: Place) -> None:
        for request in (b"", place.request()[:7], place.request("long"), place.request()):
            client = place.connect()
            client.sendall(request)
            client.close()
        assert json.loads(place.ask(place.request())) == {"value": VALUES["API_TOKEN"]}

    def test_when_descriptors_run_out_it_waits(self, place: Place) -> None:
        client = place.connect()
        client.sendall(place.request())
        assert json.loads(rest(client)) == {"value": VALUES["API_TOKEN"]}
        waiting = socket.socket(socket.AF_UNIX)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        fillers: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
            with pytest.raises(OSError, match="Too many open files"):
                fillers.extend(os.dup(0) for _ in range(used + 1))
            waiting.settimeout(0.15)
            waiting.connect(place.path)
            waiting.sendall(place.request())
            with pytest.raises(TimeoutError):
                waiting.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        place.now += 1
        waiting.settimeout(PATIENCE_SECONDS)
        with waiting:
            assert json.loads(rest(waiting)) == {"value": VALUES["API_TOKEN"]}


class TestTheEnd:
    @pytest.fixture
    def held(self, place: Place) -> list[socket.socket]:
        """Clients in every state."""
        clients = [place.connect() for _ in range(3)]
        clients[1].sendall(place.request()[:5])
        clients[2].sendall(place.request("long"))
        place.ask(place.request())
        return clients

    def test_no_client_holds_it_up(self, place: Place, held: list[socket.socket]) -> None:
        place.session.close()
        assert [len(rest(client)) < len(VALUES["long"]) for client in held] == [True] * 3

    def test_nothing_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        descriptors, threads = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
        place = Place(Path())
        with place.session:
            clients = [place.connect() for _ in range(3)]
            place.ask(place.request())
        place.clients.close()
        assert all(client.fileno() == -1 for client in clients)
        assert os.listdir("/proc/self/fd") == descriptors
        assert place.session._entries == {}
        gone(lambda: set(os.listdir("/proc/self/task")) <= set(threads))

    def test_nobody_listens_any_more(self, place: Place) -> None:
        place.session.close()
        with pytest.raises(ConnectionRefusedError):
            place.connect()

    def test_close_is_idempotent(self, place: Place) -> None:
        place.session.close()
        place.session.close()

    def test_a_session_that_was_never_entered_can_be_closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        before = os.listdir("/proc/self/fd")
        Place(Path()).session.close()
        assert os.listdir("/proc/self/fd") == before


def gone(condition: Callable[[], bool]) -> None:
    """The kernel lists a thread a moment longer than its work takes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "a thread stayed"
        os.sched_yield()
