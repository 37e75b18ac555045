import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core import events
from cellos.core.events import Draft, Event, RunIdentity, canonical_bytes, parse_event, parse_signed, read_line
from cellos.errors import EvidenceError

GOLDEN = Path(__file__).parents[2] / "golden" / "events"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
EVENTS = st.builds(
    Event,
    id=TEXT,
    source=TEXT,
    type=TEXT.filter(lambda text: text != events.SIGNED_ENVELOPE),
    datacontenttype=st.none() | TEXT,
    data=JSON,
    time=st.none() | TEXT,
    traceparent=st.none() | TEXT,
)
RUN = RunIdentity(cell_id="demo-build", spec_id="demo-build", run_id="run-0042", spec_hash="f2" * 32)
FULL_RUN = RunIdentity(
    cell_id="demo-build",
    spec_id="demo-build",
    run_id="run-0042",
    spec_hash="f2" * 32,
    correlation={
        "platform": "custom",
        "externalRunId": None,
        "externalJobId": None,
        "labels": None,
        "tenantId": "acme",
        "correlationId": "corr-7",
    },
    tenant_id="acme",
    placement={"poolId": "pool-a"},
)
ABOUT = {"cellId": "demo-build", "specId": "demo-build", "runId": "run-0042"}


@dataclass(frozen=True)
class Receipt:
    target_kind: str = "local"
    target_name: str | None = None
    destination: str = "demo-build/out.txt"
    bytes_written: int = 6


@dataclass(frozen=True)
class Residue:
    kind: str
    detail: str


class TestCanonicalBytes:
    def test_vector(self) -> None:
        """369 bytes whose digest and signature other implementations agree on."""
        event = Event(
            id="11111111-2222-4333-8444-555555555555",
            source="cellos-supervisor",
            type="dev.cellos.events.cell.command.v1.completed",
            datacontenttype="application/json",
            data={"specId": "demo", "runId": "run-1", "exitCode": 0, "durationMs": 12, "cellId": "demo", "argv": ["/bin/echo", "café ✓\n"]},
            time="2026-01-02T03:04:05.000000006+00:00",
        )
        line = canonical_bytes(event)
        assert len(line) == 369
        assert hashlib.sha256(line).hexdigest() == "03e2f8a3f0cf9cd33c995076ab05a3fe2e17cd5e93bf52f7fffd00ae32efe85d"

    def test_eight_members_in_order_and_nulls_kept(self) -> None:
        line = canonical_bytes(Event(id="1", source="s", type="t"))
        assert (
            line
            == b'{"specversion":"1.0","id":"1","source":"s","type":"t","datacontenttype":null,"data":null,"time":null,"traceparent":null}'
        )

    def test_data_is_sorted_by_code_point_at_every_depth(self) -> None:
        data = {"\U0001f600": 1, "\uffff": 2, "é": 3, "z": 4, "a": [{"b": 1, "B": 2}], "aa": 5, "": 6}
        assert list(json.loads(canonical_bytes(Event(id="1", source="s", type="t", data=data)))["data"]) == sorted(data)
        assert b'[{"B":2,"b":1}]' in canonical_bytes(Event(id="1", source="s", type="t", data=data))

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (1e-7, b"1e-7"),
            (1e16, b"1e16"),
            (1e15, b"1000000000000000.0"),
            (1.0, b"1.0"),
            (1e-5, b"0.00001"),
            (2.5e300, b"2.5e300"),
            (5e-324, b"5e-324"),
            (-0.0, b"-0.0"),
            (2**64 - 1, b"18446744073709551615"),
            (-(2**63), b"-9223372036854775808"),
            ('\x00\x1f\x7f\b\f\n\r\t"\\/\u2028é', b'"\\u0000\\u001f\x7f\\b\\f\\n\\r\\t\\"\\\\/\xe2\x80\xa8\xc3\xa9"'),
        ],
    )
    def test_values(self, value: object, text: bytes) -> None:
        assert b'"data":' + text + b"," in canonical_bytes(Event(id="1", source="s", type="t", data=value))

    @given(EVENTS)
    def test_what_is_written_reads_back_and_writes_the_same(self, event: Event) -> None:
        line = canonical_bytes(event)
        again, envelope, ours = read_line(line)
        assert (again, envelope, ours) == (event, None, True)
        assert canonical_bytes(again) == line

    @given(EVENTS)
    def test_it_is_what_the_standard_library_writes_but_for_exponents(self, event: Event) -> None:
        members = {name: getattr(event, name) for name in event.__struct_fields__}
        members["data"] = json.loads(json.dumps(event.data, sort_keys=True))
        if not _has_exponent(event.data):
            assert canonical_bytes(event) == json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()

    @given(EVENTS, st.randoms())
    def test_order_and_white_space_in_transit_do_not_matter(self, event: Event, random: Any) -> None:
        members = list(json.loads(canonical_bytes(event)).items())
        random.shuffle(members)
        line = json.dumps(dict(members), indent=1).encode()
        assert canonical_bytes(parse_event(line)) == canonical_bytes(event)
        assert read_line(line)[2] is False


def _has_exponent(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and "e" in repr(value)
    if isinstance(value, dict):
        return any(map(_has_exponent, value.values()))
    return isinstance(value, list) and any(map(_has_exponent, value))


class TestParse:
    def test_unknown_members_of_the_envelope_are_dropped(self) -> None:
        line = b'{"specversion":"1.0","id":"1","source":"s","type":"t","subject":"x","myextension":1}'
        assert parse_event(line) == Event(id="1", source="s", type="t")

    def test_data_may_be_anything(self) -> None:
        event = parse_event(b'{"specversion":"1.0","id":"1","source":"s","type":"t","data":[1]}')
        assert event.data == [1]
        assert event.members == {}

    @pytest.mark.parametrize("path", sorted((GOLDEN / "malformed").iterdir()), ids=lambda path: path.stem)
    def test_malformed(self, path: Path) -> None:
        with pytest.raises(EvidenceError, match=r"^evidence: not an event: .") as raised:
            parse_event(path.read_bytes().removesuffix(b"\n"))
        assert "\n" not in str(raised.value)

    def test_deep_nesting_is_an_error_like_any_other(self) -> None:
        line = b'{"specversion":"1.0","id":"1","source":"s","type":"t","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        with pytest.raises(EvidenceError, match="not an event"):
            parse_event(line)

    def test_signed_wrapper(self) -> None:
        line = (GOLDEN / "signed-wrapper.jsonl").read_bytes().removesuffix(b"\n")
        event, envelope, ours = read_line(line)
        assert ours
        assert hashlib.sha256(canonical_bytes(event)).hexdigest() == "03e2f8a3f0cf9cd33c995076ab05a3fe2e17cd5e93bf52f7fffd00ae32efe85d"
        assert envelope is not None
        assert (envelope.signer_kid, envelope.algorithm, envelope.not_before) == ("k1", "ed25519", None)
        assert parse_event(line) == event

    def test_bare_signed_envelope(self) -> None:
        wrapper = json.loads((GOLDEN / "signed-wrapper.jsonl").read_bytes())
        event, envelope = parse_signed(json.dumps(wrapper["data"]).encode())
        assert event.type == events.COMMAND_COMPLETED
        assert envelope is not None
        assert envelope.signature.startswith("BPGrEDlE")

    def test_wrapper_that_names_another_event(self) -> None:
        wrapper = json.loads((GOLDEN / "signed-wrapper.jsonl").read_bytes())
        line = json.dumps({**wrapper, "id": "another"}, ensure_ascii=False, separators=(",", ":")).encode()
        assert read_line(line)[2] is False


def written(draft: Draft) -> dict[str, Any]:
    event = events.finished(draft, event_id="id", time="2026-03-01T10:00:00.004000001+00:00")
    envelope: dict[str, Any] = json.loads(canonical_bytes(event))
    assert {**envelope, "data": 0} == {
        "specversion": "1.0",
        "id": "id",
        "source": "cellos-supervisor",
        "type": draft.type,
        "datacontenttype": "application/json",
        "data": 0,
        "time": "2026-03-01T10:00:00.004000001+00:00",
        "traceparent": None,
    }
    data: dict[str, Any] = envelope["data"]
    return data


class TestConstructors:
    def test_started(self) -> None:
        draft = events.started(
            RUN, ttl_seconds=300, isolation={"backend": "linux", "enforced": ["pid"], "limits": {"pids": 64}, "unbounded": []}
        )
        assert draft.type == "dev.cellos.events.cell.lifecycle.v1.started"
        expected = {
            "backend": "linux",
            "enforced": ["pid"],
            "limits": {"pids": 64},
            "unbounded": [],
            "ttlSeconds": 300,
            "specHash": "f2" * 32,
        }
        assert written(draft) == ABOUT | expected

    def test_isolation_never_replaces_what_binds_the_event(self) -> None:
        data = written(events.started(RUN, ttl_seconds=1, isolation={"cellId": "x", "runId": "y", "specHash": "z", "ttlSeconds": 9}))
        assert data == ABOUT | {"ttlSeconds": 1, "specHash": "f2" * 32}

    def test_context_of_the_run(self) -> None:
        common = ABOUT | {"correlation": FULL_RUN.correlation}
        started = written(events.started(FULL_RUN, ttl_seconds=300, isolation={}))
        assert started == common | {"ttlSeconds": 300, "specHash": "f2" * 32, "placement": {"poolId": "pool-a"}, "tenantId": "acme"}
        assert written(events.process_spawned(FULL_RUN, program="/bin/sh", argc=3)) == common | {"program": "/bin/sh", "argc": 3}
        destroyed = written(events.destroyed(FULL_RUN, ttl_seconds=300, outcome="succeeded", residue_class="none"))
        assert destroyed == common | {"ttlSeconds": 300, "outcome": "succeeded", "residueClass": "none", "tenantId": "acme"}

    def test_empty_placement_is_left_out_and_an_empty_correlation_kept(self) -> None:
        run = RunIdentity(cell_id="c", spec_id="s", run_id="r", spec_hash="0" * 64, correlation={}, placement={})
        data = written(events.started(run, ttl_seconds=1, isolation={}))
        assert "placement" not in data
        assert data["correlation"] == {}

    def test_command_completed(self) -> None:
        draft = events.command_completed(RUN, argv=("/bin/sh", "-c", "exit 3"), exit_code=3, duration_ms=4)
        assert draft.type == "dev.cellos.events.cell.command.v1.completed"
        assert written(draft) == ABOUT | {"argv": ["/bin/sh", "-c", "exit 3"], "exitCode": 3, "durationMs": 4}

    def test_what_is_told_of_a_command_only_where_it_is_so(self) -> None:
        data = written(events.command_completed(RUN, argv=["x"], exit_code=0, duration_ms=4, oom_killed=True, output_lost=True))
        assert (data["oomKilled"], data["outputLost"]) == (True, True)

    @pytest.mark.parametrize(
        "end", [{"signal": 9}, {"spawn_error": "No such file or directory"}, {"signal": 9, "spawn_error": "timed out"}]
    )
    @pytest.mark.parametrize("exit_code", [None, 0, 137])
    def test_a_command_that_did_not_exit_has_no_exit_code(self, end: dict[str, Any], exit_code: int | None) -> None:
        data = written(events.command_completed(RUN, argv=["x"], exit_code=exit_code, duration_ms=4, **end))
        assert data["exitCode"] == -1
        assert data.get("signal") == end.get("signal")
        assert data.get("spawnError") == end.get("spawn_error")

    def test_exports(self) -> None:
        touch = events.fs_touch(RUN, source_path="out.txt", artifact_name="out")
        assert touch.type == "dev.cellos.events.cell.observability.v1.fs_touch"
        assert written(touch) == ABOUT | {"purpose": "export", "sourcePath": "out.txt", "artifactName": "out"}
        provenance = {"provenance": {"parent": "id-4", "parentType": "dev.cellos.events.cell.lifecycle.v1.started"}}
        receipt = {"targetKind": "local", "targetName": None, "destination": "demo-build/out.txt", "bytesWritten": 6}
        done = events.export_completed(RUN, artifact_name="out", receipt=Receipt(), provenance="id-4")
        assert done.type == "dev.cellos.events.cell.export.v2.completed"
        assert written(done) == ABOUT | {"artifactName": "out", "receipt": receipt} | provenance
        failed = events.export_failed(RUN, artifact_name="out", target_kind="s3", target_name="b", reason="no", provenance="id-4")
        assert failed.type == "dev.cellos.events.cell.export.v2.failed"
        assert written(failed) == ABOUT | {"artifactName": "out", "targetKind": "s3", "targetName": "b", "reason": "no"} | provenance
        without_started = events.export_completed(RUN, artifact_name="out", receipt=Receipt(), provenance=None)
        assert "provenance" not in without_started.data

    def test_destroyed_names_what_stayed(self) -> None:
        draft = events.destroyed(
            RUN,
            ttl_seconds=1,
            outcome="failed",
            reason="command exited with status 3",
            residue_class="documented_exception",
            residue_exception=[Residue("mount", "/run/x")],
        )
        assert written(draft) == ABOUT | {
            "ttlSeconds": 1,
            "outcome": "failed",
            "reason": "command exited with status 3",
            "residueClass": "documented_exception",
            "residueException": [{"kind": "mount", "detail": "/run/x"}],
        }
