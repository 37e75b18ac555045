from __future__ import annotations

import json

import pytest

from cellos.errors import (
    DuplicateInBatch,
    EventLogError,
    LogFull,
    LogUnreachable,
    MessageRefused,
    NoStream,
    OutcomeUnknown,
    WrongSequence,
)
from cellos.eventlog.api import Ack, read_ack, read_reply


def refused(number: int) -> bytes:
    return json.dumps({"error": {"code": 400, "err_code": number, "description": "words"}, "stream": "CELLOS_EVENTS", "seq": 0}).encode()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (10071, WrongSequence),
        (10164, WrongSequence),
        (10201, DuplicateInBatch),
        (10199, MessageRefused),
        (10054, MessageRefused),
        (10077, LogFull),
        (10047, LogFull),
        (10059, NoStream),
        (10174, NoStream),
        (10176, LogUnreachable),
        (10210, LogUnreachable),
        (10008, LogUnreachable),
        (99999, EventLogError),
    ],
)
def test_numbers_have_kinds(number: int, kind: type[EventLogError]) -> None:
    for read in (read_ack, read_reply):
        with pytest.raises(EventLogError) as raised:
            read(refused(number), what="subject")
        assert type(raised.value) is kind
        assert raised.value.number == number
        assert str(raised.value) == f"event log: subject: words (error {number})"


def test_acknowledgements() -> None:
    assert read_ack(b'{"stream":"CELLOS_EVENTS","seq":7}', what="s") == Ack(sequence=7)
    assert read_ack(b'{"stream":"CELLOS_EVENTS","seq":7,"duplicate":true}', what="s") == Ack(sequence=7, duplicate=True)


@pytest.mark.parametrize("payload", [b"", b"{}", b"+OK", b'{"stream":"X","seq":0}', b'{"seq":3}', b"\xff", b"[]"])
def test_what_is_no_acknowledgement_leaves_the_outcome_unknown(payload: bytes) -> None:
    with pytest.raises(OutcomeUnknown):
        read_ack(payload, what="s")


def test_replies() -> None:
    assert read_reply(b'{"a":1}', what="s") == b'{"a":1}'
    with pytest.raises(EventLogError, match="not that of JetStream"):
        read_reply(b"", what="s")
