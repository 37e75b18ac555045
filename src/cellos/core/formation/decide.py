"""What is to be done about a formation, by its state alone.

`decide` gives the same answer to whoever asks with the same state and time, and asks for nothing that a second controller, or the same one
after a restart, could do twice: each action names what the log must still be like, and the log takes one of several. Nothing here counts
members: a decision costs what it asks for.

What is asked for, in this order of importance:

1. Runs of node lives that are gone are closed.
2. A formation that is being cancelled gets nothing more; attempts that began and were not claimed are declared void. Once none is left open
   it is `cancelled` after a delete, and `failed` otherwise.
3. When the deadline passed, or a critical member failed for good, what runs is cancelled; where nothing runs, the formation is `failed`.
4. When all members ended it is `completed`.
5. Members whose turn it is are dispatched, as many as may be under way at once: an event of the formation names the attempts, with the
   status that holds after it, and nodes are asked for them.
6. Else the status is told where it changed.
7. Nodes are asked again for attempts that an event named some time ago, and that nobody was asked for since: its writer is gone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping
from itertools import islice
from typing import Any, NamedTuple

from cellos.core.formation.events import DELETED
from cellos.core.formation.names import shown
from cellos.core.formation.runs import Attempt, WorkClass, work_class
from cellos.core.formation.state import FormationState, MemberState
from cellos.core.formation.transitions import Phase, status_of

IN_FLIGHT = 32
"""How many attempts of one formation are under way at once, so that a large one leaves room for others."""
MOST_DISPATCHED = 500
"""In one event, which stays well below the largest that the log takes."""
ASK_AFTER_MS = 1000
"""Whoever decides on an attempt asks for it at once. After this it is anybody's to do."""


class Dispatch(NamedTuple):
    """A member is to be asked for. `spec` is the body of the member's cell, without `id`."""

    attempt: Attempt
    pool: str
    work: WorkClass
    spec: Mapping[str, Any]


class Write(NamedTuple):
    """An event of the formation, which names what is dispatched; after it, nodes are asked for that.

    It holds after `FormationState.last_sequence` alone.
    """

    phase: Phase
    reason: str | None = None
    failed_cell_ids: tuple[str, ...] = ()
    dispatch: tuple[Dispatch, ...] = ()


class Ask(NamedTuple):
    """Nodes are to be asked for an attempt that an event of the formation has named. It holds where the subject of that work is empty."""

    dispatch: Dispatch


class Void(NamedTuple):
    """An attempt that nobody claimed is not to be claimed any more. It holds where the attempt's subject is empty."""

    attempt: Attempt
    reason: str


class Close(NamedTuple):
    """A run of a node life that is gone is to be ended: `destroyed`, after the last event on the attempt's subject."""

    attempt: Attempt
    run_id: str | None
    life: str


Action = Write | Ask | Void | Close


class Decision(NamedTuple):
    """At most one of the actions is a `Write`. `wake_at_ms`: when to ask again though nothing happened."""

    actions: tuple[Action, ...] = ()
    wake_at_ms: int | None = None


def decide(state: FormationState, now_ms: int, lost: Container[str] = (), *, in_flight: int = IN_FLIGHT) -> Decision:
    """What is to be done now. `now_ms`: milliseconds since 1970, best by the clock that the log stamps events with.

    `lost`: the lives of nodes that are gone for good. `in_flight`: how many attempts of the formation may be under way at once.
    """
    if state.terminal or not state.has_specs:
        return Decision()
    if state.formation is None:
        return _unreadable(state)
    closed: list[Action] = [
        Close(attempt, known.run_id, life)
        for life, attempts in state.lives.items()
        if life is not None and life in lost
        for attempt, known in attempts.items()
    ]
    closed.sort()
    if state.cancelling is not None:
        return Decision((*closed, *_cancel(state, state.cancelling)))
    write, wake_at_ms = _go_on(state, state.formation.deadline_seconds, now_ms, in_flight)
    asked, ask_at_ms = _ask(state, now_ms)
    wakes = [each for each in (wake_at_ms, ask_at_ms) if each is not None]
    return Decision((*closed, *((write,) if write else ()), *asked), min(wakes, default=None))


def _unreadable(state: FormationState) -> Decision:
    """Nobody could run it. One that somebody began to run was readable to him: that is his."""
    if state.fault is None or state.status != "PENDING":
        return Decision()
    return Decision((Write("failed", f"its document cannot be run: {state.fault}"),))


def _cancel(state: FormationState, reason: str) -> list[Action]:
    void: list[Action] = [Void(attempt, reason) for attempt, known in state.open_attempts.items() if not known.claimed]
    if void or state.under_way:
        return sorted(void)
    return [Write("cancelled" if reason == DELETED else "failed", reason, state.failed_cell_ids())]


def _go_on(state: FormationState, deadline_seconds: int, now_ms: int, in_flight: int) -> tuple[Write | None, int | None]:
    if (why := _why_over(state, deadline_seconds, now_ms)) is not None:
        return Write("cancelling" if state.under_way else "failed", why, state.failed_cell_ids()), None
    if state.all_ended:
        return (None if state.under_way else Write("completed", None, state.failed_cell_ids())), None
    due = _due(state, now_ms, min(in_flight - state.under_way, MOST_DISPATCHED))
    wake_at_ms = min((each for each in (state.deadline_ms, _next_retry(state, now_ms)) if each is not None), default=None)
    phase = _phase(state)
    degraded = phase == "degraded"
    # A formation is PENDING until something is dispatched: a delete goes by that.
    is_told = state.status in ("PENDING", status_of(phase)) and (not degraded or state.told_failed >= len(state.failed))
    if not due and is_told:
        return None, wake_at_ms
    write = Write(
        phase,
        _what_is_wrong(state) if degraded else None,
        state.failed_cell_ids() if degraded else (),
        tuple(_dispatch(Attempt(state.id, member.id, member.next_attempt), member) for member in due),
    )
    return write, wake_at_ms


def _ask(state: FormationState, now_ms: int) -> tuple[list[Ask], int | None]:
    """What to ask for now, and when to look again."""
    due = [attempt for attempt, decided_ms in state.unasked.items() if decided_ms + ASK_AFTER_MS <= now_ms]
    later = [decided_ms + ASK_AFTER_MS for decided_ms in state.unasked.values() if decided_ms + ASK_AFTER_MS > now_ms]
    return [Ask(_dispatch(attempt, state.members[attempt.member_id])) for attempt in sorted(due)], min(later, default=None)


def _why_over(state: FormationState, deadline_seconds: int, now_ms: int) -> str | None:
    """Why the formation cannot end well any more."""
    if state.critical_failed:
        member = state.order[state.critical_failed[0]]
        what = "was skipped" if member.phase == "skipped" else "failed"
        return f"critical member {shown(member.id)} {what}" + (f": {member.reason}" if member.reason else "")
    if state.deadline_ms is not None and now_ms >= state.deadline_ms and not state.all_ended:
        return f"its deadline of {deadline_seconds} s has passed"
    return None


def _phase(state: FormationState) -> Phase:
    """The phase whose status holds while the formation goes on."""
    if state.failed or state.retrying:
        return "degraded"
    if state.status in ("RUNNING", "DEGRADED") or not state.unstarted:
        return "running"
    return "launching"


def _what_is_wrong(state: FormationState) -> str:
    failed = f"{len(state.failed)} failed" if state.failed else ""
    retrying = f"{state.retrying} tried again" if state.retrying else ""
    return "members: " + ", ".join(filter(None, (failed, retrying)))


def _due(state: FormationState, now_ms: int, most: int) -> list[MemberState]:
    """At most so many members whose turn it is: those that waited for another attempt, then the others, as in the document."""
    if most <= 0:
        return []
    retries = state.backing_off[: min(most, _due_retries(state, now_ms))]
    places = [*(index for _, index in retries), *islice(state.ready, most - len(retries))]
    return [state.order[index] for index in places]


def _due_retries(state: FormationState, now_ms: int) -> int:
    return bisect_right(state.backing_off, now_ms, key=lambda entry: entry[0])


def _next_retry(state: FormationState, now_ms: int) -> int | None:
    """When the first of those is due that are not yet."""
    at = _due_retries(state, now_ms)
    return state.backing_off[at][0] if at < len(state.backing_off) else None


def _dispatch(attempt: Attempt, state: MemberState) -> Dispatch:
    member = state.member
    if member.spec is None or member.body is None:
        raise ValueError(f"member {shown(member.id)} has no spec, and its turn came")
    return Dispatch(attempt, member.pool, work_class(member.spec), member.body)
