"""Secrets that a command fetches while it runs: one socket in its cell, one request and one answer per connection.

    {"token": "…", "key": "API_TOKEN"}      ->  {"value": "…"}  or  {"error": "…"}         each one line of JSON

Whoever can reach the socket is the cell, and the cell is hostile: a request is short and comes soon, connections are few, and none of them
waits for another or holds up the end of the run. A request that is not one is closed without an answer.

`answer` is the protocol; `SecretSession` serves it in a thread of its own, which it joins.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import os
import select
from _operator import _compare_digest as compare_digest  # `hmac`, its public name, loads OpenSSL
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple

import msgspec

from cellos.ports import Listener

MAX_REQUEST_BYTES = 4096
"""With its line feed."""
MAX_CONNECTIONS = 32
"""Served at once. More of them wait in the backlog of the socket."""
CONNECTION_SECONDS = 5.0
"""From its acceptance to the last byte of the answer."""
SHORTEST_TTL_SECONDS = 1
_OUT_OF_DESCRIPTORS_SECONDS = 0.1


class Request(msgspec.Struct, frozen=True):
    token: str
    key: str


class Entry(NamedTuple):
    """A secret as it is handed out: its whole answer, until its time."""

    answer: bytes
    ttl_seconds: int


class Answer(NamedTuple):
    line: bytes
    key: str | None
    """The secret that the line holds."""


def answer(line: bytes, *, token: bytes, entries: Mapping[str, Entry], elapsed: float) -> Answer | None:
    """What a request gets, `elapsed` seconds after the session began. None: it is no request, and gets nothing."""
    try:
        request = msgspec.json.decode(line, type=Request)
    except (ValueError, RecursionError):  # of bytes, of JSON, of its shape, of its depth
        return None
    if not compare_digest(request.token.encode(), token):
        return _refusal("unauthorized")
    entry = entries.get(request.key)
    if entry is None:
        return _refusal(f'unknown secret key "{request.key}"')
    if elapsed >= max(entry.ttl_seconds, SHORTEST_TTL_SECONDS):
        return _refusal("secret expired")
    return Answer(entry.answer, request.key)


def _refusal(text: str) -> Answer:
    return Answer(_line(error=text), None)


def _line(**members: str) -> bytes:
    return msgspec.json.encode(members) + b"\n"


class SecretSession:
    """Serves `values` on a cell's listener from `__enter__` to `close`, and then forgets them. It owns the listener from the beginning.

    `ttl_seconds` is the time of each key, or of all; it counts from `__enter__`. `mode` is how the document spells the delivery.
    `monotonic` is called in the session's thread. To make and to enter one raises OSError; then the listener is closed.
    """

    def __init__(
        self,
        listener: Listener,
        values: Mapping[str, str],
        *,
        ttl_seconds: Mapping[str, int] | int,
        mode: str,
        monotonic: Callable[[], float],
    ) -> None:
        self._monotonic = monotonic
        self._token = os.urandom(32).hex()
        self._entries = {
            key: Entry(_line(value=value), ttl_seconds if isinstance(ttl_seconds, int) else ttl_seconds[key])
            for key, value in values.items()
        }
        self._fetched: set[str] = set()
        self._connections: dict[int, _Connection] = {}
        self._accept_after = 0.0
        self._listener: _socket.socket | None = _socket.socket(fileno=listener.descriptor)
        self._listener.setblocking(False)
        try:
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._listener.close()
            raise
        self._running = _thread.allocate_lock()
        self.environment = {
            "CELLOS_SECRET_DELIVERY": mode,
            "CELLOS_RUNTIME_SECRET_SOCKET": listener.path,
            "CELLOS_RUNTIME_SECRET_TOKEN": self._token,
        }
        """What the client in the cell needs."""

    @property
    def fetched(self) -> frozenset[str]:
        """The keys whose values left. All of them are in it after `close`."""
        return frozenset(self._fetched)

    def __repr__(self) -> str:
        return f"SecretSession({len(self._entries)} keys)"

    def __enter__(self) -> SecretSession:
        self._began = self._monotonic()
        self._running.acquire()
        try:
            _thread.start_new_thread(self._serve, ())
        except RuntimeError:
            self._running.release()
            self.close()
            raise OSError(errno.EAGAIN, "this process may have no more threads") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every connection and the thread, close the listener, forget the values. Idempotent."""
        if self._listener is None:
            return
        os.eventfd_write(self._stop, 1)
        with self._running:
            self._listener.close()
            self._listener = None
            os.close(self._stop)
            self._entries.clear()

    # -- in the thread

    def _serve(self) -> None:
        assert self._listener is not None
        listener, token = self._listener.fileno(), self._token.encode()
        try:
            while True:
                now = self._monotonic()
                self._drop_late(now)
                ready = self._wait(listener, now)
                if self._stop in ready:
                    return
                for descriptor in ready:
                    if descriptor == listener:
                        self._accept()
                    else:
                        self._advance(self._connections[descriptor], token)
        finally:
            for connection in self._connections.values():
                connection.socket.close()
            self._connections.clear()
            self._running.release()

    def _wait(self, listener: int, now: float) -> list[int]:
        """Descriptors with something to do, or none where some connection's time is over."""
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        times = [connection.until for connection in self._connections.values()]
        if now < self._accept_after:
            times.append(self._accept_after)
        elif len(self._connections) < MAX_CONNECTIONS:
            poll.register(listener, select.POLLIN)
        for descriptor, connection in self._connections.items():
            poll.register(descriptor, select.POLLIN if connection.answer is None else select.POLLOUT)
        timeout = max(0, int((min(times) - now) * 1000) + 1) if times else None
        return [descriptor for descriptor, _ in poll.poll(timeout)]

    def _drop_late(self, now: float) -> None:
        for connection in [each for each in self._connections.values() if now >= each.until]:
            self._drop(connection)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            # What `socket.accept` calls, without the 5 ms that its module costs.
            descriptor, _ = self._listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors: whoever waits keeps waiting, and we must not spin
            self._accept_after = self._monotonic() + _OUT_OF_DESCRIPTORS_SECONDS
            return
        socket = _socket.socket(fileno=descriptor)
        socket.setblocking(False)
        self._connections[descriptor] = _Connection(socket, self._monotonic() + CONNECTION_SECONDS)

    def _advance(self, connection: _Connection, token: bytes) -> None:
        """Read or write what there is."""
        try:
            if connection.answer is None:
                line = connection.read()
                if line is None:
                    return
                given = answer(line, token=token, entries=self._entries, elapsed=self._monotonic() - self._began)
                if given is None:
                    self._drop(connection)
                    return
                connection.answer, connection.unsent = given, memoryview(given.line)
            if connection.write() and connection.answer.key is not None:
                self._fetched.add(connection.answer.key)
            if not connection.unsent:
                self._drop(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        connection.socket.close()


class _Connection:
    """One connection: first its request comes in, then its answer goes out."""

    def __init__(self, socket: _socket.socket, until: float) -> None:
        self.socket = socket
        self.until = until
        self.answer: Answer | None = None
        self.unsent = memoryview(b"")
        self._received = b""

    def read(self) -> bytes | None:
        """The request, once it is whole: up to its line feed, or to the end. Raises OSError; one that is too long is an empty one."""
        data = self.socket.recv(MAX_REQUEST_BYTES + 1)
        line, feed, _ = (self._received + data).partition(b"\n")
        if len(line) + len(feed) > MAX_REQUEST_BYTES:
            return b""
        self._received = line
        return line if feed or not data else None

    def write(self) -> bool:
        """Send what the other end takes. Whether it took something. Raises OSError."""
        sent = self.socket.send(self.unsent)
        self.unsent = self.unsent[sent:]
        return sent > 0
