from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cellos.errors import EventRefused, EventSinkError
from cellos.eventlog.breaker import Connected, Reconnecting
from cellos.eventlog.jetstream import JetStreamEventSink, PubAck, read_answer, stream_command


class Clock:
    """Sleeping is what makes its time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class FakePublisher:
    """Fails as long as it is told to."""

    def __init__(self) -> None:
        self.failures: list[EventSinkError] = []
        self.calls: list[tuple[str, bytes, str]] = []
        self.on_call: Callable[[], None] = lambda: None

    def fail(self, times: int) -> None:
        self.failures = [EventSinkError(f"failure {number}") for number in range(1, times + 1)]

    def publish(self, subject: str, payload: bytes, *, message_id: str) -> PubAck:
        self.calls.append((subject, payload, message_id))
        self.on_call()
        if self.failures:
            raise self.failures.pop(0)
        return PubAck(stream="S", sequence=len(self.calls))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture
def sink(publisher: FakePublisher, clock: Clock) -> JetStreamEventSink:
    return JetStreamEventSink(publisher, "cellos.events.v1", monotonic=clock, sleep=clock.sleep)


def test_the_event_id_is_the_message_id(sink: JetStreamEventSink, publisher: FakePublisher) -> None:
    sink.emit("id", b"line")
    assert publisher.calls == [("cellos.events.v1", b"line", "id")]
    assert sink.state == Connected()


def test_three_attempts_and_the_pauses_between_them(sink: JetStreamEventSink, publisher: FakePublisher, clock: Clock) -> None:
    publisher.fail(2)
    sink.emit("id", b"line")
    assert len(publisher.calls) == 3
    assert clock.slept == pytest.approx([0.1, 0.4])
    assert sink.state == Connected()


def test_the_last_error_is_the_one_that_is_told(sink: JetStreamEventSink, publisher: FakePublisher) -> None:
    publisher.fail(9)
    with pytest.raises(EventSinkError) as caught:
        sink.emit("id", b"line")
    assert str(caught.value) == "event sink: jetstream publish: failure 3"
    assert len(publisher.calls) == 3


def test_while_open_nothing_is_published(sink: JetStreamEventSink, publisher: FakePublisher, clock: Clock) -> None:
    publisher.fail(3)
    with pytest.raises(EventSinkError):
        sink.emit("1", b"line")
    assert sink.state == Reconnecting(attempt=0, next_after=clock.now + 0.1)
    with pytest.raises(EventSinkError) as caught:
        sink.emit("2", b"line")
    assert str(caught.value) == "event sink: jetstream sink in reconnecting state (attempt=0, next probe in 100ms)"
    assert len(publisher.calls) == 3


def test_the_next_event_after_the_pause_is_the_probe(sink: JetStreamEventSink, publisher: FakePublisher, clock: Clock) -> None:
    publisher.fail(6)
    for attempt in range(2):
        with pytest.raises(EventSinkError):
            sink.emit("1", b"line")
        assert sink.state == Reconnecting(attempt=attempt, next_after=clock.now + 0.1 * 2**attempt)
        clock.now += 0.1 * 2**attempt
    sink.emit("1", b"line")
    assert sink.state == Connected()


def test_of_concurrent_events_one_is_the_probe(sink: JetStreamEventSink, publisher: FakePublisher, clock: Clock) -> None:
    publisher.fail(3)
    with pytest.raises(EventSinkError):
        sink.emit("1", b"line")
    clock.now += 1
    publisher.calls.clear()
    in_probe, others_done = threading.Event(), threading.Event()

    def hold() -> None:
        in_probe.set()
        assert others_done.wait(20)

    publisher.on_call = hold
    probe = threading.Thread(target=sink.emit, args=("probe", b"line"))
    probe.start()
    assert in_probe.wait(20)
    for number in range(5):
        with pytest.raises(EventSinkError, match="reconnecting state"):
            sink.emit(str(number), b"line")
    others_done.set()
    probe.join()
    assert [message_id for _, _, message_id in publisher.calls] == ["probe"]
    assert sink.state == Connected()


def test_an_event_that_is_refused_for_good_is_tried_once_and_opens_nothing(sink: JetStreamEventSink, publisher: FakePublisher) -> None:
    publisher.failures = [EventRefused("too large")]
    with pytest.raises(EventRefused, match="jetstream publish: too large"):
        sink.emit("id", b"line")
    assert len(publisher.calls) == 1
    assert sink.state == Connected()


def test_whatever_else_is_raised_leaves_the_next_event_its_probe(sink: JetStreamEventSink, publisher: FakePublisher, clock: Clock) -> None:
    publisher.fail(3)
    with pytest.raises(EventSinkError):
        sink.emit("1", b"line")
    clock.now += 1

    def stop() -> None:
        raise KeyboardInterrupt

    publisher.on_call = stop
    with pytest.raises(KeyboardInterrupt):
        sink.emit("1", b"line")
    publisher.on_call = lambda: None
    sink.emit("1", b"line")


# ---------------------------------------------------------------- answers


def answer(payload: bytes, status: str = "") -> PubAck:
    return read_answer(status, payload, subject="cellos.events.v1")


def test_an_acknowledgement() -> None:
    assert answer(b'{"stream":"S","seq":7,"domain":"hub"}') == PubAck(stream="S", sequence=7)
    assert answer(b'{"stream":"S","seq":7,"duplicate":true}') == PubAck(stream="S", sequence=7, duplicate=True)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (
            b'{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"S","seq":0}',
            "stream S is full: maximum messages exceeded (error 10077); raise its limits, or let it discard old messages",
        ),
        (
            b'{"error":{"code":503,"err_code":10023,"description":"insufficient resources"},"stream":"S","seq":0}',
            "stream S: insufficient resources (error 10023)",
        ),
        (b'{"error":{"code":503,"description":"no"}}', "stream of cellos.events.v1: no (error 503)"),
    ],
)
def test_a_refusal_says_what_and_what_to_do(payload: bytes, text: str) -> None:
    with pytest.raises(EventSinkError) as caught:
        answer(payload)
    assert caught.value.text == text
    assert not isinstance(caught.value, EventRefused)


def test_an_event_above_the_size_of_messages_is_refused_for_good() -> None:
    with pytest.raises(EventRefused):
        answer(b'{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"},"stream":"S","seq":0}')


@pytest.mark.parametrize("payload", [b"", b"hello", b"{}", b"[]", b'{"stream":"S"}', b'{"stream":"","seq":3}', b"\xff"])
def test_what_is_no_acknowledgement_is_none(payload: bytes) -> None:
    with pytest.raises(EventSinkError, match="is no stream"):
        answer(payload)


def test_nobody_who_takes_the_subject() -> None:
    with pytest.raises(EventSinkError, match=r"no stream takes the subject cellos\.events\.v1; make one: nats stream add CELLOS_EVENTS"):
        answer(b"", status="503")


@pytest.mark.parametrize(
    ("subject", "covered"),
    [("cellos.events.v1", "'cellos.events.>'"), ("cellos.events.a.b", "'cellos.events.>'"), ("own.x", "'own.x'"), ("it's", "'it'\\''s'")],
)
def test_the_command_that_is_named_makes_a_stream_that_takes_the_subject(subject: str, covered: str) -> None:
    assert stream_command(subject) == f"nats stream add CELLOS_EVENTS --subjects {covered} --defaults"
