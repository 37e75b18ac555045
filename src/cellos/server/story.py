"""Formations as somebody looks at them: folded from the events of the log when they are asked for, as the lists hold none of this.

What was read is kept for a while: whoever looks again and again costs the log only what is new.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from cellos.core.events import Event, parse_event
from cellos.core.formation.events import FORMATION_PREFIX, phase_of, subject_of
from cellos.core.formation.explain import NodeView, waiting_reason
from cellos.core.formation.members import cell_id
from cellos.core.formation.runs import work_of
from cellos.core.formation.state import FormationState, MemberState
from cellos.core.formation.transitions import TERMINAL, status_of
from cellos.core.formation.views import Attempts, AttemptView, FormationView, MemberView
from cellos.errors import EvidenceError
from cellos.eventlog.log import EventLog
from cellos.eventlog.stored import Stored

PAGE_MESSAGES = 250
KEPT_MEMBERS = 10_000
"""Of formations that nobody asks for at the moment."""


class Stories:
    """Those of the formations that were asked for lately, of one log: one that was made anew has others."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Story] = OrderedDict()

    async def story(self, formation_id: str, log: EventLog) -> Story:
        """As the log has it now. Raises EventLogError."""
        story = self._known.setdefault(formation_id, Story(formation_id))
        self._known.move_to_end(formation_id)
        await story.read(log)
        size = sum(each.size for each in self._known.values())
        while size > KEPT_MEMBERS and len(self._known) > 1:
            _, forgotten = self._known.popitem(last=False)
            size -= forgotten.size
        return story


class Story:
    """What a formation's events tell, and how far they were read."""

    def __init__(self, formation_id: str) -> None:
        self._state = FormationState(formation_id)
        self._attempts = Attempts()
        self._reading = asyncio.Lock()
        # First what the formation and its runs say, then what was asked for: so nothing is missing that the former speak of.
        self._places = {f"cellos.events.*.{formation_id}.>": 0, work_of(formation_id): 0}
        self._created_at: str | None = None
        self._ended_at: str | None = None

    @property
    def size(self) -> int:
        return len(self._state.order) + 1

    async def read(self, log: EventLog) -> None:
        """What is new. Raises EventLogError."""
        async with self._reading:
            begin = 0
            if not any(self._places.values()):
                # Before it there is nothing, in a log that may be long.
                created = await log.last(subject_of(self._state.id, "created"))
                begin = created.sequence - 1 if created is not None else 0
            for subject, place in self._places.items():
                after = max(place, begin)
                while page := await log.read(after, PAGE_MESSAGES, subject=subject):
                    for stored in page:
                        self._apply(stored)
                    self._places[subject] = after = page[-1].sequence
                    if len(page) < PAGE_MESSAGES:
                        break

    def _apply(self, stored: Stored) -> None:
        try:
            event = parse_event(stored.data)
        except EvidenceError:
            return
        self._state.apply(stored.sequence, stored.subject, event, stored_ns=stored.time)
        self._attempts.apply(stored.subject, event)
        if stored.subject.startswith(FORMATION_PREFIX):
            self._note(event)

    def _note(self, event: Event) -> None:
        phase = phase_of(event.type)
        if phase == "created":
            self._created_at = self._created_at or event.time
        elif phase is not None and status_of(phase) in TERMINAL:
            self._ended_at = self._ended_at or event.time

    def attempts(self, member_id: str) -> Sequence[AttemptView]:
        """In the order of their numbers."""
        return self._attempts.of(member_id)

    def view(self, nodes: Sequence[NodeView], controllers: int, now_ms: int) -> FormationView:
        """With why whoever waits does so."""
        state = self._state
        return FormationView(
            formation_id=state.id,
            name=state.name,
            status=state.status or "",
            reason=state.reason or state.fault,
            cancelling=None if state.terminal else state.cancelling,
            created_at=self._created_at,
            ended_at=self._ended_at,
            members=[self._member(member, nodes, controllers, now_ms) for member in state.order],
            cursor=next(iter(self._places.values())),
        )

    def _member(self, member: MemberState, nodes: Sequence[NodeView], controllers: int, now_ms: int) -> MemberView:
        state, written = self._state, member.member
        # Who drives a formation without specs says how it fares as a whole, and nothing of its members.
        runs_here = state.has_specs
        return MemberView(
            id=member.id,
            cell_id=cell_id(state.id, member.id),
            authorized_by=written.authorized_by,
            phase=member.phase if runs_here else None,
            attempt=member.attempt,
            run_id=member.run_id,
            node=member.node,
            exit_code=member.exit_code,
            reason=member.reason,
            after=written.after,
            critical=written.critical,
            retries=written.retries,
            pool=written.pool,
            waiting=waiting_reason(member, state, nodes, controllers, now_ms=now_ms) if runs_here else None,
            attempts=self._attempts.of(member.id),
        )
