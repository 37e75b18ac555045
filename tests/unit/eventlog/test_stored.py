from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

from cellos.eventlog.log import nanoseconds, read_message
from cellos.eventlog.stored import Stored

ONE = Stored(1, "cellos.events.x", b"NATS/1.0\r\nNats-Msg-Id: e1\r\n\r\n", b"{}", 5)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (b"", None),
        (b"NATS/1.0\r\n\r\n", None),
        (b"NATS/1.0\r\nNats-Msg-Id: e1\r\n\r\n", "e1"),
        (b"NATS/1.0\r\nA: Nats-Msg-Id: no\r\nNats-Msg-Id:e1 \r\nB: 2\r\n\r\n", "e1"),
        (b"NATS/1.0\r\nNats-Msg-Id: \xff\r\n\r\n", "\ufffd"),
    ],
)
def test_message_ids(headers: bytes, expected: str | None) -> None:
    assert replace(ONE, headers=headers).message_id == expected


def test_a_digest_tells_what_was_published_and_not_when_or_where() -> None:
    assert replace(ONE, sequence=2, time=9).digest == ONE.digest
    others = [replace(ONE, subject="cellos.events.y"), replace(ONE, headers=b""), replace(ONE, data=b"{ }"), ONE]
    # What moves from one part to another makes a difference, too.
    others += [replace(ONE, headers=b"", data=ONE.headers + ONE.data), replace(ONE, subject="", headers=ONE.subject.encode() + ONE.headers)]
    assert all(one.digest != other.digest for one, other in itertools.combinations(others, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:01Z", 1_000_000_000),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("2026-11-21T14:56:23.181312837Z", 1795272983181312837),
        ("2026-11-21T14:56:23.18Z", 1795272983180000000),
    ],
)
def test_times_of_a_server(text: str, expected: int) -> None:
    assert nanoseconds(text) == expected


def test_a_message_of_the_api() -> None:
    message = (
        b'"subject":"s","seq":5,"hdrs":"TkFUUy8xLjANCk5hdHMtTXNnLUlkOiA0DQoNCg==","data":"aGk0","time":"1970-01-01T00:00:00.000000002Z"'
    )
    answer = b'{"type":"x","message":{' + message + b"}}"
    assert read_message(answer) == Stored(5, "s", b"NATS/1.0\r\nNats-Msg-Id: 4\r\n\r\n", b"hi4", 2)
    assert read_message(b'{"message":{"subject":"s","seq":5,"time":"1970-01-01T00:00:00Z"}}') == Stored(5, "s", b"", b"", 0)
