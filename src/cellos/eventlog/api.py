"""What JetStream answers, read: acknowledgements, its JSON API, and the numbers of its errors. Pure, but for `ask`.

Numbers of errors: https://github.com/nats-io/nats-server/blob/main/server/errors.json
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from nats import errors as nats_errors
from nats.aio.client import Client

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

STREAM = "CELLOS_EVENTS"
API_SECONDS = 5.0
NO_MESSAGE = 10037
NO_STREAM = 10059

_ERRORS: dict[int, type[EventLogError]] = {
    10071: WrongSequence,
    10164: WrongSequence,  # the same, from a server that does not say the right one
    10201: DuplicateInBatch,
    10077: LogFull,  # the store said no: a limit of the stream, or the disk
    10047: LogFull,
    10028: LogFull,
    10023: LogFull,
    10002: LogFull,
    10054: MessageRefused,
    10053: MessageRefused,
    10097: MessageRefused,
    10199: MessageRefused,
    NO_STREAM: NoStream,
    10174: NoStream,  # no atomic batches
    10039: NoStream,  # no JetStream in this account
    10076: NoStream,  # no JetStream in this server
    10175: LogUnreachable,  # the beginning of a batch was lost with its connection
    10176: LogUnreachable,
    10210: LogUnreachable,  # too many batches at once
    10008: LogUnreachable,  # the cluster has no leader
    10009: LogUnreachable,
}


class Ack(Struct, frozen=True, kw_only=True):
    """The log has it. Of a batch: the sequence of its last message."""

    sequence: int
    duplicate: bool = False
    """It had it already; `sequence` is that of the first one."""


class ApiError(Struct, kw_only=True):
    """A refusal."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(Struct):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


class _Reply(Struct):
    error: ApiError | None = None


_ANSWER = msgspec.json.Decoder(_Answer)
_REPLY = msgspec.json.Decoder(_Reply)


def read_ack(payload: bytes, *, what: str) -> Ack:
    """The answer to a write. Raises the EventLogError that it stands for."""
    try:
        answer = _ANSWER.decode(payload)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise OutcomeUnknown(f"{what}: the answer is not that of a stream") from error
    if answer.error is not None:
        raise refusal(answer.error, what=what)
    if not answer.stream or answer.seq < 1:
        raise OutcomeUnknown(f"{what}: the answer is not that of a stream")
    return Ack(sequence=answer.seq, duplicate=answer.duplicate)


def read_reply(payload: bytes, *, what: str) -> bytes:
    """The answer of the JSON API. Raises the EventLogError that it stands for."""
    try:
        reply = _REPLY.decode(payload)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise EventLogError(f"{what}: the answer is not that of JetStream") from error
    if reply.error is not None:
        raise refusal(reply.error, what=what)
    return payload


def refusal(error: ApiError, *, what: str) -> EventLogError:
    """The exception for it; `number` is JetStream's."""
    raised = _ERRORS.get(error.err_code, EventLogError)(f"{what}: {error.description} (error {error.err_code or error.code})")
    raised.number = error.err_code
    return raised


async def ask(client: Client, call: str, body: Any = None) -> bytes:
    """One request to the JSON API, `call` without its prefix. Raises EventLogError."""
    payload = b"" if body is None else msgspec.json.encode(body)
    try:
        answer = await client.request(f"$JS.API.{call}", payload, timeout=API_SECONDS)
    except nats_errors.NoRespondersError as error:
        raise NoStream(f"{call}: nobody answers; is JetStream on in this NATS server and account?") from error
    except (nats_errors.Error, OSError) as error:
        raise LogUnreachable(f"{call}: {without_prefix(error)}") from error
    return read_reply(answer.data, what=call)


def without_prefix(error: BaseException) -> str:
    """The text of an error of nats-py."""
    if isinstance(error, nats_errors.TimeoutError):
        return "no answer in time"
    if isinstance(error, nats_errors.OutboundBufferLimitError | nats_errors.ConnectionClosedError):
        return "there is no connection to NATS"
    if isinstance(error, nats_errors.StaleConnectionError):
        return "the connection to NATS was lost"
    return str(error).removeprefix("nats: ") or type(error).__name__
