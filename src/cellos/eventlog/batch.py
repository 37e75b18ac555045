"""Messages for the log: the headers that guard them, and those that make several of them one write. Pure.

Compare-and-set: `expected_last` is the sequence of the last message under `expected_filter` (by default, on the subject itself), 0 where
there must be none. Without a filter a message guards its own subject only, so writers that use several subjects must name the filter.

A batch is ordinary messages with a common id and numbers from 1; the last one asks for the commit and gets the one answer.
Source: https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-50.md
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from cellos.errors import MessageRefused

MAX_BATCH_MESSAGES = 1_000
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"


class Message(Struct, frozen=True, kw_only=True):
    """One to write. `message_id` is the event's id."""

    subject: str
    payload: bytes
    message_id: str
    expected_last: int | None = None
    expected_filter: str | None = None


def headers(message: Message) -> dict[str, str]:
    """Of one message. Raises MessageRefused for an id that cannot be one."""
    found = message.message_id
    if not found or not found.isprintable() or found != found.strip():
        raise MessageRefused(f"the event id {found[:80]!r} cannot be a message id")
    block = {"Nats-Msg-Id": found}
    if message.expected_last is not None:
        block[_EXPECTED] = str(message.expected_last)
        if message.expected_filter is not None:
            block[f"{_EXPECTED}-Subject"] = message.expected_filter
    return block


def batch_headers(messages: Sequence[Message], batch_id: str) -> list[dict[str, str]]:
    """Of each message of one write. Raises MessageRefused."""
    if not 1 <= len(messages) <= MAX_BATCH_MESSAGES:
        raise MessageRefused(f"a batch of {len(messages)} messages: there may be 1 to {MAX_BATCH_MESSAGES}")
    blocks = [
        headers(message) | {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)} for number, message in enumerate(messages, 1)
    ]
    blocks[-1]["Nats-Batch-Commit"] = "1"
    return blocks


def on_the_wire(messages: Sequence[tuple[str, dict[str, str], bytes]], reply: bytes, most: int) -> bytes:
    """Subjects, headers and payloads as they are sent, in one piece; the last message asks for an answer at `reply`.

    Raises MessageRefused: one too large, more than `most` bytes, would make the server close the connection, and whatever ends a line early
    would be a command of its own.
    """
    parts: list[bytes] = []
    for subject, block, payload in reversed(messages):
        head = "".join([f"{name}: {value}\r\n" for name, value in block.items()])
        if not subject or " " in subject or not subject.isprintable():
            raise MessageRefused(f"{subject[:80]!r} is no subject: it is empty, or holds white space or a control character")
        if head.count("\n") != len(block) or head.count("\r") != len(block):
            raise MessageRefused(f"{subject}: a header of more than one line")
        lines = b"NATS/1.0\r\n%s\r\n" % head.encode()
        size = len(lines) + len(payload)
        if size > most:
            raise MessageRefused(f"{subject}: {size} bytes exceed what the NATS server takes (max_payload {most})")
        to = b"" if parts else b" " + reply
        parts += (b"\r\n", payload, b"HPUB %s%s %d %d\r\n%s" % (subject.encode(), to, len(lines), size, lines))
    return b"".join(reversed(parts))
