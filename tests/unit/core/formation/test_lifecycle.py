"""Formations from their admission to their end, with everything that can go wrong: a log that takes one of several writes, controllers that
see it late and out of order and die between any two writes, nodes that claim, run, end, die and come back.

What holds at any time is checked message by message by `Auditor`, which knows the rules and nothing of the code. In the end all that is
left alive goes on, and every formation has to be over.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cellos.core.events import DESTROYED
from cellos.core.formation.decide import Action, decide
from cellos.core.formation.events import DELETED, phase_of
from cellos.core.formation.runs import CANCELLED, CLAIMED, DISPATCHED, LOST_REASONS, NODE_RESTARTED, VOID, Attempt, attempt_of, run_subject
from cellos.core.formation.state import ENDED, FormationState
from cellos.core.formation.transitions import TERMINAL, next_status
from cellos.testing.formation_log import Entry, FormationLog, Run, document

CAP = 2
LIVES = ("n1", "n2")
MOST_LOSSES = 10


def facts(state: FormationState) -> dict[str, Any]:
    """All that a state says."""
    public = {
        name: value for name, value in vars(state).items() if not name.startswith("_") and name not in ("members", "order", "formation")
    }
    members = [
        (m.id, m.phase, m.final, m.stopped, m.unmet, m.blocked_by, m.attempts, m.ended_attempts, m.reason, m.places, m.ever_started)
        for m in state.order
    ]
    return {**public, "members": members, "terminal": state.terminal, "under_way": state.under_way}


class Auditor:
    """Reads the log in order, and knows what may follow what."""

    def __init__(self, log: FormationLog) -> None:
        self._log = log
        self._read = 0
        self.status: Any = None
        self.cancelling: str | None = None
        self.began: dict[str, int] = {}
        """How many attempts of a member were decided on."""
        self.claimed: dict[Attempt, str] = {}
        self.ended: dict[Attempt, Entry] = {}
        self.succeeded: set[str] = set()

    def read(self) -> None:
        for entry in self._log.entries[self._read :]:
            phase = phase_of(entry.event.type)
            if phase is not None:
                self._formation(entry, phase)
                continue
            attempt = attempt_of(entry.subject)
            assert attempt is not None
            if entry.event.type == DISPATCHED:  # it may be late, but never of its own accord
                assert attempt.number <= self.began.get(attempt.member_id, 0)
                assert len(self._log.events(entry.subject)) == 1
            else:
                self._run(entry, attempt)
        self._read = len(self._log.entries)

    def _formation(self, entry: Entry, phase: Any) -> None:
        # Raises where it has no place, so terminal is final, too.
        self.status = next_status(self.status, phase)
        assert self.cancelling is None or phase in ("failed", "cancelled")
        if phase == "cancelling":
            self.cancelling = entry.event.members["reason"]
        for each in entry.event.members.get("dispatched", ()):
            self._begins(entry, Attempt(self._log.id, each["memberId"], each["attempt"]))
        if self.status in TERMINAL:
            assert not self.open_attempts
            self._ended(entry)

    def _ended(self, entry: Entry) -> None:
        members = self._log.formation.members
        failed = [member.id for member in members if member.id not in self.succeeded and self._failed_for_good(member)]
        if self.status == "COMPLETED":
            others = [member.id for member in members if member.id not in self.succeeded]
            assert failed == others
            assert all(not member.critical for member in members if member.id in others)
            assert entry.event.members["failedCellIds"] == [f"{self._log.id}.{id}" for id in others]
        elif self.status == "CANCELLED":
            assert self.cancelling == DELETED
        else:
            critical = any(member.critical for member in members if member.id in failed)
            late = entry.stored_ns // 1_000_000 >= self._deadline_ms
            assert critical or late
            assert entry.event.members["reason"]

    @property
    def _deadline_ms(self) -> int:
        return self._log.entries[0].stored_ns // 1_000_000 + self._log.formation.deadline_seconds * 1000

    def _failed_for_good(self, member: Any) -> bool:
        """Of its own, or because of one that it waits for."""
        members = {each.id: each for each in self._log.formation.members}
        return self._used_up(member) or any(self._failed_for_good(members[id]) for id in member.after if id not in self.succeeded)

    def _used_up(self, member: Any) -> bool:
        """Whether none of the attempts that it is good for is left."""
        losses, failures = self._faults(member.id)
        return failures > member.retries or (losses > 0 if member.on_node_lost == "fail" else losses > MOST_LOSSES)

    def _faults(self, id: str) -> tuple[int, int]:
        reasons = [entry.event.members.get("reason") for attempt, entry in self.ended.items() if attempt.member_id == id]
        own = [reason for reason in reasons if reason != CANCELLED]
        lost = sum(reason in LOST_REASONS for reason in own)
        return lost, len(own) - lost - (id in self.succeeded)

    @property
    def open_attempts(self) -> set[Attempt]:
        asked = {Attempt(self._log.id, id, number + 1) for id, count in self.began.items() for number in range(count)}
        return asked - self.ended.keys()

    def _begins(self, entry: Entry, attempt: Attempt) -> None:
        member = next(each for each in self._log.formation.members if each.id == attempt.member_id)
        assert self.cancelling is None
        assert self.status not in TERMINAL
        assert attempt.number == self.began.get(member.id, 0) + 1
        assert member.id not in self.succeeded
        assert set(member.after) <= self.succeeded
        assert not self._used_up(member)
        if attempt.number > 1:
            before = self.ended[attempt._replace(number=attempt.number - 1)]
            delay = member.backoff.delay_ms(attempt.number - 1)
            assert entry.stored_ns >= before.stored_ns + delay * 1_000_000
        self.began[member.id] = attempt.number
        assert len(self.open_attempts) <= CAP

    def _run(self, entry: Entry, attempt: Attempt) -> None:
        assert self.status not in TERMINAL
        assert attempt in self.open_attempts
        kind = entry.event.type
        if kind == CLAIMED:
            assert attempt not in self.claimed
            self.claimed[attempt] = entry.event.members["life"]
        elif kind == VOID:
            assert attempt not in self.claimed
            assert self.cancelling is not None
            self.ended[attempt] = entry
        else:
            assert attempt in self.claimed
            if kind == DESTROYED:
                self.ended[attempt] = entry
                if entry.event.members["outcome"] == "succeeded":
                    self.succeeded.add(attempt.member_id)


class Controller:
    """Sees the formation's own events in order, and all others in any, as late as the test likes."""

    def __init__(self, log: FormationLog) -> None:
        self._log = log
        self.state = FormationState(log.id)
        self._seen: set[int] = set()
        self._planned: list[tuple[Action, int]] = []

    def unseen(self) -> list[Entry]:
        """What can come next."""
        left = [entry for entry in self._log.entries if entry.sequence not in self._seen]
        own = [entry for entry in left if phase_of(entry.event.type) is not None]
        return own[:1] + [entry for entry in left if phase_of(entry.event.type) is None]

    def see(self, entry: Entry) -> None:
        entry.apply(self.state)
        self._seen.add(entry.sequence)

    def see_again(self, entry: Entry) -> None:
        if entry.sequence in self._seen:
            before = facts(self.state)
            assert not entry.apply(self.state)
            assert facts(self.state) == before

    def catch_up(self) -> None:
        for entry in self._log.entries:
            if entry.sequence not in self._seen:
                self.see(entry)

    def plan(self, lost: set[str]) -> None:
        decision = decide(self.state, self._log.now_ms, lost, in_flight=CAP)
        assert decision == decide(self.state, self._log.now_ms, lost, in_flight=CAP)
        if self.state.terminal:
            assert decision == ((), None)
        self._planned = [(action, self.state.last_sequence) for action in decision.actions]

    def do_one(self, *, asks: bool = True) -> bool:
        """Whether there is something left to do. A controller that dies does not come to the next, or to asking for what it told."""
        if self._planned:
            self._log.act(*self._planned.pop(0), asks=asks)
        return bool(self._planned)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "critical": st.booleans(),
        "retries": st.integers(0, 2),
        "onNodeLost": st.sampled_from(["fail", "retry"]),
        "backoff": st.just({"initialMs": 500, "maxMs": 700}),
    },
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    ids = "abcde"[: draw(st.integers(1, 5))]
    members = {}
    for at, id in enumerate(ids):
        after = sorted(draw(st.sets(st.sampled_from(ids[:at]), max_size=2))) if at else []
        members[id] = draw(OPTIONS) | ({"after": after} if after else {})
    deadline = draw(st.none() | st.none() | st.integers(2, 60))
    return document(members, **({} if deadline is None else {"deadlineSeconds": deadline}))


class World:
    """Everything that can happen. `pick` says to which of those that it could happen to."""

    def __init__(self, formation: dict[str, Any]) -> None:
        self.log = FormationLog(formation)
        self.auditor = Auditor(self.log)
        self.controllers = [Controller(self.log) for _ in range(2)]
        self.runs: list[Run] = []
        self.lives = dict.fromkeys(LIVES, 0)
        self.lost: set[str] = set()
        """Lives whose lease is gone: the nodes may not know it yet."""

    def event_arrives(self, pick: int) -> None:
        controller = self.controllers[pick % 2]
        if unseen := controller.unseen():
            controller.see(unseen[pick // 2 % len(unseen)])

    def all_events_arrive(self, pick: int) -> None:
        self.controllers[pick % 2].catch_up()

    def event_arrives_twice(self, pick: int) -> None:
        self.controllers[pick % 2].see_again(self.log.entries[pick // 2 % len(self.log.entries)])

    def controller_plans(self, pick: int) -> None:
        self.controllers[pick % 2].plan(self.lost)

    def controller_does_one_thing(self, pick: int) -> None:
        self.controllers[pick % 2].do_one(asks=pick % 3 != 0)

    def controller_works(self, pick: int) -> None:
        controller = self.controllers[pick % 2]
        controller.catch_up()
        controller.plan(self.lost)
        while controller.do_one():
            pass

    def controller_dies(self, pick: int) -> None:
        self.controllers[pick % 2] = Controller(self.log)

    def node_claims(self, pick: int) -> None:
        """Whatever was ever asked for: hints come late, and twice."""
        work = [attempt_of(entry.subject) for entry in self.log.entries if entry.event.type == DISPATCHED]
        # More often than not one that is still to be had.
        work = [each for each in work if each and not self.log.last(run_subject(each))] or work if pick % 5 else work
        name = LIVES[pick % 2]
        attempt = work[pick // 2 % len(work)] if work else None
        if attempt and (run := self.log.claim(attempt, life=f"{name}-{self.lives[name]}", node=name)):
            self.runs.append(run)

    def _run(self, pick: int) -> Run | None:
        return self.runs[pick % len(self.runs)] if self.runs else None

    def run_starts(self, pick: int) -> None:
        run = self._run(pick)
        if run and not run.started and not run.start():
            self.runs.remove(run)

    def _run_ends(self, pick: int, **how: Any) -> None:
        if run := self._run(pick):
            run.end(**how)
            self.runs.remove(run)

    def run_succeeds(self, pick: int) -> None:
        self._run_ends(pick)

    def run_fails(self, pick: int) -> None:
        self._run_ends(pick, outcome="failed", exit_code=1, reason="command exited with 1")

    def run_is_lost(self, pick: int) -> None:
        self._run_ends(pick, outcome="failed", reason=NODE_RESTARTED)

    def run_is_cancelled(self, pick: int) -> None:
        if "cancelling" in self.log.phases():
            self._run_ends(pick, outcome="failed", reason=CANCELLED)

    def lease_is_lost(self, pick: int) -> None:
        """The node died, or was only slow: then its runs go on until the log refuses an event of theirs."""
        name = LIVES[pick % 2]
        life = f"{name}-{self.lives[name]}"
        self.lost.add(life)
        self.lives[name] += 1
        if pick // 2 % 2:
            self.runs = [run for run in self.runs if run.life != life]

    def time_passes(self, pick: int) -> None:
        self.log.now_ms += pick % 1000

    def somebody_deletes_it(self, pick: int) -> None:
        self.log.delete()

    # --- at any time, and in the end ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.auditor.read()

    def end(self) -> None:
        self.check()
        self.everything_comes_to_rest()
        self.folds_are_equal()

    def everything_comes_to_rest(self) -> None:
        """One controller and one node that see everything are enough."""
        controller = Controller(self.log)
        # Nodes that were slow find out in the end.
        self.lost |= {run.life for run in self.runs}
        for _ in range(200):
            controller.catch_up()
            decision = decide(controller.state, self.log.now_ms, self.lost, in_flight=CAP)
            for action in decision.actions:
                assert self.log.act(action, controller.state.last_sequence), "refused, though nobody else writes"
            self.auditor.read()
            if controller.state.terminal:
                break
            asked = {attempt_of(entry.subject) for entry in self.log.entries if entry.event.type == DISPATCHED}
            runs = [run for attempt in self.auditor.open_attempts & asked if (run := self.log.claim(attempt, life="last"))]
            for run in runs:
                run.start()
                run.end()
            if not decision.actions and not runs:
                assert decision.wake_at_ms is not None, "nothing would ever happen"
                self.log.now_ms = max(self.log.now_ms, decision.wake_at_ms)
        assert self.auditor.status in TERMINAL
        assert controller.state.status == self.auditor.status
        assert all(member.phase in ENDED for member in controller.state.order)
        assert not controller.state.under_way

    def folds_are_equal(self) -> None:
        whole = facts(self.log.state())
        for order in (reversed(self.log.entries), [*self.log.entries, *self.log.entries], self.log.entries[::2] + self.log.entries[1::2]):
            other = FormationState(self.log.id)
            for entry in order:
                entry.apply(other)
            assert facts(other) == whole
        # Who sees but the last event of each subject knows less of each run, and the same of the formation.
        short = FormationState(self.log.id)
        for entry in {entry.subject: entry for entry in self.log.entries}.values():
            entry.apply(short)
        mine, theirs = facts(short), facts(self.log.state())
        for name in ("status", "cancelling", "last_sequence", "told_failed", "counts", "failed", "critical_failed", "under_way"):
            assert mine[name] == theirs[name], name
        assert [member.phase for member in short.order] == [member.phase for member in self.log.state().order]


HAPPENINGS: dict[str, int] = {
    "event_arrives": 30,
    "all_events_arrive": 5,
    "event_arrives_twice": 2,
    "controller_plans": 12,
    "controller_does_one_thing": 20,
    "controller_works": 8,
    "controller_dies": 1,
    "node_claims": 15,
    "run_starts": 10,
    "run_succeeds": 5,
    "run_fails": 4,
    "run_is_lost": 1,
    "run_is_cancelled": 3,
    "lease_is_lost": 1,
    "time_passes": 10,
    "somebody_deletes_it": 0,
}
"""And how often."""
STEPS, SEEDS = 250, 150
ALL = tuple(name for name, weight in HAPPENINGS.items() for _ in range(weight))


def thrown(dice: Random) -> dict[str, Any]:
    """A document by dice."""
    members: dict[str, Any] = {}
    for id in "abcdef"[: dice.randint(1, 6)]:
        after = dice.sample(sorted(members), min(len(members), dice.choice([0, 0, 1, 2])))
        members[id] = {
            "after": after,
            "critical": dice.random() < 0.4,
            "retries": dice.choice([0, 1, 2, 3]),
            "onNodeLost": dice.choice(["fail", "retry", "retry"]),
            "backoff": {"initialMs": dice.choice([0, 500]), "maxMs": 700},
        }
    return document(members, deadlineSeconds=dice.choice([20, 600, 3600]))


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_whatever_happens(first: int) -> None:
    """Long lives, by dice."""
    for seed in range(first, first + 50):
        dice = Random(seed)
        world = World(thrown(dice))
        deleted = dice.randrange(4 * STEPS)
        for step in range(STEPS):
            getattr(world, dice.choice(ALL))(dice.randrange(1 << 16))
            if step == deleted:
                world.somebody_deletes_it(0)
            world.check()
        world.end()


class Machine(RuleBasedStateMachine):
    """Short lives, of which the shortest that goes wrong is found."""

    @initialize(formation=documents())
    def begin(self, formation: dict[str, Any]) -> None:
        self.world = World(formation)

    @rule(what=st.sampled_from(sorted(HAPPENINGS)), pick=st.integers(0, 15))
    def happen(self, what: str, pick: int) -> None:
        getattr(self.world, what)(pick)

    @rule(pick=st.integers(0, 15))
    def go_on(self, pick: int) -> None:
        """As it would if nothing went wrong."""
        for what in ("controller_works", "node_claims", "run_starts"):
            getattr(self.world, what)(pick)

    @invariant()
    def nothing_is_against_the_rules(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


TestFormations = Machine.TestCase
TestFormations.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
