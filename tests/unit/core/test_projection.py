import json
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellos.core.cell import CellRecord, fold_all
from cellos.core.events import COMMAND_COMPLETED, DESTROYED, FS_TOUCH, STARTED, Event, SignedEnvelope, canonical_bytes, parse_event
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import HMAC_SHA256, Signer, verify
from cellos.core.formation import FormationStatus, Phase, next_status
from cellos.core.formation.events import FORMATION_TYPE, LEGACY_FORMATION_TYPE, NAME_RESERVED, name_subject, subject_of
from cellos.core.formation.runs import Attempt, run_subject
from cellos.core.formation.transitions import PHASES, STATUSES, TERMINAL
from cellos.core.projection import MAX_CELL_BYTES, MAX_DEPTH, ApplyOutcome, NameUse, Page, Projection, Verify
from cellos.core.rows import Contents
from cellos.errors import LifecycleError

ANY = "cellos.events.v1"
F = [str(uuid.UUID(int=number << 96 | 1)) for number in (5, 1, 9)]
SIGNER = Signer("k", HMAC_SHA256, b"secret")
IMPOSTOR = Signer("k", HMAC_SHA256, b"another")
RING = Keyring(hmac={"k": b"secret"})

Stored = tuple[str, bytes]
"""A message of a log: subject and payload."""


def check(envelope: SignedEnvelope) -> None:
    verify(envelope, RING)


def event(kind: str, data: Any, *, second: int = 0) -> Event:
    return Event(id="e", source="test", type=kind, data=data, time=f"2026-01-01T00:00:{second:02d}.000000000+00:00")


def about(cell: str, run: str | None, **more: Any) -> dict[str, Any]:
    return {"cellId": cell, "specId": "s", **({} if run is None else {"runId": run}), **more}


def cell_event(kind: str, cell: str = "c", run: str | None = "r1", *, second: int = 0, **more: Any) -> Event:
    return event(kind, about(cell, run, **more), second=second)


def run_of(cell: str, run: str = "r1", *, at: int = 0, formation: str | None = None, exit_code: int = 0) -> list[Event]:
    more = {} if formation is None else {"correlation": {"formationId": formation, "memberId": "m"}}
    return [
        cell_event(STARTED, cell, run, second=at, **more),
        cell_event(FS_TOUCH, cell, run, second=at + 1, **more),
        cell_event(COMMAND_COMPLETED, cell, run, second=at + 2, exitCode=exit_code, **more),
        cell_event(DESTROYED, cell, run, second=at + 3, outcome="succeeded" if exit_code == 0 else "failed", **more),
    ]


def phase(id: str, word: str, *, name: str = "demo", family: str = FORMATION_TYPE, **more: Any) -> Event:
    return event(family + word, {"formationId": id, "formationName": name, "cellCount": 1, "failedCellIds": [], **more})


def reserved(id: str, name: str = "demo") -> Event:
    return event(NAME_RESERVED, {"formationId": id, "formationName": name})


def projected(events: Iterable[Event | bytes], *, into: Projection | None = None, verify: Verify | None = None) -> Projection:
    projection = Projection() if into is None else into
    for some in events:
        projection.apply(projection.cursor + 1, ANY, some if isinstance(some, bytes) else canonical_bytes(some), verify=verify)
    return projection


def outcome(*events: Event | bytes, subject: str = ANY) -> ApplyOutcome:
    """Of the last one."""
    projection = projected(events[:-1])
    last = events[-1]
    return projection.apply(projection.cursor + 1, subject, last if isinstance(last, bytes) else canonical_bytes(last))


def shown(line: bytes | None) -> Any:
    return None if line is None else json.loads(line)


def ids(page: Page) -> list[str]:
    return [json.loads(part)["id"] for part in page.parts]


class TestCells:
    def test_a_record_has_ten_members_in_this_order(self) -> None:
        line = projected(run_of("c", formation=F[0], exit_code=3)).cell("c")
        assert line == (
            b'{"id":"c","spec_id":"s","run_id":"r1","state":"destroyed","status":"destroyed","formation_id":"%s",'
            b'"started_at":"2026-01-01T00:00:00.000000000+00:00","destroyed_at":"2026-01-01T00:00:03.000000000+00:00",'
            b'"outcome":"failed","exit_code":3}' % F[0].encode()
        )

    def test_unknown_is_null(self) -> None:
        assert shown(projected([cell_event(COMMAND_COMPLETED, run=None)]).cell("c")) == {
            "id": "c",
            "spec_id": "s",
            "run_id": None,
            "state": "pending",
            "status": "pending",
            "formation_id": None,
            "started_at": None,
            "destroyed_at": None,
            "outcome": None,
            "exit_code": None,
        }

    def test_nothing_is_there_at_first(self) -> None:
        projection = Projection()
        assert (projection.cell("c"), projection.formation(F[0]), projection.formation_by_name("demo")) == (None, None, [])
        assert projection.cells() == projection.formations() == Page([], None)
        assert projection.name("demo") == NameUse(None, 0)
        assert projection.cursor == 0

    @given(st.permutations([(step, which) for which in range(3) for step in range(4)]), st.lists(st.integers(0, 11), max_size=6))
    def test_any_order_and_repetition_is_what_the_fold_makes_of_it(self, order: list[tuple[int, int]], again: list[int]) -> None:
        runs = [run_of("c", "r1"), run_of("d", "r1", exit_code=1, formation=F[0]), run_of("c", "r2", at=10)]
        events = [runs[which][step] for step, which in [*order, *(order[index] for index in again)]]
        projection = projected(events)
        for id, record in fold_all(events).items():
            assert projection.cell(id) == msgspec.json.encode(record)

    def test_which_runs_are_over(self) -> None:
        first, second = run_of("c", "r1"), run_of("c", "r2", at=10)
        projection = projected(first[:-1])
        assert (projection.has_ended("c", "r1"), projection.has_ended("c", "r2"), projection.has_ended("x", "r1")) == (False, False, False)
        projected(second[:1], into=projection)
        assert (projection.has_ended("c", "r1"), projection.has_ended("c", "r2")) == (True, False)
        projected(second[1:], into=projection)
        assert (projection.has_ended("c", "r2"), projection.has_ended("c", "r3")) == (True, False)

    def test_a_new_run_is_a_new_record_and_late_events_of_the_old_one_are_ignored(self) -> None:
        projection = projected([*run_of("c", "r1", formation=F[0]), cell_event(STARTED, run="r2", second=20)])
        line = projection.cell("c")
        assert shown(line)["run_id"] == "r2"
        assert shown(line)["formation_id"] is None
        assert ids(projection.cells(formation=F[0])) == []
        late = projection.apply(9, ANY, canonical_bytes(cell_event(DESTROYED, run="r1", second=59)))
        assert late == ApplyOutcome("ignored", "it is of an earlier run of the cell")
        assert projection.cell("c") == line

    def test_attempts_of_a_member_follow_each_other_whatever_the_clocks_of_their_nodes_say(self) -> None:
        projection = Projection()
        runs = run_of("c", "r1", at=30, exit_code=1), run_of("c", "r2", at=0)
        for number, run in enumerate(runs, 1):
            for each in run:
                projection.apply(projection.cursor + 1, run_subject(Attempt(F[0], "m", number)), canonical_bytes(each))
        assert (shown(projection.cell("c"))["run_id"], shown(projection.cell("c"))["outcome"]) == ("r2", "succeeded")

    @pytest.mark.parametrize("text", [F[0].upper(), F[0].replace("-", ""), "{" + F[0] + "}"])
    def test_the_formation_is_shown_and_found_in_its_canonical_form(self, text: str) -> None:
        projection = projected(run_of("c", formation=text))
        assert shown(projection.cell("c"))["formation_id"] == F[0]
        assert ids(projection.cells(formation=F[0])) == ["c"]

    @pytest.mark.parametrize("value", ["demo", "", None, 5, {}])
    def test_a_formation_that_is_no_uuid_is_none(self, value: object) -> None:
        projection = projected([cell_event(STARTED, correlation={"formationId": value})])
        assert shown(projection.cell("c"))["formation_id"] is None

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            ({"specId": "s"}, "data.cellId is missing or not a string"),
            ({"cellId": 5, "specId": "s"}, "data.cellId is missing or not a string"),
            (None, "data.cellId is missing or not a string"),
            ([], "data.cellId is missing or not a string"),
            ({"cellId": "c"}, "data.specId is missing or not a string"),
            ({"cellId": "c", "specId": None}, "data.specId is missing or not a string"),
        ],
    )
    def test_without_ids_there_is_no_record(self, data: Any, reason: str) -> None:
        projection = Projection()
        assert projection.apply(7, ANY, canonical_bytes(event(STARTED, data))) == ApplyOutcome("ignored", reason)
        assert (projection.cells(), projection.cursor, projection.ignored) == (Page([], None), 7, 1)

    @pytest.mark.parametrize("member", ["cellId", "specId", "runId"])
    def test_a_record_stays_short(self, member: str) -> None:
        data = about("c", "r1") | {member: "x" * MAX_CELL_BYTES}
        assert outcome(event(STARTED, data)) == ApplyOutcome("rejected", "the record of the cell would be longer than 4096 bytes")

    def test_a_record_that_would_grow_too_long_stays_as_it_was(self) -> None:
        started = cell_event(STARTED)
        projection = projected([started])
        line = projection.cell("c")
        late = cell_event(DESTROYED, outcome="x" * MAX_CELL_BYTES, correlation={"formationId": F[0]})
        assert projection.apply(2, ANY, canonical_bytes(late)).kind == "rejected"
        assert projection.cell("c") == line
        assert ids(projection.cells(state="running")) == ["c"]
        assert ids(projection.cells(formation=F[0])) == []

    def test_odd_ids_are_ids(self) -> None:
        odd = ["", "\x00", "a/b", '"', "\U0001f600", "é", " ", "\\"]
        projection = projected([cell_event(STARTED, cell) for cell in odd])
        assert ids(projection.cells()) == sorted(odd)
        assert all(shown(projection.cell(cell))["id"] == cell for cell in odd)


class TestFormations:
    def test_a_record_has_four_members_in_this_order(self) -> None:
        document = {"coordinator": "a", "members": [{"id": "a"}], "name": "demo", "metadata": {"labels": {"é": 1.5}}}
        projection = projected([phase(F[0], "created", document=document)])
        inner = '{"coordinator":"a","members":[{"id":"a"}],"metadata":{"labels":{"é":1.5}},"name":"demo"}'
        expected = f'{{"id":"{F[0]}","name":"demo","status":"PENDING","document":{inner}}}'
        assert projection.formation(F[0]) == expected.encode()

    @pytest.mark.parametrize("family", [FORMATION_TYPE, LEGACY_FORMATION_TYPE])
    @pytest.mark.parametrize(
        ("word", "status"),
        [
            ("created", "PENDING"),
            ("launching", "LAUNCHING"),
            ("running", "RUNNING"),
            ("degraded", "DEGRADED"),
            ("completed", "COMPLETED"),
            ("failed", "FAILED"),
            ("cancelling", "PENDING"),
            ("cancelled", "CANCELLED"),
        ],
    )
    def test_the_first_event_that_is_left_says_the_status(self, family: str, word: str, status: str) -> None:
        some = phase(F[0], word, family=family, reason="why")
        record = shown(projected([some]).formation(F[0]))
        assert record == {"id": F[0], "name": "demo", "status": status, "document": some.data}

    @given(st.lists(st.sampled_from(PHASES), max_size=8))
    def test_later_events_go_by_the_transition_table(self, phases: list[Phase]) -> None:
        status: FormationStatus = "PENDING"
        illegal = 0
        for word in phases:
            try:
                status = next_status(status, word)
            except LifecycleError:
                illegal += 1
        projection = projected([phase(F[0], "created", document={"name": "demo"}), *(phase(F[0], word) for word in phases)])
        assert shown(projection.formation(F[0])) == {"id": F[0], "name": "demo", "status": status, "document": {"name": "demo"}}
        assert (projection.illegal, projection.ignored, projection.applied) == (illegal, illegal, 1 + len(phases) - illegal)

    @pytest.mark.parametrize("status", sorted(TERMINAL))
    def test_the_end_is_final(self, status: str) -> None:
        result = outcome(phase(F[0], status.lower()), phase(F[0], "running"))
        assert result.kind == "ignored"
        assert status in result.reason

    def test_unknown_phases_are_ignored(self) -> None:
        assert outcome(phase(F[0], "succeeded")) == ApplyOutcome("ignored", "its type changes no record")

    def test_the_id_has_three_places(self) -> None:
        created = phase(F[0], "created")
        snake = {"formation_id" if key == "formationId" else key: value for key, value in created.data.items()}
        nowhere = event(created.type, {"name": "demo"})
        by_subject = canonical_bytes(nowhere)[:-1] + b',"subject":"%s"}' % F[0].upper().encode()
        for some in (created, event(created.type, snake), by_subject):
            projection = projected([some])
            assert projection.formation_by_name("demo") == [F[0]]
        assert outcome(nowhere) == ApplyOutcome("rejected", "data.formationId is missing or not a UUID")

    def test_no_signature_covers_the_subject(self) -> None:
        nowhere = event(FORMATION_TYPE + "created", {"name": "demo"})
        line = SIGNER.wrap(nowhere, canonical_bytes(nowhere))[:-1] + b',"subject":"%s"}' % F[0].encode()
        assert outcome(line).kind == "rejected"

    @pytest.mark.parametrize("value", ["", "x", F[0] + "0", None, 5])
    def test_forged_ids(self, value: object) -> None:
        assert outcome(event(FORMATION_TYPE + "created", {"formationId": value})).kind == "rejected"
        assert outcome(event(NAME_RESERVED, {"formationId": value, "formationName": "demo"})).kind == "rejected"

    @pytest.mark.parametrize(
        "subject", [subject_of(F[1], "created"), subject_of(F[0], "running"), f"cellos.events.formations.{F[0]}", name_subject("x")]
    )
    def test_another_subject_than_its_own(self, subject: str) -> None:
        """Who writes about a formation expects the last event under its subjects. One beside them would slip through."""
        wrong = ApplyOutcome("rejected", "its subject is that of another formation, phase or name")
        if not subject.startswith("cellos.events.names."):
            assert outcome(phase(F[0], "created"), subject=subject) == wrong
        assert outcome(reserved(F[0], "demo"), subject=name_subject("other")) == wrong

    def test_its_own_subject(self) -> None:
        assert outcome(phase(F[0], "created"), subject=subject_of(F[0], "created")).kind == "applied"
        assert outcome(reserved(F[0], "de.mo"), subject=name_subject("de.mo")).kind == "applied"

    def test_a_document_that_not_all_readers_could_take(self) -> None:
        def nested(depth: int) -> Event:
            deep: object = 1
            for _ in range(depth):
                deep = [deep]
            return phase(F[0], "created", document={"x": deep})

        assert outcome(nested(MAX_DEPTH - 1)).kind == "applied"
        assert outcome(nested(MAX_DEPTH)) == ApplyOutcome("rejected", "its data is nested more than 128 deep")
        assert (
            outcome(b'{"specversion":"1.0","id":"e","source":"s","type":"%screated","data":7}' % FORMATION_TYPE.encode()).kind == "rejected"
        )

    def test_a_name_is_given_once(self) -> None:
        projection = projected([phase(F[0], "created", name=""), phase(F[0], "running", name="late"), phase(F[0], "running", name="x")])
        assert shown(projection.formation(F[0]))["name"] == "late"
        assert [projection.formation_by_name(name) for name in ("", "late", "x")] == [[], [F[0]], []]

    def test_a_document_is_of_created_alone(self) -> None:
        record = shown(projected([phase(F[0], "running", document={"a": 1})]).formation(F[0]))
        assert record["document"]["document"] == {"a": 1}


class TestNames:
    def test_a_name_is_held_from_its_reservation_to_the_end(self) -> None:
        projection = projected([reserved(F[0])])
        assert projection.name("demo") == NameUse(F[0], 1)
        projected([phase(F[0], "created"), phase(F[0], "running"), phase(F[0], "cancelling")], into=projection)
        assert projection.name("demo") == NameUse(F[0], 1)
        projected([phase(F[0], "cancelled")], into=projection)
        assert projection.name("demo") == NameUse(None, 1)
        projected([reserved(F[1]), phase(F[1], "created")], into=projection)
        assert projection.name("demo") == NameUse(F[1], 6)
        assert projection.formation_by_name("demo") == [F[1]]

    def test_a_formation_without_reservation_holds_its_name_too(self) -> None:
        projection = projected([phase(F[0], "created")])
        assert projection.name("demo") == NameUse(F[0], 0)

    def test_a_reservation_of_a_taken_name_changes_nothing_but_what_the_next_expects(self) -> None:
        projection = projected([reserved(F[0]), phase(F[0], "created")])
        result = projection.apply(3, name_subject("demo"), canonical_bytes(reserved(F[1])))
        assert result == ApplyOutcome("ignored", "the name is still that of another formation")
        assert projection.name("demo") == NameUse(F[0], 3)

    def test_a_reservation_without_a_name(self) -> None:
        assert outcome(event(NAME_RESERVED, {"formationId": F[0]})).kind == "rejected"

    def test_several_open_ones_come_in_order_of_their_uuids(self) -> None:
        projection = projected([phase(id, "created") for id in F])
        assert projection.formation_by_name("demo") == sorted(F)
        projected([phase(F[0], "failed")], into=projection)
        assert projection.formation_by_name("demo") == sorted(F[1:])

    def test_where_all_have_ended_the_name_is_that_of_the_youngest(self) -> None:
        order = [F[0], F[2], F[1]]
        projection = projected([phase(id, "created") for id in order] + [phase(id, "completed") for id in reversed(order)])
        assert projection.formation_by_name("demo") == [F[1]]


class TestLists:
    def test_formations_ascend_by_uuid(self) -> None:
        projection = projected([phase(id, "created", name=id) for id in F])
        assert ids(projection.formations()) == sorted(F)
        first = projection.formations(limit=2)
        assert (ids(first), first.next) == (sorted(F)[:2], sorted(F)[1])
        assert projection.formations(after=first.next, limit=2) == Page([projection.formation(sorted(F)[2]) or b""], None)

    @given(
        st.lists(
            st.builds(
                lambda cell, run, step, formation: run_of(f"c{cell}", f"r{run}", at=run * 10, formation=formation)[step],
                st.integers(0, 12),
                st.integers(0, 2),
                st.integers(0, 3),
                st.none() | st.sampled_from(F),
            ),
            max_size=40,
        ),
        st.integers(1, 5),
    )
    def test_every_filter_and_page_against_a_search_of_all(self, events: list[Event], limit: int) -> None:
        projection = projected(events)
        records = sorted(fold_all(events).values(), key=lambda record: record.id)
        for state in (None, "pending", "running", "destroyed"):
            for formation in (None, *F, "demo"):
                expected = [
                    msgspec.json.encode(record)
                    for record in records
                    if state in {None, record.state} and formation in {None, record.formation_id}
                ]
                assert projection.cells(state=state, formation=formation) == Page(expected, None)
                pages: list[bytes] = []
                after: str | None = None
                while True:
                    page = projection.cells(state=state, formation=formation, after=after, limit=limit)
                    assert len(page.parts) <= limit
                    pages += page.parts
                    if page.next is None:
                        break
                    after = page.next
                assert pages == expected
        counts = projection.counts()
        assert [counts[state] for state in ("pending", "running", "destroyed")] == [
            sum(record.state == state for record in records) for state in ("pending", "running", "destroyed")
        ]

    def test_a_page_of_none(self) -> None:
        projection = projected([cell_event(STARTED)])
        assert projection.cells(limit=0) == projection.formations(limit=0) == Page([], None)

    def test_a_page_may_begin_after_an_id_that_is_not_there(self) -> None:
        projection = projected([cell_event(STARTED, cell) for cell in "ace"])
        assert ids(projection.cells(after="b", limit=1)) == ["c"]

    def test_a_list_is_no_part_of_the_projection(self) -> None:
        projection = projected([cell_event(STARTED), phase(F[0], "created")])
        projection.cells().parts.clear()
        projection.formation_by_name("demo").clear()
        assert ids(projection.cells()) == ["c"]
        assert projection.formation_by_name("demo") == [F[0]]


class TestCursor:
    @pytest.mark.parametrize(
        ("payload", "kind", "reason"),
        [
            (b"\xff", "rejected", "not UTF-8"),
            (b"nonsense", "rejected", "not JSON"),
            (b"", "rejected", "not JSON"),
            (b"{}", "rejected", "not an event"),
            (b'"' + b"x" * (1 << 20) + b'"', "rejected", "longer than 1048576 bytes"),
            (b'{"type":"other"}', "ignored", "its type changes no record"),
            (canonical_bytes(cell_event(FS_TOUCH)), "ignored", "its type changes no record"),
            (canonical_bytes(cell_event(STARTED)), "applied", ""),
        ],
    )
    def test_every_message_advances_it(self, payload: bytes, kind: str, reason: str) -> None:
        projection = Projection(cursor=10)
        result = projection.apply(15, ANY, payload)
        assert (result.kind, projection.cursor) == (kind, 15)
        assert result.reason.startswith(reason)
        assert {"applied": projection.applied, "ignored": projection.ignored, "rejected": projection.rejected}[kind] == 1

    @pytest.mark.parametrize("sequence", [0, 1, 5])
    def test_what_is_not_after_it_was_applied_before(self, sequence: int) -> None:
        projection = Projection(cursor=5)
        assert projection.apply(sequence, ANY, canonical_bytes(cell_event(STARTED))) == ApplyOutcome("ignored", "it was applied before")
        assert (projection.cursor, projection.cells()) == (5, Page([], None))


def sealed(some: Event, signer: Signer | None) -> bytes:
    line = canonical_bytes(some)
    return line if signer is None else signer.wrap(some, line)


class TestSignatures:
    def test_signed_events_count_as_the_event_that_they_hold(self) -> None:
        events = [*run_of("c", formation=F[0]), phase(F[0], "created"), reserved(F[0])]
        assert projected(sealed(some, SIGNER) for some in events).freeze() == projected(events).freeze()

    @pytest.mark.parametrize(
        ("signers", "mark"),
        [
            ([SIGNER, SIGNER], "verified"),
            ([SIGNER, None], "unsigned"),
            ([None, SIGNER], "unsigned"),
            ([None, None], "unsigned"),
            ([SIGNER, IMPOSTOR], "invalid"),
            ([IMPOSTOR, None], "invalid"),
        ],
    )
    def test_a_record_is_worth_as_much_as_the_worst_event_behind_it(self, signers: list[Signer | None], mark: str) -> None:
        cell = [cell_event(STARTED), cell_event(DESTROYED)]
        formation = [phase(F[0], "created", document={"name": "demo"}), phase(F[0], "running")]
        projection = projected(
            (sealed(some, signer) for events in (cell, formation) for some, signer in zip(events, signers, strict=True)), verify=check
        )
        unmarked = projected(cell + formation)
        end = b',"signature":"%s"}' % mark.encode()
        for marked, line in (
            (projection.cell("c"), unmarked.cell("c")),
            (projection.formation(F[0]), unmarked.formation(F[0])),
        ):
            assert line is not None
            assert marked == line[:-1] + end

    def test_a_new_run_begins_anew(self) -> None:
        events = [sealed(cell_event(STARTED, run="r1"), IMPOSTOR), sealed(cell_event(STARTED, run="r2", second=9), SIGNER)]
        assert shown(projected(events, verify=check).cell("c"))["signature"] == "verified"

    def test_events_that_change_nothing_do_not_count(self) -> None:
        events = [
            sealed(cell_event(STARTED, run="r2", second=9), SIGNER),
            sealed(cell_event(STARTED, run="r1", second=1), IMPOSTOR),
            sealed(phase(F[0], "failed"), SIGNER),
            sealed(phase(F[0], "running"), IMPOSTOR),
        ]
        projection = projected(events, verify=check)
        assert shown(projection.cell("c"))["signature"] == shown(projection.formation(F[0]))["signature"] == "verified"


def at(seconds: int) -> int:
    return seconds * 1_000_000_000


class TestForgetting:
    def stored(self, events: list[tuple[int, Event]]) -> Projection:
        projection = Projection()
        for second, some in events:
            projection.apply(projection.cursor + 1, ANY, canonical_bytes(some), stored_ns=at(second))
        return projection

    def test_records_go_by_their_last_event(self) -> None:
        log = [
            (1, cell_event(STARTED, "old", correlation={"formationId": F[0]})),
            (2, reserved(F[0], "gone")),
            (2, phase(F[0], "created", name="gone")),
            (3, cell_event(STARTED, "kept")),
            (3, reserved(F[1], "stays")),
            (3, phase(F[1], "created", name="stays")),
            (5, cell_event(DESTROYED, "kept")),
            (5, phase(F[1], "running", name="stays")),
        ]
        projection = self.stored(log)
        assert projection.drop_before(at(1)) == 0
        assert projection.drop_before(at(5)) == 4
        assert ids(projection.cells()) == ids(projection.cells(state="destroyed")) == ["kept"]
        assert ids(projection.cells(state="running")) == ids(projection.cells(formation=F[0])) == []
        assert ids(projection.formations()) == [F[1]]
        assert (projection.formation_by_name("gone"), projection.formation_by_name("stays")) == ([], [F[1]])
        assert projection.name("gone") == NameUse(None, 0)
        # The reservation is older than what has the name: the name is held all the same, and the next reservation expects none.
        assert projection.name("stays") == NameUse(F[1], 0)
        assert (projection.drop_before(at(5)), projection.drop_before(at(6))) == (0, 2)
        assert projection.freeze() == Contents(cursor=len(log), cells=[], formations=[], names=[])

    def test_later_rows_are_found_after_earlier_ones_were_dropped(self) -> None:
        projection = self.stored([(5, cell_event(STARTED, "a"))])
        projection.drop_before(at(2))
        projection.apply(2, ANY, canonical_bytes(cell_event(STARTED, "b")), stored_ns=at(3))
        assert projection.drop_before(at(4)) == 1
        assert ids(projection.cells()) == ["a"]

    def test_the_time_of_an_event_counts_where_the_log_gives_none(self) -> None:
        projection = projected([cell_event(STARTED, "a", second=1), cell_event(STARTED, "b", second=9)])
        assert projection.drop_before(at(1767225605)) == 1
        assert ids(projection.cells()) == ["b"]

    @given(st.data())
    @settings(max_examples=60)
    def test_a_reader_of_what_is_left_of_the_log_holds_the_same(self, data: st.DataObject) -> None:
        """Where nothing straddles the border: of what does, only the later events are left to read."""
        early = data.draw(st.permutations([*run_of("a"), *run_of("b"), phase(F[0], "created", name="x"), phase(F[0], "failed", name="x")]))
        late = data.draw(st.permutations([*run_of("a", "r2", at=20), *run_of("d", formation=F[1]), phase(F[1], "created", name="x")]))
        lived = self.stored([*((1, some) for some in early), *((9, some) for some in late)])
        lived.drop_before(at(5))
        rebuilt = Projection(cursor=len(early))
        for some in late:
            rebuilt.apply(rebuilt.cursor + 1, ANY, canonical_bytes(some), stored_ns=at(9))
        assert rebuilt.drop_before(at(5)) == 0
        assert (lived.cells(), lived.formations()) == (rebuilt.cells(), rebuilt.formations())
        assert [lived.formation_by_name("x"), lived.counts()] == [rebuilt.formation_by_name("x"), rebuilt.counts()]


JUNK: list[Callable[[Event], bytes]] = [
    canonical_bytes,
    lambda some: SIGNER.wrap(some, canonical_bytes(some)),
    lambda some: IMPOSTOR.wrap(some, canonical_bytes(some)),
    lambda some: canonical_bytes(some)[:-1],
    lambda some: canonical_bytes(some) + b"\xff",
    lambda some: msgspec.json.encode({"event": some, "signerKid": "k", "algorithm": "x", "signature": ""}),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from([*F, "demo"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["formationId", "document", "x"]), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = ["cellId", "specId", "runId", "exitCode", "outcome", "correlation", "formationId", "formationName", "name", "document"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([STARTED, COMMAND_COMPLETED, DESTROYED, NAME_RESERVED, *(FORMATION_TYPE + word for word in PHASES)]),
            st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=6) | VALUES,
            st.sampled_from(JUNK),
            st.sampled_from([ANY, "", name_subject("demo"), subject_of(F[0], "created")]),
        ),
        max_size=20,
    )
)
def test_whatever_stands_in_the_log_is_taken(log: list[tuple[str, Any, Callable[[Event], bytes], str]]) -> None:
    projection = Projection()
    for sequence, (kind, data, form, subject) in enumerate(log, start=1):
        projection.apply(sequence, subject, form(event(kind, data)), verify=check)
        assert projection.cursor == sequence
        for part in projection.cells().parts:
            record = msgspec.json.decode(part, type=CellRecord)
            assert record.state == record.status
        for part in projection.formations().parts:
            record = json.loads(part)
            assert record["status"] in STATUSES
            assert record["id"] in F
    assert projection.applied + projection.ignored + projection.rejected == len(log)


def test_types_that_are_read_are_types_that_are_written() -> None:
    assert parse_event(canonical_bytes(phase(F[0], "created"))).type == "dev.cellos.events.cell.formation.v1.created"
