"""A real NATS server with JetStream, what the reference client reads from it, and a slow line to it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import nats
import pytest
from nats.js.api import DiscardPolicy

from cellos.testing.nats_server import NatsServer

STREAM = "CELLOS_EVENTS"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A message of a stream, as nats-py sees it."""

    sequence: int
    subject: str
    headers: Mapping[str, str]
    data: bytes

    @property
    def id(self) -> str:
        return self.headers["Nats-Msg-Id"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What nats-py does and sees, for one server."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make_stream(self, *, subjects: tuple[str, ...] = ("cellos.events.>",), **settings: Any) -> None:
        async def make(js: Any) -> None:
            await js.add_stream(name=STREAM, subjects=list(subjects), **settings)

        self._do(make)

    def update_stream(self, **settings: Any) -> None:
        async def update(js: Any) -> None:
            await js.update_stream(name=STREAM, subjects=["cellos.events.>"], **settings)

        self._do(update)

    def messages(self) -> list[Stored]:
        """Everything in the stream, in its order."""

        async def read(js: Any) -> list[Stored]:
            state = (await js.stream_info(STREAM)).state
            found = []
            for sequence in range(state.first_seq, state.last_seq + 1) if state.messages else ():
                message = await js.get_msg(STREAM, sequence)
                found.append(Stored(sequence=sequence, subject=message.subject, headers=message.headers or {}, data=message.data or b""))
            return found

        return list(self._do(read))

    def ids(self) -> list[str]:
        return [message.id for message in self.messages()]

    def wait_for(self, count: int) -> None:
        """Until the stream has so many messages, 60 s at most."""
        deadline = time.monotonic() + 60
        while len(self.messages()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _do(self, action: Callable[[Any], Any]) -> Any:
        async def connected() -> Any:
            connection = await nats.connect(self.url, allow_reconnect=False, **self.options)
            try:
                return await action(connection.jetstream())
            finally:
                await connection.close()

        return asyncio.run(connected())


@pytest.fixture
def reference(server: NatsServer) -> Reference:
    return Reference(url=server.url)


@pytest.fixture
def stream(reference: Reference) -> Reference:
    """The stream that takes `cellos.events.>`."""
    reference.make_stream()
    return reference


@pytest.fixture
def full(reference: Reference) -> Reference:
    """A stream that refuses a message after two."""
    reference.make_stream(max_msgs=2, discard=DiscardPolicy.NEW)
    return reference


@pytest.fixture
def reference_of() -> Callable[..., Reference]:
    return lambda url, **options: Reference(url=url, options=options)


class SlowLine:
    """A TCP relay that holds back whatever it relays, either way, for `delay` seconds. May be told to lose what the server says."""

    def __init__(self, port: int, delay: float) -> None:
        self.loses_answers = False
        self._target = port
        self._delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"nats://127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._relay)
        self._thread.start()

    def close(self) -> None:
        self._stop.close()
        self._thread.join()

    def _relay(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        targets: set[socket.socket] = set()
        held: deque[tuple[float, socket.socket, bytes]] = deque()
        with DefaultSelector() as selector:
            selector.register(self._listener, EVENT_READ)
            selector.register(self._stopped, EVENT_READ)
            while True:
                wait = max(0.0, held[0][0] - time.monotonic()) if held else None
                for key, _ in selector.select(wait):
                    source: Any = key.fileobj
                    if source is self._stopped:
                        for sock in (*other, self._listener, self._stopped):
                            sock.close()
                        return
                    if source is self._listener:
                        client, _ = self._listener.accept()
                        target = socket.create_connection(("127.0.0.1", self._target))
                        other |= {client: target, target: client}
                        targets.add(target)
                        for sock in (client, target):
                            selector.register(sock, EVENT_READ)
                        continue
                    try:
                        data = source.recv(65536)
                    except OSError:
                        data = b""
                    if data and self.loses_answers and source in targets:
                        continue
                    held.append((time.monotonic() + self._delay, other[source], data))
                    if not data:
                        selector.unregister(source)
                while held and held[0][0] <= time.monotonic():
                    _, sink, data = held.popleft()
                    try:
                        sink.sendall(data) if data else sink.shutdown(socket.SHUT_WR)
                    except OSError:
                        continue


@pytest.fixture
def slow_line() -> Iterator[Callable[[int, float], SlowLine]]:
    made: list[SlowLine] = []

    def make(port: int, delay: float) -> SlowLine:
        made.append(SlowLine(port, delay))
        return made[-1]

    yield make
    for line in made:
        line.close()


@pytest.fixture
def events() -> Callable[[int], list[tuple[str, bytes]]]:
    """So many events of one run: id and bytes."""
    return lambda count: [(f"event-{number}", b'{"n":%d,"text":"caf\xc3\xa9"}' % number) for number in range(count)]
