"""What the log tells about one attempt, and what the attempts of a member add up to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import msgspec

from cellos.core.events import COMMAND_COMPLETED, DESTROYED, EXPORT_COMPLETED, EXPORT_FAILED, FS_TOUCH, PROCESS_SPAWNED, STARTED, Event
from cellos.core.formation.members import Member
from cellos.core.formation.names import shown
from cellos.core.formation.options import MOST_LOST_NODES
from cellos.core.formation.runs import CANCELLED, CLAIMED, LOST_REASONS, VOID, Attempt

MemberPhase = Literal["waiting", "ready", "dispatched", "claimed", "running", "backing_off", "succeeded", "failed", "skipped"]
MEMBER_PHASES: tuple[MemberPhase, ...] = get_args(MemberPhase)
"""What a member can be, in about the order in which it comes to it.

waiting: for members in its `after`; ready: nothing is in its way but other members' turn; dispatched: asked for; claimed: a node makes its
cell; running: it has a cell; backing_off: it failed and is tried again later; skipped: it will never run.
"""
ENDED: frozenset[MemberPhase] = frozenset({"succeeded", "failed", "skipped"})

Final = Literal["succeeded", "failed", "skipped"]

# Of a run, these come only once its cell is there: whoever sees but the last event of a run knows it by them.
_AFTER_START = frozenset({STARTED, PROCESS_SPAWNED, COMMAND_COMPLETED, FS_TOUCH, EXPORT_COMPLETED, EXPORT_FAILED})


class AttemptState(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. It was asked for; nothing else has to be known.

    `life` is that of the node which claimed it, None also where only later events of the run were seen. `outcome` is None until it ended.
    """

    key: Attempt
    claimed: bool = False
    started: bool = False
    run_id: str | None = None
    life: str | None = None
    node: str | None = None
    exit_code: int | None = None
    outcome: Literal["succeeded", "failed", "void"] | None = None
    reason: str | None = None
    ended_ms: int = 0

    def after(self, event: Event, time_ms: int) -> AttemptState:
        """With an event from the subject of its run. The log takes one end of an attempt: another one changes nothing."""
        data = event.members
        if event.type == VOID:
            if self.outcome is not None or self.claimed:
                return self
            return msgspec.structs.replace(self, outcome="void", reason=_text(data.get("reason")), ended_ms=time_ms)
        news: dict[str, Any] = {"claimed": True, "run_id": self.run_id or _text(data.get("runId"))}
        if event.type == CLAIMED:
            news |= {"life": _text(data.get("life")), "node": _text(data.get("node"))}
        if event.type in _AFTER_START:
            news["started"] = True
        if event.type == COMMAND_COMPLETED and type(data.get("exitCode")) is int:
            news["exit_code"] = data["exitCode"]
        if event.type == DESTROYED and self.outcome is None:
            outcome = "succeeded" if data.get("outcome") == "succeeded" else "failed"
            news |= {"outcome": outcome, "reason": _text(data.get("reason")), "ended_ms": time_ms}
        return msgspec.structs.replace(self, **news)


class Places(NamedTuple):
    """In which lists and counts of a formation a member is. `backing_off` is its entry there."""

    phase: MemberPhase
    ready: bool = False
    backing_off: tuple[int, int] | None = None
    failed: bool = False
    critical_failed: bool = False
    unstarted: bool = False
    retrying: bool = False


class MemberState:
    """One member: what it is now, and the attempts that led there. Only `FormationState` changes it."""

    __slots__ = (
        "_attempts",
        "_failures",
        "_is_blocked_by_failure",
        "_losses",
        "_settled",
        "asked",
        "blocked_by",
        "dependents",
        "ever_started",
        "final",
        "index",
        "member",
        "not_before_ms",
        "phase",
        "places",
        "stopped",
        "unmet",
    )

    def __init__(self, index: int, member: Member) -> None:
        self.index = index
        """Its place in the document."""
        self.member = member
        self.phase: MemberPhase = "waiting"
        self.places: Places | None = None
        """Where the formation lists it."""
        self.final: Final | None = None
        """How it ended, once nothing can change that any more."""
        self.stopped = False
        """It did not succeed because the formation is being cancelled, and for no other reason."""
        self.ever_started = False
        self.not_before_ms = 0
        """It is not tried again before, in milliseconds since 1970."""
        self.unmet = len(member.after)
        """How many members of its `after` have not succeeded yet."""
        self.blocked_by: tuple[int, str] | None = None
        """Of the members of its `after` that failed for good, place and id of the first in the document."""
        self._is_blocked_by_failure = False
        """Whether one of those failed otherwise than by the cancelling."""
        self.dependents: list[MemberState] = []
        self._attempts: list[AttemptState] = []
        self._settled = 0
        """So many attempts, from the first on, are over and counted."""
        self._failures = self._losses = 0
        self.asked = 0
        """The number of the last attempt that nodes were asked for."""

    # --- reading ------------------------------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self.member.id

    @property
    def current(self) -> AttemptState | None:
        """The attempt that `phase` tells of: the one that is open, or else the last."""
        at = self._settled if self.final is None and self._settled < len(self._attempts) else self._settled - 1
        return self._attempts[at] if at >= 0 else None

    @property
    def attempts(self) -> tuple[AttemptState, ...]:
        return tuple(self._attempts)

    @property
    def attempt(self) -> int:
        """The number of the current attempt, 0 before the first."""
        return self.current.key.number if self.current else 0

    @property
    def ended_attempts(self) -> int:
        return self._settled

    @property
    def next_attempt(self) -> int:
        """The number that the next attempt will have."""
        return len(self._attempts) + 1

    @property
    def run_id(self) -> str | None:
        return self.current.run_id if self.current else None

    @property
    def life(self) -> str | None:
        return self.current.life if self.current else None

    @property
    def node(self) -> str | None:
        return self.current.node if self.current else None

    @property
    def exit_code(self) -> int | None:
        """Of the current attempt's command, as in its event: -1 where it has none."""
        return self.current.exit_code if self.current else None

    @property
    def reason(self) -> str | None:
        """Why it failed, was skipped, or is tried again."""
        if self.blocked_by is not None:
            return f"needs {shown(self.blocked_by[1])}, which did not succeed"
        return self.current.reason if self.current else None

    @property
    def is_open(self) -> bool:
        """Whether an attempt of it is not over."""
        return self._settled < len(self._attempts)

    def may_have(self, number: int) -> bool:
        """Whether an attempt of that number can be one of it."""
        return self.member.spec is not None and number <= self.member.most_attempts

    # --- changing -----------------------------------------------------------------------------------------------------------------------

    def known(self, formation_id: str, number: int) -> list[AttemptState]:
        """Attempts become known by the highest of them, as none is asked for before the one before it was over. Gives the new ones."""
        first = len(self._attempts) + 1
        new = [AttemptState(key=Attempt(formation_id, self.id, each)) for each in range(first, number + 1)]
        self._attempts += new
        return new

    def replace(self, new: AttemptState) -> AttemptState:
        """Gives the one that was there."""
        at = new.key.number - 1
        old, self._attempts[at] = self._attempts[at], new
        self.ever_started |= new.started
        return old

    def settle(self) -> None:
        """Count the attempts that are over, in their order. Each is counted once."""
        while self.final is None and self._settled < len(self._attempts):
            attempt = self._attempts[self._settled]
            if attempt.outcome is None:
                return
            self._settled += 1
            self._count(attempt)
        if self.final in (None, "skipped") and self.blocked_by is not None and not self._attempts:
            self.final, self.stopped = "skipped", not self._is_blocked_by_failure

    def block(self, other: MemberState) -> None:
        """One that it waits for will never succeed."""
        place = (other.index, other.id)
        self.blocked_by = place if self.blocked_by is None else min(self.blocked_by, place)
        self._is_blocked_by_failure |= not other.stopped

    def _count(self, attempt: AttemptState) -> None:
        member = self.member
        if attempt.outcome == "succeeded":
            self.final = "succeeded"
        elif attempt.outcome == "void":
            self.final, self.stopped = ("failed" if self._settled > 1 else "skipped"), True
        elif attempt.reason == CANCELLED:
            self.final, self.stopped = "failed", True
        elif attempt.reason in LOST_REASONS:
            self._losses += 1
            if member.on_node_lost == "fail" or self._losses > MOST_LOST_NODES:
                self.final = "failed"
        else:
            self._failures += 1
            if self._failures > member.retries:
                self.final = "failed"
        if self.final is None:
            self.not_before_ms = attempt.ended_ms + member.backoff.delay_ms(self._settled)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
