from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from cellos.core.events import COMMAND_COMPLETED, DESTROYED, FS_TOUCH, PROCESS_SPAWNED, STARTED, Event
from cellos.core.formation.decide import ASK_AFTER_MS, Ask, Void, Write, decide
from cellos.core.formation.events import DELETED, FORMATION_TYPE, phase_event, subject_of
from cellos.core.formation.runs import CLAIMED, DISPATCHED, VOID, Attempt, run_subject, work_subject
from cellos.core.formation.state import ENDED, MEMBER_PHASES, FormationState
from cellos.testing.formation_log import FORMATION_ID, START_MS, FormationLog, document

A = Attempt(FORMATION_ID, "a", 1)


def event(kind: str, **data: Any) -> Event:
    return Event(id="1", source="x", type=kind, data=data)


def dispatched(members: dict[str, Any] | None = None) -> tuple[FormationLog, FormationState]:
    """A formation of which everything was asked for that can be."""
    log = FormationLog(document(members or {"a": {}}))
    state = log.state()
    for action in decide(state, log.now_ms).actions:
        log.act(action, state.last_sequence)
    return log, log.state()


def put(state: FormationState, kind: str, sequence: int = 100, attempt: Attempt = A, **data: Any) -> bool:
    return state.apply(sequence, run_subject(attempt), event(kind, **data), stored_ns=START_MS * 1_000_000)


def test_what_is_known_of_one_that_was_admitted() -> None:
    state = FormationLog(document({"a": {}, "b": {"after": ["a"]}}, deadlineSeconds=60, onDisconnect="finish")).state()
    assert (state.name, state.cell_count, state.status, state.last_sequence) == ("demo", 2, "PENDING", 1)
    assert (state.created_ms, state.deadline_ms) == (START_MS, START_MS + 60_000)
    assert state.formation is not None
    assert state.formation.on_disconnect == "finish"
    assert [(member.id, member.phase, member.attempt) for member in state.order] == [("a", "ready", 0), ("b", "waiting", 0)]
    assert not state.terminal
    assert state.members["a"].run_id is state.members["a"].node is state.members["a"].reason is None


def test_the_way_of_a_member() -> None:
    _, state = dispatched()
    member = state.members["a"]
    assert (member.phase, member.attempt, list(state.open_attempts)) == ("dispatched", 1, [A])
    assert put(state, CLAIMED, life="l", node="n", runId="r")
    assert (member.phase, member.life, member.node, member.run_id) == ("claimed", "l", "n", "r")
    assert state.lives == {"l": {A: member.current}}
    assert put(state, STARTED, runId="r")
    assert member.phase == "running"
    assert put(state, COMMAND_COMPLETED, exitCode=3)
    assert (member.phase, member.exit_code) == ("running", 3)
    assert put(state, DESTROYED, outcome="failed", reason="why")
    assert (member.phase, member.reason, member.exit_code, member.node) == ("failed", "why", 3, "n")
    assert state.open_attempts == state.lives == {}
    assert state.failed_cell_ids() == (f"{FORMATION_ID}.a",)


def test_a_void_attempt_never_ran() -> None:
    _, state = dispatched()
    assert put(state, VOID, reason=DELETED)
    assert (state.members["a"].phase, state.members["a"].reason, state.open_attempts) == ("skipped", DELETED, {})
    assert not put(state, VOID, reason="again")


@pytest.mark.parametrize("kind", [STARTED, PROCESS_SPAWNED, COMMAND_COMPLETED, FS_TOUCH])
def test_the_last_event_of_a_run_tells_that_it_runs(kind: str) -> None:
    _, state = dispatched()
    assert put(state, kind, runId="r")
    assert (state.members["a"].phase, state.members["a"].run_id) == ("running", "r")
    assert list(state.lives) == [None], "who has it is to be looked up"
    assert put(state, CLAIMED, life="l", node="n", runId="r")
    assert (list(state.lives), state.members["a"].phase) == (["l"], "running")


def test_of_a_run_that_ended_the_last_event_is_enough() -> None:
    _, state = dispatched()
    put(state, DESTROYED, outcome="succeeded", runId="r")
    assert (state.members["a"].phase, state.all_ended, state.under_way) == ("succeeded", True, 0)


def test_there_is_one_end() -> None:
    _, state = dispatched()
    put(state, CLAIMED, life="l")
    put(state, DESTROYED, outcome="failed", reason="first")
    assert not put(state, DESTROYED, sequence=101, outcome="succeeded")
    assert not put(state, VOID, sequence=102)
    assert state.members["a"].reason == "first"


def test_an_attempt_begins_with_the_event_that_names_it() -> None:
    log, _ = dispatched({"a": {}, "b": {}})
    state = FormationState(FORMATION_ID)
    for entry in log.entries[:2]:
        entry.apply(state)
    assert [member.phase for member in state.order] == ["dispatched", "dispatched"]
    assert (list(state.unasked), state.under_way) == (list(state.open_attempts), 2)
    assert decide(state, log.now_ms) == ((), log.now_ms + ASK_AFTER_MS)
    for entry in log.entries[2:]:
        entry.apply(state)
    assert (len(state.open_attempts), state.unasked, state.under_way) == (2, {}, 2)


def test_who_told_of_an_attempt_and_died_is_stood_in_for() -> None:
    log = FormationLog(document({"a": {}, "b": {}}))
    state = log.state()
    (write,) = decide(state, log.now_ms).actions
    log.act(write, state.last_sequence, asks=False)
    log.now_ms += ASK_AFTER_MS
    asks = decide(log.state(), log.now_ms).actions
    assert [type(each) for each in asks] == [Ask, Ask]
    assert all(log.act(each, 0) for each in asks)
    assert not any(log.act(each, 0) for each in asks)
    assert decide(log.state(), log.now_ms).actions == ()


def test_what_nobody_was_asked_for_is_voided_where_the_formation_is_cancelled() -> None:
    log = FormationLog(document({"a": {}}))
    state = log.state()
    (write,) = decide(state, log.now_ms).actions
    log.act(write, state.last_sequence, asks=False)
    log.delete()
    (void,) = decide(log.state(), log.now_ms + ASK_AFTER_MS).actions
    assert isinstance(void, Void)
    log.act(void, 0)
    assert log.state().unasked == {}
    (end,) = decide(log.state(), log.now_ms).actions
    assert isinstance(end, Write)
    assert end.phase == "cancelled"


def test_what_comes_before_the_document_is_kept_for_it() -> None:
    log, whole = dispatched()
    state = FormationState(FORMATION_ID)
    for entry in reversed(log.entries):
        assert entry.apply(state)
        assert not entry.apply(state)
    assert (state.status, state.members["a"].phase) == ("LAUNCHING", "dispatched")
    assert state.open_attempts == whole.open_attempts


def test_an_attempt_tells_of_those_before_it() -> None:
    _, state = dispatched({"a": {"retries": 1}})
    put(state, CLAIMED, attempt=A._replace(number=2), life="l")
    assert (state.members["a"].attempt, state.members["a"].phase) == (1, "dispatched")
    put(state, DESTROYED, outcome="failed")
    assert (state.members["a"].attempt, state.members["a"].phase) == (2, "claimed")


def test_times_are_those_of_the_log_and_else_of_the_event() -> None:
    log, state = dispatched({"a": {"retries": 1}})
    late = Event(id="1", source="x", type=DESTROYED, data={"outcome": "failed"}, time="2027-01-15T08:00:05+00:00")
    other = log.state()
    state.apply(9, run_subject(A), late, stored_ns=START_MS * 1_000_000)
    other.apply(9, run_subject(A), late)
    assert (state.members["a"].not_before_ms, other.members["a"].not_before_ms) == (START_MS + 1000, START_MS + 6000)
    untimed = log.state()
    untimed.apply(9, run_subject(A), event(DESTROYED, outcome="failed"))
    assert untimed.members["a"].not_before_ms == 1000


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        (run_subject(A._replace(formation_id="018f6f0e-0000-7000-8000-000000000002")), CLAIMED),
        (run_subject(A._replace(member_id="z")), CLAIMED),
        (run_subject(A._replace(number=2)), CLAIMED),  # it may be tried once
        (run_subject(A).replace(".ME.", ".MF."), CLAIMED),  # reads like `a` to a careless decoder
        (run_subject(A) + "0000", CLAIMED),
        (work_subject("default", "base", A), CLAIMED),
        ("cellos.events.cells.x", CLAIMED),
        (subject_of(FORMATION_ID, "failed"), FORMATION_TYPE + "completed"),
        (subject_of("018f6f0e-0000-7000-8000-000000000002", "failed"), FORMATION_TYPE + "failed"),
        ("", DISPATCHED),
    ],
)
def test_what_is_not_about_it_changes_nothing(subject: str, kind: str) -> None:
    _, state = dispatched()
    assert not state.apply(50, subject, event(kind, life="l"))
    assert (state.status, state.last_sequence, state.members["a"].phase, list(state.open_attempts)) == ("LAUNCHING", 2, "dispatched", [A])


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {
            "exitCode": True,
            "runId": 3,
            "life": [],
            "outcome": 1,
            "reason": {},
            "dispatched": [1, "z", {"memberId": 1}, {"memberId": "z", "attempt": 1}, {"memberId": "a", "attempt": True}],
        },
    ],
)
def test_malformed_data_is_taken_for_unknown(data: Any) -> None:
    for kind in (CLAIMED, STARTED, COMMAND_COMPLETED, DESTROYED, VOID):
        _, state = dispatched()
        state.apply(50, run_subject(A), Event(id="1", source="x", type=kind, data=data))
        assert state.members["a"].phase in MEMBER_PHASES
        assert state.members["a"].exit_code is None
    for phase in ("created", "launching", "cancelling", "failed"):
        state = FormationState(FORMATION_ID)
        state.apply(1, subject_of(FORMATION_ID, phase), Event(id="1", source="x", type=FORMATION_TYPE + phase, data=data))
        assert state.status is not None
        assert decide(state, 0).actions == ()


def later(phase: Any, **more: Any) -> tuple[str, Event]:
    return subject_of(FORMATION_ID, phase), phase_event(
        FORMATION_ID, phase, name="demo", cell_count=1, event_id="1", time="2027-01-01T00:00:00Z", **more
    )


def test_an_illegal_step_counts_for_the_sequence_alone() -> None:
    _, state = dispatched()
    state.apply(50, *later("completed"))
    assert (state.status, state.terminal) == ("COMPLETED", True)
    state.apply(51, *later("running", reason="no"))
    assert (state.status, state.last_sequence, state.reason) == ("COMPLETED", 51, None)


def test_the_order_of_its_own_events_is_that_of_the_log() -> None:
    state = FormationState(FORMATION_ID)
    state.apply(9, *later("failed", reason="late"))
    state.apply(5, *later("cancelling", reason="why"))
    assert not state.apply(5, *later("cancelling", reason="why"))
    state.apply(3, *later("running"))
    assert (state.status, state.cancelling, state.reason, state.last_sequence) == ("FAILED", "why", "late", 9)


def test_what_had_not_begun_when_it_ended_never_will() -> None:
    _, state = dispatched({"a": {}, "b": {"after": ["a"]}})
    put(state, VOID, reason="x")
    state.apply(50, *later("cancelled", reason=DELETED))
    assert {member.phase for member in state.order} <= ENDED


def test_failures_that_were_told() -> None:
    _, state = dispatched({"a": {"critical": False}, "b": {}})
    put(state, DESTROYED, outcome="failed")
    write = decide(state, START_MS).actions[0]
    assert isinstance(write, Write)
    state.apply(50, *later("degraded", failed_cell_ids=write.failed_cell_ids))
    assert (state.told_failed, decide(state, START_MS).actions) == (1, ())


def test_a_long_chain_that_breaks_is_skipped_to_its_end() -> None:
    ids = [f"m{number}" for number in range(1500)]
    links = {id: {"after": [before], "critical": False} for before, id in pairwise(ids)}
    _, state = dispatched({"m0": {"critical": False}, **links})
    put(state, DESTROYED, attempt=A._replace(member_id="m0"), outcome="failed")
    assert state.all_ended
    assert state.counts == {"failed": 1, "skipped": 1499, "ready": 0, "dispatched": 0, "waiting": 0}
