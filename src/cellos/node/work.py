"""What a `dispatched` event asks for, read into a document that can be run. Pure.

The document is the member's spec with the id of its cell, as compact JSON with sorted members: its SHA-256 is the run's `specHash`, so that
whoever has the event can tell what was run.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from cellos.core.documents import ExecutionCell, parse_execution_cell, raw_spec_hash
from cellos.core.documents.execution_cell import API_VERSION, KIND
from cellos.core.events import RunIdentity, parse_event
from cellos.core.formation.members import cell_id
from cellos.core.formation.runs import DISPATCHED, Attempt, attempt_of
from cellos.core.need import Need, need_of
from cellos.errors import EvidenceError, InvalidSpec
from cellos.supervisor.compose import run_identity

_ENCODER = msgspec.json.Encoder(order="deterministic")


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that somebody is to run. Without a `document` nobody can: `fault` says why."""

    attempt: Attempt
    pool: str
    on_disconnect: Literal["kill", "finish"]
    spec_hash: str
    document: ExecutionCell | None = None
    fault: str | None = None
    need: Need = Need()
    formation_name: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What the program is told of its place: which formation, which member, and which try it is, from 1."""
        return {
            "CELLOS_FORMATION": self.formation_name,
            "CELLOS_MEMBER_ID": self.attempt.member_id,
            "CELLOS_ATTEMPT": str(self.attempt.number),
            "CELLOS_CELL_ID": cell_id(self.attempt.formation_id, self.attempt.member_id),
        }

    def identity(self, run_id: str) -> RunIdentity:
        """What every event of the run says about it: formation and member are part of the correlation."""
        formation, member, _ = self.attempt
        placed = {"formationId": formation, "memberId": member}
        if self.document is None:
            cell = cell_id(formation, member)
            return RunIdentity(cell_id=cell, spec_id=cell, run_id=run_id, spec_hash=self.spec_hash, correlation=placed)
        run = run_identity(self.document.spec, self.spec_hash, run_id)
        return msgspec.structs.replace(run, correlation={**(run.correlation or {}), **placed})


class _Dispatched(msgspec.Struct, rename="camel"):
    """The members of its data that matter here."""

    pool: str
    spec: dict[str, Any]
    on_disconnect: Literal["kill", "finish"] = "kill"
    formation_name: str = ""


def read_work(subject: str, line: bytes, *, allow_unknown_fields: bool = False) -> Work:
    """Of a message of the work queue. Raises EvidenceError where it asks for nothing that anybody could claim."""
    attempt = attempt_of(subject)
    event = parse_event(line)
    if attempt is None or event.type != DISPATCHED:
        raise EvidenceError(f"{subject}: a {event.type} is no work")
    try:
        data = msgspec.convert(event.data, _Dispatched)
    except msgspec.ValidationError as error:
        raise EvidenceError(f"{subject}: not a dispatch: {error}") from error
    raw = _ENCODER.encode({"apiVersion": API_VERSION, "kind": KIND, "spec": {**data.spec, "id": cell_id(*attempt[:2])}})
    digest = raw_spec_hash(raw)
    try:
        document = parse_execution_cell(raw, allow_unknown_fields=allow_unknown_fields)
    except InvalidSpec as error:
        return Work(attempt=attempt, pool=data.pool, on_disconnect=data.on_disconnect, spec_hash=digest, fault=str(error))
    return Work(
        attempt=attempt,
        pool=data.pool,
        on_disconnect=data.on_disconnect,
        spec_hash=digest,
        document=document,
        need=need_of(document.spec),
        formation_name=data.formation_name,
    )
