"""The forwarder against a server that is down, dies, is slow, is full, has no stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.eventlog import forward
from cellos.eventlog.forward import Forwarder, Undelivered
from cellos.testing.nats_server import NatsServer

SUBJECT = "cellos.events.v1"
Events = list[tuple[str, bytes]]
Make = Callable[[int], Events]
LATE = 120.0
"""Seconds after which something that needs no time has failed."""
EARLY = 60.0
"""What takes less did not wait until LATE."""


def timed(forwarder: Forwarder, seconds: float = LATE) -> tuple[tuple[Undelivered, ...], float]:
    began = time.monotonic()
    return forwarder.finish(seconds), time.monotonic() - began


def until(condition: Callable[[], bool]) -> None:
    """What another thread does is waited for, for a bounded time."""
    deadline = time.monotonic() + LATE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_events_arrive_in_order_unchanged_under_their_ids(server: NatsServer, stream: Any, events: Make) -> None:
    sent = events(50)
    forwarder = Forwarder(server.url, SUBJECT)
    for event in sent:
        forwarder.emit(*event)
    assert forwarder.connected(LATE) is None
    assert forwarder.finish(LATE) == ()
    assert forwarder.count == 50
    assert [(message.id, message.data) for message in stream.messages()] == sent
    assert {message.subject for message in stream.messages()} == {SUBJECT}


def test_a_server_that_is_down_holds_up_nothing(server: NatsServer, events: Make) -> None:
    server.stop()
    sent = events(3000)
    forwarder = Forwarder(server.url, SUBJECT)
    assert forwarder.connected(LATE) == f"nats connect: {server.url}: Connection refused (os error 111)"
    began = time.monotonic()
    for event in sent:
        forwarder.emit(*event)
    assert time.monotonic() - began < EARLY  # less than an attempt to connect for each
    undelivered, took = timed(forwarder)
    assert [(event.event_id, event.line) for event in undelivered] == sent
    assert all("Connection refused" in event.error for event in undelivered)
    assert took < EARLY
    assert forwarder.count == 0


def test_a_server_that_comes_up_during_the_run_gets_everything(server: NatsServer, stream: Any, events: Make) -> None:
    server.stop()
    sent = events(5)
    forwarder = Forwarder(server.url, SUBJECT)
    assert forwarder.connected(LATE) is not None
    for event in sent:
        forwarder.emit(*event)
    server.start()
    until(lambda: forwarder.count == 5)
    assert forwarder.finish(LATE) == ()
    assert stream.ids() == [event_id for event_id, _ in sent]


def test_a_server_killed_and_restarted_in_the_middle_loses_and_repeats_nothing(server: NatsServer, stream: Any, events: Make) -> None:
    sent = events(60)
    forwarder = Forwarder(server.url, SUBJECT)
    for number, event in enumerate(sent):
        forwarder.emit(*event)
        if number in {15, 35}:
            until(lambda number=number: forwarder.count > number - 10)  # type: ignore[misc]  # some are acknowledged, others on their way
            server.kill()
        if number in {20, 45}:
            server.start()
    assert forwarder.finish(LATE) == ()
    assert forwarder.count == 60
    assert stream.ids() == [event_id for event_id, _ in sent]


def test_the_end_waits_for_a_server_that_was_there_and_comes_back(server: NatsServer, stream: Any, events: Make) -> None:
    first, *rest = events(4)
    forwarder = Forwarder(server.url, SUBJECT)
    forwarder.emit(*first)
    until(lambda: forwarder.count == 1)
    server.kill()
    for event in rest:
        forwarder.emit(*event)
    server.start()
    assert forwarder.finish(LATE) == ()
    assert stream.ids() == ["event-0", "event-1", "event-2", "event-3"]


def test_the_end_is_bounded_where_it_does_not_come_back(server: NatsServer, stream: Any, events: Make) -> None:
    first, *rest = events(4)
    forwarder = Forwarder(server.url, SUBJECT)
    forwarder.emit(*first)
    until(lambda: forwarder.count == 1)
    server.kill()
    for event in rest:
        forwarder.emit(*event)
    undelivered, took = timed(forwarder, 1.0)
    assert [event.event_id for event in undelivered] == ["event-1", "event-2", "event-3"]
    assert took < EARLY
    assert forwarder.count == 1


def test_the_end_is_bounded_where_the_server_is_silent(
    server: NatsServer, stream: Any, events: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "ACK_SECONDS", LATE)
    forwarder = Forwarder(server.url, SUBJECT)
    assert forwarder.connected(LATE) is None
    server.pause()
    for event in events(2):
        forwarder.emit(*event)
    undelivered, took = timed(forwarder, 0.5)
    server.go_on()
    assert [event.event_id for event in undelivered] == ["event-0", "event-1"]
    assert took < EARLY


def test_an_acknowledgement_that_got_lost_leaves_no_second_copy(server: NatsServer, stream: Any, events: Make, slow_line: Any) -> None:
    line = slow_line(server.port, 0.0)
    forwarder = Forwarder(line.url, SUBJECT)
    assert forwarder.connected(LATE) is None
    line.loses_answers = True
    forwarder.emit(*events(1)[0])
    until(lambda: stream.ids() == ["event-0"])
    undelivered = forwarder.finish(0.01)
    assert [event.event_id for event in undelivered] == ["event-0"]
    again = Forwarder(server.url, SUBJECT)
    again.emit(undelivered[0].event_id, undelivered[0].line)
    assert again.finish(LATE) == ()
    assert stream.ids() == ["event-0"]


def test_a_slow_line_delays_only_the_end(server: NatsServer, stream: Any, events: Make, slow_line: Any) -> None:
    sent = events(8)
    forwarder = Forwarder(slow_line(server.port, 0.2).url, SUBJECT)
    for event in sent:
        forwarder.emit(*event)
    assert forwarder.count < 8, "each takes 0.4 s on its way"
    assert forwarder.finish(LATE) == ()
    assert stream.ids() == [event_id for event_id, _ in sent]


def test_a_full_stream_ends_the_waiting_early_and_keeps_the_order(server: NatsServer, full: Any, events: Make) -> None:
    forwarder = Forwarder(server.url, SUBJECT)
    for event in events(5):
        forwarder.emit(*event)
    undelivered, took = timed(forwarder)
    assert [event.event_id for event in undelivered] == ["event-2", "event-3", "event-4"]
    assert all("stream CELLOS_EVENTS is full" in event.error for event in undelivered)
    assert took < EARLY
    assert full.ids() == ["event-0", "event-1"]


def test_a_full_stream_that_gets_room_takes_the_rest(server: NatsServer, full: Any, events: Make) -> None:
    sent = events(5)
    forwarder = Forwarder(server.url, SUBJECT)
    for event in sent:
        forwarder.emit(*event)
    until(lambda: forwarder.count == 2)
    full.update_stream(max_msgs=100)
    until(lambda: forwarder.count == 5)
    assert forwarder.finish(LATE) == ()
    assert full.ids() == [event_id for event_id, _ in sent]


def test_a_missing_stream_ends_the_waiting_early_and_names_the_command(server: NatsServer, events: Make) -> None:
    forwarder = Forwarder(server.url, SUBJECT)
    assert forwarder.connected(LATE) is None
    for event in events(2):
        forwarder.emit(*event)
    undelivered, took = timed(forwarder)
    assert len(undelivered) == 2
    assert "nats stream add CELLOS_EVENTS --subjects 'cellos.events.>'" in undelivered[0].error
    assert took < EARLY


def test_an_event_that_is_too_large_does_not_hold_up_the_others(server: NatsServer, reference: Any) -> None:
    reference.make_stream(max_msg_size=1000)
    forwarder = Forwarder(server.url, SUBJECT)
    for event_id, line in (("a", b"1"), ("large", b"x" * 2000), ("b", b"2")):
        forwarder.emit(event_id, line)
    [undelivered] = forwarder.finish(LATE)
    assert undelivered.event_id == "large"
    assert "takes no message of that size" in undelivered.error
    assert reference.ids() == ["a", "b"]


def test_wrong_credentials_are_told_and_cost_little(make_server: Callable[..., NatsServer], events: Make) -> None:
    server = make_server('authorization { user: "u", password: "right-secret" }')
    forwarder = Forwarder(f"nats://u:wrong-secret@{server.address}", SUBJECT)
    failure = forwarder.connected(LATE)
    assert failure == f"nats connect: {server.url}: the server says: Authorization Violation"
    forwarder.emit(*events(1)[0])
    [undelivered], took = timed(forwarder)
    assert "secret" not in undelivered.error
    assert took < EARLY


# ---------------------------------------------------------------- TLS


@pytest.fixture
def tls(make_server: Callable[..., NatsServer], reference_of: Any, certificates: Path) -> tuple[NatsServer, Path]:
    server = make_server(f'tls {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key" }}')
    import ssl

    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    reference_of(f"tls://{server.address}", tls=context).make_stream()
    return server, certificates


@pytest.mark.parametrize("scheme", ["tls", "nats"])
def test_tls_with_an_authority_of_ones_own(tls: tuple[NatsServer, Path], scheme: str, events: Make) -> None:
    server, certificates = tls
    forwarder = Forwarder(f"{scheme}://{server.address}", SUBJECT, ca_file=str(certificates / "ca.pem"))
    assert forwarder.connected(LATE) is None
    for event in events(3):
        forwarder.emit(*event)
    assert forwarder.finish(LATE) == ()
    assert forwarder.count == 3


def test_a_certificate_of_an_unknown_authority_is_not_accepted(tls: tuple[NatsServer, Path]) -> None:
    server, _ = tls
    forwarder = Forwarder(f"tls://u:secret@{server.address}", SUBJECT)
    failure = forwarder.connected(LATE)
    forwarder.close()
    assert failure is not None
    assert "TLS: the certificate is not accepted: unable to get local issuer certificate" in failure
    assert "secret" not in failure


def test_a_certificate_for_another_name_is_not_accepted(tls: tuple[NatsServer, Path]) -> None:
    server, certificates = tls
    forwarder = Forwarder(f"tls://localhost:{server.port}", SUBJECT, ca_file=str(certificates / "ca.pem"))
    failure = forwarder.connected(LATE)
    forwarder.close()
    assert failure is not None
    assert "the certificate is not accepted" in failure


def test_tls_is_never_given_up_for_a_server_that_has_none(server: NatsServer) -> None:
    forwarder = Forwarder(f"tls://u:secret@{server.address}", SUBJECT)
    failure = forwarder.connected(LATE)
    forwarder.close()
    assert failure == f"nats connect: tls://{server.address}: the server offers no TLS"


def test_a_missing_file_of_roots_is_named(tls: tuple[NatsServer, Path]) -> None:
    server, _ = tls
    forwarder = Forwarder(f"tls://{server.address}", SUBJECT, ca_file="/nowhere/ca.pem")
    failure = forwarder.connected(LATE)
    forwarder.close()
    assert failure is not None
    assert "NATS_CA_FILE /nowhere/ca.pem: No such file or directory" in failure
