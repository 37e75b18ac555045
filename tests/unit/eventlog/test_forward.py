"""The forwarder with a fake connection and a clock of its own. (Real servers: tests/integration/nats.)"""

from __future__ import annotations

import threading
import time

import pytest

from cellos.errors import ConfigError, EventRefused, EventSinkError
from cellos.eventlog.forward import Forwarder
from cellos.eventlog.jetstream import PubAck

LATE, EARLY = 120.0, 60.0
"""Seconds after which something that needs no time has failed, and what takes less did not wait so long."""


class FakeLink:
    """A connection; what it does is told by its server."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.closed = False

    def publish(self, subject: str, payload: bytes, *, message_id: str, timeout: float) -> PubAck:
        return self.server.publish(self, subject, payload, message_id)

    def service(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeServer:
    """Takes connections, and events; fails each as often as it is told to."""

    def __init__(self) -> None:
        self.links: list[FakeLink] = []
        self.refuse_connections = 0
        self.break_publishes = 0
        self.answers: dict[str, EventSinkError] = {}
        self.stored: list[tuple[str, str, bytes]] = []
        self.tries: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def connect(self, url: str, *, ca_file: str | None, timeout: float) -> FakeLink:
        assert self.gate.wait(LATE)
        if self.refuse_connections:
            self.refuse_connections -= 1
            raise EventSinkError("nats connect: refused")
        self.links.append(FakeLink(self))
        return self.links[-1]

    def publish(self, link: FakeLink, subject: str, payload: bytes, message_id: str) -> PubAck:
        self.tries.append(message_id)
        if message_id in self.answers:
            raise self.answers[message_id]
        if self.break_publishes:
            self.break_publishes -= 1
            link.close()
            raise EventSinkError("broken")
        self.stored.append((message_id, subject, payload))
        return PubAck(stream="S", sequence=len(self.stored))


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def forwarder(server: FakeServer) -> Forwarder:
    return Forwarder("nats://h", "subject", connect=server.connect)


def test_everything_is_sent_in_order_and_the_connection_closed(server: FakeServer) -> None:
    sink = forwarder(server)
    for number in range(100):
        sink.emit(str(number), b"%d" % number)
    assert sink.finish() == ()
    assert server.stored == [(str(number), "subject", b"%d" % number) for number in range(100)]
    assert sink.count == 100
    assert [link.closed for link in server.links] == [True]


def test_emit_never_waits_for_a_connection(server: FakeServer) -> None:
    server.gate.clear()
    sink = forwarder(server)
    sink.emit("a", b"1")
    assert sink.connected(0.0) == "nats connect: no answer within 0 s"
    server.gate.set()
    assert sink.connected(LATE) is None
    assert sink.finish() == ()


def test_a_lost_connection_is_made_anew_and_the_event_sent_again(server: FakeServer) -> None:
    server.break_publishes = 2
    sink = forwarder(server)
    sink.emit("a", b"1")
    sink.emit("b", b"2")
    assert sink.finish() == ()
    assert server.tries == ["a", "a", "a", "b"]
    assert len(server.links) == 3


def test_a_server_that_was_never_there_costs_the_end_little(server: FakeServer) -> None:
    server.refuse_connections = 1_000_000
    sink = forwarder(server)
    assert sink.connected(LATE) == "nats connect: refused"
    sink.emit("a", b"1")
    began = time.monotonic()
    [undelivered] = sink.finish(LATE)
    assert time.monotonic() - began < EARLY
    assert (undelivered.event_id, undelivered.line) == ("a", b"1")
    assert undelivered.error == "event sink: nats connect: refused"


def test_the_end_waits_for_the_first_connection(server: FakeServer) -> None:
    server.gate.clear()
    sink = forwarder(server)
    sink.emit("a", b"1")
    opened = threading.Timer(0.3, server.gate.set)
    opened.start()
    assert sink.finish(LATE) == ()
    opened.join()


def test_nothing_to_send_is_no_reason_to_wait(server: FakeServer) -> None:
    sink = forwarder(server)
    assert sink.connected(LATE) is None
    began = time.monotonic()
    assert sink.finish(LATE) == ()
    assert time.monotonic() - began < EARLY


def test_a_refused_event_comes_back_and_the_others_arrive(server: FakeServer) -> None:
    server.answers["large"] = EventRefused("too large")
    sink = forwarder(server)
    for event_id in ("a", "large", "b"):
        sink.emit(event_id, event_id.encode())
    [undelivered] = sink.finish(LATE)
    assert (undelivered.event_id, undelivered.error) == ("large", "event sink: jetstream publish: too large")
    assert [event_id for event_id, _, _ in server.stored] == ["a", "b"]


def test_what_is_behind_an_event_that_is_not_taken_is_never_sent_before_it(server: FakeServer) -> None:
    server.answers["b"] = EventSinkError("stream is full")
    sink = forwarder(server)
    for event_id in ("a", "b", "c"):
        sink.emit(event_id, event_id.encode())
    began = time.monotonic()
    undelivered = sink.finish(LATE)
    assert time.monotonic() - began < EARLY  # the server says no: there is nothing to wait for
    assert [event.event_id for event in undelivered] == ["b", "c"]
    assert undelivered[0].error == "event sink: jetstream publish: stream is full"
    assert "c" not in server.tries


def test_after_the_end_nothing_is_taken(server: FakeServer) -> None:
    sink = forwarder(server)
    assert sink.finish() == ()
    with pytest.raises(EventSinkError, match="closed"):
        sink.emit("a", b"1")
    assert sink.finish() == ()
    sink.close()
    sink.close()


def test_closing_gives_up_what_is_queued(server: FakeServer) -> None:
    server.refuse_connections = 1_000_000
    sink = forwarder(server)
    assert sink.connected(LATE) is not None
    sink.emit("a", b"1")
    sink.close()
    assert [event.event_id for event in sink.finish()] == ["a"]


def test_a_url_that_cannot_be_read_is_told(server: FakeServer) -> None:
    sink = Forwarder("ftp://h", "subject")
    failure = sink.connected(LATE)
    sink.close()
    assert failure is not None
    assert "NATS_URL: the scheme 'ftp' is not known" in failure


def test_whatever_goes_wrong_in_the_thread_leaves_the_events_undelivered() -> None:
    def broken(url: str, *, ca_file: str | None, timeout: float) -> FakeLink:
        raise RuntimeError("out of luck")

    sink = Forwarder("nats://h", "subject", connect=broken)
    assert sink.connected(LATE) == "RuntimeError: out of luck"
    sink.emit("a", b"1")
    [undelivered] = sink.finish(LATE)
    assert undelivered.error == "RuntimeError: out of luck"


def test_a_config_error_of_the_connection_counts_as_a_failed_one() -> None:
    def broken(url: str, *, ca_file: str | None, timeout: float) -> FakeLink:
        raise ConfigError("no such thing")

    sink = Forwarder("nats://h", "subject", connect=broken)
    assert sink.connected(LATE) == "no such thing"
    sink.close()
