"""The JetStream sink: an event is emitted when the stream has acknowledged it.

The event id is the message id (`Nats-Msg-Id`): an event whose acknowledgement was lost is published again, and the stream drops it as a
duplicate within its window (two minutes unless configured otherwise). The stream itself is never made or changed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec import Struct

from cellos.errors import EventRefused, EventSinkError
from cellos.eventlog.breaker import ATTEMPTS, Breaker, State, retry_pause


class PubAck(Struct, frozen=True, kw_only=True):
    """What a stream answers to a message that it has."""

    stream: str
    sequence: int
    duplicate: bool = False
    """The stream had it already; `sequence` is that of the first one."""


_TOO_LARGE = 10054
_STORE_FAILED = 10077
"""What a stream with `discard: new` answers when it is full, with the limit in its description."""


class _ApiError(Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(Struct):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _ApiError | None = None


_DECODER = msgspec.json.Decoder(_Answer)


def read_answer(status: str, payload: bytes, *, subject: str) -> PubAck:
    """What came back for a message on `subject`. `status` is that of the answer's headers, empty where it has none.

    Raises EventSinkError, with the cure where there is one; EventRefused where another try of the same message cannot help.
    """
    if status.startswith("503"):
        raise EventSinkError(f"no stream takes the subject {subject}; make one: {stream_command(subject)}")
    try:
        answer = _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeError):
        answer = _Answer()
    error = answer.error
    if error is None:
        if not answer.stream or answer.seq < 1:
            raise EventSinkError(f"what answers on the subject {subject} is no stream; make one: {stream_command(subject)}")
        return PubAck(stream=answer.stream, sequence=answer.seq, duplicate=answer.duplicate)
    text = f"{error.description} (error {error.err_code or error.code})"
    if error.err_code == _TOO_LARGE:
        raise EventRefused(f"stream {answer.stream} takes no message of that size: {text}; raise its max_msg_size")
    if error.err_code == _STORE_FAILED and "exceeded" in error.description:
        raise EventSinkError(f"stream {answer.stream} is full: {text}; raise its limits, or let it discard old messages")
    raise EventSinkError(f"stream {answer.stream or 'of ' + subject}: {text}")


def stream_command(subject: str) -> str:
    """The command that makes a stream which takes `subject`."""
    covered = "cellos.events.>" if subject.startswith("cellos.events.") else subject
    return f"nats stream add CELLOS_EVENTS --subjects {quoted(covered)} --defaults"


def quoted(text: str) -> str:
    """For a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


class Publisher(Protocol):
    """Something that hands one message to a stream."""

    def publish(self, subject: str, payload: bytes, *, message_id: str) -> PubAck:
        """Publish, and wait for the stream's answer, a bounded time. Raises EventSinkError: the message may be in the stream or not."""
        ...


class JetStreamEventSink:
    """EventSink over a publisher, with three attempts per event and a breaker between events. Thread-safe where its publisher is."""

    def __init__(self, publisher: Publisher, subject: str, *, monotonic: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.subject = subject
        self._publisher = publisher
        self._breaker = Breaker(monotonic)
        self._sleep = sleep

    @property
    def state(self) -> State:
        """Connected, or Reconnecting with the time of the next probe."""
        return self._breaker.state

    def emit(self, event_id: str, line: bytes) -> None:
        """Publish one event and wait for its acknowledgement. Raises EventSinkError; EventRefused where trying again cannot help."""
        probe = self._breaker.admit()
        try:
            self._publish(event_id, line)
        except EventRefused:
            self._breaker.succeeded(probe=probe)  # the way to the stream is open
            raise
        except EventSinkError:
            self._breaker.failed(probe=probe)
            raise
        except BaseException:
            self._breaker.withdrawn(probe=probe)
            raise
        self._breaker.succeeded(probe=probe)

    def _publish(self, event_id: str, line: bytes) -> None:
        attempt = 1
        while True:
            try:
                self._publisher.publish(self.subject, line, message_id=event_id)
            except EventRefused as error:
                raise EventRefused(f"jetstream publish: {error.text}") from error
            except EventSinkError as error:
                if attempt == ATTEMPTS:
                    raise EventSinkError(f"jetstream publish: {error.text}") from error
                self._sleep(retry_pause(attempt))
                attempt += 1
            else:
                return

    def retry_now(self) -> None:
        """Let the next emit through, whatever failed before."""
        self._breaker.close()

    def close(self) -> None:
        """Nothing to release: whoever made the publisher closes it."""
