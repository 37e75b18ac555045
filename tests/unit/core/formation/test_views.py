from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from cellos.core import events
from cellos.core.events import Event
from cellos.core.formation.runs import CLAIMED, DISPATCHED, VOID, Attempt, run_subject, work_subject
from cellos.core.formation.views import Attempts, AttemptView, FormationView, MemberView, place_of

FORMATION = "0198f0c4-7d5e-4a31-9c55-8a5d1f0e2b11"
FIRST = Attempt(FORMATION, "a.b", 1)
SUBJECT = run_subject(FIRST)


def event(kind: str, time: str = "t", **data: Any) -> Event:
    return Event(id="e", source="s", type=kind, data=data, time=time)


ONE_RUN = (
    (work_subject("p", "base", FIRST), event(DISPATCHED, "t0")),
    (SUBJECT, event(CLAIMED, "t1", runId="r", node="n")),
    (SUBJECT, event(events.STARTED, "t2")),
    (SUBJECT, event(events.COMMAND_COMPLETED, exitCode=3)),
    (SUBJECT, event(events.DESTROYED, "t3", outcome="failed", reason="why")),
)
ALL = AttemptView(
    attempt=1,
    state="failed",
    run_id="r",
    node="n",
    dispatched_at="t0",
    claimed_at="t1",
    started_at="t2",
    ended_at="t3",
    exit_code=3,
    reason="why",
)


class TestAttempts:
    def test_step_by_step(self) -> None:
        attempts = Attempts()
        states = []
        for subject, each in ONE_RUN:
            attempts.apply(subject, each)
            states.append(attempts.of("a.b")[0].state)
        assert states == ["dispatched", "claimed", "running", "running", "failed"]
        assert attempts.of("a.b") == (ALL,)
        assert attempts.of("other") == ()

    def test_any_order_and_twice(self) -> None:
        for seed in range(20):
            told = [*ONE_RUN, *ONE_RUN]
            random.Random(seed).shuffle(told)
            attempts = Attempts()
            for subject, each in told:
                attempts.apply(subject, each)
            assert attempts.of("a.b") == (ALL,)

    def test_several_in_the_order_of_their_numbers(self) -> None:
        attempts = Attempts()
        for number in (10, 2, 1):
            attempts.apply(run_subject(FIRST._replace(number=number)), event(events.DESTROYED, outcome="succeeded"))
        assert [(each.attempt, each.state) for each in attempts.of("a.b")] == [(1, "succeeded"), (2, "succeeded"), (10, "succeeded")]

    def test_void(self) -> None:
        attempts = Attempts()
        attempts.apply(SUBJECT, event(VOID, "t", reason="cancelled"))
        assert attempts.of("a.b") == (AttemptView(attempt=1, state="void", ended_at="t", reason="cancelled"),)

    @pytest.mark.parametrize(
        ("subject", "told"),
        [
            ("cellos.events.cells", event(CLAIMED)),
            (run_subject(FIRST) + ".x", event(CLAIMED)),
            (SUBJECT, event("dev.cellos.events.cell.other")),
        ],
    )
    def test_what_is_about_no_attempt(self, subject: str, told: Event) -> None:
        attempts = Attempts()
        attempts.apply(subject, told)
        assert attempts.of("a.b") == ()

    def test_hostile_data(self) -> None:
        attempts = Attempts()
        for kind in (CLAIMED, events.COMMAND_COMPLETED, events.DESTROYED, VOID):
            attempts.apply(SUBJECT, msgspec.structs.replace(event(kind), data=[1]))
            attempts.apply(SUBJECT, event(kind, runId=1, node={}, exitCode=True, reason=[], outcome=7))
        assert attempts.of("a.b") == (AttemptView(attempt=1, state="failed", claimed_at="t", ended_at="t"),)


class TestShapes:
    def test_both_ways(self) -> None:
        view = FormationView(formation_id=FORMATION, members=[MemberView(id="a", attempts=[ALL], after=["b"])], cursor=7)
        raw = msgspec.json.encode(view)
        assert b'"formationId"' in raw
        assert b'"exitCode":3' in raw
        read = msgspec.json.decode(raw, type=FormationView)
        assert (read.members[0].last, read.member("a"), read.member("x")) == (ALL, read.members[0], None)

    def test_of_an_older_or_newer_server(self) -> None:
        read = msgspec.json.decode(b'{"formationId":"f","news":1,"members":[{"id":"a","more":{}}]}', type=FormationView)
        assert (read.label, read.has_ended, read.members[0].phase, read.members[0].is_over, read.members[0].last) == (
            "f",
            False,
            None,
            False,
            None,
        )


@pytest.mark.parametrize(
    ("cell_id", "place"),
    [
        (f"{FORMATION}.a.b", (FORMATION, "a.b")),
        (FORMATION, None),
        (f"{FORMATION}.", None),
        (f"{FORMATION.upper()}.a", None),
        ("build.a", None),
        ("", None),
    ],
)
def test_place_of(cell_id: str, place: tuple[str, str] | None) -> None:
    assert place_of(cell_id) == place
