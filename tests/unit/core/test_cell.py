import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core import events
from cellos.core.cell import PHASES, TRANSITIONS, CellHistory, CellRecord, Phase, advance, fold, fold_all
from cellos.core.events import COMMAND_COMPLETED, DESTROYED, EXPORT_COMPLETED, FS_TOUCH, PROCESS_SPAWNED, STARTED, Event
from cellos.errors import LifecycleError

LIFE = [STARTED, PROCESS_SPAWNED, COMMAND_COMPLETED, FS_TOUCH, EXPORT_COMPLETED, DESTROYED]


def event(kind: str, *, run: str | None = "r1", second: int = 0, cell: str = "c", **data: Any) -> Event:
    bound = {"cellId": cell, "specId": "s", **({} if run is None else {"runId": run})}
    return Event(id="x", source="test", type=kind, data=bound | data, time=f"2026-01-01T00:00:{second:02d}.000000000+00:00")


def run_events(run: str, *, at: int = 0, exit_code: int = 0) -> list[Event]:
    outcome = "succeeded" if exit_code == 0 else "failed"
    return [
        event(STARTED, run=run, second=at, correlation={"formationId": "f1"}),
        event(PROCESS_SPAWNED, run=run, second=at + 1),
        event(COMMAND_COMPLETED, run=run, second=at + 2, exitCode=exit_code),
        event(DESTROYED, run=run, second=at + 3, outcome=outcome),
    ]


def folded(some: list[Event]) -> CellRecord | None:
    history: CellHistory | None = None
    for each in some:
        history = fold(history, each)
    return None if history is None else history.record


class TestAdvance:
    @pytest.mark.parametrize(
        "path",
        [
            LIFE,
            [STARTED, DESTROYED],
            [DESTROYED],
            [STARTED, COMMAND_COMPLETED, DESTROYED],
            [STARTED, FS_TOUCH, EXPORT_COMPLETED, DESTROYED],
            [STARTED, PROCESS_SPAWNED, DESTROYED],
        ],
    )
    def test_lives(self, path: list[str]) -> None:
        phase: Phase = "created"
        for kind in path:
            phase = advance(phase, kind)
        assert phase == "destroyed"

    @pytest.mark.parametrize(
        ("phase", "kind"),
        [
            ("created", COMMAND_COMPLETED),
            ("created", PROCESS_SPAWNED),
            ("started", STARTED),
            ("spawned", PROCESS_SPAWNED),
            ("spawned", FS_TOUCH),
            ("completed", COMMAND_COMPLETED),
            ("destroyed", DESTROYED),
            ("destroyed", STARTED),
        ],
    )
    def test_out_of_place(self, phase: Phase, kind: str) -> None:
        with pytest.raises(LifecycleError) as raised:
            advance(phase, kind)
        assert str(raised.value) == f"lifecycle: illegal transition for {kind}: lifecycle stage is {phase.capitalize()}"

    def test_other_events_are_legal_until_the_end(self) -> None:
        other = "dev.cellos.events.cell.observability.v1.network_scope"
        assert advance("created", other) == "created"
        assert advance("completed", other) == "completed"
        with pytest.raises(LifecycleError):
            advance("destroyed", other)

    def test_no_phase_goes_back(self) -> None:
        assert set(TRANSITIONS) == set(PHASES)
        for phase, row in TRANSITIONS.items():
            assert all(PHASES.index(to) >= PHASES.index(phase) for to in row.values())


class TestFold:
    def test_a_whole_run(self) -> None:
        assert folded(run_events("r1")) == CellRecord(
            id="c",
            spec_id="s",
            run_id="r1",
            state="destroyed",
            status="destroyed",
            formation_id="f1",
            started_at="2026-01-01T00:00:00.000000000+00:00",
            destroyed_at="2026-01-01T00:00:03.000000000+00:00",
            outcome="succeeded",
            exit_code=0,
        )

    @given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 3), max_size=6), st.randoms())
    def test_any_order_and_any_repetition_before_the_end_gives_the_same(self, before: list[int], after: list[int], random: Any) -> None:
        whole = run_events("r1", exit_code=7)
        *begun, end = whole
        several = begun + [begun[index] for index in before]
        random.shuffle(several)
        assert folded([*several, end, *(whole[index] for index in after)]) == folded(whole)

    @given(st.permutations(run_events("r1", at=0) + run_events("r2", at=10, exit_code=5)))
    def test_the_later_of_two_runs_remains_in_any_order(self, order: list[Event]) -> None:
        *second, end = run_events("r2", at=10, exit_code=5)
        order.remove(end)
        place = max(order.index(each) for each in second) + 1
        assert folded([*order[:place], end, *order[place:]]) == folded([*second, end])

    def test_words(self) -> None:
        some = run_events("r1")
        words = [folded(some[:count]) for count in (1, 2, 3, 4)]
        assert [(record.state, record.status) for record in words if record] == [("running",) * 2] * 3 + [("destroyed",) * 2]

    def test_an_end_without_a_beginning_is_pending(self) -> None:
        record = folded([event(COMMAND_COMPLETED, exitCode=1)])
        assert record is not None
        assert (record.state, record.exit_code, record.started_at) == ("pending", 1, None)

    def test_destroyed_is_the_end(self) -> None:
        """What comes later than that is not believed."""
        end = event(DESTROYED, second=5, outcome="failed")
        late = [event(STARTED, second=1), event(COMMAND_COMPLETED, exitCode=42), event(DESTROYED, second=9, outcome="succeeded")]
        record = folded([end, *late])
        assert record == folded([end])
        assert record is not None
        assert (record.state, record.started_at, record.exit_code, record.outcome) == ("destroyed", None, None, "failed")

    def test_a_new_run_is_a_new_record(self) -> None:
        record = folded([*run_events("r1", exit_code=9), event(STARTED, run="r2", second=20)])
        assert record == CellRecord(
            id="c", spec_id="s", run_id="r2", state="running", status="running", started_at="2026-01-01T00:00:20.000000000+00:00"
        )

    def test_late_events_of_a_past_run_change_nothing(self) -> None:
        """Also where the clock of its host was ahead: the run is remembered."""
        now = [event(STARTED, run="r1"), event(STARTED, run="r2", second=20)]
        assert folded([*now, event(DESTROYED, run="r1", second=50, outcome="failed")]) == folded(now)

    def test_late_events_of_a_run_never_seen(self) -> None:
        now = [event(STARTED, run="r2", second=20)]
        assert folded([*now, event(DESTROYED, run="r0", second=3)]) == folded(now)

    def test_a_run_that_never_started(self) -> None:
        record = folded([*run_events("r1"), event(DESTROYED, run="r2", second=30, outcome="failed")])
        assert record is not None
        assert (record.run_id, record.state, record.started_at, record.exit_code) == ("r2", "destroyed", None, None)

    def test_history_stays_small(self) -> None:
        history: CellHistory | None = None
        for number in range(100):
            history = fold(history, event(STARTED, run=f"r{number}", second=number % 60))
        assert history is not None
        assert len(history.superseded) <= 8

    @pytest.mark.parametrize(
        "data", [None, [], "text", {}, {"cellId": "c"}, {"specId": "s"}, {"cellId": 1, "specId": "s"}, {"cellId": "c", "specId": None}]
    )
    def test_events_that_name_no_cell_are_ignored(self, data: object) -> None:
        assert fold(None, Event(id="x", source="t", type=STARTED, data=data)) is None

    def test_other_types_are_ignored(self) -> None:
        assert fold(None, event(FS_TOUCH)) is None

    @pytest.mark.parametrize(
        ("value", "kept"), [(2**31, -(2**31)), (-1, -1), (2**32 + 3, 3), (True, None), ("3", None), (1.0, None), (None, None)]
    )
    def test_exit_code_is_an_integer_of_32_bits(self, value: object, kept: int | None) -> None:
        record = folded([event(COMMAND_COMPLETED, exitCode=value)])
        assert record is not None
        assert record.exit_code == kept

    @given(
        st.lists(
            st.builds(
                lambda kind, run, time, data: Event(
                    id="x", source="t", type=kind, time=time, data=data | ({} if run is None else {"runId": run})
                ),
                st.sampled_from([STARTED, COMMAND_COMPLETED, DESTROYED]),
                st.none() | st.sampled_from(["r1", "r2"]) | st.integers(),
                st.none() | st.text(max_size=5) | st.just("2026-01-01T00:00:00Z"),
                st.fixed_dictionaries(
                    {"cellId": st.just("c"), "specId": st.text(max_size=2)},
                    optional={
                        key: st.none() | st.integers() | st.text(max_size=3) | st.just({"formationId": 5})
                        for key in ("exitCode", "outcome", "correlation")
                    },
                ),
            )
        )
    )
    def test_it_never_raises(self, some: list[Event]) -> None:
        for record in fold_all(some).values():
            assert record.state == record.status

    def test_cells_are_apart(self) -> None:
        mixed = itertools.chain.from_iterable(zip(run_events("r1"), [event(STARTED, cell="d"), *run_events("r1")[1:]], strict=True))
        records = fold_all([*mixed, Event(id="x", source="t", type="other")])
        assert records["c"].state == "destroyed"
        assert records["d"].state == "running"

    def test_a_history_takes_only_its_own_cell(self) -> None:
        with pytest.raises(ValueError, match="in the history of cell c"):
            fold(fold(None, event(STARTED)), event(STARTED, cell="d"))

    def test_record_has_the_ten_fields(self) -> None:
        assert CellRecord.__struct_fields__ == (
            "id",
            "spec_id",
            "run_id",
            "state",
            "status",
            "formation_id",
            "started_at",
            "destroyed_at",
            "outcome",
            "exit_code",
        )


def test_constructors_and_transitions_agree_on_types() -> None:
    assert {kind for row in TRANSITIONS.values() for kind in row} <= {value for name, value in vars(events).items() if name.isupper()}
