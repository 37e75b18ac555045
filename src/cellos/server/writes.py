"""Writing: the log first. Nothing is told to be done before the log has acknowledged it, and what is refused there changes nothing here.

Every write names the last event of the formation that it goes by, so of several writers, here or in other servers, one wins and the others
look again. The answer to a writer waits until its event has come back through the reader: who wrote it can read it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Sequence

import msgspec

from cellos.core.events import canonical_bytes, parse_event
from cellos.core.formation import TERMINAL, Formation, Phase, document_has_specs, next_status, status_of
from cellos.core.formation import events as formation_events
from cellos.core.formation.events import DELETED, name_subject, phase_of, subject_of, subjects_of
from cellos.core.formation.transitions import TELLS_FAILED_CELLS
from cellos.core.ids import uuid4
from cellos.core.problem import driven_by_controller, formation_not_found, name_taken, problem, problem_of_status
from cellos.core.projection import FormationRecord
from cellos.errors import (
    DuplicateInBatch,
    EventLogError,
    EvidenceError,
    LifecycleError,
    LogFull,
    LogUnreachable,
    MessageRefused,
    OutcomeUnknown,
    WrongSequence,
)
from cellos.eventlog.api import Ack
from cellos.eventlog.batch import Message
from cellos.eventlog.log import EventLog
from cellos.eventlog.stored import Stored
from cellos.server.replies import Refused, require_match
from cellos.server.state import ServerState, unavailable

ATTEMPTS = 8
ADMISSION_SECONDS = 1.0
"""How long a name that is reserved waits for its formation before another one may have it."""
_POLL_SECONDS = 0.02
_UNKNOWN = "whether it was written is not known; repeat the request, with the same Idempotency-Key where it has one"


class _Lost(Exception):  # no error: look again
    """Another write came first."""


async def create(state: ServerState, formation: Formation, key: str | None) -> str:
    """Reserve the name, then admit the formation under that reservation. Gives its id.

    A `key` (Idempotency-Key) names the formation: a repetition finds it and gives the same id, whatever became of it. Raises Refused.
    """
    formation_id = uuid4(os.urandom(16)) if key is None else id_of_key(key)
    log = state.required_log()
    holder, expected = state.projection.name(formation.name)
    for _ in range(ATTEMPTS):
        may_be_repeated = key is not None and (holder is not None or state.projection.formation(formation_id) is not None)
        if may_be_repeated and await _is_repeated(state, log, formation_id, formation):
            return formation_id
        if holder not in {None, formation_id} and not await _is_free(state, log, holder):
            raise Refused(name_taken(formation.name, holder))
        try:
            if holder != formation_id:
                expected = (await _commit(log, [_reservation(state, formation_id, formation, expected)])).sequence
            ack = await _commit(log, [_admission(state, formation_id, formation, key, expected)])
        except _Lost:
            reservation = await log.last(name_subject(formation.name))
            holder, expected = _holder(reservation), reservation.sequence if reservation is not None else 0
            continue
        await state.applied(ack.sequence)
        return formation_id
    raise unavailable("too many writers of this name at once; retry later")


def id_of_key(key: str) -> str:
    """The id of the formation that requests with this key are about, in every server."""
    digest = hashlib.sha256(b"cellos idempotency key\n" + key.encode()).digest()
    return uuid4(digest[:16])


def _reservation(state: ServerState, formation_id: str, formation: Formation, expected: int) -> Message:
    event_id, time = state.new_event()
    reserved = formation_events.name_reserved(formation_id, formation.name, event_id=event_id, time=time)
    return Message(subject=name_subject(formation.name), payload=canonical_bytes(reserved), message_id=reserved.id, expected_last=expected)


def _admission(state: ServerState, formation_id: str, formation: Formation, key: str | None, reservation: int) -> Message:
    """The log takes it only while the name is reserved for it, so the two writes need no batch, which takes NATS tens of their time.

    With a key, the id of the event is the key's too: of two servers that are asked at once, the log takes one.
    """
    event_id, time = state.new_event()
    if key is not None:
        event_id = formation_id
    created = formation_events.created(formation_id, formation, event_id=event_id, time=time, idempotency_key=key)
    return Message(
        subject=subject_of(formation_id, "created"),
        payload=canonical_bytes(created),
        message_id=created.id,
        expected_last=reservation,
        expected_filter=name_subject(formation.name),
    )


async def _is_repeated(state: ServerState, log: EventLog, formation_id: str, formation: Formation) -> bool:
    """Whether the formation is in the log already. Raises Refused where it is another one than is asked for."""
    admitted = await log.last(subject_of(formation_id, "created"))
    if admitted is None:
        return False
    await state.applied(admitted.sequence)
    try:
        document = parse_event(admitted.data).members.get("document")
    except EvidenceError:
        document = None
    if document != formation.document:
        raise Refused(problem_of_status(422, f"this Idempotency-Key was used for another document: formation {formation_id}"))
    return True


async def cancel(state: ServerState, formation_id: str, *, condition: bytes | None = None) -> None:
    """End a formation. One of which nothing was dispatched is over with this; of another one, what runs has to be ended first.

    `condition` is the request's If-Match. Raises Refused.
    """
    for _ in range(ATTEMPTS):
        record, last = await _look(state, formation_id, condition)
        if record.status in TERMINAL:
            return
        phases: tuple[Phase, ...] = ("cancelling", "cancelled")
        # The event that an attempt begins with makes it LAUNCHING or more.
        if document_has_specs(record.document) and record.status != "PENDING":
            phases = ("cancelling",)
            if last is not None and _phase(last) == "cancelling":
                return
        if await _write(state, record, last, phases, reason=DELETED):
            return
    raise unavailable("too many writers of this formation at once; retry later")


async def report(
    state: ServerState,
    formation_id: str,
    phase: Phase,
    *,
    reason: str | None,
    failed_cells: Sequence[str],
    condition: bytes | None = None,
) -> None:
    """What somebody outside says of a formation without specs. Raises Refused: 409 where the phase has no place."""
    for _ in range(ATTEMPTS):
        record, last = await _look(state, formation_id, condition)
        if document_has_specs(record.document):
            raise Refused(driven_by_controller(formation_id))
        try:
            next_status(record.status, phase)
        except LifecycleError as error:
            raise Refused(problem("conflict", f"formation {formation_id}: {error.text}")) from error
        failed = failed_cells if phase in TELLS_FAILED_CELLS else ()
        if await _write(state, record, last, (phase,), reason=reason, failed_cells=failed):
            return
    raise unavailable("too many writers of this formation at once; retry later")


async def require_known(state: ServerState, formation_id: str) -> None:
    """Raises Refused: 404."""
    await _look(state, formation_id)


async def _look(state: ServerState, formation_id: str, condition: bytes | None = None) -> tuple[FormationRecord, Stored | None]:
    """A formation and its last event in the log, of the same moment. Raises Refused, also where `condition` does not hold."""
    if state.log is None:
        if state.projection.formation(formation_id) is None:
            raise Refused(formation_not_found(formation_id))
        raise unavailable()
    try:
        last = await state.log.last(subjects_of(formation_id))
    except EventLogError:
        if state.projection.formation(formation_id) is None:
            raise Refused(formation_not_found(formation_id)) from None
        raise
    if last is not None:
        await state.applied(last.sequence)
    line = state.projection.formation(formation_id)
    if line is None:
        raise Refused(formation_not_found(formation_id))
    require_match(condition, line)
    return _decoded(line), last


async def _write(
    state: ServerState,
    record: FormationRecord,
    last: Stored | None,
    phases: Sequence[Phase],
    *,
    reason: str | None,
    failed_cells: Sequence[str] = (),
) -> bool:
    """One event per phase, all or none. False where another write came first. Raises Refused."""
    members = record.document.get("members") if isinstance(record.document, dict) else None
    messages: list[Message] = []
    for phase in phases:
        event_id, time = state.new_event()
        event = formation_events.phase_event(
            record.id,
            phase,
            name=record.name,
            cell_count=len(members) if isinstance(members, list) else 0,
            failed_cell_ids=failed_cells,
            reason=reason,
            event_id=event_id,
            time=time,
        )
        guard = None if messages else last.sequence if last is not None else 0
        messages.append(
            Message(
                subject=subject_of(record.id, phase),
                payload=canonical_bytes(event),
                message_id=event.id,
                expected_last=guard,
                expected_filter=subjects_of(record.id) if guard is not None else None,
            )
        )
    try:
        ack = await _commit(state.required_log(), messages)
    except _Lost:
        return False
    await state.applied(ack.sequence)
    return True


async def _commit(log: EventLog, messages: Sequence[Message]) -> Ack:
    """Write all or none. Raises _Lost, and Refused where nothing was written or nobody knows."""
    try:
        if len(messages) == 1:
            only = messages[0]
            return await log.publish(
                only.subject,
                only.payload,
                message_id=only.message_id,
                expected_last=only.expected_last,
                expected_filter=only.expected_filter,
            )
        return await log.publish_batch(messages)
    except (WrongSequence, DuplicateInBatch, OutcomeUnknown) as error:
        try:
            settled = await log.settle(messages[-1].subject, messages[-1].message_id)
        except EventLogError:
            raise unavailable(_UNKNOWN) from error
        if settled is not None:
            return settled
        if isinstance(error, OutcomeUnknown):  # it may still arrive
            raise unavailable(_UNKNOWN) from error
        raise _Lost from error
    except LogFull as error:
        raise unavailable("the event log is full; nothing was written") from error
    except MessageRefused as error:
        raise Refused(problem("payload-too-large", f"the event log does not take this: {error.text}")) from error
    except LogUnreachable as error:
        raise unavailable() from error


def _record(state: ServerState, formation_id: str) -> FormationRecord | None:
    line = state.projection.formation(formation_id)
    return _decoded(line) if line is not None else None


def _decoded(line: bytes) -> FormationRecord:
    return msgspec.json.decode(line, type=FormationRecord)


async def _is_free(state: ServerState, log: EventLog, holder: str) -> bool:
    """Whether a name that is reserved for `holder` may be reserved again: the formation has ended, or never came to be.

    By its last event alone where the projection began after the formation did. A server that died between the two writes leaves a name
    without a formation; one that is about to write the second gets a moment, after which its write is refused.
    """
    deadline = time.monotonic() + ADMISSION_SECONDS
    while (last := await log.last(subjects_of(holder))) is None:
        if time.monotonic() > deadline:
            return True
        await asyncio.sleep(_POLL_SECONDS)
    await state.applied(last.sequence)
    record = _record(state, holder)
    if record is not None:
        return record.status in TERMINAL
    phase = _phase(last)
    return phase is not None and status_of(phase) in TERMINAL


def _phase(stored: Stored) -> Phase | None:
    try:
        return phase_of(parse_event(stored.data).type)
    except EvidenceError:
        return None


def _holder(reservation: Stored | None) -> str | None:
    if reservation is None:
        return None
    try:
        holder = parse_event(reservation.data).members.get("formationId")
    except EvidenceError:
        return None
    return holder if isinstance(holder, str) else None
