"""Writing to the event log, and looking into it: nothing has happened until the log has acknowledged it.

A write ends in one of three ways: an Ack; an error after which nothing of it is in the log; or OutcomeUnknown, when the connection or the
server went away between the two. `settle` turns the third, and the refusals that a repeated write gets, into one of the others.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct
from nats import errors as nats_errors
from nats.aio.client import Client

from cellos.errors import EventLogError, LogUnreachable, MessageRefused, NoStream, OutcomeUnknown
from cellos.eventlog.api import API_SECONDS, NO_MESSAGE, STREAM, Ack, ask, read_ack, without_prefix
from cellos.eventlog.batch import Message, batch_headers, headers, wire_size
from cellos.eventlog.pages import MAX_PAGE_MESSAGES, read_page
from cellos.eventlog.stored import Cursor, Stored, nanoseconds
from cellos.eventlog.stream import stream_info

ACK_SECONDS = 5.0
_LARGEST = 2**64 - 1
_NOT_SENT = (
    nats_errors.OutboundBufferLimitError,
    nats_errors.ConnectionClosedError,
    nats_errors.ConnectionDrainingError,
    nats_errors.ConnectionReconnectingError,
)
_UNFIT = (nats_errors.BadSubjectError, nats_errors.MaxPayloadError, nats_errors.BadHeaderError)


class EventLog:
    """The log behind one connection; any number of tasks may use it at once."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str,
        expected_last: int | None = None,
        expected_filter: str | None = None,
        timeout: float = ACK_SECONDS,  # noqa: ASYNC109 (told to nats-py)
    ) -> Ack:
        """Write one event. A plain repetition within the duplicate window is answered with the first one's sequence.

        Raises WrongSequence, LogFull, LogUnreachable, MessageRefused, NoStream: it was not written. OutcomeUnknown: settle it.
        """
        message = Message(
            subject=subject, payload=payload, message_id=message_id, expected_last=expected_last, expected_filter=expected_filter
        )
        block = headers(message)
        self._check_size(subject, block, payload)
        return await self._commit(subject, payload, block, timeout)

    async def publish_batch(
        self,
        messages: Sequence[Message],
        *,
        timeout: float = ACK_SECONDS,  # noqa: ASYNC109 (told to nats-py)
    ) -> Ack:
        """Write all of them or none: 1 to 1,000. The ack is that of the last.

        Raises what `publish` raises, and DuplicateInBatch: a message id is in the log already (settle it if it may be ours).
        """
        blocks = batch_headers(messages, uuid.uuid4().hex)
        for message, block in zip(messages, blocks, strict=True):
            self._check_size(message.subject, block, message.payload)
        for message, block in zip(messages[:-1], blocks, strict=False):
            try:
                await self._client.publish(message.subject, message.payload, headers=block)
            except (nats_errors.Error, OSError) as error:  # without its commit a batch is nothing
                raise LogUnreachable(f"{message.subject}: {without_prefix(error)}") from error
        return await self._commit(messages[-1].subject, messages[-1].payload, blocks[-1], timeout)

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

        `subject`: a filter; those it does not match are passed over by the server.

        Raises NoStream, LogUnreachable.
        """
        if limit < 1:
            return []
        query: dict[str, Any] = {"seq": min(after + 1, _LARGEST), "batch": min(limit, MAX_PAGE_MESSAGES)}
        if subject is not None:
            query["next_by_subj"] = subject
        return await read_page(self._client, STREAM, query, seconds=seconds)

    async def _commit(self, subject: str, payload: bytes, block: dict[str, str], seconds: float) -> Ack:
        try:
            answer = await self._client.request(subject, payload, timeout=seconds, headers=block)
        except nats_errors.NoRespondersError as error:
            raise NoStream(f"{subject}: no stream takes it; is the stream {STREAM} there, and JetStream on?") from error
        except _NOT_SENT as error:
            raise LogUnreachable(f"{subject}: {without_prefix(error)}") from error
        except _UNFIT as error:
            raise MessageRefused(f"{subject}: {without_prefix(error)}") from error
        except (nats_errors.Error, OSError) as error:
            raise OutcomeUnknown(f"{subject}: {without_prefix(error)}; whether it was written is not known") from error
        return read_ack(answer.data, what=subject)

    async def _get(self, query: dict[str, Any]) -> Stored | None:
        try:
            payload = await ask(self._client, f"STREAM.MSG.GET.{STREAM}", query)
        except EventLogError as error:
            if error.number == NO_MESSAGE:
                return None
            raise
        return read_message(payload)

    def _check_size(self, subject: str, block: dict[str, str], payload: bytes) -> None:
        """Too large a message would make the server close the connection."""
        size, most = wire_size(block, payload), self._client.max_payload
        if size > most:
            raise MessageRefused(f"{subject}: {size} bytes exceed what the NATS server takes (max_payload {most})")


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
