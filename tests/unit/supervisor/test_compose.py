from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cellos.brokers.memory import MemoryBroker
from cellos.core.documents import parse_execution_cell, raw_spec_hash
from cellos.core.evidence.verify import verify
from cellos.errors import ConfigError, EventSinkError, HostBackendError, Unenforceable
from cellos.ports import Refusal
from cellos.supervisor import compose
from cellos.supervisor.compose import (
    VARIABLES,
    Config,
    Host,
    Order,
    command_environment,
    directory_store,
    execute,
    new_run_id,
    open_host,
    read_config,
    run_identity,
)
from cellos.supervisor.state import open_state_directory
from cellos.testing.backend import FakeBackend

SPEC: dict[str, Any] = {
    "id": "cell-1",
    "authority": {},
    "lifetime": {"ttlSeconds": 60},
    "run": {"argv": ["exits", "0"], "secretDelivery": "env"},
}


def order(run_id: str | None = "run-1", *, keep_evidence: bool = False, **spec: Any) -> Order:
    raw = json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {**SPEC, **spec}}).encode()
    document = parse_execution_cell(raw)
    return Order(document=document, spec_hash=raw_spec_hash(raw), run_id=run_id, broker=MemoryBroker(), keep_evidence=keep_evidence)


class Scene:
    def __init__(self, path: Path) -> None:
        self.state = open_state_directory({"CELLOS_STATE_DIR": str(path / "state")})
        self.jsonl = path / "events.jsonl"
        self.backend = FakeBackend()
        self.warnings: list[str] = []

    def host(self, **config: Any) -> Host:
        return Host(config=Config(**config), state=self.state, backend=self.backend, warn=self.warnings.append)

    @property
    def files(self) -> list[str]:
        return sorted(
            os.path.relpath(os.path.join(place, name), self.state.path) for place, _, names in os.walk(self.state.path) for name in names
        )


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


class TestConfig:
    def test_nothing_set(self) -> None:
        assert read_config({}) == Config()

    def test_everything_set(self, tmp_path: Path) -> None:
        config = read_config(
            {
                "CELLOS_CELL_BACKEND": "stub",
                "CELLOS_RUN_ID": "run-local-001",
                "CELLOS_RUN_TIMEOUT_MS": "1500",
                "CELL_OS_JSONL_EVENTS": "events.jsonl",
                "CELL_OS_USE_NOOP_SINK": "0",
                "CELLOS_REDACT_EVENT_FIELDS": "argv, path",
                "CELLOS_EXPORT_DIR": "/out",
                "CELLOS_ALLOW_UNKNOWN_FIELDS": "Yes",
                "CELLOS_STATE_DIR": "/state",
                "HOME": "/home/u",
                "UNRELATED": "x",
            }
        )
        assert config == Config(
            backend="stub",
            run_id="run-local-001",
            run_timeout_ms=1500,
            jsonl=os.path.abspath("events.jsonl"),
            noop_sink=True,
            redacted_fields=frozenset({"argv", "path"}),
            export_dir="/out",
            allow_unknown_fields=True,
            state={"CELLOS_STATE_DIR": "/state", "HOME": "/home/u"},
        )
        assert directory_store(config) is not None
        assert directory_store(Config()) is None

    @pytest.mark.parametrize(
        ("variable", "value", "text"),
        [
            ("CELLOS_CELL_BACKEND", "docker", "CELLOS_CELL_BACKEND: unknown backend 'docker'; known: linux, stub"),
            ("CELLOS_CELL_BACKEND", "Stub", "CELLOS_CELL_BACKEND: unknown backend 'Stub'; known: linux, stub"),
            ("CELLOS_CELL_BACKEND", "firecracker", "CELLOS_CELL_BACKEND=firecracker is not built yet; known: linux, stub"),
            ("CELLOS_CELL_BACKEND", "gvisor", "CELLOS_CELL_BACKEND=gvisor is not built yet; known: linux, stub"),
            ("CELLOS_RUN_TIMEOUT_MS", "soon", 'invalid CELLOS_RUN_TIMEOUT_MS: "soon"'),
            ("CELLOS_RUN_TIMEOUT_MS", "0", "CELLOS_RUN_TIMEOUT_MS must be > 0"),
            ("CELL_OS_JSONL_EVENTS", " ", "CELL_OS_JSONL_EVENTS is set, but empty; unset it or give a path"),
            ("CELLOS_REDACT_EVENT_FIELDS", "runId", "CELLOS_REDACT_EVENT_FIELDS: cannot redact runId"),
            ("CELLOS_RUN_ID", "two words", "CELLOS_RUN_ID: 'two words' is not a run id"),
            ("CELLOS_RUN_ID", "a\nb", "CELLOS_RUN_ID: 'a\\nb' is not a run id"),
            ("CELLOS_RUN_ID", "x" * 257, "is not a run id"),
            ("CELLOS_DEPLOYMENT_PROFILE", "hardened", "CELLOS_DEPLOYMENT_PROFILE is set, but the hardened profile is not built yet"),
            ("CELLOS_POLICY_PACK_PATH", "/x", "policy packs are not built yet; unset it to run without"),
            ("CELL_OS_REQUIRE_JETSTREAM", "", "the JetStream sink is not built yet"),
            ("CELLOS_BROKER", "env", "this secret broker is not built yet"),
            ("CELLOS_EVENT_SIGNING", "ed25519", "event signing is not built yet"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, variable: str, value: str, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_config({variable: value})
        assert text in str(caught.value)

    @pytest.mark.parametrize(
        "environment",
        [
            {"CELLOS_DEPLOYMENT_PROFILE": "portable"},
            {"CELLOS_EVENT_SIGNING": "off"},
            {"CELLOS_BROKER": "memory"},
            {"CELLOS_CELL_BACKEND": ""},
            {"CELLOS_RUN_ID": ""},
            {"CELLOS_ALLOW_UNKNOWN_FIELDS": "0"},
        ],
    )
    def test_what_asks_for_nothing_is_nothing(self, environment: Mapping[str, str]) -> None:
        assert read_config(environment) == Config()

    def test_the_table_names_every_variable_once(self) -> None:
        names = [variable.name for variable in VARIABLES]
        assert len(set(names)) == len(names)
        read: set[str] = set()

        class Spy(dict[str, str]):
            def get(self, name: str, *default: Any) -> Any:
                read.add(name)
                return super().get(name, *default)

            def __contains__(self, name: object) -> bool:
                read.add(str(name))
                return super().__contains__(name)

        read_config(Spy())
        refused = {name for name, _, _ in compose._NOT_BUILT}
        assert read - refused - {"XDG_STATE_HOME", "HOME"} == set(names)


class TestExecute:
    def test_without_a_sink_the_spool_stays(self, scene: Scene) -> None:
        finished = execute(scene.host(), order())
        assert finished.outcome.outcome == "succeeded"
        assert finished.evidence is not None
        assert scene.files == [os.path.relpath(finished.evidence, scene.state.path)]
        assert finished.evidence.startswith(scene.state.spool)
        assert verify(Path(finished.evidence).read_bytes().splitlines()).verified

    def test_with_a_jsonl_file_nothing_stays_in_the_state_directory(self, scene: Scene) -> None:
        finished = execute(scene.host(jsonl=str(scene.jsonl)), order())
        assert finished.evidence is None
        assert scene.files == []
        assert verify(scene.jsonl.read_bytes().splitlines()).verified

    def test_nor_with_the_noop_sink(self, scene: Scene) -> None:
        assert execute(scene.host(noop_sink=True), order()).evidence is None
        assert scene.files == []

    def test_evidence_that_is_the_product_is_named_after_the_run(self, scene: Scene) -> None:
        finished = execute(scene.host(jsonl=str(scene.jsonl)), order(keep_evidence=True))
        assert finished.evidence == f"{scene.state.evidence}/run-1.jsonl"
        assert scene.files == ["evidence/run-1.jsonl"]
        assert Path(finished.evidence).read_bytes() == scene.jsonl.read_bytes()

    def test_a_run_id_is_made_where_none_is_given(self, scene: Scene) -> None:
        first, second = (execute(scene.host(noop_sink=True), order(None)).outcome.run_id for _ in range(2))
        assert first != second
        assert first[:13] <= second[:13], "they sort by their millisecond"
        assert first[14] == "7"

    def test_a_failed_run_leaves_no_more_than_a_good_one(self, scene: Scene) -> None:
        finished = execute(scene.host(jsonl=str(scene.jsonl)), order(run={"argv": ["exits", "3"], "secretDelivery": "env"}))
        assert finished.outcome.outcome == "failed"
        assert scene.files == []

    def test_what_is_refused_leaves_nothing_at_all(self, scene: Scene) -> None:
        scene.backend.refuses = (Refusal(field="spec.x", why="y"),)
        with pytest.raises(Unenforceable):
            execute(scene.host(jsonl=str(scene.jsonl)), order())
        assert scene.files == []
        assert not scene.jsonl.exists()

    def test_a_cell_that_could_not_be_made_leaves_nothing(self, scene: Scene) -> None:
        scene.backend.fail["create"] = HostBackendError("no")
        with pytest.raises(HostBackendError):
            execute(scene.host(), order(keep_evidence=True))
        assert scene.files == []

    def test_a_sink_that_cannot_be_opened_refuses_the_run_before_there_is_a_cell(self, scene: Scene) -> None:
        with pytest.raises(EventSinkError, match="jsonl open /nowhere/x"):
            execute(scene.host(jsonl="/nowhere/x"), order())
        assert scene.backend.calls == []
        assert scene.files == []

    def test_a_spool_that_cannot_be_made_too(self, scene: Scene) -> None:
        execute(scene.host(), order(keep_evidence=True))
        with pytest.raises(EventSinkError, match="File exists"):
            execute(scene.host(), order(keep_evidence=True))
        assert scene.backend.calls.count("create") == 1
        assert scene.files == ["evidence/run-1.jsonl"]

    def test_while_a_run_lives_it_has_a_record(self, scene: Scene) -> None:
        seen: list[list[str]] = []
        scene.backend.step = lambda name: seen.append(scene.files)  # type: ignore[method-assign]
        execute(scene.host(), order())
        assert all(len(files) == 2 and files[0].startswith("runs/") and files[1].startswith("spool/") for files in seen)
        assert len(seen) == 4

    def test_a_run_whose_end_did_not_reach_a_sink_is_ended_by_the_next_start(self, scene: Scene) -> None:
        host = scene.host(jsonl="/dev/full")
        finished = execute(host, order())
        assert finished.outcome.outcome == "failed"
        assert "sink full: /dev/full" in str(finished.outcome.reason)
        assert finished.evidence is not None
        assert len(scene.files) == 2, "the record and the spool"
        assert verify(Path(finished.evidence).read_bytes().splitlines()).verified

    def test_redaction_reaches_the_spool(self, scene: Scene) -> None:
        finished = execute(
            scene.host(redacted_fields=frozenset({"argv"})), order(run={"argv": ["exits", "0", "hunter2"], "secretDelivery": "env"})
        )
        assert finished.evidence is not None
        assert "hunter2" not in Path(finished.evidence).read_text()

    def test_the_cap_of_the_operator_holds(self, scene: Scene) -> None:
        outcome = execute(scene.host(run_timeout_ms=100), order(run={"argv": ["sleeps"], "secretDelivery": "env"})).outcome
        assert outcome.reason == "command spawn: command timed out after 100 ms (CELLOS_RUN_TIMEOUT_MS)"


class TestHost:
    def test_the_stub_says_that_it_isolates_nothing(self, tmp_path: Path) -> None:
        warnings: list[str] = []
        config = Config(backend="stub", state={"CELLOS_STATE_DIR": str(tmp_path / "state")})
        host = open_host(config, None, warnings.append)
        assert host.backend.kind == "stub"
        assert warnings == [compose.STUB_WARNING]

    def test_linux_needs_a_launcher(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="launcher"):
            open_host(Config(state={"CELLOS_STATE_DIR": str(tmp_path / "state")}), None, lambda _: None)


class TestRunIdentity:
    def test_absent_members_as_consumers_know_them(self) -> None:
        spec = order(correlation={"platform": "ci", "tenantId": "acme"}, placement={"queueName": "q"}).document.spec
        run = run_identity(spec, "0" * 64, "run-1")
        assert run.correlation == {"platform": "ci", "externalRunId": None, "externalJobId": None, "labels": None, "tenantId": "acme"}
        assert run.placement == {"queueName": "q"}
        assert (run.cell_id, run.spec_id, run.tenant_id) == ("cell-1", "cell-1", "acme")

    def test_an_empty_correlation_is_still_one(self) -> None:
        run = run_identity(order(correlation={}).document.spec, "0" * 64, "run-1")
        assert run.correlation == {"platform": None, "externalRunId": None, "externalJobId": None, "labels": None}

    def test_none_is_none(self) -> None:
        run = run_identity(order().document.spec, "0" * 64, "run-1")
        assert (run.correlation, run.placement, run.tenant_id) == (None, None, None)


def test_a_command_inherits_nothing() -> None:
    assert command_environment("stub") == {"PATH": "/usr/bin:/bin:/usr/local/bin"}
    assert command_environment("linux") == {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": "/work", "TMPDIR": "/tmp"}


def test_run_ids_sort_by_time() -> None:
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert [each[:13] for each in ids] == sorted(each[:13] for each in ids)
