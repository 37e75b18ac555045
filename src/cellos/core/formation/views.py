"""Formations that run, as people and programs are shown them: the bodies of `GET /v1/formations/…/members`, and the attempts in them.

The server writes these shapes and clients read them; a client takes what is missing for unknown, so servers of other versions will do.
`Attempts` is what a formation's events tell about each try to run a member.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cellos.core.events import COMMAND_COMPLETED, DESTROYED, STARTED, Event
from cellos.core.formation.runs import CLAIMED, DISPATCHED, VOID, Attempt, attempt_of
from cellos.core.formation.transitions import TERMINAL
from cellos.core.messages import canonical_uuid

OVER = frozenset({"succeeded", "failed", "skipped"})
"""The phases of a member after which nothing happens to it any more."""


class AttemptView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One try to run a member. `state` is dispatched, claimed, running, succeeded, failed or void. Times are those of the events."""

    attempt: int
    state: str = ""
    run_id: str | None = None
    node: str | None = None
    dispatched_at: str | None = None
    claimed_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: int | None = None
    reason: str | None = None


class MemberView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A member. `phase` is null where others than CellOS drive the formation; `waiting` says why a member does not go on."""

    id: str
    cell_id: str = ""
    authorized_by: str | None = None
    phase: str | None = None
    attempt: int = 0
    run_id: str | None = None
    node: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    after: Sequence[str] = ()
    critical: bool = True
    retries: int = 0
    pool: str = ""
    waiting: str | None = None
    attempts: Sequence[AttemptView] = ()

    @property
    def is_over(self) -> bool:
        return self.phase in OVER

    @property
    def last(self) -> AttemptView | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None


class FormationView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A formation with its members, in the order of its document. Events of it behind `cursor` may not be in it yet."""

    formation_id: str
    name: str = ""
    status: str = ""
    reason: str | None = None
    """Why it has its status; of one whose document nobody can run any more, why not."""
    cancelling: str | None = None
    created_at: str | None = None
    ended_at: str | None = None
    members: Sequence[MemberView] = ()
    cursor: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name or self.formation_id

    def member(self, member_id: str) -> MemberView | None:
        return next((each for each in self.members if each.id == member_id), None)


class Attempts:
    """The attempts of a formation's members, from its events in the order of their subjects; what is told twice changes nothing."""

    def __init__(self) -> None:
        self._of: dict[str, dict[int, AttemptView]] = {}

    def apply(self, subject: str, event: Event) -> None:
        """Take an event; one that is about no attempt tells nothing."""
        attempt = attempt_of(subject)
        if attempt is None:
            return
        news = _told(event)
        if news:
            known = self._of.setdefault(attempt.member_id, {})
            known[attempt.number] = _after(known.get(attempt.number), attempt, event, news)

    def of(self, member_id: str) -> tuple[AttemptView, ...]:
        """In the order of their numbers."""
        known = self._of.get(member_id, {})
        return tuple(known[number] for number in sorted(known))


_ORDER = ("", "dispatched", "claimed", "running", "void", "succeeded", "failed")


def _told(event: Event) -> dict[str, object]:
    """What an event says of its attempt."""
    data, time = event.members, event.time
    if event.type == DISPATCHED:
        return {"state": "dispatched", "dispatched_at": time}
    if event.type == CLAIMED:
        return {"state": "claimed", "claimed_at": time, "run_id": _text(data.get("runId")), "node": _text(data.get("node"))}
    if event.type == STARTED:
        return {"state": "running", "started_at": time}
    if event.type == COMMAND_COMPLETED:
        code = data.get("exitCode")
        return {"exit_code": code if isinstance(code, int) and not isinstance(code, bool) else None}
    if event.type == DESTROYED:
        ended = "succeeded" if data.get("outcome") == "succeeded" else "failed"
        return {"state": ended, "ended_at": time, "reason": _text(data.get("reason"))}
    if event.type == VOID:
        return {"state": "void", "ended_at": time, "reason": _text(data.get("reason"))}
    return {}


def _after(known: AttemptView | None, attempt: Attempt, event: Event, news: dict[str, object]) -> AttemptView:
    """`dispatched` lies on another subject than the rest, so it may be read after them."""
    before = known or AttemptView(attempt=attempt.number)
    state = news.get("state", before.state)
    if _ORDER.index(str(state)) < _ORDER.index(before.state):
        news = {**news, "state": before.state}
    return msgspec.structs.replace(before, **news)


def place_of(cell_id: str) -> tuple[str, str] | None:
    """The formation and the member that a cell id is made of; None for one of another make."""
    formation_id, dot, member_id = cell_id.partition(".")
    return (formation_id, member_id) if dot and member_id and canonical_uuid(formation_id) == formation_id else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
