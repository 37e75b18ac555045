"""Writing to the event log, and looking into it: nothing has happened until the log has acknowledged it.

A write ends in one of three ways: an Ack; an error after which nothing of it is in the log; or OutcomeUnknown, when the connection or the
server went away between the two. `settle` turns the third, and the refusals that a repeated write gets, into one of the others.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from cellos.errors import EventLogError, LogUnreachable, NoStream
from cellos.eventlog.api import API_SECONDS, NO_MESSAGE, STREAM, Ack, ask, read_ack
from cellos.eventlog.batch import Message, batch_headers, headers, on_the_wire
from cellos.eventlog.connect import LogClient
from cellos.eventlog.pages import MAX_PAGE_MESSAGES, read_page
from cellos.eventlog.stored import Cursor, Stored, nanoseconds
from cellos.eventlog.stream import stream_info
from cellos.eventlog.writer import Writer

ACK_SECONDS = 5.0
_LARGEST = 2**64 - 1


class EventLog:
    """The log behind one connection; any number of tasks may use it at once."""

    def __init__(self, client: LogClient) -> None:
        self._client = client
        self._writer = Writer(client)

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str,
        expected_last: int | None = None,
        expected_filter: str | None = None,
        timeout: float = ACK_SECONDS,  # noqa: ASYNC109 (told to the connection)
    ) -> Ack:
        """Write one event. A plain repetition within the duplicate window is answered with the first one's sequence.

        Raises WrongSequence, LogFull, LogUnreachable, MessageRefused, NoStream: it was not written. OutcomeUnknown: settle it.
        """
        message = Message(
            subject=subject, payload=payload, message_id=message_id, expected_last=expected_last, expected_filter=expected_filter
        )
        return await self.commit(subject, payload, headers(message), timeout)

    async def publish_batch(
        self,
        messages: Sequence[Message],
        *,
        timeout: float = ACK_SECONDS,  # noqa: ASYNC109 (told to the connection)
    ) -> Ack:
        """Write all of them or none: 1 to 1,000. The ack is that of the last.

        Raises what `publish` raises, and DuplicateInBatch: a message id is in the log already (settle it if it may be ours).
        """
        blocks = batch_headers(messages, os.urandom(16).hex())
        pieces = [(message.subject, block, message.payload) for message, block in zip(messages, blocks, strict=True)]
        return await self._commit(pieces, timeout)

    async def last(self, subject_filter: str) -> Stored | None:
        """The last message whose subject matches; None where there is none. Raises NoStream, LogUnreachable."""
        return await self._get({"last_by_subj": subject_filter})

    async def get(self, sequence: int) -> Stored | None:
        """One message; None where it is not, or no longer, there. Raises NoStream, LogUnreachable."""
        return await self._get({"seq": sequence})

    async def settle(self, subject_filter: str, message_id: str) -> Ack | None:
        """Whether the last message under the filter is ours: its Ack, or None: another was there first, or nothing arrived (yet).

        For a batch, any of its messages tells. Raises NoStream, LogUnreachable.
        """
        found = await self.last(subject_filter)
        return Ack(sequence=found.sequence, duplicate=True) if found is not None and found.message_id == message_id else None

    async def tail(self) -> Cursor:
        """The place after everything that is there now. Raises NoStream, LogUnreachable."""
        info = await stream_info(self._client)
        found = await self.get(info.last_seq) if info.messages else None
        if found is None:
            return Cursor(stream_created=info.created, sequence=info.last_seq, digest="")
        return Cursor(stream_created=info.created, sequence=found.sequence, digest=found.digest)

    async def read(self, after: int, limit: int, *, subject: str | None = None, seconds: float = API_SECONDS) -> list[Stored]:
        """The messages that follow sequence `after`, at most `limit` (and 1,000) of them. Leaves no consumer behind.

        `subject`: a filter; those it does not match are passed over by the server. Of a cluster any member may answer, one that
        has just come back, too: what was acknowledged last may still be missing. `last` and `get` ask the leader.

        Raises NoStream, LogUnreachable.
        """
        if limit < 1:
            return []
        query: dict[str, Any] = {"seq": min(after + 1, _LARGEST), "batch": min(limit, MAX_PAGE_MESSAGES)}
        if subject is not None:
            query["next_by_subj"] = subject
        return await read_page(self._client, STREAM, query, seconds=seconds)

    async def commit(self, subject: str, payload: bytes, block: dict[str, str], seconds: float = ACK_SECONDS) -> Ack:
        """Send a message with these headers to whatever stream takes it, and wait for the ack. Raises as `publish`."""
        return await self._commit([(subject, block, payload)], seconds)

    async def _commit(self, pieces: Sequence[tuple[str, dict[str, str], bytes]], seconds: float) -> Ack:
        subject = pieces[-1][0]
        try:
            link = await self._writer.link()
        except LogUnreachable as error:
            raise LogUnreachable(f"{subject}: {error.text}") from error
        reply = link.new_reply()
        data = on_the_wire(pieces, reply, link.info.max_payload)
        answer = await self._writer.ask(link, reply, data, seconds, what=subject)
        if answer.has_no_responders:
            raise NoStream(f"{subject}: no stream takes it; is the stream {STREAM} there, and JetStream on?")
        return read_ack(answer.data, what=subject)

    async def _get(self, query: dict[str, Any]) -> Stored | None:
        try:
            payload = await ask(self._client, f"STREAM.MSG.GET.{STREAM}", query)
        except EventLogError as error:
            if error.number == NO_MESSAGE:
                return None
            raise
        return read_message(payload)


class _Message(Struct):
    subject: str
    seq: int
    time: str
    data: str = ""
    hdrs: str = ""


class _Got(Struct):
    message: _Message


_GOT = msgspec.json.Decoder(_Got)


def read_message(payload: bytes) -> Stored:
    """Of an answer to STREAM.MSG.GET."""
    found = _GOT.decode(payload).message
    return Stored(
        sequence=found.seq,
        subject=found.subject,
        headers=binascii.a2b_base64(found.hdrs),
        data=base64.b64decode(found.data),
        time=nanoseconds(found.time),
    )
