"""The rules by which formations run, one by one."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from cellos.core.formation.decide import MOST_DISPATCHED, Close, Decision, Dispatch, Void, Write, decide
from cellos.core.formation.events import DELETED, created, subject_of
from cellos.core.formation.runs import CANCELLED, NODE_DRAINED, NODE_LOST, NODE_RESTARTED, Attempt
from cellos.core.formation.state import FormationState
from cellos.testing.formation_log import FORMATION_ID, SPEC, START_MS, FormationLog, Run, document

PATIENT = {"backoff": {"initialMs": 1000, "maxMs": 10_000}}


class Formation:
    """One controller and one node, both of which see everything at once."""

    def __init__(self, members: dict[str, Any], **settings: Any) -> None:
        self.log = FormationLog(document(members, **settings))
        self.runs: dict[str, Run] = {}
        self.lost: set[str] = set()

    @property
    def state(self) -> FormationState:
        return self.log.state()

    def decision(self, in_flight: int = 32) -> Decision:
        return decide(self.state, self.log.now_ms, self.lost, in_flight=in_flight)

    def step(self, in_flight: int = 32) -> Write | None:
        """What was written about the formation, after all that was to be done was done."""
        last = self.state.last_sequence
        actions = self.decision(in_flight).actions
        assert all(self.log.act(action, last) for action in actions)
        return next((action for action in actions if isinstance(action, Write)), None)

    def rest(self) -> list[str]:
        """The phases that are written until there is nothing to do."""
        phases = []
        while self.decision().actions:
            if write := self.step():
                phases.append(write.phase)
        return phases

    def start(self, *ids: str, life: str = "life") -> None:
        for id in ids:
            attempt = Attempt(self.log.id, id, self.state.members[id].attempt)
            run = self.log.claim(attempt, life=life)
            assert run is not None
            self.runs[id] = run
            assert run.start()

    def end(self, *ids: str, **how: Any) -> None:
        for id in ids:
            if id not in self.runs:
                self.start(id)
            assert self.runs.pop(id).end(**how)

    def fail(self, *ids: str, reason: str = "command exited with 3") -> None:
        self.end(*ids, outcome="failed", exit_code=3, reason=reason)

    @property
    def phases(self) -> dict[str, str]:
        return {member.id: member.phase for member in self.state.order}

    def cell(self, id: str) -> str:
        return f"{self.log.id}.{id}"


def asked(write: Write | None) -> list[str]:
    assert write is not None
    return [each.attempt.member_id for each in write.dispatch]


# --- dispatching ------------------------------------------------------------------------------------------------------------------------


def test_what_waits_for_nobody_is_asked_for_at_once() -> None:
    formation = Formation({"a": {}, "b": {"pool": "gpu"}, "c": {"after": ["a"]}})
    write = formation.step()
    assert write == Write(
        "launching",
        dispatch=(
            Dispatch(Attempt(FORMATION_ID, "a", 1), "default", "base", SPEC),
            Dispatch(Attempt(FORMATION_ID, "b", 1), "gpu", "base", SPEC),
        ),
    )
    assert formation.phases == {"a": "dispatched", "b": "dispatched", "c": "waiting"}
    assert formation.decision().actions == ()


def test_a_member_follows_when_all_that_it_waits_for_succeeded() -> None:
    formation = Formation({"a": {}, "b": {}, "c": {"after": ["a", "b"]}})
    formation.rest()
    formation.end("a")
    formation.rest()
    assert formation.phases["c"] == "waiting"
    formation.end("b")
    assert asked(formation.step()) == ["c"]


def test_no_more_are_under_way_than_may_be() -> None:
    formation = Formation({id: {} for id in "abcde"})
    assert asked(formation.step(in_flight=2)) == ["a", "b"]
    assert formation.decision(in_flight=2).actions == ()
    formation.end("b")
    assert asked(formation.step(in_flight=2)) == ["c"]
    formation.start("a")
    assert formation.decision(in_flight=2).actions == ()


def test_a_write_fits_into_one_batch() -> None:
    # A document has room for about a thousand members.
    formation = Formation({f"m{number}": {} for number in range(MOST_DISPATCHED + 3)})
    assert len(asked(formation.step(in_flight=10_000))) == MOST_DISPATCHED
    assert len(asked(formation.step(in_flight=10_000))) == 3


def test_where_nothing_may_be_under_way_nothing_is_said() -> None:
    formation = Formation({"a": {}})
    assert formation.decision(in_flight=0).actions == ()


# --- status -----------------------------------------------------------------------------------------------------------------------------


def test_it_runs_when_all_that_can_have_started() -> None:
    formation = Formation({"a": {}, "b": {}, "c": {"after": ["a"]}})
    formation.rest()
    formation.start("a")
    assert formation.rest() == []
    formation.start("b")
    assert formation.rest() == ["running"]
    formation.end("a")
    assert formation.step() == Write("running", dispatch=(Dispatch(Attempt(FORMATION_ID, "c", 1), "default", "base", SPEC),))
    formation.end("b", "c")
    assert formation.rest() == ["completed"]
    assert formation.state.status == "COMPLETED"


def test_what_has_ended_has_started() -> None:
    formation = Formation({"a": {}, "b": {}})
    formation.rest()
    formation.end("a")
    assert formation.rest() == []
    formation.start("b")
    assert formation.rest() == ["running"]


def test_it_is_degraded_while_a_member_is_tried_again() -> None:
    formation = Formation({"a": {"retries": 1, **PATIENT}, "b": {}})
    formation.rest()
    formation.start("a", "b")
    formation.rest()
    formation.fail("a")
    assert formation.step() == Write("degraded", "members: 1 tried again")
    assert formation.decision() == Decision((), START_MS + 1000)
    formation.log.now_ms += 999
    assert formation.decision().actions == ()
    formation.log.now_ms += 1
    write = formation.step()
    assert write is not None
    assert (write.phase, asked(write)) == ("degraded", ["a"])
    assert formation.rest() == []
    formation.start("a")
    assert formation.rest() == ["running"]


def test_it_stays_degraded_with_a_member_that_failed_for_good() -> None:
    formation = Formation({"a": {}, "b": {"critical": False}, "c": {"critical": False}, "d": {}})
    formation.rest()
    formation.start(*"abcd")
    formation.rest()
    formation.fail("b")
    assert formation.step() == Write("degraded", "members: 1 failed", (formation.cell("b"),))
    formation.fail("c")
    assert formation.step() == Write("degraded", "members: 2 failed", (formation.cell("b"), formation.cell("c")))
    formation.end("a")
    assert formation.rest() == []
    formation.end("d")
    assert formation.step() == Write("completed", None, (formation.cell("b"), formation.cell("c")))
    assert formation.state.status == "COMPLETED"


# --- retries ----------------------------------------------------------------------------------------------------------------------------


def test_back_off_grows_and_ends() -> None:
    formation = Formation({"a": {"retries": 4, "backoff": {"initialMs": 100, "maxMs": 350, "factor": 2}}})
    waits = []
    for _ in range(4):
        formation.rest()
        formation.fail("a")
        formation.rest()
        wake = formation.decision().wake_at_ms
        assert wake is not None
        waits.append(wake - formation.log.now_ms)
        formation.log.now_ms = wake
    assert waits == [100, 200, 350, 350]
    formation.rest()
    formation.fail("a")
    assert formation.step() == Write("failed", "critical member 'a' failed: command exited with 3", (formation.cell("a"),))


@pytest.mark.parametrize("reason", [NODE_LOST, NODE_RESTARTED, NODE_DRAINED])
def test_a_lost_node_is_no_fault_of_the_program(reason: str) -> None:
    formation = Formation({"a": {"onNodeLost": "retry", "backoff": {"initialMs": 0}}})
    for number in range(1, 11):
        formation.rest()
        assert formation.state.members["a"].attempt == number
        formation.fail("a", reason=reason)
        assert formation.phases["a"] == "backing_off"
    formation.rest()
    formation.fail("a", reason=reason)
    assert formation.phases["a"] == "failed"


def test_without_leave_a_lost_node_is_the_end_of_a_member() -> None:
    formation = Formation({"a": {"retries": 5}})
    formation.rest()
    formation.fail("a", reason=NODE_LOST)
    assert formation.step() == Write("failed", "critical member 'a' failed: node_lost", (formation.cell("a"),))


def test_lost_nodes_and_failures_are_counted_apart() -> None:
    formation = Formation({"a": {"retries": 1, "onNodeLost": "retry", "backoff": {"initialMs": 0}}})
    for reason in ("oops", NODE_LOST, NODE_LOST):
        formation.rest()
        formation.fail("a", reason=reason)
        assert formation.phases["a"] == "backing_off"
    formation.rest()
    formation.fail("a", reason="oops")
    assert formation.phases["a"] == "failed"


def test_those_that_waited_for_another_attempt_come_first() -> None:
    formation = Formation({"a": {"retries": 1, "backoff": {"initialMs": 0}}, "b": {}, "c": {"retries": 1, "backoff": {"initialMs": 0}}})
    formation.step(in_flight=1)
    formation.fail("a")
    assert asked(formation.step(in_flight=1)) == ["a"]


# --- failing ----------------------------------------------------------------------------------------------------------------------------


def test_others_are_cancelled_before_it_fails() -> None:
    formation = Formation({"a": {}, "b": {}, "c": {}, "d": {"after": ["a"]}})
    formation.rest()
    formation.start("a", "b")
    formation.fail("a")
    why = "critical member 'a' failed: command exited with 3"
    skipped = (formation.cell("a"), formation.cell("d"))
    assert formation.step() == Write("cancelling", why, skipped)
    assert formation.decision() == Decision((Void(Attempt(FORMATION_ID, "c", 1), why),))
    formation.step()
    assert formation.decision() == Decision()
    formation.fail("b", reason=CANCELLED)
    assert formation.step() == Write("failed", why, skipped)
    assert formation.phases == {"a": "failed", "b": "failed", "c": "skipped", "d": "skipped"}
    assert formation.decision() == Decision()


def test_a_critical_member_whose_turn_can_never_come_fails_it() -> None:
    formation = Formation({"a": {"critical": False}, "b": {"after": ["a"], "critical": False}, "c": {"after": ["b"]}})
    formation.rest()
    formation.fail("a")
    assert formation.phases == {"a": "failed", "b": "skipped", "c": "skipped"}
    cells = tuple(map(formation.cell, "abc"))
    assert formation.step() == Write("failed", "critical member 'c' was skipped: needs 'b', which did not succeed", cells)


def test_what_is_not_critical_is_skipped_and_the_rest_goes_on() -> None:
    formation = Formation({"a": {}, "b": {"critical": False}, "c": {"after": ["b"], "critical": False}})
    formation.rest()
    formation.fail("b")
    assert formation.rest() == ["degraded"]
    formation.end("a")
    assert formation.step() == Write("completed", None, (formation.cell("b"), formation.cell("c")))


def test_the_deadline_ends_it() -> None:
    formation = Formation({"a": {}, "b": {"after": ["a"]}}, deadlineSeconds=60)
    formation.rest()
    formation.start("a")
    formation.rest()
    assert formation.decision().wake_at_ms == START_MS + 60_000
    formation.log.now_ms += 59_999
    assert formation.decision().actions == ()
    formation.log.now_ms += 1
    assert formation.rest() == ["cancelling"]
    formation.fail("a", reason=CANCELLED)
    assert formation.step() == Write("failed", "its deadline of 60 s has passed")


def test_the_deadline_of_what_never_began() -> None:
    formation = Formation({"a": {}}, deadlineSeconds=60)
    formation.log.now_ms += 60_000
    assert formation.step() == Write("failed", "its deadline of 60 s has passed")


def test_what_ended_in_time_is_not_late() -> None:
    formation = Formation({"a": {}}, deadlineSeconds=60)
    formation.rest()
    formation.end("a")
    formation.log.now_ms += 60_000
    assert formation.rest() == ["completed"]


# --- deleting ---------------------------------------------------------------------------------------------------------------------------


def test_a_deleted_formation_is_over_when_nothing_is_left() -> None:
    formation = Formation({"a": {}, "b": {}, "c": {"retries": 3}})
    formation.rest()
    formation.start("a", "c")
    formation.fail("c")
    formation.log.delete()
    assert formation.state.status == "LAUNCHING"
    assert formation.decision() == Decision((Void(Attempt(FORMATION_ID, "b", 1), DELETED),))
    formation.step()
    formation.fail("a", reason=CANCELLED)
    assert formation.step() == Write("cancelled", DELETED)
    assert formation.phases == {"a": "failed", "b": "skipped", "c": "failed"}


def test_what_succeeds_after_the_delete_changes_nothing() -> None:
    formation = Formation({"a": {}})
    formation.rest()
    formation.start("a")
    formation.log.delete()
    formation.end("a")
    assert formation.step() == Write("cancelled", DELETED)
    assert formation.phases == {"a": "succeeded"}


# --- nodes that are gone ----------------------------------------------------------------------------------------------------------------


def test_runs_of_a_lost_life_are_closed() -> None:
    formation = Formation({"a": {"onNodeLost": "retry"}, "b": {}, "c": {}})
    formation.rest()
    formation.start("a", life="one")
    formation.start("b", life="two")
    formation.lost = {"one", "three"}
    assert Close(Attempt(FORMATION_ID, "a", 1), "run-a-1-one", "one") in formation.decision().actions
    formation.rest()
    assert formation.phases == {"a": "backing_off", "b": "running", "c": "dispatched"}


def test_also_while_the_formation_is_being_cancelled() -> None:
    formation = Formation({"a": {}})
    formation.rest()
    formation.start("a", life="one")
    formation.log.delete()
    formation.lost = {"one"}
    assert formation.rest() == ["cancelled"]


# --- formations that are not ours to run ------------------------------------------------------------------------------------------------


def test_without_specs_there_is_nothing_to_do() -> None:
    log = FormationLog({"name": "demo", "coordinator": "a", "members": [{"id": "a"}], "deadlineSeconds": 1})
    assert decide(log.state(), log.now_ms + 10**9) == Decision()


def unreadable() -> tuple[FormationLog, FormationState]:
    log = FormationLog(document({"a": {}}))
    event = created(log.id, log.formation, event_id="1", time="2027-01-01T00:00:00+00:00")
    event.data["document"] = document({"a": {"retries": "many"}})
    state = FormationState(log.id)
    state.apply(1, subject_of(log.id, "created"), event)
    return log, state


def test_a_document_that_cannot_be_run_fails() -> None:
    _, state = unreadable()
    (write,) = decide(state, 0).actions
    assert isinstance(write, Write)
    assert (write.phase, write.dispatch) == ("failed", ())
    assert write.reason is not None
    assert write.reason.startswith("its document cannot be run: member 'a' (members[0].retries): retries must be an integer")


def test_what_somebody_else_could_read_is_left_to_him() -> None:
    log, state = unreadable()
    log.append_phase("launching", dispatched=[Attempt(log.id, "a", 1)])
    log.entries[-1].apply(state)
    assert decide(state, 0) == Decision()


def test_before_it_is_known_there_is_nothing_to_do() -> None:
    assert decide(FormationState(FORMATION_ID), 0) == Decision()


# --- cost -------------------------------------------------------------------------------------------------------------------------------


def steps_per_member(count: int, **member: Any) -> float:
    """Lines of Python that a formation takes, from one controller's first look to its end, for each member."""
    lead = {"m0": {}}
    log = FormationLog(document(lead | {f"m{number}": member for number in range(1, count)}))
    state = FormationState(log.id)
    log.entries[0].apply(state)
    lines = 0

    def count_line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        lines += 1
        return count_line

    def traced(function: Any, *args: Any, **options: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(count_line)
        try:
            return function(*args, **options)
        finally:
            sys.settrace(before)

    while not state.terminal:
        read = len(log.entries)
        for action in traced(decide, state, log.now_ms).actions:
            assert log.act(action, state.last_sequence)
        for attempt in list(state.open_attempts):
            run = log.claim(attempt)
            assert run is not None
            run.start()
            run.end()
        for entry in log.entries[read:]:
            traced(entry.apply, state)
    return lines / count


@pytest.mark.parametrize("member", [{}, {"after": ["m0"]}], ids=["side by side", "after one"])
def test_a_member_costs_the_same_in_a_large_formation(member: dict[str, Any]) -> None:
    assert steps_per_member(400, **member) < 1.25 * steps_per_member(100, **member)
