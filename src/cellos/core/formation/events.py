"""The events of a formation, and the subjects that they are written to.

Formation events are CloudEvents whose source is the formation's UUID. `created` holds the whole document: the log alone is enough to know
everything about a formation. They belong to no run, so there is no chain; their order is that of the log, which refuses a write where
another came first. A reservation of a name is an event beside them, written before `created`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cellos.core.events import PREFIX, Event, present
from cellos.core.formation.documents import Formation
from cellos.core.formation.runs import Attempt
from cellos.core.formation.transitions import PHASES, Phase

FORMATION_PREFIX = "cellos.events.formations."
NAME_PREFIX = "cellos.events.names."
FORMATION_TYPE = PREFIX + "formation.v1."
LEGACY_FORMATION_TYPE = "io.cellos.formation.v1."
"""Older events in a log begin with this; none is written."""
NAME_RESERVED = PREFIX + "name.v1.reserved"

DELETED = "deleted by operator"
"""The reason of `cancelling` and `cancelled` after a DELETE."""


def subject_of(formation_id: str, phase: Phase) -> str:
    return f"{FORMATION_PREFIX}{formation_id}.{phase}"


def subjects_of(formation_id: str) -> str:
    """The filter of all events of a formation: the last one under it is what the next write expects."""
    return f"{FORMATION_PREFIX}{formation_id}.>"


@lru_cache(maxsize=1024)  # a name is written, and read back a moment later
def name_subject(name: str) -> str:
    """The subject of a name's reservation. A name may hold dots: it is one token in base32 (RFC 4648, without padding)."""
    return NAME_PREFIX + base64.b32encode(name.encode()).decode().rstrip("=")


def phase_of(event_type: str) -> Phase | None:
    """The phase that a type of event tells; None where it is no formation event, or of a phase that is not known here."""
    for prefix in (FORMATION_TYPE, LEGACY_FORMATION_TYPE):
        if event_type.startswith(prefix):
            word = event_type.removeprefix(prefix)
            return next((phase for phase in PHASES if phase == word), None)
    return None


def created(formation_id: str, formation: Formation, *, event_id: str, time: str, idempotency_key: str | None = None) -> Event:
    """The formation is admitted. `time` as `ids.rfc3339` writes it; `idempotency_key` is what a client knows a repeated request by."""
    data = _about(formation_id, formation.name, len(formation.members))
    data |= {"document": formation.document, **present(idempotencyKey=idempotency_key)}
    return _event(formation_id, FORMATION_TYPE + "created", data, event_id, time)


def phase_event(
    formation_id: str,
    phase: Phase,
    *,
    name: str,
    cell_count: int,
    failed_cell_ids: Sequence[str] = (),
    reason: str | None = None,
    dispatched: Sequence[Attempt] = (),
    event_id: str,
    time: str,
) -> Event:
    """Any later phase. `cell_count` is the number of the formation's members; `dispatched` are attempts that begin with this event."""
    if phase == "created":
        raise ValueError("a formation is created by its document: use created()")
    data = _about(formation_id, name, cell_count, failed_cell_ids)
    named = [{"memberId": each.member_id, "attempt": each.number} for each in dispatched]
    return _event(formation_id, FORMATION_TYPE + phase, data | present(reason=reason, dispatched=named or None), event_id, time)


def name_reserved(formation_id: str, name: str, *, event_id: str, time: str) -> Event:
    """`name` is this formation's until it has ended."""
    return _event(formation_id, NAME_RESERVED, {"formationId": formation_id, "formationName": name}, event_id, time)


def _about(formation_id: str, name: str, cell_count: int, failed_cell_ids: Sequence[str] = ()) -> dict[str, Any]:
    return {"formationId": formation_id, "formationName": name, "cellCount": cell_count, "failedCellIds": list(failed_cell_ids)}


def _event(formation_id: str, event_type: str, data: dict[str, Any], event_id: str, time: str) -> Event:
    return Event(id=event_id, source=formation_id, type=event_type, datacontenttype="application/json", data=data, time=time)
