from __future__ import annotations

import pytest

from cellos.errors import MessageRefused
from cellos.eventlog.batch import Message, batch_headers, headers, wire_size


def message(**members: object) -> Message:
    return Message(**({"subject": "s", "payload": b"", "message_id": "id"} | members))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, {}),
        ({"expected_last": 0}, {"Nats-Expected-Last-Subject-Sequence": "0"}),
        (
            {"expected_last": 7, "expected_filter": "a.>"},
            {"Nats-Expected-Last-Subject-Sequence": "7", "Nats-Expected-Last-Subject-Sequence-Subject": "a.>"},
        ),
    ],
)
def test_guards(members: dict[str, object], expected: dict[str, str]) -> None:
    assert headers(message(**members)) == {"Nats-Msg-Id": "id"} | expected


@pytest.mark.parametrize("message_id", ["", " id", "id\r\nX: y", "a\x00b", "\x7f"])
def test_an_id_that_would_be_another_in_a_header_is_refused(message_id: str) -> None:
    with pytest.raises(MessageRefused):
        headers(message(message_id=message_id))


def test_a_batch_is_numbered_and_its_last_message_commits() -> None:
    blocks = batch_headers([message(message_id=str(number)) for number in range(3)], "b")
    assert [block["Nats-Batch-Sequence"] for block in blocks] == ["1", "2", "3"]
    assert {block["Nats-Batch-Id"] for block in blocks} == {"b"}
    assert [block.get("Nats-Batch-Commit") for block in blocks] == [None, None, "1"]
    assert [block["Nats-Msg-Id"] for block in blocks] == ["0", "1", "2"]


@pytest.mark.parametrize("count", [0, 1001])
def test_a_batch_has_a_size(count: int) -> None:
    with pytest.raises(MessageRefused, match=f"batch of {count} messages"):
        batch_headers([message()] * count, "b")


def test_a_size_is_that_of_the_wire() -> None:
    block = {"Nats-Msg-Id": "é", "A": "1"}
    wire = "NATS/1.0\r\nNats-Msg-Id: é\r\nA: 1\r\n\r\n".encode() + b"payload"
    assert wire_size(block, b"payload") == len(wire)
