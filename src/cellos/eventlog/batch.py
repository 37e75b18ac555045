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


def wire_size(block: dict[str, str], payload: bytes) -> int:
    """Bytes that a server counts."""
    return len(b"NATS/1.0\r\n\r\n") + sum(len(name) + len(value.encode()) + 4 for name, value in block.items()) + len(payload)
