from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cellos.artifacts.files import DirectoryStore
from cellos.brokers.memory import MemoryBroker
from cellos.core.documents import Artifact, ExecutionCell, parse_execution_cell
from cellos.core.events import RunIdentity
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.verify import verify
from cellos.errors import ConfigError, EventSinkError, ExportError, HostBackendError, SecretBrokerError
from cellos.ports import CommandResult, Isolation, Listener, Residue
from cellos.supervisor.admission import program_check
from cellos.supervisor.compose import _open_session
from cellos.supervisor.emitter import Emitter
from cellos.supervisor.report import Reporting
from cellos.supervisor.run import TERMINATED, CellOutcome, Deps, run_cell
from cellos.testing.backend import UNPRIVILEGED, FakeBackend, FakeCell, Step
from cellos.testing.sink import RecordingSink

PREFIX = "dev.cellos.events.cell."
SCOPE = "observability.v1.network_scope"
TARGETS = "observability.v1.dns_target_set"
DECISION = "observability.v1.l7_egress_decision"
RESOLUTION = "observability.v1.dns_resolution"
MATERIALIZED = "identity.v1.materialized"
IDENTITY_FAILED = "identity.v1.failed"
REVOKED = "identity.v1.revoked"
STARTED = "lifecycle.v1.started"
UNIVERSAL = "identity.v1.universal_token_accepted_in_permissive_mode"
SECURITY = "observability.v1.container_security"
NETWORK = "observability.v1.network_policy"
SPAWNED = "observability.v1.process_spawned"
ENFORCED = "observability.v1.network_enforcement"
COMPLETED = "command.v1.completed"
TOUCHED = "observability.v1.fs_touch"
EXPORTED = "export.v2.completed"
NOT_EXPORTED = "export.v2.failed"
SUMMARY = "compliance.v1.summary"
BOOKS = "authority.v1.homeostasis"
DESTROYED = "lifecycle.v1.destroyed"

DECLARED = [SCOPE, TARGETS]
BEGUN = [STARTED, SECURITY, NETWORK]
RAN = [SPAWNED, ENFORCED, COMPLETED]
END = [SUMMARY, BOOKS, DESTROYED]

LEASE = "secret broker: runtimeLeasedBroker is not supported by this secret broker; set spec.run.secretDelivery to runtimeBroker or env"
ONE_ARTIFACT = {"artifacts": [{"name": "a", "path": "a"}]}
TWO_ARTIFACTS = {"artifacts": [{"name": name, "path": name} for name in ("a", "b")]}
IDENTITY = {"kind": "federatedOidc", "provider": "p", "audience": "https://aud", "secretRef": "TOKEN"}
AT_RUN_TIME: dict[str, Any] = {"authority": {"secretRefs": ["TOKEN", "OTHER"]}, "run": {"secretDelivery": "runtimeBroker"}}
WITH_IDENTITY: dict[str, Any] = {"identity": IDENTITY, "authority": {"secretRefs": ["TOKEN"]}}


def document(*argv: str, **spec: Any) -> ExecutionCell:
    run = {"run": {"argv": list(argv), "secretDelivery": "env", **spec.pop("run", {})}} if argv else {}
    body = {"id": "cell-1", "authority": spec.pop("authority", {}), "lifetime": {"ttlSeconds": 60}, **run, **spec}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode())


class Stores:
    """One store for all artifacts, or none. Notes which secrets it was asked with."""

    def __init__(self, store: DirectoryStore | None) -> None:
        self.store = store
        self.asked: list[Mapping[str, str]] = []
        self.fail: ExportError | None = None

    def for_artifact(self, artifact: Artifact, secrets: Mapping[str, str] | None = None) -> DirectoryStore | None:
        if secrets is not None:
            self.asked.append(secrets)
            if self.fail is not None:
                raise self.fail
        return self.store

    def kind_for(self, artifact: Artifact) -> str:
        return "local"

    def check(self) -> None: ...


class Session:
    """Secrets at run time, without a socket."""

    def __init__(self, listener: Listener, values: Mapping[str, str], seconds: Mapping[str, int], mode: str) -> None:
        os.close(listener.descriptor)
        self.seconds = dict(seconds)
        self.environment = {"CELLOS_SECRET_DELIVERY": mode, "KEYS": ",".join(values)}
        self.closed = 0
        self.fetched = frozenset({"TOKEN"})

    def close(self) -> None:
        self.closed += 1


class Recorder:
    def __init__(self, secrets: Iterable[str]) -> None:
        self.secrets = tuple(secrets)
        self.pieces: list[tuple[str, bytes]] = []
        self.closed = 0
        self.fail: Exception | None = None

    def write(self, stream: str, data: bytes) -> None:
        self.pieces.append((stream, data))

    def close(self) -> None:
        self.closed += 1
        if self.fail is not None:
            raise self.fail


class Bench:
    """A fake backend, a recording sink, and what a run of them came to."""

    def __init__(self, tmp_path: Path) -> None:
        self.backend = FakeBackend()
        self.sink = RecordingSink()
        self.broker: Any = MemoryBroker()
        self.exports = tmp_path / "exports"
        self.stores = Stores(DirectoryStore(str(self.exports)))
        self.sessions: list[Session] = []
        self.recorder: Recorder | None = None
        self.reporting: dict[str, Any] = {"trust_plane": True}
        self.more: dict[str, Any] = {}
        """Members of Deps."""
        self.emitter: Emitter

    def _session(self, listener: Listener, values: Mapping[str, str], seconds: Mapping[str, int], mode: str) -> Session:
        self.sessions.append(Session(listener, values, seconds, mode))
        return self.sessions[-1]

    def deps(self) -> Deps:
        clock = itertools.count(1, 1)
        self.emitter = Emitter(
            chain=Chain.first("run-1", "0" * 64, "1" * 64), spool=self.sink, now_ns=lambda: next(clock), random=os.urandom
        )
        seconds = itertools.count(100.0, 0.25)
        members: dict[str, Any] = {
            "backend": self.backend,
            "events": self.emitter,
            "broker": self.broker,
            "stores": self.stores,
            "run": RunIdentity(cell_id="cell-1", spec_id="cell-1", run_id="run-1", spec_hash="0" * 64, tenant_id="acme"),
            "key": "0123456789abcdef",
            "environment": {"PATH": "/usr/bin"},
            "reporting": Reporting(digest="sha256:d", now=lambda: "now", new_id=lambda: "id", **self.reporting),
            "open_session": self._session,
            "monotonic": lambda: next(seconds),
        }
        return Deps(**{**members, **self.more})

    def record(self) -> None:
        """Have the command's output recorded."""

        def make(secrets: Iterable[str]) -> Recorder:
            self.recorder = self.recorder or Recorder(())
            self.recorder.secrets = tuple(secrets)
            return self.recorder

        self.more["record_output"] = make

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

    def ended(self, outcome: CellOutcome, reason: str) -> None:
        """The run failed for this reason, and everybody says so."""
        assert outcome.reason == self.destroyed["reason"] == reason
        assert outcome.outcome == self.destroyed["outcome"] == "failed"

    def holds(self, **isolation: Any) -> None:
        """What the next cell's isolation is."""
        members = {name: getattr(self.backend.isolation, name) for name in Isolation.__struct_fields__}
        self.backend.isolation = Isolation(**{**members, **isolation})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def stop(bench: Bench) -> Iterator[int]:
    """The writing end of the pipe that asks the run to stop."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def stop_reason() -> str | None:
        try:
            os.read(reading, 1)
        except BlockingIOError:
            return None
        os.write(writing, b"x")
        return TERMINATED

    bench.more |= {"interrupt": reading, "stop_reason": stop_reason}
    yield writing
    os.close(reading)
    os.close(writing)


class TestGoodRun:
    def test_events_come_in_the_contracts_order(self, bench: Bench) -> None:
        outcome = bench.run("file", "a", "hello", export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, TOUCHED, EXPORTED, *END]
        assert bench.destroyed["outcome"] == outcome.outcome == "succeeded"
        assert "reason" not in bench.destroyed
        assert bench.destroyed["residueClass"] == "none"
        assert bench.destroyed["tenantId"] == "acme"

    def test_in_the_hosts_network_there_is_nothing_to_say_of_a_network(self, bench: Bench) -> None:
        bench.holds(own_network=False)
        bench.run("exits", "0")
        assert bench.sink.types == [*DECLARED, STARTED, SECURITY, SPAWNED, COMPLETED, *END]

    def test_what_was_not_measured_is_not_reported(self, bench: Bench) -> None:
        bench.holds(own_network=False, security=None)
        bench.run("exits", "0")
        assert bench.sink.types == [*DECLARED, STARTED, SPAWNED, COMPLETED, *END]

    def test_everything_at_once(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"https://aud": "jwt", "OTHER": "o"})
        bench.more["universal_role"] = "ci"
        bench.reporting |= {"resolve": lambda host, port: [{"address": "::1", "family": "inet6", "port": port}]}
        rules = [{"host": "a.example", "port": 443, "protocol": "tls"}, {"host": "b.example", "port": 443, "protocol": "tls"}]
        authority = {"secretRefs": ["OTHER", "TOKEN"], "egressRules": rules}
        outcome = bench.run("file", "a", "x", identity=IDENTITY, authority=authority, export=ONE_ARTIFACT)
        assert outcome.outcome == "succeeded"
        assert bench.sink.types == [
            *DECLARED,
            *(DECISION, RESOLUTION) * 2,
            MATERIALIZED,
            STARTED,
            UNIVERSAL,
            SECURITY,
            NETWORK,
            *RAN,
            TOUCHED,
            EXPORTED,
            REVOKED,
            *END,
        ]

    def test_the_outcome_says_what_was_done(self, bench: Bench) -> None:
        outcome = bench.run("file", "a", "hello", export=ONE_ARTIFACT)
        assert (outcome.run_id, outcome.cell_id, outcome.reason) == ("run-1", "cell-1", None)
        assert outcome.command is not None
        assert outcome.command.exit_code == 0
        assert outcome.isolation is bench.backend.isolation
        assert [(receipt.destination, receipt.bytes_written) for receipt in outcome.receipts] == [("cell-1/a", 5)]
        assert (bench.exports / "cell-1" / "a").read_text() == "hello"
        assert outcome.duration_ms == 250
        assert outcome.head == bench.emitter.head

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
        assert "derivationVerified" not in started

    def test_and_what_a_token_grants(self, bench: Bench) -> None:
        bench.more["derivation"] = {"derivationVerified": True, "roleRoot": "ci", "parentRunId": "run-0"}
        bench.run("exits", "0")
        started = bench.sink.data(STARTED)
        assert (started["derivationVerified"], started["roleRoot"], started["parentRunId"]) == (True, "ci", "run-0")

    def test_later_events_name_started_as_their_origin(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"https://aud": "jwt"})
        bench.run("file", "a", "x", export=ONE_ARTIFACT, **WITH_IDENTITY)
        origin = {"parent": bench.sink.ids[bench.sink.types.index(STARTED)], "parentType": PREFIX + STARTED}
        assert bench.sink.data(EXPORTED)["provenance"] == bench.sink.data(REVOKED)["provenance"] == origin

    def test_without_a_command_nothing_is_run(self, bench: Bench) -> None:
        assert bench.run().command is None
        assert bench.sink.types == [*DECLARED, *BEGUN, *END]
        assert bench.backend.commands == []
        assert bench.destroyed["outcome"] == "succeeded"
        assert "commandExitCode" not in bench.sink.data(SUMMARY)

    def test_but_artifacts_are_exported(self, bench: Bench) -> None:
        bench.run(export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *BEGUN, TOUCHED, NOT_EXPORTED, *END]

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
        assert command.on_output is None
        assert b"s3cret" not in b"".join(bench.sink.lines)

    def test_a_program_that_the_operator_allows(self, bench: Bench) -> None:
        seen: list[list[str]] = []
        bench.more["check_program"] = lambda argv: seen.append(list(argv))
        assert bench.run("exits", "0").outcome == "succeeded"
        assert seen == [["exits", "0"]]


class TestHowCommandsEnd:
    @pytest.mark.parametrize(
        ("argv", "data", "reason"),
        [
            (("exits", "3"), {"exitCode": 3}, "command exited with status 3"),
            (("exits", "255"), {"exitCode": 255}, "command exited with status 255"),
            (("dies", "11"), {"exitCode": -1, "signal": 11}, "command exited with status -1"),
            (("unread", "0"), {"exitCode": 0, "outputLost": True}, "output was lost: it was not read in time"),
            (("unread", "3"), {"exitCode": 3, "outputLost": True}, "command exited with status 3"),
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
                {"exitCode": -1, "spawnError": "the cell's init process ended unexpectedly after the command had started"},
                "the cell's init process ended unexpectedly after the command had started",
            ),
        ],
    )
    def test_the_contracts_words(self, bench: Bench, argv: tuple[str, ...], data: dict[str, Any], reason: str) -> None:
        outcome = bench.run(*argv, export=ONE_ARTIFACT)
        completed = bench.sink.data(COMPLETED)
        names = ("exitCode", "signal", "spawnError", "outputLost")
        assert {name: completed[name] for name in names if name in completed} == data
        enforced = bench.sink.data(ENFORCED)
        assert (enforced["commandExitCode"], enforced.get("spawnError")) == (data["exitCode"], data.get("spawnError"))
        assert bench.sink.data(SUMMARY)["commandExitCode"] == data["exitCode"]
        spawned = [] if argv[0] in {"nowhere", "unreadable"} else [SPAWNED]
        assert bench.sink.types == [*DECLARED, *BEGUN, *spawned, ENFORCED, COMPLETED, *END], "a failed command exports nothing"
        bench.ended(outcome, reason)

    def test_init_that_ends_before_it_has_started_the_command(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeCell, "run", lambda *_, on_started: CommandResult(ended="lost"))
        outcome = bench.run("exits", "0")
        assert bench.sink.data(COMPLETED)["spawnError"] == "the cell's init process ended unexpectedly"
        assert SPAWNED not in bench.sink.types
        bench.ended(outcome, "command spawn: the cell's init process ended unexpectedly")

    @pytest.mark.parametrize(
        ("spec_ms", "env_ms", "text"),
        [
            (100, None, "command timed out after 100 ms (spec.run.timeoutMs)"),
            (100, 100, "command timed out after 100 ms (spec.run.timeoutMs)"),
            (200, 100, "command timed out after 100 ms (CELLOS_RUN_TIMEOUT_MS)"),
            (60_000, None, "command timed out after 60000 ms (spec.run.timeoutMs)"),
            (None, 60_000, "command timed out after 60000 ms (CELLOS_RUN_TIMEOUT_MS)"),
            (None, None, "cell killed by TTL watchdog after 60000 ms (ttl_seconds=60)"),
            (None, 90_000, "cell killed by TTL watchdog after 60000 ms (ttl_seconds=60)"),
        ],
    )
    def test_a_deadline_says_whose_it_was(self, bench: Bench, spec_ms: int | None, env_ms: int | None, text: str) -> None:
        bench.more["run_timeout_ms"] = env_ms
        outcome = bench.run("sleeps", run={"timeoutMs": spec_ms}, export=ONE_ARTIFACT)
        completed = bench.sink.data(COMPLETED)
        assert (completed["exitCode"], completed["spawnError"]) == (-1, text)
        assert "signal" not in completed
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]
        bench.ended(outcome, f"command spawn: {text}")
        assert outcome.timed_out is not None
        assert outcome.timed_out.text == text

    @pytest.mark.parametrize(
        ("program", "text"),
        [
            (
                "true",
                (
                    'CELLOS_RUN_ARGV0_ALLOW_PREFIXES is set but argv[0] is not an absolute path (got "true"); '
                    "use a full path such as /usr/bin/true"
                ),
            ),
            ("/bin/true", 'argv[0] "/bin/true" is not under any allowed prefix from CELLOS_RUN_ARGV0_ALLOW_PREFIXES: ["/usr/bin"]'),
        ],
    )
    def test_a_program_that_the_operator_does_not_allow(self, bench: Bench, program: str, text: str) -> None:
        bench.more["check_program"] = program_check(("/usr/bin",))
        outcome = bench.run(program, export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *BEGUN, *END], "neither spawned nor completed"
        assert "commandExitCode" not in bench.sink.data(SUMMARY)
        bench.ended(outcome, text)
        assert bench.backend.commands == []


class TestInterrupts:
    def test_while_the_command_runs(self, bench: Bench, stop: int) -> None:
        os.write(stop, b"x")
        outcome = bench.run("sleeps", export=ONE_ARTIFACT)
        assert outcome.interrupted
        completed = bench.sink.data(COMPLETED)
        assert (completed["exitCode"], completed["spawnError"]) == (-1, "supervisor terminated")
        assert "signal" not in completed
        assert bench.sink.data(ENFORCED)["spawnError"] == "supervisor terminated"
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]
        bench.ended(outcome, "supervisor_terminated")

    def test_before_the_command(self, bench: Bench, stop: int) -> None:
        class Asking(MemoryBroker):
            def resolve(self, key: str, *, cell_id: str) -> str:
                os.write(stop, b"x")
                return super().resolve(key, cell_id=cell_id)

        bench.broker = Asking({"TOKEN": "s3cret"})
        outcome = bench.run("sleeps", authority={"secretRefs": ["TOKEN"]})
        assert outcome.interrupted
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]
        bench.ended(outcome, "supervisor_terminated")

    def test_after_the_command(self, bench: Bench, stop: int) -> None:
        """The command came to its own end just before: that is told, but nothing is exported."""
        os.write(stop, b"x")
        outcome = bench.run("file", "a", "x", export=ONE_ARTIFACT)
        assert outcome.interrupted
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]
        assert bench.sink.data(COMPLETED)["exitCode"] == 0
        bench.ended(outcome, "supervisor_terminated")

    def test_during_the_exports(self, bench: Bench, stop: int) -> None:
        def asked(kind: str) -> bool:
            if kind.endswith(EXPORTED):
                os.write(stop, b"x")
            return False

        bench.sink.refuse = asked
        outcome = bench.run("file", "a", "x", export=TWO_ARTIFACTS)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, TOUCHED, EXPORTED, *END]
        assert [receipt.destination for receipt in outcome.receipts] == ["cell-1/a"]
        bench.ended(outcome, "supervisor_terminated")

    def test_after_everything_changes_nothing(self, bench: Bench, stop: int) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(SUMMARY) and not os.write(stop, b"x")
        assert bench.run("exits", "0").outcome == "succeeded"


class Refusing:
    """A broker that has no answer."""

    name = "env"

    def resolve(self, key: str, *, cell_id: str) -> str:
        raise SecretBrokerError(f'env var CELLOS_SECRET_{key} not set (required for secret key "{key}")')


class TestSecrets:
    def test_a_missing_one_ends_the_run_before_started(self, bench: Bench) -> None:
        outcome = bench.run("exits", "0", authority={"secretRefs": ["TOKEN"]}, export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *END]
        bench.ended(outcome, 'secret TOKEN unresolvable via memory broker: secret broker: no value was handed over for secret key "TOKEN"')
        assert bench.backend.commands == []
        assert "commandExitCode" not in bench.sink.data(SUMMARY)

    def test_the_broker_that_has_no_answer_is_named(self, bench: Bench) -> None:
        bench.broker = Refusing()
        outcome = bench.run("exits", "0", authority={"secretRefs": ["T"]})
        text = 'secret T unresolvable via env broker: secret broker: env var CELLOS_SECRET_T not set (required for secret key "T")'
        bench.ended(outcome, text)

    def test_an_empty_one_too(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"TOKEN": ""})
        outcome = bench.run("exits", "0", authority={"secretRefs": ["TOKEN"]})
        assert bench.sink.types == [*DECLARED, *END]
        bench.ended(outcome, "secret TOKEN unresolvable via memory broker")

    def test_they_are_resolved_without_a_command_too(self, bench: Bench) -> None:
        assert bench.run(authority={"secretRefs": ["TOKEN"]}).outcome == "failed"

    def test_nothing_is_fetched_twice(self, bench: Bench) -> None:
        asked: list[str] = []

        class Counting(MemoryBroker):
            def resolve(self, key: str, *, cell_id: str) -> str:
                asked.append(key)
                return super().resolve(key, cell_id=cell_id)

        bench.broker = Counting({"A": "a", "B": "b", "https://aud": "jwt"})
        bench.run("exits", "0", identity=IDENTITY, authority={"secretRefs": ["B", "TOKEN", "A"]})
        assert asked == ["https://aud", "B", "A"], "the identity first, then in order"
        assert dict(bench.backend.commands[0].environment) == {"PATH": "/usr/bin", "TOKEN": "jwt", "B": "b", "A": "a"}

    @pytest.mark.parametrize("authority", [{}, {"secretRefs": []}])
    def test_a_lease_of_nothing_is_not_asked_for(self, bench: Bench, authority: dict[str, Any]) -> None:
        """It is the delivery of documents that say nothing."""
        assert bench.run("exits", "0", authority=authority, run={"secretDelivery": "runtimeLeasedBroker"}).outcome == "succeeded"

    def test_leases_are_refused_before_started(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"TOKEN": "s3cret"})
        outcome = bench.run("exits", "0", authority={"secretRefs": ["TOKEN"]}, run={"secretDelivery": "runtimeLeasedBroker"})
        assert bench.sink.types == [*DECLARED, *END]
        bench.ended(outcome, f"runtime leased broker prepare: {LEASE}")

    def test_stores_are_given_the_values(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"TOKEN": "s3cret"})
        bench.run("file", "a", "x", authority={"secretRefs": ["TOKEN"]}, export=ONE_ARTIFACT)
        assert bench.stores.asked == [{"TOKEN": "s3cret"}]


class TestSessions:
    """Secrets at run time."""

    @pytest.fixture(autouse=True)
    def values(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"TOKEN": "s3cret", "OTHER": "hunter2", "https://aud": "jwt"})

    def test_the_command_gets_the_way_to_them_not_the_values(self, bench: Bench) -> None:
        assert bench.run("exits", "0", **AT_RUN_TIME).outcome == "succeeded"
        environment = {"PATH": "/usr/bin", "CELLOS_SECRET_DELIVERY": "runtimeBroker", "KEYS": "TOKEN,OTHER"}
        assert dict(bench.backend.commands[0].environment) == environment
        [session] = bench.sessions
        assert session.closed == 1
        assert session.seconds == {"TOKEN": 60, "OTHER": 60}
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]

    def test_what_was_fetched_is_in_the_books(self, bench: Bench) -> None:
        bench.run("exits", "0", **AT_RUN_TIME)
        books = bench.sink.data(BOOKS)
        assert books["exercisedSecretCount"] == 1
        assert books["recommendedRemovals"] == [{"kind": "secretRef", "name": "OTHER"}]

    def test_an_identity_has_its_own_time(self, bench: Bench) -> None:
        bench.run("exits", "0", identity={**IDENTITY, "ttlSeconds": 7}, **AT_RUN_TIME)
        assert bench.sessions[0].seconds == {"TOKEN": 7, "OTHER": 60}

    def test_without_secrets_there_is_none(self, bench: Bench) -> None:
        bench.run("exits", "0", run={"secretDelivery": "runtimeBroker"})
        assert bench.sessions == []
        assert "exercisedSecretCount" not in bench.sink.data(BOOKS)

    def test_a_real_one(self, bench: Bench) -> None:
        bench.more["open_session"] = _open_session
        assert bench.run("exits", "0", **AT_RUN_TIME).outcome == "succeeded"
        environment = bench.backend.commands[0].environment
        assert environment.keys() == {"PATH", "CELLOS_SECRET_DELIVERY", "CELLOS_RUNTIME_SECRET_SOCKET", "CELLOS_RUNTIME_SECRET_TOKEN"}
        token = environment["CELLOS_RUNTIME_SECRET_TOKEN"]
        assert not any(word.encode() in b"".join(bench.sink.lines) for word in ("s3cret", "hunter2", token))
        assert bench.sink.data(BOOKS)["exercisedSecretCount"] == 0

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (HostBackendError("no room"), "host backend: no room"),
            (OSError(24, "Too many open files"), "Too many open files (os error 24)"),
        ],
    )
    def test_one_that_cannot_start(self, bench: Bench, error: Exception, text: str) -> None:
        def refuse(listener: Listener, *_: object) -> Session:
            os.close(listener.descriptor)
            raise error

        if isinstance(error, HostBackendError):
            bench.backend.fail["listen"] = error
        bench.more["open_session"] = refuse
        outcome = bench.run("exits", "0", **AT_RUN_TIME)
        assert bench.sink.types == [*DECLARED, *BEGUN, *END], "nothing was spawned, nothing completed"
        assert bench.sink.data(SUMMARY)["commandExitCode"] == -1
        bench.ended(outcome, f"start runtimeBroker secret delivery session: {text}")

    @pytest.mark.parametrize("error", [HostBackendError("broken"), KeyboardInterrupt()])
    def test_it_ends_whatever_happens(self, bench: Bench, error: BaseException) -> None:
        bench.backend.fail["run"] = error
        try:
            bench.run("exits", "0", **AT_RUN_TIME)
        except KeyboardInterrupt:
            assert bench.destroyed["reason"] == "supervisor_terminated"
        assert bench.sessions[0].closed == 1


class TestIdentity:
    def test_it_is_had_before_started_and_gone_before_the_summary(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"https://aud": "jwt-value"})
        bench.run("exits", "0", **WITH_IDENTITY)
        assert bench.sink.types == [*DECLARED, MATERIALIZED, *BEGUN, *RAN, REVOKED, *END]
        shown = {
            "kind": "federatedOidc",
            "provider": "p",
            "audience": "https://aud",
            "subject": None,
            "ttlSeconds": None,
            "secretRef": "TOKEN",
        }
        assert bench.sink.data(MATERIALIZED)["identity"] == bench.sink.data(REVOKED)["identity"] == shown
        assert bench.sink.data(REVOKED)["reason"] == "teardown"
        assert b"jwt-value" not in b"".join(bench.sink.lines)

    @pytest.mark.parametrize(
        ("broker", "run", "reason"),
        [
            (
                Refusing(),
                {},
                (
                    "identity TOKEN unresolvable via env broker: secret broker: env var CELLOS_SECRET_https://aud not set "
                    '(required for secret key "https://aud")'
                ),
            ),
            (MemoryBroker({"https://aud": ""}), {}, "identity TOKEN unresolvable via memory broker (empty value for https://aud)"),
            (
                MemoryBroker({"https://aud": "jwt"}),
                {"secretDelivery": "runtimeLeasedBroker"},
                f"runtime leased broker prepare https://aud -> TOKEN: {LEASE}",
            ),
        ],
    )
    def test_one_that_cannot_be_had(self, bench: Bench, broker: Any, run: dict[str, Any], reason: str) -> None:
        bench.broker = broker
        outcome = bench.run("exits", "0", run=run, **WITH_IDENTITY)
        assert bench.sink.types == [*DECLARED, IDENTITY_FAILED, *END]
        failed = bench.sink.data(IDENTITY_FAILED)
        assert (failed["operation"], failed["reason"], failed["identity"]["secretRef"]) == ("materialize", reason, "TOKEN")
        bench.ended(outcome, reason)

    def test_without_started_it_has_no_origin(self, bench: Bench) -> None:
        bench.broker = MemoryBroker({"https://aud": "jwt"})
        outcome = bench.run("exits", "0", identity=IDENTITY, authority={"secretRefs": ["TOKEN", "OTHER"]})
        assert bench.sink.types == [*DECLARED, MATERIALIZED, REVOKED, *END]
        assert "provenance" not in bench.sink.data(REVOKED)
        assert str(outcome.reason).startswith("secret OTHER unresolvable via memory broker: ")


class TestUnbounded:
    def test_a_hardened_host_runs_nothing_without_limits(self, bench: Bench) -> None:
        bench.more["refuse_unbounded"] = True
        outcome = bench.run("exits", "0")
        assert bench.sink.types == [*DECLARED, *END]
        bench.ended(outcome, "cannot enforce spec.run.limits: nothing limits cpu on this host, and the profile is hardened")

    def test_all_that_is_missing_is_named(self, bench: Bench) -> None:
        bench.more["refuse_unbounded"] = True
        bench.holds(unbounded=("memory", "cpu"))
        assert "nothing limits memory and cpu on this host" in str(bench.run("exits", "0").reason)

    @pytest.mark.parametrize("unbounded", [(), ("core", "swap")])
    def test_what_harms_nobody_is_let_be(self, bench: Bench, unbounded: tuple[str, ...]) -> None:
        bench.more["refuse_unbounded"] = True
        bench.holds(unbounded=unbounded)
        assert bench.run("exits", "0").outcome == "succeeded"

    def test_other_profiles_only_report_it(self, bench: Bench) -> None:
        assert bench.run("exits", "0").outcome == "succeeded"


class TestOutput:
    def test_it_is_recorded_without_secrets(self, bench: Bench) -> None:
        bench.record()
        bench.broker = MemoryBroker({"TOKEN": "s3cret"})
        bench.run("writes", "out", "err", authority={"secretRefs": ["TOKEN"]})
        assert bench.recorder is not None
        assert bench.recorder.pieces == [("stdout", b"out"), ("stderr", b"err")]
        assert bench.recorder.secrets == ("s3cret",)
        assert bench.recorder.closed == 1

    @pytest.mark.parametrize("argv", [("exits", "3"), ("exits", "0")])
    def test_an_end_of_it_that_cannot_be_kept_is_told_after_the_commands(self, bench: Bench, argv: tuple[str, ...]) -> None:
        bench.record()
        bench.recorder = Recorder(())
        bench.recorder.fail = EventSinkError("full")
        outcome = bench.run(*argv, export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]
        bench.ended(outcome, "command exited with status 3" if argv[1] == "3" else "event sink: full")

    def test_it_hides_no_other_error(self, bench: Bench) -> None:
        bench.record()
        bench.recorder = Recorder(())
        bench.recorder.fail = EventSinkError("full")
        bench.backend.fail["run"] = HostBackendError("broken")
        bench.ended(bench.run("exits", "0"), "host backend: broken")

    def test_a_recorder_that_cannot_begin_ends_the_run_and_the_session(self, bench: Bench) -> None:
        def refuse(_: Iterable[str]) -> Recorder:
            raise ConfigError("CELLOS_OUTPUT_DIR: cannot make it")

        bench.more["record_output"] = refuse
        bench.broker = MemoryBroker({"TOKEN": "s3cret"})
        outcome = bench.run("exits", "0", authority={"secretRefs": ["TOKEN"]}, run={"secretDelivery": "runtimeBroker"})
        assert bench.sink.types == [*DECLARED, *BEGUN, *END]
        assert bench.sessions[0].closed == 1
        bench.ended(outcome, "CELLOS_OUTPUT_DIR: cannot make it")


class TestExports:
    @pytest.mark.parametrize("make", ["link", "fifo"])
    def test_the_first_failure_stops(self, bench: Bench, make: str) -> None:
        outcome = bench.run(make, "a", export=TWO_ARTIFACTS)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, TOUCHED, NOT_EXPORTED, *END]
        failed = bench.sink.data(NOT_EXPORTED)
        assert failed["reason"] == "export sink: read artifact a: not a regular file"
        assert (failed["targetKind"], failed["destination"]) == ("local", "cell-1/a")
        assert failed["provenance"]["parentType"] == PREFIX + STARTED
        bench.ended(outcome, "export sink: read artifact a: not a regular file")

    def test_what_was_delivered_before_stays_delivered(self, bench: Bench) -> None:
        outcome = bench.run("file", "a", "x", export=TWO_ARTIFACTS)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, TOUCHED, EXPORTED, TOUCHED, NOT_EXPORTED, *END]
        assert outcome.outcome == "failed"
        assert [receipt.destination for receipt in outcome.receipts] == ["cell-1/a"]

    def test_nowhere_to_go(self, bench: Bench) -> None:
        bench.stores.store = None
        outcome = bench.run("file", "a", "x", export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, TOUCHED, NOT_EXPORTED, *END]
        assert "destination" not in bench.sink.data(NOT_EXPORTED)
        bench.ended(outcome, 'export sink: export requested for artifact "a" but no export sink is configured')

    def test_a_store_that_lacks_its_secret(self, bench: Bench) -> None:
        bench.stores.fail = ExportError('export target "t": secret TOKEN was not resolved')
        outcome = bench.run("file", "a", "x", export=ONE_ARTIFACT)
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, TOUCHED, NOT_EXPORTED, *END]
        bench.ended(outcome, 'export sink: export target "t": secret TOKEN was not resolved')

    def test_the_reason_survives_a_sink_that_will_not_take_the_failure(self, bench: Bench) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(NOT_EXPORTED)
        bench.ended(bench.run("fifo", "a", export=TWO_ARTIFACTS), "export sink: read artifact a: not a regular file")


RULE = {"host": "a.example", "port": 443, "protocol": "tls"}
WHOLE = [*DECLARED, DECISION, RESOLUTION, MATERIALIZED, STARTED, UNIVERSAL, SECURITY, NETWORK, *RAN, TOUCHED, EXPORTED, REVOKED, *END]
CLOSED = [REVOKED, *END]


class TestUnrecordedEvents:
    """What becomes of a run when one of its events cannot be recorded."""

    @pytest.fixture
    def whole(self, bench: Bench) -> Bench:
        """Its runs have every event of a good run."""
        bench.broker = MemoryBroker({"https://aud": "jwt"})
        bench.more["universal_role"] = "ci"
        bench.reporting |= {"resolve": lambda host, port: []}
        return bench

    def try_it(self, bench: Bench, refused: str) -> CellOutcome:
        bench.sink.refuse = lambda kind: kind.endswith(refused)
        authority = {"secretRefs": ["TOKEN"], "egressRules": [RULE]}
        return bench.run("file", "a", "x", identity=IDENTITY, authority=authority, export=ONE_ARTIFACT)

    @pytest.mark.parametrize(
        ("refused", "left", "ran"),
        [
            (SCOPE, END, False),
            (TARGETS, [SCOPE, *END], False),
            (DECISION, [*DECLARED, *END], False),
            (RESOLUTION, [*DECLARED, DECISION, *END], False),
            (MATERIALIZED, [*WHOLE[:4], *END], False),
            (STARTED, [*WHOLE[:5], *CLOSED], False),
            (NETWORK, [*WHOLE[:8], *CLOSED], False),
            (SPAWNED, [*WHOLE[:9], *CLOSED], True),
            (ENFORCED, [*WHOLE[:10], COMPLETED, *CLOSED], True),
            (COMPLETED, [*WHOLE[:11], *CLOSED], True),
            (TOUCHED, [*WHOLE[:12], *CLOSED], True),
            (EXPORTED, [*WHOLE[:13], *CLOSED], True),
        ],
    )
    def test_of_the_course_of_the_run_ends_it(self, whole: Bench, refused: str, left: list[str], ran: bool) -> None:
        outcome = self.try_it(whole, refused)
        assert whole.sink.types == left
        whole.ended(outcome, f"event sink: told to refuse {PREFIX}{refused}")
        assert bool(whole.backend.commands) == ran

    @pytest.mark.parametrize("refused", [UNIVERSAL, SECURITY, REVOKED, SUMMARY, BOOKS])
    def test_beside_it_changes_nothing(self, whole: Bench, refused: str) -> None:
        outcome = self.try_it(whole, refused)
        assert whole.sink.types == [kind for kind in WHOLE if kind != refused]
        assert whole.destroyed["outcome"] == outcome.outcome == "succeeded"

    def test_nothing_is_refused(self, whole: Bench) -> None:
        self.try_it(whole, "nothing")
        assert whole.sink.types == WHOLE

    def test_why_an_identity_could_not_be_had_comes_before_a_failure_to_record_it(self, whole: Bench) -> None:
        whole.broker = MemoryBroker({"https://aud": ""})
        outcome = self.try_it(whole, IDENTITY_FAILED)
        whole.ended(outcome, "identity TOKEN unresolvable via memory broker (empty value for https://aud)")

    @pytest.mark.parametrize("refused", [COMPLETED, ENFORCED])
    def test_how_the_command_ended_comes_before_a_failure_to_record_it(self, bench: Bench, refused: str) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(refused)
        bench.ended(bench.run("exits", "3"), "command exited with status 3")

    def test_an_end_that_cannot_be_recorded_is_a_failure(self, bench: Bench) -> None:
        bench.sink.refuse = lambda kind: kind.endswith(DESTROYED)
        outcome = bench.run("exits", "0")
        assert outcome.outcome == "failed"
        assert outcome.reason == f"event sink: told to refuse {PREFIX}{DESTROYED}"
        assert bench.backend.calls[-1] == "destroy"


class TestFaults:
    """Whatever fails, the cell is destroyed and the record ends with `destroyed`."""

    def test_no_cell_no_events(self, bench: Bench) -> None:
        bench.backend.fail["create"] = HostBackendError("no room")
        with pytest.raises(HostBackendError, match="no room"):
            bench.run("exits", "0")
        assert bench.sink.lines == []
        assert bench.backend.calls == ["create"]

    @pytest.mark.parametrize(
        ("step", "events"),
        [
            ("run", [*DECLARED, *BEGUN, *END]),
            ("started", [*DECLARED, *BEGUN, *END]),
            ("open_artifact", [*DECLARED, *BEGUN, *RAN, TOUCHED, *END]),
        ],
    )
    def test_a_backend_that_fails(self, bench: Bench, step: Step, events: list[str]) -> None:
        bench.backend.fail[step] = HostBackendError("broken")
        outcome = bench.run("file", "a", "x", export=ONE_ARTIFACT)
        assert bench.backend.calls[-1] == "destroy"
        assert bench.sink.types == events
        bench.ended(outcome, "host backend: broken")

    def test_a_teardown_that_fails_is_the_reason_if_nothing_else_is(self, bench: Bench) -> None:
        bench.backend.fail["destroy"] = HostBackendError("stuck")
        outcome = bench.run("exits", "0")
        assert bench.sink.types == [*DECLARED, *BEGUN, *RAN, *END]
        bench.ended(outcome, "cell destroy: host backend: stuck")
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
        ("error", "reason"), [(KeyboardInterrupt(), "supervisor_terminated"), (ZeroDivisionError(), "internal error: ZeroDivisionError")]
    )
    @pytest.mark.parametrize("step", ["run", "started", "open_artifact"])
    def test_what_is_not_ours_passes_on_after_teardown(self, bench: Bench, step: Step, error: BaseException, reason: str) -> None:
        bench.backend.fail[step] = error
        with pytest.raises(type(error)):
            bench.run("file", "a", "x", export=ONE_ARTIFACT)
        assert bench.backend.calls[-1] == "destroy"
        assert bench.destroyed["reason"] == reason

    def test_the_security_that_is_reported_is_the_cells(self, bench: Bench) -> None:
        bench.run("exits", "0")
        measured = bench.sink.data(SECURITY)
        assert measured["capEff"] == UNPRIVILEGED.cap_eff
        assert (measured["privileged"], measured["noNewPrivs"], measured["seccompMode"]) == (False, True, 2)
