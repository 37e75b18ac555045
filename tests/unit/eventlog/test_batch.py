from __future__ import annotations

import pytest

from cellos.errors import MessageRefused
from cellos.eventlog.batch import Message, batch_headers, headers, on_the_wire


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


def test_a_write_leaves_in_one_piece_and_its_last_message_asks_for_the_answer() -> None:
    wire = on_the_wire([("a", {"A": "1"}, b"{}"), ("b.c", {"B": "é"}, b"")], b"_INBOX.r.1", 100)
    assert wire == (b"HPUB a 18 20\r\nNATS/1.0\r\nA: 1\r\n\r\n{}\r\nHPUB b.c _INBOX.r.1 19 19\r\nNATS/1.0\r\nB: \xc3\xa9\r\n\r\n\r\n")


def test_a_message_has_a_size() -> None:
    assert on_the_wire([("a", {"A": "1"}, b"12345")], b"r", 23)
    with pytest.raises(MessageRefused, match=r"a: 24 bytes .* \(max_payload 23\)"):
        on_the_wire([("a", {"A": "1"}, b"123456")], b"r", 23)


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPING", "a\tb", "a\x00", "\N{NO-BREAK SPACE}"])
def test_a_subject_that_would_end_its_line_is_refused(subject: str) -> None:
    with pytest.raises(MessageRefused, match="subject"):
        on_the_wire([(subject, {}, b"")], b"r", 100)


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "a\rb"])
def test_a_header_that_would_be_two_is_refused(value: str) -> None:
    for block in ({"A": value}, {value: "A"}):
        with pytest.raises(MessageRefused, match="more than one line"):
            on_the_wire([("a", block, b"")], b"r", 100)
