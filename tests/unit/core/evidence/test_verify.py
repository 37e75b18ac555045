import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellos.core import events
from cellos.core.events import DESTROYED, PREFIX, STARTED, Draft, Event, RunIdentity, canonical_bytes, finished
from cellos.core.evidence.chain import Chain, digest
from cellos.core.evidence.verify import MAX_LINE_BYTES, Report, Verifier, verify

SPEC_HASH = "5e" * 32
TYPES = ("process_spawned", "touched", "scoped", "queried")


def record(
    run: str = "run-1", *, middle: int = 3, cell: str = "cell", start_at: int = 0, end: bool = True, nonce: str = "0f" * 32
) -> list[bytes]:
    """The lines of one run: some events, `started` at place `start_at`, `destroyed`."""
    identity = RunIdentity(cell_id=cell, spec_id="spec", run_id=run, spec_hash=SPEC_HASH)
    about = {"cellId": cell, "specId": "spec", "runId": run}
    drafts = [Draft(f"{events.PREFIX}observability.v1.{TYPES[number % 4]}", {**about, "number": number}) for number in range(middle)]
    drafts.insert(start_at, events.started(identity, ttl_seconds=60, isolation={}))
    if end:
        drafts.append(events.destroyed(identity, ttl_seconds=60, outcome="succeeded", residue_class="none"))
    chain = Chain.first(run, SPEC_HASH, nonce)
    lines = []
    for number, draft in enumerate(drafts):
        linked = Draft(draft.type, chain.link(draft.data, final=draft.type == DESTROYED))
        line = canonical_bytes(
            finished(linked, event_id=f"{run}-{nonce[:4]}-{number}", time=f"2026-01-01T00:00:{number % 60:02d}.000000000+00:00")
        )
        chain.advance(line)
        lines.append(line + b"\n")
    return lines


def edit(line: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A line as an editor who knows our form would write it."""
    members = json.loads(line)
    change(members)
    return canonical_bytes(Event(**members)) + b"\n"


def only(report: Report) -> tuple[str, str, int]:
    """The first fault of the only run."""
    (run,) = report.runs
    assert run.fault is not None
    return run.state, run.fault.kind, run.fault.line


RECORDS = st.builds(record, middle=st.integers(1, 6), start_at=st.integers(0, 1))


class TestGood:
    @pytest.mark.parametrize("start_at", [0, 2])
    def test_whole_run(self, start_at: int) -> None:
        lines = record(start_at=start_at)
        report = verify(lines)
        assert report.verified
        (run,) = report.runs
        assert (run.state, run.events, run.fault, run.start_checked) == ("verified", 5, None, True)
        assert (run.cell_id, run.run_id, run.spec_id, run.spec_hash) == ("cell", "run-1", "spec", SPEC_HASH)
        assert (run.first, run.last) == (digest(lines[0][:-1]), digest(lines[-1][:-1]))

    def test_a_run_of_one_event(self) -> None:
        chain = Chain.first("r", SPEC_HASH, "0f" * 32)
        data = chain.link({"cellId": "c", "specId": "s", "runId": "r"}, final=True)
        (run,) = verify([canonical_bytes(Event(id="1", source="s", type=DESTROYED, data=data))]).runs
        assert (run.state, run.start_checked) == ("verified", False)

    def test_line_feeds_are_not_needed(self) -> None:
        assert verify([line[:-1] for line in record()]).verified

    @given(st.data())
    def test_runs_may_be_interleaved(self, data: st.DataObject) -> None:
        queues = [record(f"run-{number}", cell=f"cell-{number % 2}", middle=number) for number in range(4)]
        total = sum(map(len, queues))
        lines = []
        while any(queues):
            queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
            lines.append(queue.pop(0))
        report = verify(lines)
        assert report.verified
        assert sum(run.events for run in report.runs) == total

    def test_one_run_id_for_several_cells(self) -> None:
        lines = [line for pair in zip(record(cell="a"), record(cell="b"), strict=True) for line in pair]
        assert [run.cell_id for run in verify(lines).runs] == ["a", "b"]
        assert verify(lines).verified

    def test_a_run_id_used_again(self) -> None:
        again = record(nonce="1f" * 32)
        assert verify(record() + again).verified
        assert [run.state for run in verify(record(end=False) + again).runs] == ["unfinished", "verified"]

    @given(st.integers(1, 5))
    def test_an_unfinished_run_is_no_forgery(self, length: int) -> None:
        report = verify(record(middle=5)[:length])
        assert [run.state for run in report.runs] == ["unfinished"]
        assert not report.verified

    def test_resumed_by_somebody_else(self) -> None:
        lines = record(end=False)
        chain = Chain.after(lines[-1][:-1])
        data = chain.link({"cellId": "cell", "specId": "spec", "runId": "run-1", "outcome": "failed"}, final=True)
        last = canonical_bytes(Event(id="9", source="s", type=DESTROYED, data=data))
        assert verify([*lines, last]).verified

    def test_signed_events_are_looked_into(self) -> None:
        assert verify([_signed(line) for line in record()]).verified
        assert verify([_bare(line) for line in record()]).verified

    def test_events_of_no_run_are_counted(self) -> None:
        loose = canonical_bytes(Event(id="1", source="s", type=PREFIX + "policy.v1.rejected", data={"specId": "spec"}))
        report = verify([loose, *record(), loose])
        assert (report.loose, report.verified) == (2, True)

    @pytest.mark.parametrize("kind", [STARTED, DESTROYED, PREFIX + "command.v1.output", PREFIX + "export.v2.completed", "x"])
    @pytest.mark.parametrize("run_id", [{}, {"runId": 7}])
    def test_an_event_of_a_run_has_one(self, kind: str, run_id: dict[str, object]) -> None:
        report = verify([*record(), canonical_bytes(Event(id="1", source="s", type=kind, data={"cellId": "cell", **run_id}))])
        assert (report.loose, report.verified) == (0, False)
        [fault] = report.faults
        assert (fault.kind, "without the cellId and runId it belongs to" in fault.text) == ("malformed", True)

    def test_one_of_no_run_has_our_form_too(self) -> None:
        loose = canonical_bytes(Event(id="1", source="s", type=PREFIX + "policy.v1.rejected", data={"specId": "spec"}))
        report = verify([*record(), loose.replace(b":", b": ", 1)])
        assert [(fault.kind, fault.line) for fault in report.faults] == [("edited", len(record()) + 1)]

    def test_nothing_is_not_verified(self) -> None:
        assert not verify([]).verified
        assert not verify([canonical_bytes(Event(id="1", source="s", type="x"))]).verified


class TestFaults:
    @given(RECORDS, st.data())
    def test_any_deletion(self, lines: list[bytes], data: st.DataObject) -> None:
        gone = data.draw(st.integers(0, len(lines) - 2))
        state, kind, line = only(verify(lines[:gone] + lines[gone + 1 :]))
        assert (state, kind, line) == ("broken", "deleted", gone + 1)

    @given(RECORDS, st.data())
    def test_any_swap(self, lines: list[bytes], data: st.DataObject) -> None:
        one, other = sorted(data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True)))
        lines[one], lines[other] = lines[other], lines[one]
        assert only(verify(lines))[:2] == ("broken", "reordered")

    @given(RECORDS, st.data())
    def test_any_move(self, lines: list[bytes], data: st.DataObject) -> None:
        source, target = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True))
        lines.insert(target, lines.pop(source))
        assert only(verify(lines))[:2] == ("broken", "reordered")

    @given(RECORDS, st.data())
    def test_any_repetition(self, lines: list[bytes], data: st.DataObject) -> None:
        again = data.draw(st.integers(0, len(lines) - 1))
        place = data.draw(st.integers(again + 1, len(lines)))
        lines.insert(place, lines[again])
        assert only(verify(lines)) == ("broken", "duplicated", place + 1)

    @given(RECORDS, st.data())
    def test_any_change_to_what_an_event_says(self, lines: list[bytes], data: st.DataObject) -> None:
        """All but the last: see `test_the_last_event_needs_a_witness`."""
        place = data.draw(st.integers(0, len(lines) - 2))
        member = data.draw(st.sampled_from(["id", "time", "source", "new"]))

        def change(members: dict[str, Any]) -> None:
            if member == "new":
                members["data"]["new"] = 1
            else:
                members[member] += "x"

        lines[place] = edit(lines[place], change)
        assert only(verify(lines)) == ("broken", "edited", place + 1)

    @given(RECORDS, st.data())
    def test_any_change_to_a_link(self, lines: list[bytes], data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(lines) - 1))
        member = data.draw(st.sampled_from(["seq", "prev"]))

        def change(members: dict[str, Any]) -> None:
            link = members["data"]["chain"]
            link[member] = data.draw(st.integers(0, 99).filter(lambda seq: seq != link["seq"])) if member == "seq" else "77" * 32

        lines[place] = edit(lines[place], change)
        state, kind, line = only(verify(lines))
        assert state == "broken"
        assert (kind, line) in _names_of_a_changed_link(place, member, last=len(lines) - 1, starts_at=_start(lines))

    @settings(max_examples=300)
    @given(RECORDS, st.data())
    def test_any_changed_byte(self, lines: list[bytes], data: st.DataObject) -> None:
        """Detected wherever it is, when the digest of the last event is known; named by its line or the one that follows from it."""
        head = {"run-1": digest(lines[-1][:-1])}
        place = data.draw(st.integers(0, len(lines) - 1))
        at = data.draw(st.integers(0, len(lines[place]) - 2))
        byte = data.draw(st.integers(0, 255).filter(lambda byte: byte not in (lines[place][at], 10)))
        lines[place] = lines[place][:at] + bytes([byte]) + lines[place][at + 1 :]
        report = verify(lines, heads=head)
        assert not report.verified
        faults = [*report.faults, *(run.fault for run in report.runs if run.fault)]
        # A changed cell or run id makes another, unknown run of the line. It is found, but two runs are then at fault.
        assert any(abs(fault.line - (place + 1)) <= 1 for fault in faults) or len(report.runs) > 1

    @given(RECORDS, st.data())
    def test_any_cut(self, lines: list[bytes], data: st.DataObject) -> None:
        whole = b"".join(lines)
        head = {"run-1": digest(lines[-1][:-1])}
        length = data.draw(st.integers(1, len(whole) - 2))
        report = verify(whole[:length].splitlines(keepends=True), heads=head)
        assert not report.verified
        faults = [*report.faults, *(run.fault for run in report.runs if run.fault)]
        assert "truncated" in {fault.kind for fault in faults}

    def test_a_cut_within_a_line_needs_no_witness(self) -> None:
        lines = record()
        report = verify([*lines[:-1], lines[-1][:50]])
        assert [run.state for run in report.runs] == ["unfinished"]
        (fault,) = report.faults
        assert (fault.kind, fault.line) == ("truncated", 5)

    def test_a_torn_line_that_was_written_over(self) -> None:
        """A full disk leaves half a line, and the next event lands behind it."""
        lines = record()
        torn = [lines[0], lines[1], lines[2][:30] + lines[3], lines[4]]
        report = verify(torn)
        assert [(fault.kind, fault.line) for fault in report.faults] == [("malformed", 3)]
        assert only(report) == ("broken", "malformed", 3)
        assert "events 2 to 3 are missing before line 4" in str(report.runs[0].fault)

    def test_the_last_event_needs_a_witness(self) -> None:
        lines = record()
        head = {"run-1": digest(lines[-1][:-1])}

        def change(members: dict[str, Any]) -> None:
            members["data"]["outcome"] = "failed"

        changed = [*lines[:-1], edit(lines[-1], change)]
        assert verify(changed).verified
        assert only(verify(changed, heads=head)) == ("broken", "edited", 5)
        assert verify(lines, heads=head).verified

    def test_rewritten_without_a_change_of_meaning(self) -> None:
        lines = record()
        for form in (
            json.dumps(json.loads(lines[2])).encode(),
            b" " + lines[2],
            lines[2].replace(b'"id":', b'"id":"x","id":'),
            lines[2].replace(b'{"specversion"', b'{"subject":"x","specversion"'),
        ):
            assert only(verify([*lines[:2], form, *lines[3:]])) == ("broken", "edited", 3)

    def test_forged_start(self) -> None:
        lines = record()

        def change(members: dict[str, Any]) -> None:
            members["data"]["specHash"] = "00" * 32

        forged = record(middle=0, end=False)
        forged[0] = edit(forged[0], change)
        assert only(verify(forged)) == ("broken", "forged start", 1)
        late = record(start_at=2)
        late[2] = edit(late[2], change)
        assert only(verify(late)) == ("broken", "forged start", 1)
        assert verify(lines).runs[0].start_checked

    def test_the_start_of_another_run(self) -> None:
        def rename(members: dict[str, Any]) -> None:
            members["data"]["runId"] = "run-2"

        assert only(verify([edit(record(middle=0, end=False)[0], rename)])) == ("broken", "forged start", 1)

    def test_events_after_the_end(self) -> None:
        lines = record()
        chain = Chain.after(lines[-1][:-1])
        more = canonical_bytes(Event(id="9", source="s", type="x", data=chain.link({"cellId": "cell", "specId": "spec", "runId": "run-1"})))
        assert only(verify([*lines, more])) == ("broken", "after the end", 6)

    @pytest.mark.parametrize("count", [0, 4, 6, None])
    def test_wrong_count(self, count: int | None) -> None:
        def change(members: dict[str, Any]) -> None:
            link = members["data"]["chain"]
            link.pop("count") if count is None else link.update(count=count)

        lines = record()
        assert only(verify([*lines[:-1], edit(lines[-1], change)])) == ("broken", "wrong count", 5)

    def test_an_event_of_another_record(self) -> None:
        for stray in range(1, 5):
            lines = [*record()[:2], record("run-2")[stray], *record()[2:]]
            report = verify(lines)
            assert [run.state for run in report.runs] == ["verified", "broken"]
            fault = report.runs[1].fault
            assert fault is not None
            assert (fault.kind, fault.line) == ("spliced", 3)

    def test_the_end_of_another_record(self) -> None:
        """Both runs have one id, as with a fixed CELLOS_RUN_ID."""
        ours, theirs = record(), record(nonce="1f" * 32)
        state, kind, line = only(verify(ours[:3] + theirs[3:]))
        assert (state, kind, line) == ("broken", "edited", 3)

    def test_an_event_given_to_another_run(self) -> None:
        def rename(members: dict[str, Any]) -> None:
            members["data"]["runId"] = "run-2"

        lines = record()
        lines[2] = edit(lines[2], rename)
        first, second = verify(lines).runs
        assert first.fault is not None
        assert (first.fault.kind, first.fault.line) == ("edited", 3)
        assert second.state == "broken"

    def test_one_event_without_its_chain(self) -> None:
        def strip(members: dict[str, Any]) -> None:
            del members["data"]["chain"]

        lines = record()
        lines[4] = edit(lines[4], strip)
        assert only(verify(lines)) == ("broken", "edited", 5)

    def test_no_event_with_a_chain_is_not_verified(self) -> None:
        def strip(members: dict[str, Any]) -> None:
            del members["data"]["chain"]

        report = verify([edit(line, strip) for line in record()])
        (run,) = report.runs
        assert (run.state, run.events, run.first) == ("unchained", 5, None)
        assert not report.verified

    @pytest.mark.parametrize(
        "link",
        [
            1,
            [],
            {},
            {"seq": 2},
            {"seq": -1, "prev": "00" * 32},
            {"seq": True, "prev": "00" * 32},
            {"seq": 2.0, "prev": "00" * 32},
            {"seq": 2, "prev": "AB" * 32},
            {"seq": 2, "prev": "00"},
            {"seq": 2, "prev": "00" * 32, "nonce": "00" * 32},
            {"seq": 2, "prev": "00" * 32, "count": 5},
            {"seq": 2, "prev": "00" * 32, "other": 5},
            {"seq": 0, "prev": "00" * 32},
            {"seq": 0, "prev": "00" * 32, "nonce": "x"},
        ],
    )
    def test_links_that_no_writer_makes(self, link: object) -> None:
        def change(members: dict[str, Any]) -> None:
            members["data"]["chain"] = link

        lines = record()
        lines[2] = edit(lines[2], change)
        assert only(verify(lines)) == ("broken", "malformed", 3)

    @pytest.mark.parametrize("line", [b"\n", b"{}\n", b"\xff\n", b"x" * (MAX_LINE_BYTES + 1) + b"\n"])
    def test_lines_that_are_no_events(self, line: bytes) -> None:
        report = verify([*record()[:2], line, *record()[2:]])
        assert [(fault.kind, fault.line) for fault in report.faults] == [("malformed", 3)]
        assert [run.state for run in report.runs] == ["verified"]
        assert not report.verified

    def test_a_chain_that_belongs_to_no_run(self) -> None:
        report = verify([canonical_bytes(Event(id="1", source="s", type="x", data={"chain": {"seq": 0}}))])
        assert [fault.kind for fault in report.faults] == ["malformed"]

    @given(st.lists(st.sampled_from([*record(), *record(nonce="1f" * 32), *record("run-2"), b"{}\n", b"\n"]), max_size=14))
    def test_any_heap_of_lines_gets_a_verdict(self, lines: list[bytes]) -> None:
        report = verify(lines)
        if report.verified:
            assert len(lines) == 5 * len(report.runs)


def _signed(line: bytes) -> bytes:
    event = Event(**json.loads(line))
    envelope = {"event": json.loads(line), "signerKid": "k", "algorithm": "ed25519", "signature": "s"}
    about = {"source": events.SIGNING_SOURCE, "datacontenttype": "application/json", "time": event.time}
    return canonical_bytes(Event(id=event.id, type=events.SIGNED_ENVELOPE, data=envelope, **about)) + b"\n"


def _bare(line: bytes) -> bytes:
    return json.dumps({"event": json.loads(line), "signerKid": "k", "algorithm": "ed25519", "signature": "s"}).encode()


def _start(lines: list[bytes]) -> int:
    return next(number for number, line in enumerate(lines) if json.loads(line)["type"] == STARTED)


def _names_of_a_changed_link(place: int, member: str, *, last: int, starts_at: int) -> set[tuple[str, int]]:
    """What a changed link may be called. Some changes have several explanations."""
    names = {("edited", place + 1), ("malformed", place + 1)}  # malformed: a nonce away from 0, or none at 0
    if member == "prev" and place == last:
        names.add(("edited", place))  # nothing tells which end of the last link was changed
    if place == 0 and starts_at <= 1:
        names |= {("forged start", 1)}
    return names


def test_memory_does_not_grow_with_a_run() -> None:
    def lines(count: int) -> Iterator[bytes]:
        chain = Chain.first("r", SPEC_HASH, "0f" * 32)
        for number in range(count):
            data = chain.link({"cellId": "c", "specId": "s", "runId": "r"})
            line = canonical_bytes(Event(id=str(number), source="s", type="x", data=data))
            chain.advance(line)
            yield line

    verifier = Verifier()
    stream = lines(6000)
    for line in itertools.islice(stream, 1000):
        verifier.feed(line)
    tracemalloc.start()
    for line in stream:
        verifier.feed(line)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 20_000
    assert verifier.finish().runs[0].events == 6000
