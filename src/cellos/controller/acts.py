"""Decisions as writes to the log. Each names what the log must still be like, so that of several controllers one does it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cellos.core import events
from cellos.core.events import Draft, Event, RunIdentity, canonical_bytes, finished, parse_event
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.sign import Signer
from cellos.core.formation.decide import Close, Dispatch, Void, Write
from cellos.core.formation.events import phase_event, subject_of, subjects_of
from cellos.core.formation.runs import NODE_LOST, VOID, dispatched, run_subject, void, work_subject
from cellos.core.formation.state import FormationState
from cellos.core.ids import UUID_RANDOM_BYTES, rfc3339, uuid7
from cellos.errors import EvidenceError, WrongSequence
from cellos.eventlog.batch import Message
from cellos.eventlog.log import EventLog
from cellos.ports import Residue

NOT_KNOWN = Residue(kind="process", detail="not known: node lost")
"""What is left of a cell whose node is gone, and what is not, only that node could tell."""
_log = logging.getLogger("cellos.controller")


class Acts:
    """What a controller may do. `now_ns` is the wall clock, `random` gives that many random bytes. Raises what EventLog does."""

    def __init__(self, log: EventLog, *, signer: Signer | None, now_ns: Callable[[], int], random: Callable[[int], bytes]) -> None:
        self._log = log
        self._signer = signer
        self._now_ns = now_ns
        self._random = random

    def messages(self, state: FormationState, write: Write) -> list[Message]:
        """The event of the formation, guarded by what the state is now, and what asks nodes for the attempts that it names."""
        event_id, time = self._stamp()
        told = phase_event(
            state.id,
            write.phase,
            name=state.name,
            cell_count=state.cell_count,
            failed_cell_ids=write.failed_cell_ids,
            reason=write.reason,
            dispatched=[each.attempt for each in write.dispatch],
            event_id=event_id,
            time=time,
        )
        first = Message(
            subject=subject_of(state.id, write.phase),
            payload=self._line(told),
            message_id=told.id,
            expected_last=state.last_sequence,
            expected_filter=subjects_of(state.id),
        )
        return [first, *(self.work(state, each) for each in write.dispatch)]

    async def write(self, messages: list[Message]) -> int:
        """Tell the first, then ask for the others, which needs nobody's luck: the sequence of the last.

        No batch: NATS (2.12) takes tens of times as long for one. Whoever dies between the two leaves the asking to another one.
        """
        first, *work = messages
        ack = await self._log.publish(
            first.subject,
            first.payload,
            message_id=first.message_id,
            expected_last=first.expected_last,
            expected_filter=first.expected_filter,
        )
        return max([ack.sequence, *await asyncio.gather(*map(self.ask, work))])

    async def ask(self, work: Message) -> int:
        """Ask nodes for an attempt; 0 where somebody has."""
        try:
            return (await self._log.publish(work.subject, work.payload, message_id=work.message_id, expected_last=0)).sequence
        except WrongSequence:
            return 0

    def work(self, state: FormationState, dispatch: Dispatch) -> Message:
        """What asks nodes for an attempt."""
        assert state.formation is not None
        event_id, time = self._stamp()
        asked = dispatched(
            dispatch.attempt,
            name=state.name,
            pool=dispatch.pool,
            work=dispatch.work,
            spec=dispatch.spec,
            on_disconnect=state.formation.on_disconnect,
            event_id=event_id,
            time=time,
        )
        subject = work_subject(dispatch.pool, dispatch.work, dispatch.attempt)
        return Message(subject=subject, payload=self._line(asked), message_id=asked.id, expected_last=0)

    async def void(self, action: Void) -> int:
        """Unless the attempt was claimed."""
        event_id, time = self._stamp()
        event = void(action.attempt, reason=action.reason, event_id=event_id, time=time)
        ack = await self._log.publish(run_subject(action.attempt), self._line(event), message_id=event.id, expected_last=0)
        return ack.sequence

    async def close(self, action: Close, *, ttl_seconds: int) -> int:
        """End the run after its last event, whatever that is; 0 where it has ended."""
        subject = run_subject(action.attempt)
        last = await self._log.last(subject)
        if last is None:
            return 0
        try:
            before = parse_event(last.data)
            if before.type in {events.DESTROYED, VOID}:
                return 0
            chain = Chain.after(last.data)
        except EvidenceError as error:  # somebody else writes to our subjects
            _log.error("cannot close a run", extra={"fields": {"subject": subject, "error": str(error)}})
            return 0
        draft = _lost(before, action, ttl_seconds)
        event_id, time = self._stamp()
        event = finished(Draft(draft.type, chain.link(draft.data, final=True)), event_id=event_id, time=time)
        ack = await self._log.publish(subject, self._line(event), message_id=event.id, expected_last=last.sequence)
        fields = {"formation": action.attempt.formation_id, "member": action.attempt.member_id, "attempt": action.attempt.number}
        _log.warning("closed a run: its node is gone", extra={"fields": {**fields, "run": action.run_id, "life": action.life}})
        return ack.sequence

    def _stamp(self) -> tuple[str, str]:
        now = self._now_ns()
        return uuid7(now // 1_000_000, self._random(UUID_RANDOM_BYTES)), rfc3339(now)

    def _line(self, event: Event) -> bytes:
        line = canonical_bytes(event)
        return self._signer.wrap(event, line) if self._signer is not None else line


def _lost(before: Event, action: Close, ttl_seconds: int) -> Draft:
    """`destroyed` of a run that we know by its last event."""
    data = before.members
    correlation = data.get("correlation")
    run = RunIdentity(
        cell_id=str(data.get("cellId", "")),
        spec_id=str(data.get("specId", "")),
        run_id=str(data.get("runId", action.run_id or "")),
        spec_hash="",
        correlation=correlation if isinstance(correlation, dict) else None,
        tenant_id=correlation.get("tenantId") if isinstance(correlation, dict) else None,
    )
    draft = events.destroyed(
        run,
        ttl_seconds=ttl_seconds,
        outcome="failed",
        reason=NODE_LOST,
        residue_class="documented_exception",
        residue_exception=(NOT_KNOWN,),
    )
    return Draft(draft.type, {**draft.data, "terminalState": "forced"})
