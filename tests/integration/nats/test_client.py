"""The client against a real server, with nats-py as the judge of what it says."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import nats as nats_py
import pytest

from cellos.errors import EventRefused, EventSinkError
from cellos.eventlog import nats
from cellos.eventlog.jetstream import PubAck
from cellos.testing.nats_server import NatsServer

SUBJECT = "cellos.events.v1"


def test_the_reference_client_reads_what_we_publish(server: NatsServer, stream: Any) -> None:
    payloads = [b"", b"{}", '{"text":"café ✓"}'.encode(), bytes(range(256)), b"\r\nPUB x 1\r\n", b"x" * 900_000]
    connection = nats.connect(server.url)
    for number, payload in enumerate(payloads, 1):
        ack = connection.publish(f"cellos.events.tenant.{number}", payload, message_id=f"id-{number}")
        assert ack == PubAck(stream="CELLOS_EVENTS", sequence=number)
    connection.close()
    stored = stream.messages()
    assert [message.data for message in stored] == payloads
    assert [message.subject for message in stored] == [f"cellos.events.tenant.{number}" for number in range(1, 7)]
    assert [dict(message.headers) for message in stored] == [{"Nats-Msg-Id": f"id-{number}"} for number in range(1, 7)]


def test_both_clients_are_told_the_same_of_a_duplicate(server: NatsServer, stream: Any) -> None:
    connection = nats.connect(server.url)
    first = connection.publish(SUBJECT, b"{}", message_id="same")

    async def publish() -> Any:
        theirs = await nats_py.connect(server.url)
        try:
            return await theirs.jetstream().publish(SUBJECT, b"{}", headers={"Nats-Msg-Id": "same"})
        finally:
            await theirs.close()

    theirs = asyncio.run(publish())
    ours = connection.publish(SUBJECT, b"{}", message_id="same")
    connection.close()
    assert (first.sequence, first.duplicate) == (1, False)
    assert (ours.stream, ours.sequence, ours.duplicate) == (theirs.stream, theirs.seq, theirs.duplicate) == ("CELLOS_EVENTS", 1, True)
    assert stream.ids() == ["same"]


def test_many_messages_are_in_flight_at_once(server: NatsServer, stream: Any) -> None:
    connection = nats.connect(server.url)
    numbers = [connection.send(SUBJECT, b"{}", message_id=f"id-{number}") for number in range(500)]
    assert connection.in_flight == 500
    answers = dict(connection.receive() for _ in numbers)
    connection.close()
    assert [answers[number] for number in numbers] == [PubAck(stream="CELLOS_EVENTS", sequence=n) for n in range(1, 501)]
    assert connection.in_flight == 0


def test_answers_to_other_messages_do_not_disturb_a_publish(server: NatsServer, stream: Any) -> None:
    connection = nats.connect(server.url)
    early = connection.send(SUBJECT, b"{}", message_id="early")
    assert connection.publish(SUBJECT, b"{}", message_id="late").sequence == 2
    assert connection.receive() == (early, PubAck(stream="CELLOS_EVENTS", sequence=1))
    connection.close()


def test_a_missing_stream_is_an_error_that_names_the_command(server: NatsServer) -> None:
    connection = nats.connect(server.url)
    with pytest.raises(EventSinkError, match="no stream takes the subject") as caught:
        connection.publish(SUBJECT, b"{}", message_id="a")
    assert "nats stream add CELLOS_EVENTS --subjects 'cellos.events.>'" in str(caught.value)
    assert not connection.closed
    connection.close()


def test_a_server_without_jetstream_is_a_missing_stream(make_server: Callable[..., NatsServer]) -> None:
    connection = nats.connect(make_server(jetstream=False).url)
    with pytest.raises(EventSinkError, match="no stream takes the subject"):
        connection.publish(SUBJECT, b"{}", message_id="a")
    connection.close()


def test_a_full_stream_says_so(server: NatsServer, full: Any) -> None:
    connection = nats.connect(server.url)
    for number in range(2):
        connection.publish(SUBJECT, b"{}", message_id=f"id-{number}")
    with pytest.raises(EventSinkError, match="stream CELLOS_EVENTS is full: maximum messages exceeded"):
        connection.publish(SUBJECT, b"{}", message_id="id-2")
    connection.close()
    assert full.ids() == ["id-0", "id-1"]


def test_a_stream_that_is_full_by_bytes_says_so(server: NatsServer, reference: Any) -> None:
    reference.make_stream(max_bytes=2000, discard=nats_py.js.api.DiscardPolicy.NEW)
    connection = nats.connect(server.url)
    connection.publish(SUBJECT, b"x" * 1000, message_id="a")
    with pytest.raises(EventSinkError, match="stream CELLOS_EVENTS is full: maximum bytes exceeded"):
        connection.publish(SUBJECT, b"x" * 1000, message_id="b")
    connection.close()


def test_an_event_that_the_stream_will_never_take_is_refused(server: NatsServer, reference: Any) -> None:
    reference.make_stream(max_msg_size=1000)
    connection = nats.connect(server.url)
    with pytest.raises(EventRefused, match="takes no message of that size"):
        connection.publish(SUBJECT, b"x" * 2000, message_id="a")
    assert connection.publish(SUBJECT, b"x" * 100, message_id="b").sequence == 1
    connection.close()


def test_max_payload_is_kept_to_and_costs_no_connection(make_server: Callable[..., NatsServer], reference_of: Any) -> None:
    server = make_server("max_payload: 1024")
    reference_of(server.url).make_stream()
    connection = nats.connect(server.url)
    with pytest.raises(EventRefused, match=r"exceed what the server takes \(max_payload 1024\)"):
        connection.publish(SUBJECT, b"x" * 1024, message_id="a")
    assert connection.publish(SUBJECT, b"x" * 900, message_id="b").sequence == 1
    connection.close()


def test_nobody_listens(server: NatsServer) -> None:
    server.stop()
    with pytest.raises(EventSinkError) as caught:
        nats.connect(server.url)
    assert str(caught.value) == f"event sink: nats connect: {server.url}: Connection refused (os error 111)"


def test_the_next_url_is_tried_and_all_failures_are_told(make_server: Callable[..., NatsServer]) -> None:
    down, up = make_server(), make_server()
    down.stop()
    connection = nats.connect(f"{down.url},{up.url}")
    connection.close()
    up.stop()
    with pytest.raises(EventSinkError) as caught:
        nats.connect(f"{down.url},{up.url}")
    assert down.url in str(caught.value)
    assert up.url in str(caught.value)


def test_a_server_that_is_silent_costs_the_time_out_and_the_connection(server: NatsServer, stream: Any) -> None:
    connection = nats.connect(server.url)
    server.pause()
    try:
        with pytest.raises(EventSinkError, match="no answer in time"):
            connection.publish(SUBJECT, b"{}", message_id="a", timeout=0.1)
        assert connection.closed
        with pytest.raises(EventSinkError, match="no answer in time"):
            nats.connect(server.url, timeout=0.1)
    finally:
        server.go_on()


def test_a_killed_server_is_noticed(server: NatsServer, stream: Any) -> None:
    connection = nats.connect(server.url)
    server.kill()
    with pytest.raises(EventSinkError):
        connection.publish(SUBJECT, b"{}", message_id="a")
    assert connection.closed
    with pytest.raises(EventSinkError, match="closed"):
        connection.publish(SUBJECT, b"{}", message_id="a")


# ---------------------------------------------------------------- who may


USERS = """
authorization {{ users: [
  {{ user: "writer", password: "{secret}", permissions: {{ publish: ["cellos.events.>", "$JS.>"], subscribe: ["_INBOX.>"] }} }}
  {{ user: "admin", password: "admin-secret" }}
  {{ user: "deaf", password: "deaf-secret", permissions: {{ subscribe: ["nothing"] }} }}
] }}
"""
SECRET = "p@ss:w/rd%"
ENCODED = "p%40ss%3Aw%2Frd%25"


@pytest.fixture
def guarded(make_server: Callable[..., NatsServer], reference_of: Any) -> NatsServer:
    server = make_server(USERS.format(secret=SECRET))
    reference_of(server.url, user="admin", password="admin-secret").make_stream(subjects=("cellos.>",))
    return server


def test_user_and_password_come_from_the_url(guarded: NatsServer) -> None:
    connection = nats.connect(f"nats://writer:{ENCODED}@{guarded.address}")
    assert connection.publish(SUBJECT, b"{}", message_id="a").sequence == 1
    connection.close()


@pytest.mark.parametrize("userinfo", ["", "writer:wrong-secret@", "nobody:wrong-secret@", "wrong-secret@"])
def test_wrong_credentials_are_an_error_that_does_not_quote_them(guarded: NatsServer, userinfo: str) -> None:
    with pytest.raises(EventSinkError) as caught:
        nats.connect(f"nats://{userinfo}{guarded.address}")
    assert str(caught.value) == f"event sink: nats connect: {guarded.url}: the server says: Authorization Violation"


def test_a_subject_that_is_forbidden_fails_its_message_at_once(guarded: NatsServer) -> None:
    connection = nats.connect(f"nats://writer:{ENCODED}@{guarded.address}")
    with pytest.raises(EventSinkError, match=r'Permissions Violation for Publish to "cellos\.other"'):
        connection.publish("cellos.other", b"{}", message_id="a")
    assert connection.publish(SUBJECT, b"{}", message_id="b").sequence == 1
    connection.close()


def test_a_user_who_may_not_hear_answers_cannot_connect(guarded: NatsServer) -> None:
    with pytest.raises(EventSinkError, match="Permissions Violation for Subscription") as caught:
        nats.connect(f"nats://deaf:deaf-secret@{guarded.address}")
    assert "deaf-secret" not in str(caught.value)


def test_a_token_comes_from_the_url(make_server: Callable[..., NatsServer]) -> None:
    server = make_server('authorization { token: "s3cr3t" }')
    nats.connect(f"nats://s3cr3t@{server.address}").close()


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="this host has no IPv6")
def test_ipv6(make_server: Callable[..., NatsServer]) -> None:
    server = make_server('host: "::1"')
    nats.connect(f"nats://[::1]:{server.port}").close()
