"""The connection against a server that says what the test wants. (What a real one says: tests/integration/nats.)"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cellos.errors import EventRefused, EventSinkError
from cellos.eventlog import nats
from cellos.eventlog.jetstream import PubAck

INFO = b'INFO {"headers":true,"max_payload":1000}\r\n'


class Script:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def say(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))

    def line(self) -> str:
        return self.file.readline().decode().rstrip("\r\n")

    def welcome(self) -> None:
        """INFO, and a PONG after CONNECT, SUB and PING."""
        self.say(INFO)
        assert [self.line().split(" ")[0] for _ in range(3)] == ["CONNECT", "SUB", "PING"]
        self.say(b"PONG\r\n")

    def published(self) -> tuple[str, bytes]:
        """Where the answer to the next message goes, and its payload."""
        verb, _, reply, header_size, size = self.line().split(" ")
        assert verb == "HPUB"
        return reply, self.file.read(int(size) + 2)[int(header_size) : -2]

    def acknowledge(self, reply: str, sequence: int) -> None:
        self.answer(reply, b'{"stream":"S","seq":%d}' % sequence)

    def until_closed(self) -> bytes:
        """All that still comes. What closes a connection with something unread resets it."""
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := self.file.read1():
                found += chunk
        return found

    def answer(self, reply: str, payload: bytes) -> None:
        self.say(f"MSG {reply} 1 {len(payload)}\r\n".encode(), payload, b"\r\n")


Serve = Callable[[Callable[[Script], None]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs the server's side in a thread; the URL. What it asserts counts."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []

    def start(script: Callable[[Script], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def work() -> None:
            try:
                sock, _ = listener.accept()
                side = Script(sock)
                with sock, side.file:
                    sock.settimeout(20)
                    script(side)
            except BaseException as error:  # noqa: BLE001  # raised where the test ends
                failures.append(error)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return f"nats://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()
    assert not failures


def test_what_a_client_says_of_itself(serve: Serve) -> None:
    said: list[str] = []

    def script(side: Script) -> None:
        side.say(INFO)
        said.extend(side.line() for _ in range(3))
        side.say(b"PONG\r\n")
        side.until_closed()

    url = serve(script).replace("//", "//us%20er:p%40ss@")
    nats.connect(url, name="test").close()
    connect, subscribe, ping = said
    options = json.loads(connect.removeprefix("CONNECT "))
    assert {name: options[name] for name in ("user", "pass", "headers", "no_responders", "verbose", "name")} == {
        "user": "us er", "pass": "p@ss", "headers": True, "no_responders": True, "verbose": False, "name": "test",
    }  # fmt: skip
    assert subscribe.startswith("SUB _INBOX.")
    assert ping == "PING"


def test_a_ping_is_answered_while_we_wait(serve: Serve) -> None:
    def script(side: Script) -> None:
        side.welcome()
        reply, _ = side.published()
        side.say(b"PING\r\n")
        assert side.line() == "PONG"
        side.acknowledge(reply, 3)
        side.until_closed()

    connection = nats.connect(serve(script))
    assert connection.publish("a", b"x", message_id="1") == PubAck(stream="S", sequence=3)
    connection.close()


def test_a_ping_is_answered_when_an_idle_connection_is_looked_after(serve: Serve) -> None:
    answered = threading.Event()

    def script(side: Script) -> None:
        side.welcome()
        side.say(b"PING\r\n")
        assert side.line() == "PONG"
        answered.set()
        side.until_closed()

    connection = nats.connect(serve(script))
    deadline = time.monotonic() + 20
    while not answered.is_set() and time.monotonic() < deadline:
        connection.service()
    connection.close()


def test_looking_after_a_connection_never_waits_and_notices_its_end(serve: Serve) -> None:
    silent = threading.Event()

    def script(side: Script) -> None:
        side.welcome()
        assert silent.wait(20)

    connection = nats.connect(serve(script))
    connection.service()
    assert not connection.closed
    silent.set()
    deadline = time.monotonic() + 20
    failure = None
    while failure is None and time.monotonic() < deadline:
        try:
            connection.service()
        except EventSinkError as error:
            failure = error.text
    assert failure is not None
    assert "the server closed the connection" in failure
    assert connection.closed
    connection.service()


def test_answers_that_are_not_ours_are_passed_over(serve: Serve) -> None:
    def script(side: Script) -> None:
        side.welcome()
        reply, _ = side.published()
        inbox = reply.rpartition(".")[0]
        for other in (f"{inbox}.77", f"{inbox}.x", f"{inbox}.²", "elsewhere", reply + "0"):
            side.acknowledge(other, 99)
        side.acknowledge(reply, 1)
        side.acknowledge(reply, 2)
        side.until_closed()

    connection = nats.connect(serve(script))
    assert connection.publish("a", b"x", message_id="1").sequence == 1
    connection.close()


def test_a_changed_limit_is_followed(serve: Serve) -> None:
    def script(side: Script) -> None:
        side.welcome()
        reply, _ = side.published()
        side.say(b'INFO {"headers":true,"max_payload":50}\r\n')
        side.acknowledge(reply, 1)
        side.until_closed()

    connection = nats.connect(serve(script))
    connection.publish("a", b"x" * 100, message_id="1")
    with pytest.raises(EventRefused, match="max_payload 50"):
        connection.publish("a", b"x" * 100, message_id="2")
    connection.close()


@pytest.mark.parametrize("message_id", ["", "a\r\nb: c", "a\nb", " a", "a ", "a\x00"])
def test_an_id_that_is_no_header_is_refused_before_anything_is_sent(serve: Serve, message_id: str) -> None:
    def script(side: Script) -> None:
        side.welcome()
        assert side.until_closed() == b""

    connection = nats.connect(serve(script))
    with pytest.raises(EventRefused, match="cannot be a message id"):
        connection.publish("a", b"x", message_id=message_id)
    connection.close()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"-ERR 'Stale Connection'\r\n", "the server says: Stale Connection"),
        (b"HTTP/1.1 400\r\n", "is this a NATS server?"),
        (b"", "the server closed the connection"),
    ],
)
def test_what_ends_a_connection_in_the_middle(serve: Serve, said: bytes, text: str) -> None:
    def script(side: Script) -> None:
        side.welcome()
        side.published()
        side.say(said)

    connection = nats.connect(serve(script))
    with pytest.raises(EventSinkError, match=text):
        connection.publish("a", b"x", message_id="1")
    assert connection.closed


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"", "the server closed the connection"),
        (b"SSH-2.0-OpenSSH\r\n", "is this a NATS server?"),
        (b"-ERR 'maximum connections exceeded'\r\n", "the server says: maximum connections exceeded"),
        (b"PING\r\n", "unexpected answer; is this a NATS server?"),
        (b'INFO {"headers":false,"version":"1.4.0"}\r\n', "knows no message headers"),
        (b'INFO {"headers":true,"tls_required":true}\r\nPING\r\n', "more than INFO came before TLS began"),
        (INFO + b"-ERR 'Authorization Violation'\r\n", "the server says: Authorization Violation"),
    ],
)
def test_what_makes_no_connection(serve: Serve, said: bytes, text: str) -> None:
    def script(side: Script) -> None:
        side.say(said)
        side.sock.shutdown(socket.SHUT_WR)
        side.until_closed()

    with pytest.raises(EventSinkError, match=text) as caught:
        nats.connect(serve(script).replace("//", "//user:s3cret@"))
    assert str(caught.value).startswith("event sink: nats connect: nats://127.0.0.1:")
    assert "s3cret" not in str(caught.value)


def test_a_host_that_is_not_known() -> None:
    with pytest.raises(EventSinkError, match=r"nats connect: nats://host\.invalid:4222: "):
        nats.connect("nats://host.invalid")
