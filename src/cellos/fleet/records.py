"""The documents that agents write beside the specs: claims, leases, receipts, and what an agent says of itself."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from cellos.errors import RecordDamaged
from cellos.fleet.layout import Outcome

MOST_BYTES = 8 << 20
"""No record is longer: a claim holds a spec of at most 1 MiB in base64."""
INVALID_SPEC, CANNOT_START = "invalid_spec", "cannot_start"
"""Reasons of an end that no run's own record tells."""


class Record(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """`token` is drawn for one write only: who finds it in the bucket knows that the write was its own."""

    token: str
    node: str
    life: str


class Claim(Record, frozen=True, kw_only=True):
    """It stands for the first lease until there is one of its own. It is never changed."""

    lease_ms: int
    claimed_at: str
    spec: bytes | None = None
    """What was submitted; None where it was too large to be read."""
    fault: str | None = None
    """Why it can never be run."""


class Lease(Record, frozen=True, kw_only=True):
    """`started`: its holder has started the cell of this attempt, or was about to. It never becomes false again."""

    lease_ms: int
    attempt: int
    started: bool = False
    run_id: str | None = None


class EventDigest(msgspec.Struct, frozen=True, kw_only=True):
    """The events of a run as its supervisor wrote them: how many, and the SHA-256 of their lines, each with its line feed."""

    count: int
    sha256: str


class Receipt(Record, frozen=True, kw_only=True):
    """The end of an attempt, and the only thing that ends one. `again`: another attempt follows by itself."""

    id: str
    attempt: int
    epoch: int
    outcome: Outcome
    written_at: str
    reason: str | None = None
    """A word: invalid_spec, agent_lost, cannot_start, or what the run's own record says."""
    detail: str | None = None
    again: bool = False
    exit_code: int | None = None
    run_id: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    spec_sha256: str | None = None
    events: EventDigest | None = None


class Again(Record, frozen=True, kw_only=True):
    """Somebody asked for another attempt."""

    asked_at: str


class AgentState(Record, frozen=True, kw_only=True):
    """What an agent says of itself, at every heartbeat."""

    pool: str
    slots: int
    slots_free: int
    heartbeat_ms: int = 30_000
    draining: bool
    started_at: str
    store: str
    """`ok`, or what is wrong with the store."""
    version: str


_R = TypeVar("_R", bound=Record)
_encoder = msgspec.json.Encoder(order="deterministic")


class _Token(msgspec.Struct):
    token: str = ""


_token = msgspec.json.Decoder(_Token).decode


def encode(record: Record) -> bytes:
    return _encoder.encode(record)


def decode(kind: type[_R], body: bytes, key: str) -> _R:
    """Raises RecordDamaged for what no agent of ours wrote."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        what = f"{key} is no {kind.__name__.lower()} of ours ({error})"
        raise RecordDamaged(f"{what}; does another program use this prefix? If not, it is damaged: remove this object") from error


def token_of(body: bytes) -> Any:
    """Whose write it was; empty for what is no record."""
    try:
        return _token(body).token
    except msgspec.DecodeError:
        return ""
