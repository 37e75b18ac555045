"""Events: the CloudEvents 1.0 envelope, its canonical bytes, and a constructor for each event of a run.

Canonical bytes are what is hashed, signed and written: compact UTF-8 JSON, the eight members always present (null when absent) in the
order of `Event`, members of `data` sorted by code point at every depth, numbers as the shortest text that reads back the same
(`1e-7`, `1e16`). One event has exactly one such form.

Constructors give a `Draft`, a type and its data. The emitter of the run adds identity, time and the link to the event before it. Here are
those of a run's course; what a run reports beside it is in core/observations.py.
"""

# Annotations are evaluated at once: msgspec would otherwise evaluate each as text, and start-up time counts here.
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from cellos.errors import EvidenceError

SOURCE = "cellos-supervisor"
SIGNING_SOURCE = "/cellos-supervisor/event-signing"
PREFIX = "dev.cellos.events.cell."
# What is emitted is listed, with its data, in docs/reference/events.md.
STARTED = PREFIX + "lifecycle.v1.started"
DESTROYED = PREFIX + "lifecycle.v1.destroyed"
PROCESS_SPAWNED = PREFIX + "observability.v1.process_spawned"
FS_TOUCH = PREFIX + "observability.v1.fs_touch"
COMMAND_COMPLETED = PREFIX + "command.v1.completed"
EXPORT_COMPLETED = PREFIX + "export.v2.completed"
EXPORT_FAILED = PREFIX + "export.v2.failed"
SIGNED_ENVELOPE = "dev.cellos.events.signed_envelope.v1"

NO_EXIT_CODE = -1
"""The wire's exit code of a command that has none: ended by a signal or a deadline, or never started."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One CloudEvent. The order of the members is the order on the wire."""

    specversion: str = "1.0"
    id: str
    source: str
    type: str
    datacontenttype: str | None = None
    data: Any = None
    time: str | None = None
    traceparent: str | None = None

    @property
    def members(self) -> Mapping[str, Any]:
        """`data` where it is an object, as every producer of ours writes it; otherwise empty."""
        return self.data if isinstance(self.data, dict) else {}


class SignedEnvelope(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An event with a signature over its canonical bytes. Nothing but the event itself is signed."""

    event: Event
    signer_kid: str
    algorithm: str
    signature: str
    not_before: str | None = None
    not_after: str | None = None


class Draft(msgspec.Struct, frozen=True):
    """What happened, not yet an event."""

    type: str
    data: dict[str, Any]


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What every event of a run says about the run. `correlation` and `placement` are in wire form; `spec_hash` is 64 hex digits."""

    cell_id: str
    spec_id: str
    run_id: str
    spec_hash: str
    correlation: Mapping[str, Any] | None = None
    tenant_id: str | None = None
    placement: Mapping[str, Any] | None = None


class Delivery(Protocol):
    """Proof of one delivered artifact (`cellos.ports.Receipt`)."""

    @property
    def target_kind(self) -> str: ...
    @property
    def target_name(self) -> str | None: ...
    @property
    def destination(self) -> str: ...
    @property
    def bytes_written(self) -> int: ...


class Remainder(Protocol):
    """Something of a cell that is still there (`cellos.ports.Residue`)."""

    @property
    def kind(self) -> str: ...
    @property
    def detail(self) -> str: ...


_ENCODER = msgspec.json.Encoder(order="deterministic")
_EVENT = msgspec.json.Decoder(Event)


def canonical_bytes(event: Event) -> bytes:
    """The bytes of an event: hashed, signed and written. Numbers must be finite, integers within 64 bits."""
    return _ENCODER.encode(event)


def parse_event(line: bytes) -> Event:
    """Read one event; a signed one is unwrapped, its signature is not looked at. Raises EvidenceError."""
    event, _ = parse_signed(line)
    return event


def parse_signed(line: bytes) -> tuple[Event, SignedEnvelope | None]:
    """Read one event and the envelope it came in, if any: the wrapping CloudEvent or the bare envelope.

    Members of the envelope that are not ours are dropped, as CloudEvents has extensions: they are no part of the canonical bytes, so
    nothing may depend on them. Raises EvidenceError for anything that is not an event.
    """
    event, envelope, _ = read_line(line)
    return event, envelope


def read_line(line: bytes) -> tuple[Event, SignedEnvelope | None, bool]:
    """Like `parse_signed`, and whether the line is, byte for byte, the form in which we write that event."""
    try:
        outer = _EVENT.decode(line)
        if outer.type != SIGNED_ENVELOPE:
            return outer, None, _ENCODER.encode(outer) == line
        envelope = msgspec.convert(outer.data, SignedEnvelope)
        inner = envelope.event
        ours = _ENCODER.encode(outer) == line and outer == Event(
            id=inner.id,
            source=SIGNING_SOURCE,
            type=SIGNED_ENVELOPE,
            datacontenttype="application/json",
            data=outer.data,
            time=inner.time,
            traceparent=inner.traceparent,
        )
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        bare = _bare_envelope(line)
        if bare is None:
            raise EvidenceError(f"not an event: {error}") from error
        envelope, ours = bare, True
    if envelope.event.type == SIGNED_ENVELOPE:
        raise EvidenceError("not an event: a signed envelope inside a signed envelope")
    return envelope.event, envelope, ours


def _bare_envelope(line: bytes) -> SignedEnvelope | None:
    try:
        return msgspec.json.decode(line, type=SignedEnvelope)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def finished(draft: Draft, *, event_id: str, time: str) -> Event:
    """The event of a draft whose data is final. `time` as `ids.rfc3339` writes it."""
    return Event(id=event_id, source=SOURCE, type=draft.type, datacontenttype="application/json", data=draft.data, time=time)


def started(
    run: RunIdentity,
    *,
    ttl_seconds: int,
    isolation: Mapping[str, Any],
    derivation: Mapping[str, Any] | None = None,
) -> Draft:
    """The cell is complete and about to run. `isolation` says what holds it; its members stand beside ours and never replace them.

    `derivation`: what a verified token says of the run's authority: derivationVerified, roleRoot, parentRunId.
    """
    data = {**isolation, **(derivation or {}), **about(run), "ttlSeconds": ttl_seconds, "specHash": run.spec_hash}
    if run.placement:
        data["placement"] = run.placement
    return Draft(STARTED, _with_tenant(run, data))


def process_spawned(run: RunIdentity, *, program: str, argc: int) -> Draft:
    """The command was executed."""
    return Draft(PROCESS_SPAWNED, {**about(run), "program": program, "argc": argc})


def command_completed(
    run: RunIdentity,
    *,
    argv: Sequence[str],
    exit_code: int | None,
    duration_ms: int,
    spawn_error: str | None = None,
    signal: int | None = None,
    oom_killed: bool = False,
    output_lost: bool = False,
) -> Draft:
    """The command and its whole tree are gone. The exit code is -1 with a signal or a `spawn_error` (which a deadline is, too).

    `oom_killed`: the kernel killed something in the cell for want of memory. `output_lost`: what it wrote was not read in time. Both are
    written only where they are true.
    """
    has_code = exit_code is not None and spawn_error is None and signal is None
    data = {
        **about(run),
        "argv": list(argv),
        "exitCode": exit_code if has_code else NO_EXIT_CODE,
        "durationMs": duration_ms,
        **present(spawnError=spawn_error, signal=signal, oomKilled=oom_killed or None, outputLost=output_lost or None),
    }
    return Draft(COMMAND_COMPLETED, data)


def fs_touch(run: RunIdentity, *, source_path: str, artifact_name: str) -> Draft:
    """An artifact is about to be read."""
    return Draft(FS_TOUCH, {**about(run), "purpose": "export", "sourcePath": source_path, "artifactName": artifact_name})


def export_completed(run: RunIdentity, *, artifact_name: str, receipt: Delivery, provenance: str | None) -> Draft:
    """An artifact was delivered. `provenance` is the id of the run's `started` event."""
    wire_receipt = {
        "targetKind": receipt.target_kind,
        "targetName": receipt.target_name,
        "destination": receipt.destination,
        "bytesWritten": receipt.bytes_written,
    }
    data = {**about(run), "artifactName": artifact_name, "receipt": wire_receipt, **provenance_of(provenance)}
    return Draft(EXPORT_COMPLETED, data)


def export_failed(
    run: RunIdentity,
    *,
    artifact_name: str,
    target_kind: str,
    reason: str,
    target_name: str | None = None,
    destination: str | None = None,
    provenance: str | None = None,
) -> Draft:
    """An artifact could not be read or delivered."""
    data = {
        **about(run),
        "artifactName": artifact_name,
        "targetKind": target_kind,
        "reason": reason,
        **present(targetName=target_name, destination=destination),
        **provenance_of(provenance),
    }
    return Draft(EXPORT_FAILED, data)


def destroyed(
    run: RunIdentity,
    *,
    ttl_seconds: int,
    outcome: str,
    reason: str | None = None,
    residue_class: str,
    residue_exception: Sequence[Remainder] = (),
) -> Draft:
    """The cell is gone, the last event of its run. `outcome` is succeeded or failed, `reason` the first error.

    `residue_class` is none, or documented_exception with what stayed.
    """
    data = {
        **about(run),
        "ttlSeconds": ttl_seconds,
        "outcome": outcome,
        "residueClass": residue_class,
        **present(reason=reason),
    }
    if residue_exception:
        data["residueException"] = [{"kind": each.kind, "detail": each.detail} for each in residue_exception]
    return Draft(DESTROYED, _with_tenant(run, data))


def about(run: RunIdentity) -> dict[str, Any]:
    """The members that nearly every event of a run has."""
    data: dict[str, Any] = {"cellId": run.cell_id, "specId": run.spec_id, "runId": run.run_id}
    if run.correlation is not None:
        data["correlation"] = run.correlation
    return data


def _with_tenant(run: RunIdentity, data: dict[str, Any]) -> dict[str, Any]:
    return data if run.tenant_id is None else {**data, "tenantId": run.tenant_id}


def present(**members: object) -> dict[str, object]:
    """Those that are not None: an absent member is left out, not null."""
    return {name: value for name, value in members.items() if value is not None}


def provenance_of(started_id: str | None) -> dict[str, Any]:
    """The run's `started` event as the origin of another."""
    return {} if started_id is None else {"provenance": {"parent": started_id, "parentType": STARTED}}
