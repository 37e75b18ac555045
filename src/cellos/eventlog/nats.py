"""A small blocking NATS connection that publishes to streams and reads their acknowledgements.

One owner uses it, from one thread. Many messages may be in flight; each is answered by itself, on an inbox of the connection. A connection
that failed, or that did not answer in time, closes itself: whether its messages arrived is not known then, and to connect anew and to
publish them again, under the same message id, is up to the owner.

(nats-py needs asyncio, which alone costs a one-shot run more than it takes to make its cell.)
"""

from __future__ import annotations

import _socket
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from cellos.errors import EventRefused, EventSinkError, ProtocolError, os_error_text
from cellos.eventlog import nats_protocol as protocol
from cellos.eventlog.jetstream import PubAck, read_answer
from cellos.eventlog.nats_url import Server, read_servers

if TYPE_CHECKING:
    import ssl

CONNECT_SECONDS = 2.0
ACK_SECONDS = 5.0
_INBOX_SID = "1"
_CLIENT_VERSION = "1"
"""Of this client, not of the project: servers list it beside the name."""
_READ_BYTES = 1 << 16
_TOO_LATE = "no answer in time"

Answer = PubAck | EventSinkError


def connect(
    url: str,
    *,
    ca_file: str | None = None,
    name: str = "cellos",
    timeout: float = CONNECT_SECONDS,
    monotonic: Callable[[], float] = time.monotonic,
) -> Connection:
    """A connection to the first server of `url` that takes us; each gets `timeout` seconds. `ca_file`: a PEM file of more roots to trust.

    Raises EventSinkError (`nats connect: …`) with what each server answered, ConfigError for an unusable URL; neither quotes credentials.
    """
    failures = []
    for server in read_servers(url):
        try:
            return _connect(server, ca_file, name, timeout, monotonic)
        except EventSinkError as error:
            failures.append(error.text)
    raise EventSinkError(f"nats connect: {'; '.join(failures)}")


class Connection:
    """An established connection, which has proven that it is let in."""

    def __init__(self, link: _Link, info: protocol.ServerInfo, inbox: str) -> None:
        self.info = info
        self._link = link
        self._inbox = inbox
        self._sent = 0
        self._subjects: dict[int, str] = {}
        """Subject of each message in flight, by its number."""
        self._answers: dict[int, Answer] = {}

    @property
    def closed(self) -> bool:
        """Of no use any more."""
        return self._link.closed

    @property
    def in_flight(self) -> int:
        """Messages sent and not yet answered to the owner."""
        return len(self._subjects) + len(self._answers)

    def publish(self, subject: str, payload: bytes, *, message_id: str, timeout: float = ACK_SECONDS) -> PubAck:
        """Publish one message and wait for its acknowledgement. Raises EventSinkError, EventRefused."""
        number = self.send(subject, payload, message_id=message_id)
        deadline = self._link.monotonic() + timeout
        while number not in self._answers:
            self._pump(deadline)
        answer = self._answers.pop(number)
        if isinstance(answer, EventSinkError):
            raise answer
        return answer

    def send(self, subject: str, payload: bytes, *, message_id: str, timeout: float = ACK_SECONDS) -> int:
        """Send one message; the number by which `receive` gives its answer. Raises EventSinkError, EventRefused."""
        if not message_id.isprintable() or message_id != message_id.strip() or not message_id:
            raise EventRefused(f"the event id {message_id[:80]!r} cannot be a message id")
        headers = protocol.header_block({"Nats-Msg-Id": message_id})
        size = len(headers) + len(payload)
        if size > self.info.max_payload:
            raise EventRefused(f"{size} bytes exceed what the server takes (max_payload {self.info.max_payload})")
        self._sent += 1
        number = self._sent
        self._link.send(protocol.publish(subject, f"{self._inbox}.{number}", headers, payload), self._link.monotonic() + timeout)
        self._subjects[number] = subject
        return number

    def receive(self, *, timeout: float = ACK_SECONDS) -> tuple[int, Answer]:
        """The next answer to any message in flight. Raises EventSinkError: none came, and the connection is closed."""
        deadline = self._link.monotonic() + timeout
        while not self._answers:
            self._pump(deadline)
        number = next(iter(self._answers))
        return number, self._answers.pop(number)

    def service(self) -> None:
        """Read what came meanwhile, and answer the server's PING: one that is not answered ends the connection. Never waits.

        Raises EventSinkError: the connection is closed.
        """
        self._link.poll()
        while self._link.heard:
            self._take(self._link.heard.popleft())

    def close(self) -> None:
        """Idempotent."""
        self._link.close()

    def _pump(self, deadline: float) -> None:
        self._take(self._link.next(deadline))

    def _take(self, event: protocol.Event) -> None:
        match event:
            case protocol.Message():
                self._answered(event)
            case protocol.Ping():
                self._link.send(protocol.PONG, self._link.monotonic() + ACK_SECONDS)
            case protocol.Info():
                self.info = event.info
            case protocol.ServerError():
                self._refused(event.text)
            case _:
                pass

    def _answered(self, message: protocol.Message) -> None:
        suffix = message.subject.rpartition(".")[2]
        subject = self._subjects.pop(int(suffix), None) if suffix.isascii() and suffix.isdigit() else None
        if subject is None:
            return
        try:
            self._answers[int(suffix)] = read_answer(protocol.status(message.headers), message.payload, subject=subject)
        except EventSinkError as error:
            self._answers[int(suffix)] = error

    def _refused(self, text: str) -> None:
        """A subject that we may not publish on fails its messages; every other error of a server ends the connection."""
        lowered = text.lower()
        if not lowered.startswith("permissions violation"):
            raise self._link.failure(f"the server says: {text}")
        for number, subject in list(self._subjects.items()):
            if f'"{subject}"'.lower() in lowered:
                del self._subjects[number]
                self._answers[number] = EventSinkError(f"the server says: {text}")


class _Link:
    """A socket with a parser and deadlines. Whatever fails closes it, and names the server."""

    def __init__(self, sock: _socket.socket, server: Server, monotonic: Callable[[], float]) -> None:
        self.server = server
        self.monotonic = monotonic
        self.closed = False
        self.heard: deque[protocol.Event] = deque()
        """What the server said and nobody took yet."""
        self._sock = sock
        self._parser = protocol.Parser()

    def send(self, data: bytes, deadline: float) -> None:
        """Everything of `data`."""
        self._arm(deadline)
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise self.failure(_why(error)) from error

    def next(self, deadline: float) -> protocol.Event:
        """What the server said next."""
        while not self.heard:
            self._arm(deadline)
            try:
                data = self._sock.recv(_READ_BYTES)
            except OSError as error:
                raise self.failure(_why(error)) from error
            self._hear(data)
        return self.heard.popleft()

    def poll(self) -> None:
        """Hear what is there already."""
        if self.closed:
            return
        self._sock.settimeout(0)
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError as error:
            if isinstance(error, BlockingIOError) or type(error).__name__ == "SSLWantReadError":
                return
            raise self.failure(_why(error)) from error
        self._hear(data)

    def secure(self, context: ssl.SSLContext, deadline: float) -> None:
        """Go on encrypted."""
        if self._parser.pending or self.heard:  # it came in the clear, so anybody may have sent it
            raise self.failure("more than INFO came before TLS began")
        import socket

        plain = socket.socket(fileno=self._sock.detach())
        try:
            plain.settimeout(max(0.001, deadline - self.monotonic()))
            self._sock = context.wrap_socket(plain, server_hostname=self.server.host)
        except OSError as error:
            plain.close()
            raise self.failure(f"TLS: {_why(error)}") from error

    def failure(self, text: str) -> EventSinkError:
        """Close, and give the error to raise."""
        self.close()
        return EventSinkError(f"{self.server.shown}: {text}")

    def close(self) -> None:
        """Idempotent."""
        self.closed = True
        self._sock.close()

    def _arm(self, deadline: float) -> None:
        if self.closed:
            raise self.failure("the connection is closed")
        left = deadline - self.monotonic()
        if left <= 0:
            raise self.failure(_TOO_LATE)
        self._sock.settimeout(left)

    def _hear(self, data: bytes) -> None:
        if not data:
            raise self.failure("the server closed the connection")
        try:
            self.heard.extend(self._parser.feed(data))
        except ProtocolError as error:
            raise self.failure(error.text) from error


def _connect(server: Server, ca_file: str | None, name: str, timeout: float, monotonic: Callable[[], float]) -> Connection:
    deadline = monotonic() + timeout
    link = _Link(_dial(server, timeout), server, monotonic)
    try:
        info = _first_info(link, deadline)
        if server.tls or info.tls_required or (ca_file is not None and info.tls_available):
            if not (info.tls_required or info.tls_available):
                raise link.failure("the server offers no TLS")
            link.secure(_tls_context(ca_file), deadline)
        if not info.headers:
            raise link.failure(f"the server (version {info.version[:20]}) knows no message headers; 2.2 is the first that does")
        inbox = f"_INBOX.{os.urandom(11).hex()}"
        hello = (protocol.connect(_options(server, name)), protocol.subscribe(f"{inbox}.*", _INBOX_SID), protocol.PING)
        link.send(b"".join(hello), deadline)
        return Connection(link, _admitted(link, info, deadline), inbox)
    except BaseException:
        link.close()
        raise


def _dial(server: Server, timeout: float) -> _socket.socket:
    """A TCP connection to the first address of the host that takes one."""
    failure: OSError | None = None
    try:
        # As bytes: of a text it would load the tables of international names first, which takes longer than to connect.
        host = server.host.encode() if server.host.isascii() else server.host
        addresses = _socket.getaddrinfo(host, server.port, 0, _socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EventSinkError(f"{server.shown}: {error.strerror if isinstance(error, OSError) else 'no host name'}") from error
    for family, kind, number, _, address in addresses:
        sock = None
        try:
            sock = _socket.socket(family, kind, number)
            sock.settimeout(timeout)
            sock.connect(address)
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            failure = error
            if sock is not None:
                sock.close()
    raise EventSinkError(f"{server.shown}: {_why(failure) if failure else 'the host has no address'}") from failure


def _first_info(link: _Link, deadline: float) -> protocol.ServerInfo:
    event = link.next(deadline)
    if isinstance(event, protocol.Info):
        return event.info
    raise link.failure(_said(event))


def _admitted(link: _Link, info: protocol.ServerInfo, deadline: float) -> protocol.ServerInfo:
    """PONG says that CONNECT and SUB were read and nothing was wrong with them."""
    while True:
        match event := link.next(deadline):
            case protocol.Pong():
                return info
            case protocol.Info():
                info = event.info
            case protocol.Ping():
                link.send(protocol.PONG, deadline)
            case _:
                raise link.failure(_said(event))


def _said(event: protocol.Event) -> str:
    return f"the server says: {event.text}" if isinstance(event, protocol.ServerError) else "unexpected answer; is this a NATS server?"


def _options(server: Server, name: str) -> dict[str, object]:
    options: dict[str, object] = {
        "verbose": False,
        "pedantic": False,
        "headers": True,
        "no_responders": True,
        "echo": False,
        "protocol": 1,
        "lang": "python",
        "name": name,
        "version": _CLIENT_VERSION,
    }
    if server.user is not None:
        options |= {"user": server.user, "pass": server.password}
    elif server.token is not None:
        options["auth_token"] = server.token
    return options


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    """The system's roots, and those of the file."""
    import ssl

    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise EventSinkError(f"NATS_CA_FILE {ca_file}: {_why(error)}") from error
    return context


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return _TOO_LATE
    verify = getattr(error, "verify_message", None)  # of ssl.SSLCertVerificationError
    if verify:
        return f"the certificate is not accepted: {verify}"
    return os_error_text(error)
