"""Forwarding: a run's events to JetStream, while the run goes on.

`emit` only queues: the spool has the bytes already. A thread of the forwarder's own connects and publishes one event after the other, each
when the one before it was acknowledged: so the stream has them in the order of the run, whatever fails. After a failure it connects again,
by the schedule of the breaker. An event that no stream will ever take is set aside, and the next one is sent.

The end of a run waits a bounded time for what is still queued: see `finish`.
"""

from __future__ import annotations

import _thread
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from cellos.errors import CellosError, EventRefused, EventSinkError
from cellos.eventlog import nats
from cellos.eventlog.breaker import Reconnecting
from cellos.eventlog.jetstream import JetStreamEventSink, PubAck
from cellos.eventlog.nats import ACK_SECONDS, CONNECT_SECONDS

if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # `signal` makes enums of its numbers, which takes longer than to connect

FINISH_SECONDS = 5.0
NEVER_REACHED_SECONDS = 0.2
"""How long the end of a run waits for a server that refused every connection so far."""
_IDLE_SECONDS = 20.0
"""How often an idle connection is looked after. A server asks every two minutes whether we live, and hangs up after two questions."""


class Link(Protocol):
    """An open connection, as `cellos.eventlog.nats.Connection` is one."""

    @property
    def closed(self) -> bool: ...
    def publish(self, subject: str, payload: bytes, *, message_id: str, timeout: float) -> PubAck: ...
    def service(self) -> None: ...
    def close(self) -> None: ...


class Undelivered(Struct, frozen=True, kw_only=True):
    """An event that was not acknowledged, and the last thing that stood in its way. The stream may have it nevertheless."""

    event_id: str
    line: bytes
    error: str


class Connect(Protocol):
    """`cellos.eventlog.nats.connect`, or what stands for it. Raises EventSinkError, ConfigError."""

    def __call__(self, url: str, *, ca_file: str | None, timeout: float) -> Link: ...


class Forwarder:
    """EventSink that publishes in the background. The thread starts at once; `finish` or `close` must be called.

    `url`: as NATS_URL; `ca_file`: as NATS_CA_FILE; `subject`: of every event.
    """

    def __init__(
        self,
        url: str,
        subject: str,
        *,
        ca_file: str | None = None,
        connect: Connect = nats.connect,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = 0
        """Events that the stream acknowledged."""
        self._monotonic = monotonic
        self._publisher = _Reconnecting(lambda seconds: connect(url, ca_file=ca_file, timeout=seconds), self._seconds_left)
        self._sink = JetStreamEventSink(self._publisher, subject, monotonic=monotonic, sleep=self._pause)
        self._lock = _thread.allocate_lock()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._refused: list[Undelivered] = []
        self._error = "not sent yet"
        self._failed = False
        """The last event that was tried, with all attempts, was not taken."""
        self._first_error: str | None = None
        self._end: float | None = None
        """When to give up: set by `finish`."""
        self._hurried = False
        self._abandoned = False
        self._wake, self._tried, self._done = (_held_lock() for _ in range(3))
        _start_thread(self._work)

    def emit(self, event_id: str, line: bytes) -> None:
        """Queue one event. Raises EventSinkError after `finish`."""
        with self._lock:
            if self._end is not None:
                raise EventSinkError("jetstream sink is closed")
            self._waiting.append((event_id, line))
            self._wake_thread()

    def connected(self, timeout: float) -> str | None:
        """Why the first attempt to connect failed (`nats connect: …`), None where it succeeded. Waits for it, `timeout` seconds at most."""
        if not self._tried.acquire(timeout=timeout):
            return f"nats connect: no answer within {timeout:g} s"
        self._tried.release()
        return self._first_error

    def finish(self, seconds: float = FINISH_SECONDS) -> tuple[Undelivered, ...]:
        """Send what is still queued, and end; what was not acknowledged comes back, in the order of the run.

        Takes `seconds` at most, and much less where waiting is no use: nothing is queued; the server, asked once more, refuses the event
        (no stream, or a full one); or no connection was ever made (0.2 s after the first attempt failed).
        """
        with self._lock:
            if self._end is None:
                self._end = self._monotonic() + seconds
                if self._first_error is not None:
                    self._shorten()
                self._wake_thread()
        if self._done.acquire(timeout=seconds + 0.1):
            self._done.release()
        with self._lock:  # a thread that still hangs in a name server's silence finds nothing to do when it comes back
            self._abandoned = True
            waiting = [Undelivered(event_id=event_id, line=line, error=self._error) for event_id, line in self._waiting]
            return (*self._refused, *waiting)

    def close(self) -> None:
        """Give up whatever is queued. Idempotent."""
        self.finish(0.0)

    # ------------------------------------------------------------------ the thread

    def _work(self) -> None:
        try:
            self._connect_first()
            while (event := self._next()) is not None:
                self._deliver(*event)
        except _Over:
            pass
        except Exception as error:  # noqa: BLE001  # nobody reads a traceback of this thread; the events count as undelivered
            self._error = _unforeseen(error)
        finally:
            self._publisher.close()
            self._done.release()

    def _connect_first(self) -> None:
        try:
            self._publisher.open()
        except _Over:
            raise
        except Exception as error:  # noqa: BLE001  # as in _work
            with self._lock:
                self._error = _unforeseen(error)
                self._first_error = error.text if isinstance(error, CellosError) else self._error
                self._shorten()
        finally:
            self._tried.release()

    def _next(self) -> tuple[str, bytes] | None:
        """The event at the head of the queue, which stays there; None when there is nothing more to do."""
        while True:
            with self._lock:
                if self._abandoned:
                    return None
                if self._waiting:
                    return self._waiting[0]
                if self._end is not None:
                    return None
            if not self._wake.acquire(timeout=_IDLE_SECONDS):
                self._publisher.service()

    def _deliver(self, event_id: str, line: bytes) -> None:
        try:
            self._sink.emit(event_id, line)
        except EventRefused as error:
            with self._lock:
                if not self._abandoned:
                    self._waiting.popleft()
                    self._refused.append(Undelivered(event_id=event_id, line=line, error=str(error)))
        except EventSinkError as error:
            self._error, self._failed = str(error), True
            if self._end is not None and self._publisher.is_open:
                raise _Over from error  # the server is there and says no
            state = self._sink.state
            if isinstance(state, Reconnecting):
                self._pause(state.next_after - self._monotonic())
        else:
            with self._lock:
                self._failed = False
                if not self._abandoned:
                    self._waiting.popleft()
                    self.count += 1

    def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until the end, and not once the end is near: then everything is tried once more. Raises _Over."""
        until = self._monotonic() + seconds
        while True:
            now, end = self._monotonic(), self._end
            if end is not None:
                if now >= end or (self._hurried and self._failed and self._publisher.is_open):
                    raise _Over
                if not self._hurried:
                    self._hurried = True
                    self._sink.retry_now()
                    return
            if now >= until:
                return
            self._wake.acquire(timeout=(until if end is None else min(until, end)) - now)

    def _seconds_left(self) -> float | None:
        """Until the end, where there is one. Raises _Over."""
        if self._end is None:
            return None
        left = self._end - self._monotonic()
        if left <= 0:
            raise _Over
        return left

    def _shorten(self) -> None:
        if self._end is not None and not self._publisher.was_open:
            self._end = min(self._end, self._monotonic() + NEVER_REACHED_SECONDS)

    def _wake_thread(self) -> None:
        """Under the lock: nobody else releases it."""
        if self._wake.locked():
            self._wake.release()


class _Over(Exception):
    """No time is left, or no hope."""


class _Reconnecting:
    """Publisher over whatever connection there is, or a new one."""

    def __init__(self, connect: Callable[[float], Link], seconds_left: Callable[[], float | None]) -> None:
        self.was_open = False
        self._connect = connect
        self._seconds_left = seconds_left
        self._link: Link | None = None

    @property
    def is_open(self) -> bool:
        """After a failed publish: it is the server that refused."""
        return self._link is not None and not self._link.closed

    def open(self) -> Link:
        if self._link is None or self._link.closed:
            self.close()
            self._link = self._connect(self._bounded(CONNECT_SECONDS))
            self.was_open = True
        return self._link

    def publish(self, subject: str, payload: bytes, *, message_id: str) -> PubAck:
        return self.open().publish(subject, payload, message_id=message_id, timeout=self._bounded(ACK_SECONDS))

    def service(self) -> None:
        """A connection that was lost while nothing was to be sent is made anew when there is."""
        try:
            if self._link is not None:
                self._link.service()
        except EventSinkError:
            self.close()

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _bounded(self, seconds: float) -> float:
        left = self._seconds_left()
        return seconds if left is None else min(seconds, left)


def _unforeseen(error: Exception) -> str:
    return str(error) if isinstance(error, CellosError) else f"{type(error).__name__}: {error}"


def _held_lock() -> _thread.LockType:
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


def _start_thread(work: Callable[[], None]) -> None:
    """With every signal blocked: a signal of the process is for the thread that waits for it, whose call it shall interrupt."""
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    try:
        _thread.start_new_thread(work, ())
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
