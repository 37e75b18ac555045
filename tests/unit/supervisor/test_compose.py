from __future__ import annotations

import json
import os
import shutil
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from cellos.brokers.memory import MemoryBroker
from cellos.core import observations
from cellos.core.derivation import signed_bytes
from cellos.core.documents import canonical_spec_hash, parse_execution_cell, raw_spec_hash
from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import encode_url
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import ED25519, Signer
from cellos.core.evidence.verify import verify
from cellos.core.policy import read_authorization_policy, read_policy_pack
from cellos.errors import ConfigError, EventSinkError, ExportError, HostBackendError, Unenforceable
from cellos.eventlog import default_server, forward
from cellos.eventlog.forward import Undelivered
from cellos.eventlog.spool import Spool
from cellos.ports import Isolation, Refusal
from cellos.supervisor import compose, records
from cellos.supervisor.compose import (
    Host,
    Order,
    command_environment,
    execute,
    make_broker,
    new_run_id,
    open_host,
    read_signer,
    refuse_backend,
    run_identity,
)
from cellos.supervisor.config import Config, read_config
from cellos.supervisor.state import open_state_directory
from cellos.supervisor.trust import Rejected, Trust
from cellos.testing.backend import FakeBackend

SPEC: dict[str, Any] = {
    "id": "cell-1",
    "authority": {},
    "lifetime": {"ttlSeconds": 60},
    "run": {"argv": ["exits", "0"], "secretDelivery": "env"},
}
ROLE_KEY = ed25519.private_key(b"\xa5" * 32)


def order(run_id: str | None = "run-1", *, keep_evidence: bool = False, secrets: dict[str, str] | None = None, **spec: Any) -> Order:
    raw = json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {**SPEC, **spec}}).encode()
    document = parse_execution_cell(raw)
    broker = MemoryBroker(secrets)
    return Order(document=document, spec_hash=raw_spec_hash(raw), run_id=run_id, broker=broker, keep_evidence=keep_evidence)


def running(*argv: str) -> dict[str, Any]:
    return {"run": {"argv": list(argv), "secretDelivery": "env"}}


RULE = {"host": "a.example", "port": 443}
TARGET: dict[str, Any] = {"export": {"targets": [{"kind": "s3", "name": "t", "bucket": "b"}]}}
EXPORT: dict[str, Any] = {"export": {"artifacts": [{"name": "a", "path": "a"}]}, **running("file", "a", "x")}


class Scene:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = open_state_directory({"CELLOS_STATE_DIR": str(path / "state")})
        self.jsonl = path / "events.jsonl"
        self.backend = FakeBackend()
        self.trust = Trust()
        self.signer: Signer | None = None
        self.notices: list[Any] = []
        self.warnings: list[str] = []

    def host(self, **config: Any) -> Host:
        return Host(
            config=Config(**config),
            state=self.state,
            backend=self.backend,
            trust=self.trust,
            signer=self.signer,
            warn=self.warnings.append,
            notices=list(self.notices),
        )

    def logging(self, **config: Any) -> Host:
        """With a JSONL file."""
        return self.host(jsonl=str(self.jsonl), **config)

    @property
    def files(self) -> list[str]:
        return sorted(
            os.path.relpath(os.path.join(place, name), self.state.path) for place, _, names in os.walk(self.state.path) for name in names
        )

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.jsonl.read_bytes().splitlines()]

    @property
    def types(self) -> list[str]:
        return [str(event["type"]).rpartition(".")[2] for event in self.events]

    def data(self, kind: str) -> dict[str, Any]:
        [found] = [event["data"] for event in self.events if event["type"].endswith(kind)]
        return dict(found)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(default_server, "default_server_listens", lambda: False)
    return Scene(tmp_path)


class TestExecute:
    def test_without_a_sink_the_record_stays(self, scene: Scene) -> None:
        finished = execute(scene.host(), order())
        assert finished.outcome.outcome == "succeeded"
        assert finished.evidence is not None
        assert scene.files == [os.path.relpath(finished.evidence, scene.state.path)]
        assert finished.evidence.startswith(scene.state.evidence)
        assert verify(Path(finished.evidence).read_bytes().splitlines()).verified

    def test_with_a_jsonl_file_nothing_stays_in_the_state_directory(self, scene: Scene) -> None:
        finished = execute(scene.logging(), order())
        assert finished.evidence is None
        assert scene.files == []
        assert verify(scene.jsonl.read_bytes().splitlines()).verified

    def test_nor_with_the_noop_sink(self, scene: Scene) -> None:
        assert execute(scene.host(noop_sink=True), order()).evidence is None
        assert scene.files == []

    def test_evidence_that_is_the_product_is_named_after_the_run(self, scene: Scene) -> None:
        finished = execute(scene.logging(), order(keep_evidence=True))
        assert finished.evidence == f"{scene.state.evidence}/run-1.jsonl"
        assert scene.files == ["evidence/run-1.jsonl"]
        assert Path(finished.evidence).read_bytes() == scene.jsonl.read_bytes()

    def test_a_run_id_is_made_where_none_is_given(self, scene: Scene) -> None:
        first, second = (execute(scene.host(noop_sink=True), order(None)).outcome.run_id for _ in range(2))
        assert first != second
        assert first[:13] <= second[:13], "they sort by their millisecond"
        assert first[14] == "7"

    def test_a_failed_run_leaves_no_more_than_a_good_one(self, scene: Scene) -> None:
        finished = execute(scene.logging(), order(**running("exits", "3")))
        assert finished.outcome.outcome == "failed"
        assert scene.files == []

    def test_what_is_refused_leaves_nothing_at_all(self, scene: Scene) -> None:
        scene.backend.refuses = (Refusal(field="spec.x", why="y"),)
        with pytest.raises(Unenforceable):
            execute(scene.logging(), order())
        assert scene.files == []
        assert scene.events == []

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

    def test_a_full_spool_takes_no_new_runs(self, scene: Scene) -> None:
        waiting = Path(scene.state.spool) / "old.jsonl"
        waiting.touch()
        os.truncate(waiting, 256 << 20)
        with pytest.raises(EventSinkError, match=r"spool full: .* no run begins above 256 MiB"):
            execute(scene.logging(), order())
        assert scene.backend.calls == []

    def test_while_a_run_lives_it_has_a_record(self, scene: Scene) -> None:
        seen: list[list[str]] = []
        scene.backend.step = lambda name: seen.append(scene.files)  # type: ignore[method-assign]
        execute(scene.logging(), order())
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

    @pytest.mark.parametrize("jsonl", [False, True])
    def test_a_record_that_is_removed_while_the_run_goes_on_is_no_success(self, scene: Scene, jsonl: bool) -> None:
        scene.backend.step = lambda name: shutil.rmtree(scene.state.path, ignore_errors=True)  # type: ignore[method-assign]
        finished = execute(scene.logging() if jsonl else scene.host(), order(keep_evidence=True))
        path = f"{scene.state.evidence}/run-1.jsonl"
        assert (finished.outcome.outcome, finished.evidence) == ("failed", None)
        assert finished.outcome.reason == f"event sink: the record {path} was removed while the run went on"

    def test_the_reason_that_came_first_stays(self, scene: Scene) -> None:
        scene.backend.step = lambda name: shutil.rmtree(scene.state.path, ignore_errors=True)  # type: ignore[method-assign]
        finished = execute(scene.host(), order(**running("exits", "3")))
        assert finished.outcome.reason == "command exited with status 3"
        assert "was removed while the run went on" in scene.warnings[-1]

    def test_a_spool_that_was_only_a_step_on_the_way_may_be_missing(self, scene: Scene) -> None:
        scene.backend.step = lambda name: shutil.rmtree(scene.state.path, ignore_errors=True)  # type: ignore[method-assign]
        finished = execute(scene.logging(), order())
        assert (finished.outcome.outcome, finished.evidence) == ("succeeded", None)
        assert verify(scene.jsonl.read_bytes().splitlines()).verified

    def test_a_jsonl_file_that_is_removed_meanwhile_is_written_again(self, scene: Scene) -> None:
        scene.backend.step = lambda name: scene.jsonl.unlink(missing_ok=True)  # type: ignore[method-assign]
        host = scene.logging()
        finished = execute(host, order())
        assert finished.outcome.reason == f"event sink: {scene.jsonl} was removed while the run went on; the next start writes it again"
        sweeper = records.Sweeper(backend_of=lambda kind: scene.backend, now_ns=time.time_ns, random=os.urandom, warn=scene.warnings.append)
        records.sweep(scene.state.runs, sweeper)
        assert verify(scene.jsonl.read_bytes().splitlines()).verified
        assert (scene.files, scene.warnings) == ([], [])

    def test_a_jsonl_file_may_be_renamed_meanwhile(self, scene: Scene) -> None:
        rotated = scene.path / "events.jsonl.1"
        scene.backend.step = lambda name: scene.jsonl.exists() and scene.jsonl.rename(rotated)  # type: ignore[method-assign]
        assert execute(scene.logging(), order()).outcome.outcome == "succeeded"
        assert verify(rotated.read_bytes().splitlines()).verified
        assert scene.files == []

    def test_how_a_run_ended_that_could_not_be_recorded_is_told_by_the_next_start(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        emit, full = Spool.emit, EventSinkError("sink full")

        def fills_up(self: Spool, event_id: str, line: bytes) -> None:
            if b"command.v1.completed" in line or b"lifecycle.v1.destroyed" in line:
                raise full
            emit(self, event_id, line)

        monkeypatch.setattr(Spool, "emit", fills_up)
        outcome = execute(scene.logging(), order(**running("exits", "7"))).outcome
        monkeypatch.undo()
        assert outcome.reason == "command exited with status 7"
        sweeper = records.Sweeper(backend_of=lambda kind: scene.backend, now_ns=time.time_ns, random=os.urandom, warn=scene.warnings.append)
        records.sweep(scene.state.runs, sweeper)
        assert scene.data("destroyed")["reason"] == outcome.reason
        assert verify(scene.jsonl.read_bytes().splitlines()).verified

    def test_redaction_reaches_every_copy(self, scene: Scene) -> None:
        finished = execute(
            scene.logging(redacted_fields=frozenset({"argv"})), order(keep_evidence=True, **running("exits", "0", "hunter2"))
        )
        assert finished.evidence is not None
        assert "hunter2" not in Path(finished.evidence).read_text() + scene.jsonl.read_text()

    @pytest.mark.parametrize("argv", [("exits", "3", "--token=s3cret!"), ("/nowhere/s3cret!",)])
    def test_a_secret_on_the_command_line_does_not_show(self, scene: Scene, argv: tuple[str, ...]) -> None:
        execute(scene.logging(), order(secrets={"TOKEN": "s3cret!"}, authority={"secretRefs": ["TOKEN"]}, **running(*argv)))
        assert "s3cret" not in scene.jsonl.read_text()
        assert scene.data("command.v1.completed")["argv"] == [each.replace("s3cret!", "***") for each in argv]
        assert verify(scene.jsonl.read_bytes().splitlines()).verified

    def test_a_reason_that_quotes_it_neither(self, scene: Scene) -> None:
        asked = order(secrets={"TOKEN": "s3cret!"}, authority={"secretRefs": ["TOKEN"]}, **running("/opt/s3cret!"))
        outcome = execute(scene.logging(argv0_prefixes=("/usr/bin",)), asked).outcome
        assert "s3cret!" in str(outcome.reason)
        assert '"/opt/***" is not under' in scene.data("destroyed")["reason"]

    def test_nor_half_of_it_where_a_noted_reason_is_cut(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = order(secrets={"TOKEN": "s3cret!"}, authority={"secretRefs": ["TOKEN"]}, **running("/opt/s3cret!"))
        reason = str(execute(scene.host(argv0_prefixes=("/usr/bin",)), asked).outcome.reason)
        emit = Spool.emit

        def fills_up(self: Spool, event_id: str, line: bytes) -> None:
            if b"lifecycle.v1.destroyed" in line:
                raise EventSinkError("sink full")
            emit(self, event_id, line)

        monkeypatch.setattr(Spool, "emit", fills_up)
        monkeypatch.setattr(records, "MOST_REASON", reason.index("s3cret!") + 3)
        execute(scene.host(argv0_prefixes=("/usr/bin",)), asked)
        [noted] = Path(scene.state.runs).iterdir()
        assert "/opt/***" in noted.read_text()
        assert "s3c" not in noted.read_text()

    def test_and_the_record_of_the_live_run(self, scene: Scene) -> None:
        held: list[str] = []
        scene.backend.step = lambda name: held.append(  # type: ignore[method-assign]
            "".join(path.read_text() for path in Path(scene.state.runs).iterdir())
        )
        labels = {"correlation": {"platform": "ci", "tenantId": "hunter2", "labels": {"a": "hunter3"}}}
        execute(scene.host(redacted_fields=frozenset({"tenantId", "labels"})), order(**labels))
        assert held
        assert all('"ci"' in text and "hunter" not in text for text in held)

    def test_signed_events_are_signed_everywhere(self, scene: Scene) -> None:
        scene.signer = Signer("k1", ED25519, b"\1" * 32)
        public = ed25519.private_key(b"\1" * 32).public_key().public_bytes_raw()
        execute(scene.logging(), order())
        lines = scene.jsonl.read_bytes().splitlines()
        report = verify(lines, ring=Keyring(ed25519={"k1": ed25519.public_key(public)}), require_signed=True)
        assert report.verified
        assert report.runs[0].signers == ("k1",)

    def test_the_cap_of_the_operator_holds(self, scene: Scene) -> None:
        outcome = execute(scene.host(run_timeout_ms=100), order(**running("sleeps"))).outcome
        assert outcome.reason == "command spawn: command timed out after 100 ms (CELLOS_RUN_TIMEOUT_MS)"

    def test_so_do_the_programs_that_he_allows(self, scene: Scene) -> None:
        outcome = execute(scene.logging(argv0_prefixes=("/usr/bin",)), order()).outcome
        assert str(outcome.reason).startswith("CELLOS_RUN_ARGV0_ALLOW_PREFIXES is set but argv[0] is not an absolute path")
        assert scene.types[-3:] == ["summary", "homeostasis", "destroyed"]
        assert "process_spawned" not in scene.types

    def test_a_hardened_host_runs_nothing_without_limits(self, scene: Scene) -> None:
        assert "nothing limits cpu on this host" in str(execute(scene.host(profile="hardened"), order()).outcome.reason)
        scene.backend.isolation = Isolation(backend="fake")
        assert execute(scene.host(profile="hardened"), order("run-2")).outcome.outcome == "succeeded"

    def test_an_interrupt_is_seen_between_artifacts(self, scene: Scene) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"x")
        asked = order(export={"artifacts": [{"name": "a", "path": "a"}]}, **running("file", "a", "x"))
        try:
            stopped = Order(**{name: getattr(asked, name) for name in Order.__struct_fields__} | {"interrupt": reading})
            outcome = execute(scene.host(environment={"CELLOS_EXPORT_DIR": str(scene.path / "out")}), stopped).outcome
        finally:
            os.close(reading)
            os.close(writing)
        assert (outcome.reason, outcome.interrupted) == ("supervisor_terminated", True)
        assert not (scene.path / "out").exists()


class TestReporting:
    def test_labels_and_digest_are_the_operators_and_the_documents(self, scene: Scene) -> None:
        asked = order(authority={"egressRules": [RULE]})
        config = read_config({"CELLOS_TRUST_KEYSET_ID": "mine", "CELLOS_TRUST_RESOLVER_KID": "names", "CELLOS_TRUST_L7_KID": "gates"})
        execute(scene.logging(labels=config.labels), asked)
        targets, decision = scene.data("dns_target_set"), scene.data("l7_egress_decision")
        assert targets["currentDigest"] == decision["policyDigest"] == canonical_spec_hash(asked.document.spec)
        assert (targets["keysetId"], targets["issuerKid"]) == ("mine", "names")
        assert (decision["keysetId"], decision["issuerKid"]) == ("mine", "gates")
        assert scene.data("homeostasis")["specHash"] == targets["currentDigest"]

    def test_the_trust_plane_can_be_turned_off(self, scene: Scene) -> None:
        execute(scene.logging(trust_plane=False), order(authority={"egressRules": [RULE]}))
        assert scene.types[:2] == ["network_scope", "started"]

    def test_addresses_where_they_are_wanted(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        from cellos.supervisor import resolve

        monkeypatch.setattr(resolve, "addresses", lambda host, port: ({"address": "192.0.2.1", "family": "inet", "port": port},))
        execute(scene.logging(resolve_egress=True), order(authority={"egressRules": [RULE]}))
        assert scene.data("dns_resolution")["targets"] == [{"address": "192.0.2.1", "family": "inet", "port": 443}]

    def test_the_gate_of_names(self, scene: Scene) -> None:
        asked = order(authority={"dnsAuthority": {"hostnameAllowlist": ["a.example"]}})
        execute(scene.logging(l7_gate=True), asked)
        assert scene.data("l7_egress_decision")["reasonCode"] == "hostname_allowlist_evaluated"


class TestOutput:
    def test_files_and_events(self, scene: Scene) -> None:
        out = scene.path / "out"
        out.mkdir()
        asked = order(secrets={"TOKEN": "s3cret!"}, authority={"secretRefs": ["TOKEN"]}, **running("environment"))
        execute(scene.logging(output_dir=str(out), output_events=True), asked)
        assert (out / "run-1.stdout").read_text() == "PATH=/usr/bin:/bin:/usr/local/bin\nTOKEN=***\n"
        assert (out / "run-1.stderr").read_text() == ""
        begin = scene.types.index("process_spawned")
        assert scene.types[begin : begin + 4] == ["process_spawned", "output", "network_enforcement", "completed"]
        told = scene.data("command.v1.output")
        assert (told["stream"], told["offset"], told["text"]) == ("stdout", 0, (out / "run-1.stdout").read_text())
        assert "s3cret" not in scene.jsonl.read_text()

    def test_the_cap(self, scene: Scene) -> None:
        execute(scene.logging(output_events=True, output_bytes=3), order(**running("writes", "abcdef")))
        assert scene.data("command.v1.output")["text"] == "abc"
        assert scene.data("command.v1.output")["truncated"] is True

    def test_a_directory_that_is_none_refuses_the_run(self, scene: Scene) -> None:
        with pytest.raises(ConfigError, match="CELLOS_OUTPUT_DIR: /nowhere is no directory; make it"):
            execute(scene.logging(output_dir="/nowhere"), order())
        assert scene.backend.calls == []

    def test_nothing_is_recorded_unasked(self, scene: Scene) -> None:
        execute(scene.logging(), order(**running("writes", "abc")))
        assert "output" not in scene.types
        assert scene.backend.commands[0].on_output is None


class TestArtifacts:
    def test_the_operators_directory(self, scene: Scene) -> None:
        out = scene.path / "out"
        finished = execute(scene.host(environment={"CELLOS_EXPORT_DIR": str(out)}), order(**EXPORT))
        assert [receipt.destination for receipt in finished.outcome.receipts] == ["cell-1/a"]
        assert (out / "cell-1" / "a").read_text() == "x"

    def test_nowhere_to_go_is_refused_before_there_is_a_cell(self, scene: Scene) -> None:
        with pytest.raises(ExportError, match='export requested for artifact "a" but no export sink is configured'):
            execute(scene.logging(), order(**EXPORT))
        assert scene.backend.calls == []
        assert scene.files == []

    def test_what_is_not_followed_is_told(self, scene: Scene) -> None:
        execute(scene.logging(), order(**TARGET))
        text = 'not followed: CELLOS_EXPORT_S3_PRESIGNED_URL__T="" (no presigned URL is configured for target "t")'
        assert scene.warnings == [text]

    def test_and_refused_with_strict_configuration(self, scene: Scene) -> None:
        with pytest.raises(ConfigError) as caught:
            execute(scene.logging(strict=True, dead_letters="/nowhere", nats_url=None), order(**TARGET))
        assert str(caught.value) == (
            "CELLOS_STRICT_CONFIG is set: refusing to start with 3 ignored/misconfigured env var(s): "
            '[CELLOS_EXPORT_S3_PRESIGNED_URL__T="" (no presigned URL is configured for target "t"); '
            'CELLOS_DLQ_DIR="/nowhere" (no such directory; make it, or correct the name); '
            'NATS_URL="nats://127.0.0.1:4222" (nothing listens there, so events are not published; '
            "CELL_OS_USE_NOOP_SINK=1 says that this is meant)]"
        )
        assert scene.backend.calls == []


class TestTokens:
    def test_the_leaf_is_the_authority_of_the_run(self, scene: Scene) -> None:
        made: dict[str, Any] = {
            "roleRoot": "ci",
            "parentRunId": "run-0",
            "leafCapability": {"egressRules": [], "secretRefs": ["A"]},
            "grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="},
        }
        authority = {"egressRules": [RULE], "secretRefs": ["A", "B"], "authorityDerivation": made}
        parsed = order(authority=authority).document.spec.authority.authority_derivation
        assert parsed is not None
        made["grantorSignature"]["bytes"] = b64encode(ROLE_KEY.sign(signed_bytes(parsed))).decode()
        scene.trust = Trust(authority_keys={"ci": b64encode(ROLE_KEY.public_key().public_bytes_raw()).decode()})
        asked = order(secrets={"A": "a", "B": "b"}, authority=authority)
        assert execute(scene.logging(), asked).outcome.outcome == "succeeded"
        assert dict(scene.backend.commands[0].environment).keys() == {"PATH", "A"}
        assert scene.data("network_scope")["egressRuleCount"] == 0
        started = scene.data("started")
        assert (started["derivationVerified"], started["roleRoot"], started["parentRunId"]) == (True, "ci", "run-0")
        assert scene.data("dns_target_set")["currentDigest"] == canonical_spec_hash(asked.document.spec), "of what was submitted"


def pack(**rules: Any) -> Any:
    document = {"apiVersion": "cellos.io/v1", "kind": "PolicyPack", "spec": {"id": "strict", "rules": rules}}
    return read_policy_pack(json.dumps(document).encode(), allow_downgrade=False)


def policy(**spec: Any) -> Any:
    document = {"apiVersion": "cellos.io/v1", "kind": "AuthorizationPolicy", "spec": {"subjects": ["acme"], **spec}}
    return read_authorization_policy(json.dumps(document).encode())


class TestRefusals:
    """Their events belong to no run: no chain links them."""

    @pytest.fixture(autouse=True)
    def strict(self, scene: Scene) -> None:
        scene.trust = Trust(pack=pack(maxLifetimeTtlSeconds=30))

    def test_the_event_is_all_that_there_is(self, scene: Scene) -> None:
        with pytest.raises(Rejected, match=r"^cell spec rejected by policy pack 'strict': maxLifetimeTtlSeconds: "):
            execute(scene.logging(), order())
        assert scene.types == ["rejected"]
        assert "chain" not in scene.events[0]["data"]
        assert scene.backend.calls == []
        assert scene.files == []
        assert scene.warnings == []

    def test_it_is_redacted_and_signed_as_all_others(self, scene: Scene) -> None:
        scene.signer = Signer("k1", ED25519, b"\1" * 32)
        with pytest.raises(Rejected):
            execute(scene.logging(redacted_fields=frozenset({"message"})), order())
        assert scene.types == ["v1"]
        assert scene.events[0]["data"]["event"]["data"]["violations"] == [{"message": "[redacted]", "rule": "maxLifetimeTtlSeconds"}]

    def test_without_a_sink_it_stays(self, scene: Scene) -> None:
        with pytest.raises(Rejected):
            execute(scene.host(), order())
        [name] = scene.files
        assert name.startswith("evidence/")
        assert scene.warnings == [f"events of no run are in {scene.state.path}/{name}"]
        assert b"policy.v1.rejected" in Path(scene.state.path, name).read_bytes()

    def test_that_it_cannot_be_recorded_does_not_hide_it(self, scene: Scene) -> None:
        with pytest.raises(Rejected, match="rejected by policy pack"):
            execute(scene.host(jsonl="/dev/full"), order())
        [name] = scene.files
        assert scene.warnings[0] == f"events of no run are in {scene.state.path}/{name}"
        assert scene.warnings[1].startswith("the refusal could not be recorded: event sink: sink full: /dev/full")

    def test_who_may_not(self, scene: Scene) -> None:
        scene.trust = Trust(policy=policy())
        with pytest.raises(Rejected, match="cell spec rejected by authorization policy: "):
            execute(scene.logging(), order())
        assert scene.data("authz.v1.rejected")["reason"] == "subject_not_authorized"

    def test_the_hour_of_a_tenant(self, scene: Scene) -> None:
        scene.trust = Trust(policy=policy(maxCellsPerHour=2))
        asked = {"correlation": {"tenantId": "acme"}}
        scene.backend.refuses = (Refusal(field="spec.x", why="y"),)
        for _ in range(3):
            with pytest.raises(Unenforceable):
                execute(scene.logging(), order(**asked))
        scene.backend.refuses = ()
        for run_id in ("run-1", "run-2"):
            assert execute(scene.logging(), order(run_id, **asked)).outcome.outcome == "succeeded", "what was refused does not count"
        with pytest.raises(Rejected, match=r"has started 2 cell\(s\) on this host within the last hour"):
            execute(scene.logging(), order("run-3", **asked))
        assert scene.data("authz.v1.rejected")["reason"] == "rate_limit_exceeded"
        assert scene.backend.calls.count("create") == 2

    def test_the_maxima_of_a_pack_are_the_limits_of_who_has_none(self, scene: Scene) -> None:
        scene.trust = Trust(pack=pack(maxRunTimeoutMs=100))
        outcome = execute(scene.logging(), order(**running("sleeps"))).outcome
        assert outcome.reason == "command spawn: command timed out after 100 ms (spec.run.timeoutMs)"


NOTICE = observations.keyset_verified(keyset_id="set-1", payload_digest="sha256:d", signer_kid="a", verified_at="now")


class TestNotices:
    """Events about the trust keyset come first, once."""

    def test_they_come_before_the_first_run(self, scene: Scene) -> None:
        scene.notices = [NOTICE]
        host = scene.logging()
        execute(host, order("run-1"))
        execute(host, order("run-2"))
        assert scene.types[:2] == ["keyset_verified", "network_scope"]
        assert scene.types.count("keyset_verified") == 1
        assert scene.files == []
        report = verify(scene.jsonl.read_bytes().splitlines())
        assert (len(report.runs), report.loose, report.verified) == (2, 1, True)

    def test_also_before_one_that_is_refused(self, scene: Scene) -> None:
        scene.notices = [NOTICE]
        scene.trust = Trust(pack=pack(maxLifetimeTtlSeconds=30))
        with pytest.raises(Rejected):
            execute(scene.logging(), order())
        assert scene.types == ["keyset_verified", "rejected"]

    def test_one_that_cannot_be_recorded_is_the_end(self, scene: Scene) -> None:
        scene.notices = [NOTICE]
        with pytest.raises(EventSinkError, match="sink full"):
            execute(scene.host(jsonl="/dev/full"), order())
        assert scene.backend.calls == []


class FakeForwarder:
    """NATS, which acknowledges what `takes` says."""

    takes = True

    def __init__(self, url: str, subject: str, *, ca_file: str | None = None) -> None:
        self.events: list[tuple[str, bytes]] = []

    def emit(self, event_id: str, line: bytes) -> None:
        self.events.append((event_id, line))

    def connected(self, seconds: float) -> str | None:
        return None

    def finish(self, seconds: float) -> tuple[Undelivered, ...]:
        if self.takes:
            return ()
        return tuple(Undelivered(event_id=event_id, line=line, error="event sink: no stream") for event_id, line in self.events)

    def close(self) -> None: ...


class TestNats:
    @pytest.fixture(autouse=True)
    def server(self, monkeypatch: pytest.MonkeyPatch) -> type[FakeForwarder]:
        made: type[FakeForwarder] = type("Fake", (FakeForwarder,), {})
        monkeypatch.setattr(forward, "Forwarder", made)
        return made

    def test_what_it_has_is_kept_nowhere_else(self, scene: Scene) -> None:
        finished = execute(scene.host(nats_url="nats://h"), order())
        assert (finished.evidence, finished.unacknowledged.events, finished.not_sent()) == (None, 0, None)
        assert scene.files == []

    def test_what_it_does_not_have_waits_in_the_spool(self, scene: Scene, server: type[FakeForwarder]) -> None:
        server.takes = False
        finished = execute(scene.host(nats_url="nats://h"), order())
        assert finished.outcome.outcome == "succeeded", "the run was not at fault"
        assert finished.evidence is not None
        assert scene.files == [os.path.relpath(finished.evidence, scene.state.path)]
        assert finished.evidence.startswith(scene.state.spool)
        assert finished.unacknowledged.error == "event sink: no stream"
        lines = Path(finished.evidence).read_bytes().splitlines()
        assert len(lines) == finished.unacknowledged.events == finished.outcome.events
        assert verify(lines).verified
        told = f"and wait in {finished.evidence}; send them with: cellos spool replay {finished.evidence}"
        assert finished.not_sent() == f"{len(lines)} events were not acknowledged by NATS (event sink: no stream) {told}"

    def test_what_was_required_is_missed(self, scene: Scene, server: type[FakeForwarder]) -> None:
        server.takes = False
        finished = execute(scene.host(nats_url="nats://h", require_jetstream=True), order())
        why = f"event sink: CELL_OS_REQUIRE_JETSTREAM is set and {finished.outcome.events} events were not acknowledged"
        assert (finished.outcome.outcome, finished.outcome.reason) == ("failed", why)

    def test_or_among_the_dead_letters(self, scene: Scene, server: type[FakeForwarder]) -> None:
        server.takes = False
        letters = scene.path / "letters"
        letters.mkdir()
        finished = execute(scene.host(nats_url="nats://h", dead_letters=str(letters)), order())
        assert (finished.evidence, scene.files) == (None, [])
        assert finished.unacknowledged.events == len(os.listdir(letters)) == finished.outcome.events
        assert (finished.not_sent() or "").endswith(f" and are in {letters}")

    def test_a_notice_is_no_dead_letter_twice(self, scene: Scene, server: type[FakeForwarder]) -> None:
        server.takes = False
        letters = scene.path / "letters"
        letters.mkdir()
        scene.notices = [NOTICE]
        finished = execute(scene.host(nats_url="nats://h", dead_letters=str(letters)), order())
        assert len(os.listdir(letters)) == finished.outcome.events + 1
        assert scene.files == []

    def test_what_waits_of_no_run_waits_in_a_file_of_its_own(self, scene: Scene, server: type[FakeForwarder]) -> None:
        server.takes = False
        scene.notices = [NOTICE]
        finished = execute(scene.host(nats_url="nats://h"), order())
        assert finished.evidence is not None
        [other] = {f"{scene.state.path}/{name}" for name in scene.files} - {finished.evidence}
        assert scene.warnings == [f"events of no run are in {other}"]
        assert len(Path(other).read_bytes().splitlines()) == 1
        assert verify(Path(finished.evidence).read_bytes().splitlines()).loose == 0


class TestHost:
    def environment(self, tmp_path: Path, **variables: str) -> Config:
        return read_config({"CELLOS_STATE_DIR": str(tmp_path / "state"), "CELLOS_CELL_BACKEND": "stub", **variables})

    def test_the_stub_says_that_it_isolates_nothing(self, tmp_path: Path) -> None:
        warnings: list[str] = []
        host = open_host(self.environment(tmp_path), None, warnings.append)
        assert host.backend.kind == "stub"
        assert warnings == [compose.STUB_WARNING]
        assert (host.trust, host.signer, host.notices) == (Trust(), None, [])

    def test_linux_needs_a_launcher(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="launcher"):
            open_host(self.environment(tmp_path, CELLOS_CELL_BACKEND="linux"), None, lambda _: None)

    def test_isolation_is_not_asked_of_the_stub(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="CELLOS_CGROUP_MEMORY_MAX asks for isolation, and the stub backend isolates nothing"):
            open_host(self.environment(tmp_path, CELLOS_CGROUP_MEMORY_MAX="1G"), None, lambda _: None)

    def test_the_operators_files_are_read(self, tmp_path: Path) -> None:
        keys = tmp_path / "keys.json"
        keys.write_text('{"ci": "AA=="}')
        host = open_host(self.environment(tmp_path, CELLOS_AUTHORITY_KEYS_PATH=str(keys)), None, lambda _: None)
        assert host.trust.authority_keys == {"ci": "AA=="}

    def test_an_untrusted_keyset_is_a_notice(self, tmp_path: Path) -> None:
        host = open_host(self.environment(tmp_path, CELLOS_TRUST_KEYSET_PATH="/nowhere"), None, lambda _: None)
        assert [draft.type.rpartition(".")[2] for draft in host.notices] == ["keyset_verification_failed"]

    def test_wrong_signing_is_the_end(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="CELLOS_EVENT_SIGNING"):
            open_host(self.environment(tmp_path, CELLOS_EVENT_SIGNING="rsa"), None, lambda _: None)

    def test_backends_that_are_not_built(self, tmp_path: Path) -> None:
        text = "CELLOS_CELL_BACKEND=gvisor: its settings are right, but it is not built yet; known: linux, stub"
        config = self.environment(tmp_path, CELLOS_CELL_BACKEND="gvisor", CELLOS_GVISOR_BUNDLE_ROOT=str(tmp_path))
        assert refuse_backend(config) == text
        with pytest.raises(ConfigError) as caught:
            open_host(config, None, lambda _: None)
        assert str(caught.value) == text
        with pytest.raises(ConfigError, match=r"^firecracker backend init: CELLOS_FIRECRACKER_BINARY must be set"):
            open_host(self.environment(tmp_path, CELLOS_CELL_BACKEND="firecracker"), None, lambda _: None)


class TestBrokers:
    @pytest.mark.parametrize(
        ("environment", "name"),
        [
            ({}, "memory"),
            ({"CELLOS_BROKER": "memory"}, "memory"),
            ({"CELLOS_BROKER": "env"}, "env"),
            ({"CELLOS_BROKER": "file"}, "file"),
            (
                {"CELLOS_BROKER": "github-oidc", "ACTIONS_ID_TOKEN_REQUEST_URL": "https://x", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "t"},
                "github-oidc",
            ),
        ],
    )
    def test_by_name(self, environment: dict[str, str], name: str) -> None:
        assert make_broker(read_config(environment)).name == name

    def test_secrets_come_from_the_environment(self) -> None:
        broker = make_broker(read_config({"CELLOS_BROKER": "env", "CELLOS_SECRET_MY_TOKEN": "s3cret"}))
        assert broker.resolve("my-token", cell_id="c") == "s3cret"

    def test_vault_is_not_built(self) -> None:
        with pytest.raises(ConfigError, match="CELLOS_VAULT_ADDR not set"):
            make_broker(read_config({"CELLOS_BROKER": "vault-approle"}))
        settings = {"CELLOS_VAULT_ADDR": "https://v", "CELLOS_VAULT_ROLE_ID": "r", "CELLOS_VAULT_SECRET_ID": "s"}
        with pytest.raises(ConfigError) as caught:
            make_broker(read_config({"CELLOS_BROKER": "vault-approle", **settings}))
        assert str(caught.value) == (
            "CELLOS_BROKER=vault-approle: its settings are right, but it is not built yet; known: env, file, github-oidc"
        )


class TestSigner:
    @pytest.mark.parametrize("word", ["", "off", " OFF "])
    def test_off(self, word: str) -> None:
        assert read_signer(read_config({"CELLOS_EVENT_SIGNING": word})) is None

    def test_on(self) -> None:
        variables = {"CELLOS_EVENT_SIGNING": "ed25519", "CELLOS_EVENT_SIGNING_KID": "k1"}
        signer = read_signer(read_config({**variables, "CELLOS_EVENT_SIGNING_KEY_BASE64": encode_url(b"\1" * 32)}))
        assert signer is not None
        assert (signer.kid, signer.algorithm) == ("k1", "ed25519")


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
