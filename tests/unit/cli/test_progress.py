from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.cli import describe, progress
from cellos.cli.group import UsageError, dispatch
from cellos.cli.progress import Change, changes
from cellos.cli.wait import is_reached, line, next_step, table
from cellos.core.formation.runs import CLAIMED, DISPATCHED, VOID
from cellos.core.formation.state import MEMBER_PHASES
from cellos.core.formation.views import AttemptView, FormationView, MemberView
from cellos.core.ids import rfc3339

SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND


def at(seconds: float) -> str:
    return rfc3339(NOW + int(seconds * SECOND))


def formation(*members: MemberView, status: str = "RUNNING", **more: Any) -> FormationView:
    return FormationView(formation_id="f", name="demo", status=status, members=members, created_at=at(-10), **more)


def member(id: str = "a", phase: str | None = "running", **more: Any) -> MemberView:
    return MemberView(id=id, phase=phase, **more)


RUN = AttemptView(attempt=1, state="running", run_id="r1", node="n1", claimed_at=at(-3), started_at=at(-2))
ENDED = msgspec.structs.replace(RUN, state="failed", ended_at=at(-0.5), reason="command exited with status 3", exit_code=3)
RUNNING = member(attempt=1, node="n1", run_id="r1", attempts=[RUN])
FAILED = member(phase="failed", attempt=1, node="n1", run_id="r1", reason="command exited with status 3", exit_code=3, attempts=[ENDED])


class TestChanges:
    def test_at_first_whoever_has_begun(self) -> None:
        view = formation(RUNNING, member("b", "waiting", waiting="waits for: a"), member("c", None))
        assert list(changes(None, view)) == [Change(None, "RUNNING", "3 members"), Change("a", "running", "on n1")]

    def test_then_what_is_new(self) -> None:
        before = formation(RUNNING, member("b", "waiting", waiting="waits for: a"))
        after = formation(FAILED, member("b", "skipped", reason="needs a, which did not succeed"), status="FAILED", reason="a failed")
        assert list(changes(before, after)) == [
            Change("a", "failed", "command exited with status 3, 1.5 s on n1"),
            Change("b", "skipped", "needs a, which did not succeed"),
            Change(None, "FAILED", "a failed"),
        ]
        assert list(changes(after, after)) == []

    def test_what_changes_from_moment_to_moment_is_no_news(self) -> None:
        before, after = (
            formation(member(phase="backing_off", attempt=1, waiting=f"is tried again in {left} s"), member("b", "ready", waiting=text))
            for left, text in ((3, "waits for its turn: 3"), (2, "waits for its turn: 2"))
        )
        assert list(changes(before, after)) == []

    def test_what_nobody_will_cure_is(self) -> None:
        stuck = formation(member(phase="dispatched", attempt=1, waiting="no node in pool x", pool="x"), status="LAUNCHING")
        taken = formation(member(phase="dispatched", attempt=1, waiting="is about to be taken by n1", pool="x"), status="LAUNCHING")
        assert list(changes(taken, stuck)) == [Change("a", "dispatched", "no node in pool x")]
        alone = formation(*(member(id, "ready", waiting="no controller runs") for id in "ab"), status="PENDING")
        assert list(changes(None, alone)) == [Change(None, "PENDING", "2 members, no controller runs")]

    def test_cancelling(self) -> None:
        assert list(changes(formation(), formation(cancelling="deleted"))) == [Change(None, "RUNNING", "is being cancelled: deleted")]

    def test_a_line(self) -> None:
        change = Change("a", "backing_off", "is tried again")
        assert line(1.25, "a\x1b", change) == "    1.2 s  a\\x1b                     backing off  is tried again"


class TestDetail:
    @pytest.mark.parametrize(
        ("shown", "text"),
        [
            (member(phase="claimed", attempt=2, node="n1", retries=2), "on n1, attempt 2/3"),
            (member(phase="dispatched", attempt=1, pool="gpu"), "asked of the nodes of pool gpu"),
            (member(phase="succeeded", attempt=2, exit_code=0, retries=1), "exit 0, attempt 2/2"),
            (member(phase="failed", attempt=3, exit_code=-1, reason="time-out", retries=0), "time-out, attempt 3/3"),
            (member(phase="ready"), ""),
        ],
    )
    def test_where_and_why(self, shown: MemberView, text: str) -> None:
        assert progress.detail(shown) == text

    def test_an_attempt(self) -> None:
        assert progress.attempt_text(ENDED) == "on n1, command exited with status 3, 1.5 s"
        assert progress.attempt_text(AttemptView(attempt=1)) == ""


class TestRow:
    def test_while_it_runs_its_time_grows(self) -> None:
        assert progress.row(RUNNING, NOW) == ("a", "running", "1/1", "n1", "2.0 s", "")
        assert progress.row(RUNNING, NOW + SECOND).time == "3.0 s"

    def test_when_it_is_over(self) -> None:
        assert progress.row(FAILED, NOW + 99 * SECOND) == ("a", "failed", "1/1", "n1", "1.5 s", "command exited with status 3")

    def test_before_it_begins(self) -> None:
        assert progress.row(member(phase="backing_off", attempt=0, waiting="w"), NOW) == ("a", "backing off", "", "", "", "w")
        assert progress.row(member(phase=None), NOW) == ("a", "", "", "", "", "")

    def test_the_clocks_of_others(self) -> None:
        assert progress.row(RUNNING, NOW - 60 * SECOND).time == "0 ms"
        assert progress.row(member(attempt=1, attempts=[msgspec.structs.replace(RUN, started_at="x")]), NOW).time == ""


class TestSummary:
    def test_while_it_runs(self) -> None:
        view = formation(RUNNING, member("b", "backing_off"), status="DEGRADED")
        assert progress.summary(view, NOW) == "demo DEGRADED for 10.0 s · 2 members: 1 running, 1 backing off"

    def test_at_the_end(self) -> None:
        view = formation(msgspec.structs.replace(FAILED, attempts=[ENDED, ENDED]), status="FAILED", ended_at=at(-9.9))
        assert progress.summary(view, NOW) == "demo FAILED in 100 ms · 1 member: 1 failed · 2 attempts"

    def test_of_one_that_others_drive(self) -> None:
        view = FormationView(formation_id="f", status="PENDING", members=[member(phase=None)])
        assert progress.summary(view, NOW) == "f PENDING · 1 member"


class TestShown:
    def test_all_that_fit(self) -> None:
        members = [member(str(number)) for number in range(3)]
        assert progress.shown(members, 3) == (members, "")

    def test_those_that_matter_in_their_order(self) -> None:
        members = [member("a", "succeeded"), member("b", "waiting"), member("c", "failed"), member("d", "running"), member("e", "skipped")]
        kept, rest = progress.shown(members, 4)
        assert [each.id for each in kept] == ["b", "c", "d"]
        assert rest == "… and 2 more: 1 succeeded, 1 skipped"

    def test_every_phase_has_a_place(self) -> None:
        assert set(progress.PHASES) == set(MEMBER_PHASES)
        view = formation(*(member(phase, phase) for phase in MEMBER_PHASES))
        assert all(f"1 {phase.replace('_', ' ')}" in progress.summary(view, NOW) for phase in MEMBER_PHASES)


class TestTree:
    def test_below_who_authorized_them(self) -> None:
        members = [member(id, authorized_by=parent) for id, parent in (("c", "b"), ("b", "a"), ("a", None), ("d", "a"), ("e", "b"))]
        assert [prefix + each.id for prefix, each in progress.tree(members)] == ["a", "├ b", "│ ├ c", "│ └ e", "└ d"]

    @given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.sampled_from("abcdefx")), unique_by=lambda pair: pair[0]))
    def test_nobody_comes_twice(self, pairs: list[tuple[str, str | None]]) -> None:
        found = [each.id for _, each in progress.tree([member(id, authorized_by=parent) for id, parent in pairs])]
        assert len(found) == len(set(found))
        assert {id for id, parent in pairs if parent is None} <= set(found)

    def test_deep(self) -> None:
        members = [member("m0"), *(member(f"m{n}", authorized_by=f"m{n - 1}") for n in range(1, 2000))]
        assert sum(1 for _ in progress.tree(members)) == 2000

    def test_rows_with_attempts(self) -> None:
        two = msgspec.structs.replace(
            FAILED, attempts=[ENDED, msgspec.structs.replace(ENDED, attempt=2, run_id="r2")], after=["x"], critical=False
        )
        first, *attempts = describe.member_rows([two], NOW)
        assert first[-1] == "command exited with status 3; after x, not critical"
        assert [(each[0], each[-1]) for each in attempts] == [
            ("  attempt 1", "on n1, command exited with status 3, 1.5 s, run r1"),
            ("  attempt 2", "on n1, command exited with status 3, 1.5 s, run r2"),
        ]


class TestTable:
    @staticmethod
    def drawn(view: FormationView, height: int, width: int = 100) -> list[str]:
        from rich.console import Console

        console = Console(width=width, force_terminal=False, no_color=True)
        with console.capture() as captured:
            console.print(table(view, NOW, height))
        return [text.rstrip() for text in captured.get().splitlines()]

    def test_members_and_a_line_about_all(self) -> None:
        assert self.drawn(formation(RUNNING, member("b", "waiting", waiting="waits for: a")), 24) == [
            "MEMBER  PHASE    TRY  NODE   TIME  NOTE",
            "a       running  1/1  n1    2.0 s",
            "b       waiting                    waits for: a",
            "demo RUNNING for 10.0 s · 2 members: 1 running, 1 waiting",
        ]

    def test_it_fits_the_terminal(self) -> None:
        lines = self.drawn(formation(*(member(f"m{number}", "waiting", waiting="w" * 200) for number in range(1000))), 10, 60)
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 60
        assert lines[-2] == "… and 996 more: 996 waiting"

    def test_names_are_no_markup(self) -> None:
        assert self.drawn(formation(member("[red]a[/red]\x1b[2J")), 24)[1].startswith(r"[red]a[/red]\x1b[2J  running")


class TestSteps:
    def test_of_a_formation(self) -> None:
        assert describe.formation_steps(formation(RUNNING)) == ["cellos wait formation demo", "cellos logs demo/a -f"]
        assert describe.formation_steps(formation(FAILED, status="FAILED")) == ["cellos logs demo/a", "cellos events --formation demo"]
        assert describe.formation_steps(formation(member(phase=None))) == ["cellos get formation demo"]

    def test_after_waiting(self) -> None:
        assert next_step(formation(FAILED, status="FAILED")) == "cellos logs demo/a"
        assert next_step(formation(FAILED)) == next_step(formation(status="FAILED")) == "cellos describe formation demo"


@pytest.mark.parametrize(
    ("status", "until", "reached"),
    [
        ("COMPLETED", {"COMPLETED"}, True),
        ("COMPLETED", {"RUNNING"}, True),
        ("COMPLETED", {"FAILED"}, False),
        ("FAILED", {"COMPLETED", "FAILED"}, True),
        ("FAILED", {"RUNNING"}, False),
        ("FAILED", {"LAUNCHING"}, True),
        ("RUNNING", {"LAUNCHING"}, True),
        ("CANCELLED", {"LAUNCHING"}, False),
        ("CANCELLED", {"PENDING"}, True),
        ("PENDING", {"LAUNCHING"}, False),
        ("DEGRADED", {"RUNNING"}, False),
    ],
)
def test_reached(status: str, until: set[str], reached: bool) -> None:
    assert is_reached(status, until) is reached


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 ms"),
        (999_999_999, "999 ms"),
        (SECOND, "1.0 s"),
        (59_999_999_999, "59.9 s"),
        (60 * SECOND, "1 min 0 s"),
        (3599 * SECOND, "59 min 59 s"),
        (3600 * SECOND, "1 h 0 min"),
        (90_000 * SECOND, "1 d 1 h"),
    ],
)
def test_times_for_people(nanoseconds: int, text: str) -> None:
    assert progress.seconds(nanoseconds) == text


def test_words_for_the_events_of_attempts() -> None:
    from cellos.cli.timeline import DESCRIBED

    assert {DISPATCHED, CLAIMED, VOID} <= set(DESCRIBED)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["wait", "formation", "x", "--for", "DONE"], "'DONE' is no status; there are PENDING, "),
        (["wait", "formation", "x", "--timeout", "soon"], "'soon' is not a time above 0, like 30s"),
        (["wait", "formation"], "missing argument 'NAME'"),
        (["apply", "-f", "x", "--timeout", "1s"], "--timeout goes with --wait"),
        (["logs"], "missing argument"),
        (["logs", "x", "--stream", "both"], "'both' is not one of 'stdout', 'stderr'"),
        (["describe", "pod", "x"], "no such command 'pod'"),
        (["get", "nodes", "--state", "running"], "--state and --formation choose cells"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError) as refused:
        dispatch(arguments, None)
    assert text in str(refused.value)
