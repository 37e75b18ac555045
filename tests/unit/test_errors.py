"""Codes and prefixes of errors are part of the interface: programs match the codes, people grep for the texts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellos import errors
from cellos.core.problem import problem
from cellos.errors import ArgvTooLarge, CellosError, HostBackendError, InvalidSpec, MissingPrimitive, SpecSyntaxError, Unenforceable

PRINTED = {
    InvalidSpec("x"): ("invalid_spec", "invalid cell specification: x"),
    SpecSyntaxError("x", line=1, column=2): ("spec_syntax", "parse ExecutionCellDocument: x"),
    ArgvTooLarge(encoded_bytes=9, limit_bytes=8): (
        "argv_too_large",
        "spec.run.argv encoded is 9 bytes; exceeds the backend's limit of 8 bytes",
    ),
    Unenforceable(field="spec.x", why="nothing does"): ("unenforceable", "cannot enforce: spec.x: nothing does"),
    MissingPrimitive(primitive="a", why="b", cure="c"): ("missing_primitive", "host backend: a: b; c"),
    errors.ConfigError("x"): ("config", "x"),
    HostBackendError("x"): ("host_backend", "host backend: x"),
    errors.EventSinkError("x"): ("event_sink", "event sink: x"),
    errors.EventRefused("x"): ("event_refused", "event sink: x"),
    errors.ProtocolError("x"): ("nats_protocol", "event sink: x"),
    errors.SecretBrokerError("x"): ("secret_broker", "secret broker: x"),
    errors.ExportError("x"): ("export_sink", "export sink: x"),
    errors.LifecycleError("x"): ("lifecycle", "lifecycle: x"),
    errors.EvidenceError("x"): ("evidence", "evidence: x"),
    errors.SnapshotError("x"): ("snapshot", "cannot use the snapshot: x"),
    errors.SnapshotDamaged("x"): ("snapshot_damaged", "cannot use the snapshot: x"),
    errors.SnapshotNewer("x"): ("snapshot_newer", "cannot use the snapshot: x"),
    errors.SnapshotForeign("x"): ("snapshot_foreign", "cannot use the snapshot: x"),
    errors.FormationRejected(problem("formation/cycle", "x")): ("formation_rejected", "formation rejected: x"),
    errors.EventLogError("x"): ("event_log", "event log: x"),
    errors.LogUnreachable("x"): ("log_unreachable", "event log: x"),
    errors.OutcomeUnknown("x"): ("outcome_unknown", "event log: x"),
    errors.WrongSequence("x"): ("wrong_sequence", "event log: x"),
    errors.DuplicateInBatch("x"): ("duplicate_in_batch", "event log: x"),
    errors.LogTooOld("x"): ("log_too_old", "event log: x"),
    errors.NoStream("x"): ("no_stream", "event log: x"),
    errors.LogFull("x"): ("log_full", "event log: x"),
    errors.MessageRefused("x"): ("message_refused", "event log: x"),
    errors.Rebuild("x", reason="floor"): ("rebuild", "event log: x"),
    errors.ServerError("x"): ("server", "server: x"),
    errors.ServerUnreachable("x"): ("server_unreachable", "server: x"),
    errors.ServerProblem(problem("not-found", "x")): ("server_problem", "server: Not Found: x"),
    errors.CursorExpired("x", oldest=1): ("cursor_expired", "server: x"),
    errors.StoreError("x"): ("store", "object store: x"),
    errors.StoreUnreachable("x"): ("store_unreachable", "object store: x"),
    errors.RecordDamaged("x"): ("record_damaged", "object store: x"),
    errors.StoreUnfit("x"): ("store_unfit", "object store: x"),
    errors.LeaseLost("x"): ("lease_lost", "object store: x"),
    errors.FleetError("x"): ("fleet", "x"),
}


@pytest.mark.parametrize(("error", "expected"), PRINTED.items(), ids=lambda value: getattr(value, "code", None))
def test_code_and_printed_form(error: CellosError, expected: tuple[str, str]) -> None:
    assert (error.code, str(error)) == expected


def test_no_error_is_missing_here_and_no_code_stands_for_two() -> None:
    def below(kind: type[CellosError]) -> Iterator[type[CellosError]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    public = {kind for kind in below(CellosError) if kind.__module__ == errors.__name__}
    assert public == {type(error) for error in PRINTED}
    assert len({kind.code for kind in public}) == len(public)


@pytest.mark.parametrize("name", ["Any", "NoSuchError"])
def test_what_is_no_error_is_not_handed_out(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'cellos.errors' has no attribute '{name}'"):
        getattr(errors, name)
