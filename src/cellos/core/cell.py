"""The life of a cell: the transitions that are legal, and the record that a run's events add up to.

Two readings of the same events. `advance` is strict, for whoever makes a cell: an event out of place is a defect and raises.
`fold` is total, for whoever reads a log: events may come late, twice or in another order. Any order of one run's events gives the same
record, as long as `destroyed` is the last: after it nothing of that run changes anything.
"""

# Annotations are evaluated at once: msgspec would otherwise evaluate each as text, and start-up time counts here.
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import msgspec

from cellos.core.events import (
    COMMAND_COMPLETED,
    DESTROYED,
    EXPORT_COMPLETED,
    EXPORT_FAILED,
    FS_TOUCH,
    PROCESS_SPAWNED,
    STARTED,
    Event,
)
from cellos.core.ids import TimeSyntaxError, unix_ns
from cellos.errors import LifecycleError

Phase = Literal["created", "started", "spawned", "completed", "destroyed"]
State = Literal["pending", "running", "destroyed"]
PHASES: tuple[Phase, ...] = get_args(Phase)

TRANSITIONS: dict[Phase, dict[str, Phase]] = {
    "created": {STARTED: "started", DESTROYED: "destroyed"},
    # A spec without a command goes from here to its exports; a command that cannot be executed completes without having been spawned.
    "started": {
        PROCESS_SPAWNED: "spawned",
        COMMAND_COMPLETED: "completed",
        FS_TOUCH: "started",
        EXPORT_COMPLETED: "started",
        EXPORT_FAILED: "started",
        DESTROYED: "destroyed",
    },
    "spawned": {COMMAND_COMPLETED: "completed", DESTROYED: "destroyed"},
    "completed": {FS_TOUCH: "completed", EXPORT_COMPLETED: "completed", EXPORT_FAILED: "completed", DESTROYED: "destroyed"},
    "destroyed": {},
}
"""Phase and event type to the next phase. Types that no row names are not about the life of a cell and are legal until it is destroyed."""

_LIFE = frozenset(kind for row in TRANSITIONS.values() for kind in row)
_SUPERSEDED_KEPT = 8


def advance(phase: Phase, event_type: str) -> Phase:
    """The phase after an event of that type. Raises LifecycleError where it has no place."""
    if phase != "destroyed" and event_type not in _LIFE:
        return phase
    try:
        return TRANSITIONS[phase][event_type]
    except KeyError:
        raise LifecycleError(f"illegal transition for {event_type}: lifecycle stage is {phase.capitalize()}") from None


class CellRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a cell's latest run. Times are as in the events; None is unknown."""

    id: str
    spec_id: str
    run_id: str | None = None
    state: State = "pending"
    status: State = "pending"
    """Always the same word as `state`, under its older name."""
    formation_id: str | None = None
    started_at: str | None = None
    destroyed_at: str | None = None
    outcome: str | None = None
    exit_code: int | None = None


class CellHistory(msgspec.Struct, frozen=True, kw_only=True):
    """A record and what it takes to place further events: the earliest time seen of its run, and the last few runs before it."""

    record: CellRecord
    since: int | None = None
    superseded: tuple[str, ...] = ()


def fold(history: CellHistory | None, event: Event, *, in_order: bool = False) -> CellHistory | None:
    """What is known after one more event of a cell; `history` is None before the first.

    Acts on `started`, `command completed` and `destroyed`, after which nothing of its run does. Events of an earlier run change nothing: of
    one that this cell is known to have had, or from before the earliest event of its present run. An event of any other run begins a new
    record. `in_order`: runs are known to come one after the other, so no clock is asked, which may be another host's.
    """
    data = event.members
    cell_id, spec_id, run_id = data.get("cellId"), data.get("specId"), _string(data.get("runId"))
    if event.type not in (STARTED, COMMAND_COMPLETED, DESTROYED) or not isinstance(cell_id, str) or not isinstance(spec_id, str):
        return history
    time = _nanoseconds(event.time)
    if history is None:
        history = CellHistory(record=CellRecord(id=cell_id, spec_id=spec_id, run_id=run_id))
    elif history.record.id != cell_id:
        raise ValueError(f"an event of cell {cell_id} in the history of cell {history.record.id}")
    elif run_id is not None and history.record.run_id not in (None, run_id):
        if _is_late(history, run_id, None if in_order else time):
            return history
        superseded = (*history.superseded, str(history.record.run_id))[-_SUPERSEDED_KEPT:]
        history = CellHistory(record=CellRecord(id=cell_id, spec_id=spec_id, run_id=run_id), superseded=superseded)
    elif history.record.state == "destroyed":
        return history
    since = history.since if time is None or (history.since is not None and history.since <= time) else time
    return CellHistory(record=_apply(history.record, event, data, spec_id, run_id), since=since, superseded=history.superseded)


def fold_all(events: Iterable[Event]) -> dict[str, CellRecord]:
    """Records by cell id."""
    histories: dict[str, CellHistory] = {}
    for event in events:
        cell_id = event.members.get("cellId")
        if isinstance(cell_id, str):
            history = fold(histories.get(cell_id), event)
            if history is not None:
                histories[cell_id] = history
    return {cell_id: history.record for cell_id, history in histories.items()}


def _apply(record: CellRecord, event: Event, data: Mapping[str, Any], spec_id: str, run_id: str | None) -> CellRecord:
    state, started_at, destroyed_at = record.state, record.started_at, record.destroyed_at
    outcome, exit_code = record.outcome, record.exit_code
    if event.type == STARTED:
        state = "running" if state == "pending" else state
        started_at = _earlier(started_at, event.time)
    elif event.type == COMMAND_COMPLETED:
        # Not a reason to call it running: without `started` the cell is known to be over soon, not to have begun.
        exit_code = _int32(data.get("exitCode")) if exit_code is None else exit_code
    else:
        state = "destroyed"
        destroyed_at = _earlier(destroyed_at, event.time)
        outcome = outcome or _string(data.get("outcome"))
    correlation = data.get("correlation")
    formation_id = _string(correlation.get("formationId")) if isinstance(correlation, dict) else None
    return CellRecord(
        id=record.id,
        spec_id=record.spec_id or spec_id,
        run_id=record.run_id or run_id,
        state=state,
        status=state,
        formation_id=record.formation_id or formation_id,
        started_at=started_at,
        destroyed_at=destroyed_at,
        outcome=outcome,
        exit_code=exit_code,
    )


def _is_late(history: CellHistory, run_id: str, time: int | None) -> bool:
    return run_id in history.superseded or (time is not None and history.since is not None and time < history.since)


def _earlier(known: str | None, time: str | None) -> str | None:
    """The earlier of two times; one that cannot be read gives way."""
    if known is None or time is None:
        return known or time
    return min(known, time, key=lambda text: (_nanoseconds(text) is None, _nanoseconds(text) or 0, text))


def _nanoseconds(time: str | None) -> int | None:
    try:
        return None if time is None else unix_ns(time)
    except TimeSyntaxError:
        return None


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _int32(value: object) -> int | None:
    """An integer cut to 32 bits; a boolean is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
