from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cellos.artifacts.files import DirectoryStore
from cellos.brokers.memory import MemoryBroker
from cellos.core.documents import ExecutionCell, parse_execution_cell
from cellos.core.events import RunIdentity
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.verify import verify
from cellos.errors import HostBackendError
from cellos.ports import Residue
from cellos.supervisor.emitter import Emitter
from cellos.supervisor.run import CellOutcome, Deps, run_cell
from cellos.testing.backend import FakeBackend, Step
from cellos.testing.sink import RecordingSink

STARTED = "lifecycle.v1.started"
SPAWNED = "observability.v1.process_spawned"
COMPLETED = "command.v1.completed"
TOUCHED = "observability.v1.fs_touch"
EXPORTED = "export.v2.completed"
NOT_EXPORTED = "export.v2.failed"
DESTROYED = "lifecycle.v1.destroyed"


def document(*argv: str, **spec: Any) -> ExecutionCell:
    run = {"run": {"argv": list(argv), "secretDelivery": "env", **spec.pop("run", {})}} if argv else {}
    body = {"id": "cell-1", "authority": spec.pop("authority", {}), "lifetime": {"ttlSeconds": 60}, **run, **spec}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode())


class Bench:
    """A fake backend, a recording sink, and what a run of them came to."""

    def __init__(self, tmp_path: Path) -> None:
        self.backend = FakeBackend()
        self.sink = RecordingSink()
        self.broker = MemoryBroker()
        self.exports = tmp_path / "exports"
        self.run_timeout_ms: int | None = None
        self.interrupt: int | None = None
        self.emitter: Emitter

    def deps(self) -> Deps:
        clock = itertools.count(1, 1)
        self.emitter = Emitter(
            chain=Chain.first("run-1", "0" * 64, "1" * 64), spool=self.sink, now_ns=lambda: next(clock), random=os.urandom
        )
        seconds = itertools.count(100.0, 0.25)
        return Deps(
            backend=self.backend,
            events=self.emitter,
            broker=self.broker,
            artifacts=DirectoryStore(str(self.exports)),
            run=RunIdentity(cell_id="cell-1", spec_id="cell-1", run_id="run-1", spec_hash="0" * 64, tenant_id="acme"),
            key="0123456789abcdef",
            environment={"PATH": "/usr/bin"},
            run_timeout_ms=self.run_timeout_ms,
            interrupt=self.interrupt,
            monotonic=lambda: next(seconds),
        )

    def run(self, *argv: str, **spec: Any) -> CellOutcome:
        outcome = run_cell(document(*argv, **spec), self.deps())
        assert self.backend.keys == set(), "the cell is gone"
        assert outcome.events == len(self.sink.lines)
        return outcome

    @property
    def destroyed(self) -> dict[str, Any]:
        assert self.sink.types[-1] == DESTROYED
        assert self.sink.types.count(DESTROYED) == 1
        assert verify(self.sink.lines).verified
        return self.sink.data(DESTROYED)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


class TestGoodRun:
    def test_events_come_in_the_contracts_order(self, bench: Bench) -> None:
        outcome = bench.run("file", "a.txt", "hello", export={"artifacts": [{"name": "a", "path": "a.txt"}]})
        assert bench.sink.types == [STARTED, SPAWNED, COMPLETED, TOUCHED, EXPORTED, DESTROYED]
        assert bench.destroyed["outcome"] == outcome.outcome == "succeeded"
        assert "reason" not in bench.destroyed
        assert bench.destroyed["residueClass"] == "none"
        assert bench.destroyed["tenantId"] == "acme"

    def test_the_outcome_says_what_was_done(self, bench: Bench) -> None:
        outcome = bench.run("file", "a.txt", "hello", export={"artifacts": [{"name": "a", "path": "a.txt"}]})
        assert (outcome.run_id, outcome.cell_id, outcome.reason) == ("run-1", "cell-1", None)
        assert outcome.command is not None
        assert outcome.command.exit_code == 0
        assert outcome.isolation is bench.backend.isolation
        assert [(receipt.destination, receipt.bytes_written) for receipt in outcome.receipts] == [("cell-1/a", 5)]
        assert (bench.exports / "cell-1" / "a").read_text() == "hello"
        assert outcome.duration_ms == 250

    def test_started_says_what_holds_the_cell(self, bench: Bench) -> None:
        bench.run("exits", "0")
        started = bench.sink.data(STARTED)
        assert {name: started[name] for name in ("backend", "enforced", "limits", "unbounded")} == {
            "backend": "fake",
            "enforced": ["memory"],
            "limits": {"memoryBytes": 1 << 29},
            "unbounded": ["cpu"],
        }
        assert started["specHash"] == "0" * 64

    def test_later_events_name_started_as_their_origin(self, bench: Bench) -> None:
        bench.run("file", "a", "x", export={"artifacts": [{"name": "a", "path": "a"}]})
        assert bench.sink.data(EXPORTED)["provenance"]["parent"] == bench.sink.ids[0]

    def test_without_a_command_nothing_is_run(self, bench: Bench) -> None:
        assert bench.run().command is None
        assert bench.sink.types == [STARTED, DESTROYED]
        assert bench.backend.commands == []
        assert bench.destroyed["outcome"] == "succeeded"

    def test_the_command_gets_what_the_spec_says(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"TOKEN": "s3cret", "OTHER": "unused"})
        bench.run(
            "exits",
            "0",
            authority={"secretRefs": ["TOKEN"]},
            run={"workingDirectory": "/work/x", "timeoutMs": 2500, "limits": {"gracefulShutdownSeconds": 3}},
        )
        [command] = bench.backend.commands
        assert dict(command.environment) == {"PATH": "/usr/bin", "TOKEN": "s3cret"}
        assert command.working_directory == "/work/x"
        assert command.deadline_seconds == 2.5
        assert command.grace_seconds == 3.0
        assert b"s3cret" not in b"".join(bench.sink.lines)


class TestHowCommandsEnd:
    @pytest.mark.parametrize(
        ("argv", "data", "reason"),
        [
            (("exits", "3"), {"exitCode": 3}, "command exited with status 3"),
            (("exits", "255"), {"exitCode": 255}, "command exited with status 255"),
            (("dies", "11"), {"exitCode": -1, "signal": 11}, "command exited with status -1"),
            (
                ("nowhere",),
                {"exitCode": -1, "spawnError": "No such file or directory (os error 2)"},
                "command spawn: No such file or directory (os error 2)",
            ),
            (
                ("unreadable",),
                {"exitCode": -1, "spawnError": "Permission denied (os error 13)"},
                "command spawn: Permission denied (os error 13)",
            ),
            (
                ("vanishes",),
                {"exitCode": -1, "spawnError": "the cell's init process ended unexpectedly"},
                "command spawn: the cell's init process ended unexpectedly",
            ),
        ],
    )
    def test_the_contracts_words(self, bench: Bench, argv: tuple[str, ...], data: dict[str, Any], reason: str) -> None:
        outcome = bench.run(*argv, export={"artifacts": [{"name": "a", "path": "a"}]})
        completed = bench.sink.data(COMPLETED)
        assert {name: completed.get(name) for name in ("exitCode", "signal", "spawnError")} == {"signal": None, "spawnError": None, **data}
        assert bench.destroyed["reason"] == outcome.reason == reason
        assert bench.destroyed["outcome"] == outcome.outcome == "failed"
        assert TOUCHED not in bench.sink.types, "a failed command exports nothing"

    def test_a_program_that_is_not_there_was_not_spawned(self, bench: Bench) -> None:
        bench.run("nowhere")
        assert bench.sink.types == [STARTED, COMPLETED, DESTROYED]

    @pytest.mark.parametrize(
        ("spec_ms", "env_ms", "text"),
        [
            (100, None, "command timed out after 100 ms (spec.run.timeoutMs)"),
            (100, 100, "command timed out after 100 ms (spec.run.timeoutMs)"),
            (200, 100, "command timed out after 100 ms (CELLOS_RUN_TIMEOUT_MS)"),
            (None, None, "cell killed by TTL watchdog after 60000 ms (ttl_seconds=60)"),
            (None, 90_000, "cell killed by TTL watchdog after 60000 ms (ttl_seconds=60)"),
        ],
    )
    def test_a_deadline_says_whose_it_was(self, bench: Bench, spec_ms: int | None, env_ms: int | None, text: str) -> None:
        bench.run_timeout_ms = env_ms
        outcome = bench.run("sleeps", run={"timeoutMs": spec_ms})
        completed = bench.sink.data(COMPLETED)
        assert (completed["exitCode"], completed["spawnError"]) == (-1, text)
        assert "signal" not in completed
        assert bench.destroyed["reason"] == f"command spawn: {text}"
        assert outcome.timed_out is not None
        assert outcome.timed_out.text == text

    def test_an_interrupt(self, bench: Bench) -> None:
        bench.interrupt, writing = os.pipe()
        os.write(writing, b"x")
        outcome = bench.run("sleeps")
        os.close(bench.interrupt)
        os.close(writing)
        assert outcome.interrupted
        assert bench.sink.data(COMPLETED)["exitCode"] == -1
        assert bench.sink.data(COMPLETED)["spawnError"] == "supervisor terminated"
        assert bench.destroyed["reason"] == "supervisor_terminated"


class TestSecrets:
    def test_a_missing_one_ends_the_run_before_started(self, bench: Bench) -> None:
        outcome = bench.run("exits", "0", authority={"secretRefs": ["TOKEN"]})
        assert bench.sink.types == [DESTROYED]
        assert outcome.reason == bench.destroyed["reason"]
        assert outcome.reason == (
            'secret TOKEN unresolvable via memory broker: secret broker: no value was handed over for secret key "TOKEN"'
        )
        assert bench.backend.commands == []

    def test_an_empty_one_too(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"TOKEN": ""})
        assert bench.run("exits", "0", authority={"secretRefs": ["TOKEN"]}).reason == "secret TOKEN unresolvable via memory broker"

    def test_they_are_resolved_without_a_command_too(self, bench: Bench) -> None:
        assert bench.run(authority={"secretRefs": ["TOKEN"]}).outcome == "failed"


TWO_ARTIFACTS = {"artifacts": [{"name": name, "path": name} for name in ("a", "b")]}


class TestExports:
    @pytest.mark.parametrize("make", ["link", "fifo"])
    def test_the_first_failure_stops(self, bench: Bench, make: str) -> None:
        outcome = bench.run(make, "a", export=TWO_ARTIFACTS)
        assert bench.sink.types == [STARTED, SPAWNED, COMPLETED, TOUCHED, NOT_EXPORTED, DESTROYED]
        failed = bench.sink.data(NOT_EXPORTED)
        assert failed["reason"] == outcome.reason == bench.destroyed["reason"] == "export sink: read artifact a: not a regular file"
        assert failed["targetKind"] == "local"

    def test_what_was_delivered_before_stays_delivered(self, bench: Bench) -> None:
        outcome = bench.run("file", "a", "x", export=TWO_ARTIFACTS)
        assert outcome.outcome == "failed"
        assert [receipt.destination for receipt in outcome.receipts] == ["cell-1/a"]

    def test_the_reason_survives_a_sink_that_will_not_take_the_failure(self, bench: Bench) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(NOT_EXPORTED)
        assert bench.run("fifo", "a", export=TWO_ARTIFACTS).reason == "export sink: read artifact a: not a regular file"
        assert bench.destroyed["reason"] == "export sink: read artifact a: not a regular file"


class TestFaults:
    """Whatever fails, the cell is destroyed and the record ends with `destroyed`."""

    def test_no_cell_no_events(self, bench: Bench) -> None:
        bench.backend.fail["create"] = HostBackendError("no room")
        with pytest.raises(HostBackendError, match="no room"):
            bench.run("exits", "0")
        assert bench.sink.lines == []
        assert bench.backend.calls == ["create"]

    @pytest.mark.parametrize("step", ["run", "started", "open_artifact"])
    def test_a_backend_that_fails(self, bench: Bench, step: Step) -> None:
        bench.backend.fail[step] = HostBackendError("broken")
        outcome = bench.run("file", "a", "x", export={"artifacts": [{"name": "a", "path": "a"}]})
        assert bench.backend.calls[-1] == "destroy"
        assert outcome.reason == bench.destroyed["reason"] == "host backend: broken"

    def test_a_teardown_that_fails_is_the_reason_if_nothing_else_is(self, bench: Bench) -> None:
        bench.backend.fail["destroy"] = HostBackendError("stuck")
        assert bench.run("exits", "0").reason == "cell destroy: host backend: stuck"
        assert bench.destroyed["residueClass"] == "documented_exception"
        assert bench.destroyed["residueException"] == [{"kind": "unknown", "detail": "host backend: stuck"}]

    def test_and_not_if_something_is(self, bench: Bench) -> None:
        bench.backend.fail["destroy"] = OSError("stuck")
        assert bench.run("exits", "3").reason == "command exited with status 3"
        assert bench.destroyed["residueClass"] == "documented_exception"

    def test_what_stayed_is_named(self, bench: Bench) -> None:
        bench.backend.residue = (Residue(kind="cgroup", detail="/sys/fs/cgroup/x: busy"),)
        outcome = bench.run("exits", "0")
        assert outcome.residue == bench.backend.residue
        assert bench.destroyed["outcome"] == "succeeded"
        assert bench.destroyed["residueClass"] == "documented_exception"
        assert bench.destroyed["residueException"] == [{"kind": "cgroup", "detail": "/sys/fs/cgroup/x: busy"}]

    @pytest.mark.parametrize(
        ("refused", "left", "ran"),
        [
            (STARTED, [DESTROYED], False),
            (SPAWNED, [STARTED, DESTROYED], True),
            (COMPLETED, [STARTED, SPAWNED, DESTROYED], True),
            (TOUCHED, [STARTED, SPAWNED, COMPLETED, DESTROYED], True),
            (EXPORTED, [STARTED, SPAWNED, COMPLETED, TOUCHED, DESTROYED], True),
        ],
    )
    def test_an_event_that_cannot_be_recorded_ends_the_run(self, bench: Bench, refused: str, left: list[str], ran: bool) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(refused)
        outcome = bench.run("file", "a", "x", export={"artifacts": [{"name": "a", "path": "a"}]})
        assert bench.sink.types == left
        assert outcome.reason == bench.destroyed["reason"]
        assert outcome.reason == f"event sink: told to refuse dev.cellos.events.cell.{refused}"
        assert bool(bench.backend.commands) == ran

    def test_how_the_command_ended_comes_before_a_failure_to_record_it(self, bench: Bench) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(COMPLETED)
        assert bench.run("exits", "3").reason == "command exited with status 3"

    def test_an_end_that_cannot_be_recorded_is_a_failure(self, bench: Bench) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(DESTROYED)
        outcome = bench.run("exits", "0")
        assert outcome.outcome == "failed"
        assert outcome.reason == f"event sink: told to refuse dev.cellos.events.cell.{DESTROYED}"
        assert bench.backend.calls[-1] == "destroy"

    @pytest.mark.parametrize(
        ("error", "reason"), [(KeyboardInterrupt(), "supervisor_terminated"), (ZeroDivisionError(), "internal error: ZeroDivisionError")]
    )
    @pytest.mark.parametrize("step", ["run", "started", "open_artifact"])
    def test_what_is_not_ours_passes_on_after_teardown(self, bench: Bench, step: Step, error: BaseException, reason: str) -> None:
        bench.backend.fail[step] = error
        with pytest.raises(type(error)):
            bench.run("file", "a", "x", export={"artifacts": [{"name": "a", "path": "a"}]})
        assert bench.backend.calls[-1] == "destroy"
        assert bench.destroyed["reason"] == reason
