"""The state of one formation that runs: what its events in the log add up to.

A `FormationState` is given the events of the formation itself, of what was asked for (`dispatched`) and of its runs, and keeps what
`decide` goes by. It promises: the same events in any order, each once or more often, give the same state; an event that cannot be what it
claims to be changes nothing; and an event costs the same in a formation of ten and of ten thousand members, but for those that it frees,
skips or ends.

Of a run, its last event alone is enough, save for who claimed it: then `lives[None]` has the attempt, and `claimed` can be read from the
log. What is decided is only as good as what was applied: the formation's own events up to `last_sequence` must all have been.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from typing import Any, NamedTuple

from cellos.core.events import Event
from cellos.core.formation.documents import Formation, document_has_specs, read_formation
from cellos.core.formation.events import phase_of, subject_of
from cellos.core.formation.member_state import ENDED, MEMBER_PHASES, AttemptState, MemberPhase, MemberState, Places
from cellos.core.formation.members import cell_id
from cellos.core.formation.runs import DISPATCHED, WORK_PREFIX, Attempt, attempt_of
from cellos.core.formation.transitions import TERMINAL, FormationStatus, Phase, next_status, status_of
from cellos.core.ids import TimeSyntaxError, unix_ns
from cellos.errors import FormationRejected, LifecycleError

__all__ = ["ENDED", "MEMBER_PHASES", "AttemptState", "FormationState", "MemberPhase", "MemberState"]

_MILLISECOND = 1_000_000


class _Step(NamedTuple):
    """An event of the formation."""

    sequence: int
    phase: Phase
    reason: str | None
    failed: int
    """How many members it names as failed."""


class FormationState:
    """Everything public is for reading. Members are in the order of the document; times are milliseconds since 1970."""

    def __init__(self, formation_id: str) -> None:
        self.id = formation_id
        self.formation: Formation | None = None
        """None until `created` was applied, and for ever where nobody can read its document: then `fault` says why."""
        self.fault: str | None = None
        self.has_specs = False
        """Without, somebody else drives it, and `decide` does nothing."""
        self.name = ""
        self.cell_count = 0
        self.created_ms: int | None = None
        self.deadline_ms: int | None = None
        self.status: FormationStatus | None = None
        self.last_sequence = 0
        """Of the last event of the formation itself: what the next write expects."""
        self.reason: str | None = None
        """That of the last event which changed the status or began to cancel."""
        self.cancelling: str | None = None
        """Why the formation is being cancelled; None where it is not."""
        self.members: dict[str, MemberState] = {}
        self.order: list[MemberState] = []
        self.open_attempts: dict[Attempt, AttemptState] = {}
        """Those that are not over."""
        self.lives: dict[str | None, dict[Attempt, AttemptState]] = {}
        """Of these the claimed ones, by the life of the node that has them."""
        self.unasked: dict[Attempt, int] = {}
        """Attempts that the formation's events decided on, and that no node was asked for yet, with the time of that decision."""
        self.counts: Counter[MemberPhase] = Counter()
        self.ready: list[int] = []
        """Places of members, ascending; so are the next ones."""
        self.backing_off: list[tuple[int, int]] = []
        """By the time before which they are not tried again."""
        self.failed: list[int] = []
        """Those that failed for good or were skipped."""
        self.critical_failed: list[int] = []
        """Those of them that were not to fail."""
        self.told_failed = 0
        """How many members the last event that told of `degraded` named as failed."""
        self.unstarted = 0
        """How many members could run, and none of their attempts has started."""
        self.retrying = 0
        """How many members wait to be tried again, or were asked for again and have not started."""
        self._decided: dict[Attempt, int] = {}
        """Attempts that were decided on, as far as that was read before `created`."""
        self._steps: list[_Step] = []
        self._early: dict[int, tuple[Attempt, int, str, Event, int | None]] = {}
        """What came before `created`, by sequence."""

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def all_ended(self) -> bool:
        return self.counts["succeeded"] + self.counts["failed"] + self.counts["skipped"] == len(self.order)

    @property
    def under_way(self) -> int:
        """How many attempts are not over."""
        return len(self.open_attempts)

    def failed_cell_ids(self) -> tuple[str, ...]:
        """In the order of the document. What ended only because the formation is being cancelled did not fail."""
        failed = (self.order[index] for index in self.failed)
        return tuple(cell_id(self.id, member.id) for member in failed if self.cancelling is None or not member.stopped)

    # --- applying -----------------------------------------------------------------------------------------------------------------------

    def apply(self, sequence: int, subject: str, event: Event, *, stored_ns: int | None = None) -> bool:
        """Take an event from the log. False where it changes nothing.

        `stored_ns`: when the log stored it, which is what back-off and deadline are measured from; without it, the event's own time.
        """
        phase = phase_of(event.type)
        if phase is not None:
            if subject != subject_of(self.id, phase):
                return False
            failed = event.members.get("failedCellIds")
            step = _Step(sequence, phase, _text(event.members.get("reason")), len(failed) if isinstance(failed, list) else 0)
            return self._apply_step(step, event, stored_ns)
        attempt = attempt_of(subject)
        if attempt is None or attempt.formation_id != self.id:
            return False
        if self.created_ms is None:
            early = (attempt, sequence, subject, event, stored_ns)
            return self._early.setdefault(sequence, early) is early
        return self._apply_attempt(attempt, sequence, subject, event, stored_ns)

    def _apply_step(self, step: _Step, event: Event, stored_ns: int | None) -> bool:
        at = bisect_left(self._steps, step.sequence, key=lambda known: known.sequence)
        if at < len(self._steps) and self._steps[at].sequence == step.sequence:
            return False
        was_terminal = self.terminal
        self._steps.insert(at, step)
        if at == len(self._steps) - 1:
            self._step(step)
        else:
            self.status = self.reason = self.cancelling = None
            self.told_failed = 0
            for each in self._steps:
                self._step(each)
        self.last_sequence = self._steps[-1].sequence
        self._decide(event.members.get("dispatched"), _milliseconds(event, stored_ns))
        if step.phase == "created" and self.created_ms is None:
            self._create(event, stored_ns)
        if self.terminal and not was_terminal:
            # Whatever had not begun never will.
            for member in self.order:
                self._relist(member)
        return True

    def _step(self, step: _Step) -> None:
        """The status after one more event. What has no place was written past the rules: it counts for nothing but the sequence."""
        try:
            status = next_status(self.status, step.phase)
        except LifecycleError:
            if self.status is not None:
                return
            # The log may begin after `created`.
            status = status_of(step.phase) or "PENDING"
        if step.phase == "cancelling":
            self.cancelling = step.reason or "cancelled"
        if step.phase == "degraded":
            self.told_failed = step.failed
        if status != self.status or step.phase == "cancelling":
            self.reason = step.reason
        self.status = status

    def _decide(self, dispatched: object, time_ms: int) -> None:
        """Attempts that an event of the formation names begin with it; asking nodes for them follows from it."""
        for each in dispatched if isinstance(dispatched, list) else ():
            id, number = (each.get("memberId"), each.get("attempt")) if isinstance(each, dict) else (None, None)
            if isinstance(id, str) and type(number) is int and number > 0:
                attempt = Attempt(self.id, id, number)
                if self.created_ms is None:
                    self._decided[attempt] = time_ms
                else:
                    self._begin(attempt, time_ms)

    def _begin(self, attempt: Attempt, time_ms: int) -> None:
        member = self.members.get(attempt.member_id)
        if member is None or not member.may_have(attempt.number):
            return
        new = member.known(self.id, attempt.number)
        self.open_attempts.update((each.key, each) for each in new)
        known = member.attempts[attempt.number - 1]
        if attempt.number > member.asked and not known.claimed and known.outcome is None:
            self.unasked[attempt] = time_ms
        if new:
            self._settle(member)

    def _create(self, event: Event, stored_ns: int | None) -> None:
        data = event.members
        document = data.get("document")
        self.name = _text(data.get("formationName")) or ""
        self.created_ms = _milliseconds(event, stored_ns)
        self.has_specs = document_has_specs(document)
        if isinstance(document, dict):
            try:
                self.formation = read_formation(document)
            except FormationRejected as error:
                self.fault = error.text
        if self.formation is None:
            return
        self.cell_count = len(self.formation.members)
        self.deadline_ms = self.created_ms + self.formation.deadline_seconds * 1000
        self.order = [MemberState(index, member) for index, member in enumerate(self.formation.members)]
        self.members = {member.id: member for member in self.order}
        for member in self.order:
            for id in member.member.after:
                self.members[id].dependents.append(member)
        for member in self.order:
            self._relist(member)
        decided, self._decided = self._decided, {}
        for attempt, time_ms in decided.items():
            self._begin(attempt, time_ms)
        early, self._early = self._early, {}
        for each in early.values():
            self._apply_attempt(*each)

    def _apply_attempt(self, attempt: Attempt, sequence: int, subject: str, event: Event, stored_ns: int | None) -> bool:
        member = self.members.get(attempt.member_id)
        is_work = subject.startswith(WORK_PREFIX)
        if member is None or not member.may_have(attempt.number):
            return False
        if is_work and event.type != DISPATCHED:
            return False
        new = member.known(self.id, attempt.number)
        self.open_attempts.update((each.key, each) for each in new)
        if is_work:
            changed = attempt.number > member.asked or bool(new)
            member.asked = max(member.asked, attempt.number)
            self.unasked.pop(attempt, None)
        else:
            old = member.attempts[attempt.number - 1]
            after = old.after(event, _milliseconds(event, stored_ns))
            changed = after != old or bool(new)
            self._list_attempt(member.replace(after), after)
        if changed:
            self._settle(member)
        return changed

    # --- indexes ------------------------------------------------------------------------------------------------------------------------

    def _list_attempt(self, old: AttemptState, new: AttemptState) -> None:
        if old.claimed and old.outcome is None:
            of_life = self.lives[old.life]
            del of_life[old.key]
            if not of_life:
                del self.lives[old.life]
        if new.claimed or new.outcome is not None:
            self.unasked.pop(new.key, None)
        if new.outcome is not None:
            self.open_attempts.pop(new.key, None)
            return
        self.open_attempts[new.key] = new
        if new.claimed:
            self.lives.setdefault(new.life, {})[new.key] = new

    def _settle(self, first: MemberState) -> None:
        """A member changed: so do, where it ended, those that wait for it."""
        changed = [first]
        while changed:
            member = changed.pop()
            before = member.final, member.stopped
            member.settle()
            self._relist(member)
            if member.final is None or before == (member.final, member.stopped):
                continue
            for other in member.dependents:
                if member.final == "succeeded":
                    other.unmet -= 1
                else:
                    other.block(member)
                changed.append(other)

    def _relist(self, member: MemberState) -> None:
        """Move a member to where its phase belongs."""
        old, new = member.places, self._places(member)
        if new == old:
            return
        member.places, member.phase = new, new.phase
        index = member.index
        if old is not None:
            self.counts[old.phase] -= 1
        self.counts[new.phase] += 1
        was, now = old or _NOWHERE, new
        self.unstarted += now.unstarted - was.unstarted
        self.retrying += now.retrying - was.retrying
        _move(self.ready, index if was.ready else None, index if now.ready else None)
        _move(self.failed, index if was.failed else None, index if now.failed else None)
        _move(self.critical_failed, index if was.critical_failed else None, index if now.critical_failed else None)
        _move(self.backing_off, was.backing_off, now.backing_off)

    def _places(self, member: MemberState) -> Places:
        phase = self._phase(member)
        on_its_way = phase in ("dispatched", "claimed")
        failed = member.final in ("failed", "skipped")
        return Places(
            phase=phase,
            ready=phase == "ready",
            backing_off=(member.not_before_ms, member.index) if phase == "backing_off" else None,
            failed=failed,
            critical_failed=failed and member.member.critical,
            unstarted=(on_its_way or phase == "ready") and not member.ever_started,
            retrying=phase == "backing_off" or (on_its_way and member.ended_attempts > 0),
        )

    def _phase(self, member: MemberState) -> MemberPhase:
        if member.final is not None:
            return member.final
        if member.is_open and (attempt := member.current) is not None:
            return "running" if attempt.started else "claimed" if attempt.claimed else "dispatched"
        if self.terminal:
            return "failed" if member.ended_attempts else "skipped"
        if member.ended_attempts:
            return "backing_off"
        return "waiting" if member.unmet else "ready"


_NOWHERE = Places(phase="waiting")


def _move(places: list[Any], old: object, new: object) -> None:
    if old == new:
        return
    if old is not None:
        del places[bisect_left(places, old)]
    if new is not None:
        insort(places, new)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _milliseconds(event: Event, stored_ns: int | None) -> int:
    """Zero for a time that nobody can read."""
    if stored_ns is None:
        try:
            stored_ns = unix_ns(event.time or "")
        except TimeSyntaxError:
            return 0
    return stored_ns // _MILLISECOND
