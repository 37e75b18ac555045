"""The state of the log: what the events of the stream CELLOS_EVENTS add up to, as bytes that are ready to be sent.

A `Projection` is given every message of the stream, in order, and keeps one record for each cell and each formation, encoded once per
change; and the indexes that lists and their filters are read from, so that nothing is sorted or searched for a request. It opens and
awaits nothing and is no lock: whoever owns it applies and reads in one thread. Between two calls of `apply` every list is exactly the
state at `cursor`.

It promises to take whatever stands in the log. Each message advances the cursor and is `applied`, `ignored` (it tells nothing about a
cell or a formation, or nothing new) or `rejected` (it cannot be what it claims to be); neither of the latter two changes any record. The
state depends on nothing but the messages: applying them again, from the first or from a snapshot, gives the same bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from cellos.core.cell import CellRecord, State, fold
from cellos.core.events import Event
from cellos.core.formation.events import FORMATION_PREFIX, NAME_PREFIX, name_subject
from cellos.core.formation.runs import RUN_PREFIX
from cellos.core.formation.transitions import TERMINAL, Phase, next_status, status_of
from cellos.core.ids import TimeSyntaxError, unix_ns
from cellos.core.messages import Message, Signature, Verify, canonical_uuid, envelope_subject, read_message, signature_of
from cellos.core.rows import CellRow, Contents, FormationRecord, FormationRow, NameRow, cell_row, formation_row, worse
from cellos.core.sorted_ids import SortedIds
from cellos.errors import EvidenceError, LifecycleError

__all__ = ["APPLIED", "ApplyOutcome", "CellRecord", "FormationRecord", "NameUse", "Page", "Projection", "Verify"]

MAX_CELL_BYTES = 4096
"""A record of a cell that would be longer is refused: ten short members do not need more, and every list carries them."""
MAX_DEPTH = 128
"""Of a formation's document. What a reader can take depends on how deep it is itself; this much all of them can."""

_MILLISECOND = 1_000_000


class ApplyOutcome(NamedTuple):
    """What became of a message. `reason` is a clause about it, empty where it was applied."""

    kind: Literal["applied", "ignored", "rejected"]
    reason: str = ""


APPLIED = ApplyOutcome("applied")
_OTHER_TYPE = ApplyOutcome("ignored", "its type changes no record")
_TAKEN = ApplyOutcome("ignored", "the name is still that of another formation")
_SEEN = ApplyOutcome("ignored", "it was applied before")
_NO_CELL = ApplyOutcome("ignored", "data.cellId is missing or not a string")
_NO_SPEC = ApplyOutcome("ignored", "data.specId is missing or not a string")
_LATE = ApplyOutcome("ignored", "it is of an earlier run of the cell")
_LONG_CELL = ApplyOutcome("rejected", f"the record of the cell would be longer than {MAX_CELL_BYTES} bytes")
_NO_FORMATION = ApplyOutcome("rejected", "data.formationId is missing or not a UUID")
_FOREIGN_SUBJECT = ApplyOutcome("rejected", "its subject is that of another formation, phase or name")
_NO_NAME = ApplyOutcome("rejected", "data.formationName is missing or not a string")
_DEEP = ApplyOutcome("rejected", f"its data is nested more than {MAX_DEPTH} deep")


class Page(NamedTuple):
    """Some records of a list, each as JSON, and the id after which the next page begins; None where there is no more."""

    parts: list[bytes]
    next: str | None


class NameUse(NamedTuple):
    """Who has a name: the id of a formation that has not ended, or None. `sequence` is that of the last reservation, 0 without one."""

    holder: str | None
    sequence: int


class Projection:
    """The state at `cursor`, the sequence of the last message that was applied."""

    def __init__(self, contents: Contents | None = None, *, cursor: int = 0) -> None:
        """`contents` as from `freeze`. `cursor`: to begin with nothing, after that message."""
        self.cursor = cursor if contents is None else contents.cursor
        self.applied = self.ignored = self.rejected = self.illegal = 0
        """How many messages came to what; `illegal` are those ignored ones that told an impossible step of a formation."""
        self._cells: dict[str, CellRow] = {}
        self._formations: dict[str, FormationRow] = {}
        self._names: dict[str, NameRow] = {}
        self._oldest: int | None = None
        """No row is older. None: not known."""
        self._by_state: dict[State, SortedIds]
        self._index(contents or Contents(cursor, [], [], []))

    def _index(self, contents: Contents) -> None:
        self._cells = {row.id: row for row in contents.cells}
        self._formations = {row.id: row for row in contents.formations}
        self._names = {row.name: row for row in contents.names}
        self._ids = SortedIds(list(self._cells))
        self._formation_ids = SortedIds(list(self._formations))
        states: dict[State, list[str]] = {"pending": [], "running": [], "destroyed": []}
        self._by_formation: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        """In the order in which they began."""
        self._open: dict[str, list[str]] = {}
        """By name, those that have not ended. A name may have ended thousands of times, and is open once."""
        for id, row in self._cells.items():
            states[row.state].append(id)
            if row.formation is not None:
                self._by_formation.setdefault(row.formation, []).append(id)
        self._by_state = {state: SortedIds(ids) for state, ids in states.items()}
        for formation in contents.formations:
            self._list_name(formation)

    def freeze(self) -> Contents:
        """All that is known now. It costs a copy of the lists of rows, not of the rows."""
        return Contents(
            cursor=self.cursor,
            cells=list(map(self._cells.__getitem__, self._ids.after(None, None))),
            formations=list(map(self._formations.__getitem__, self._formation_ids.after(None, None))),
            names=list(self._names.values()),
        )

    # --- reading ------------------------------------------------------------------------------------------------------------------------

    def cell(self, id: str) -> bytes | None:
        """The record of a cell as JSON."""
        row = self._cells.get(id)
        return None if row is None else row.line

    def has_ended(self, id: str, run_id: str) -> bool:
        """Whether a run of a cell is known to be over: it was destroyed, or another one followed."""
        row = self._cells.get(id)
        if row is None:
            return False
        history = row.history
        return row.state == "destroyed" if history.record.run_id == run_id else run_id in history.superseded

    def cells(
        self, *, state: State | None = None, formation: str | None = None, after: str | None = None, limit: int | None = None
    ) -> Page:
        """Records of cells in ascending order of their ids, from the one that follows `after`. `formation` in canonical form."""
        more = None if limit is None else limit + 1
        if formation is not None:
            ids = self._cells_of(formation, state, after, more)
        else:
            ids = (self._ids if state is None else self._by_state[state]).after(after, more)
        cells = self._cells
        return _page([cells[id].line for id in ids], ids, limit)

    def _cells_of(self, formation: str, state: State | None, after: str | None, limit: int | None) -> list[str]:
        ids = self._by_formation.get(formation, [])
        start = 0 if after is None else bisect_right(ids, after)
        if state is None:
            return ids[start : None if limit is None else start + limit]
        found = [id for id in ids[start:] if self._cells[id].state == state]
        return found if limit is None else found[:limit]

    def formation(self, id: str) -> bytes | None:
        """The record of a formation as JSON. `id` in canonical form."""
        row = self._formations.get(id)
        return None if row is None else row.line

    def formation_by_name(self, name: str) -> list[str]:
        """The ids that a name stands for: the formations that have not ended, in order; where all have, the one that began last."""
        return list(self._open.get(name, ())) or self._by_name.get(name, [])[-1:]

    def formations(self, *, after: str | None = None, limit: int | None = None) -> Page:
        """Records of formations in ascending order of their UUIDs, from the one that follows `after`."""
        ids = self._formation_ids.after(after, None if limit is None else limit + 1)
        return _page([self._formations[id].line for id in ids], ids, limit)

    def name(self, name: str) -> NameUse:
        """Who has a name, and after which sequence it may be reserved where nobody has it."""
        row = self._names.get(name)
        # A reservation is written before `created`: between the two the formation is not known yet.
        if row is not None and (row.formation not in self._formations or self._is_open(row.formation)):
            return NameUse(row.formation, row.sequence)
        holder = self._open.get(name, (None,))[0]
        return NameUse(holder, 0 if row is None else row.sequence)

    def counts(self) -> dict[str, int]:
        """How many records there are: cells by state, and formations."""
        return {**{state: len(ids) for state, ids in self._by_state.items()}, "formations": len(self._formations)}

    # --- applying -----------------------------------------------------------------------------------------------------------------------

    def apply(self, seq: int, subject: str, payload: bytes, *, stored_ns: int | None = None, verify: Verify | None = None) -> ApplyOutcome:
        """Take the message `seq` of the stream. One that is not after the cursor is ignored: it was applied before.

        `stored_ns`: when the log stored it, which is what retention goes by; without it, the event's own time. `verify`: with it,
        signatures are checked and every record says what they were worth, as `signature`.
        """
        if seq <= self.cursor:
            self.ignored += 1
            return _SEEN
        self.cursor = seq
        try:
            message = read_message(payload)
            if message is None:
                self.ignored += 1
                return _OTHER_TYPE
            outcome = self._apply(seq, subject, payload, message, stored_ns, verify)
        except EvidenceError as error:
            outcome = ApplyOutcome("rejected", error.text)
        if outcome is APPLIED:
            self.applied += 1
        elif outcome.kind == "ignored":
            self.ignored += 1
        else:
            self.rejected += 1
        return outcome

    def _apply(
        self, seq: int, subject: str, payload: bytes, message: Message, stored_ns: int | None, verify: Verify | None
    ) -> ApplyOutcome:
        kind, event, envelope = message
        mark = None if verify is None else signature_of(envelope, verify)
        last = (_nanoseconds(event.time) if stored_ns is None else stored_ns) // _MILLISECOND
        if kind == "cell":
            return self._apply_cell(event, last, mark, in_order=subject.startswith(RUN_PREFIX))
        if kind == "name":
            return self._apply_name(seq, subject, event, last)
        named = _first(event.members, "formationId", "formation_id")
        id = canonical_uuid(envelope_subject(payload) if named is None and envelope is None else named)
        if id is None:
            return _NO_FORMATION
        # Writers of a formation agree by its subjects: what is written past them would not have been seen.
        if subject.startswith(FORMATION_PREFIX) and subject != f"{FORMATION_PREFIX}{id}.{kind}":
            return _FOREIGN_SUBJECT
        known = self._formations.get(id)
        if known is None:
            return self._begin_formation(seq, id, kind, event, last, mark)
        return self._step_formation(known, kind, event, last, mark)

    def _apply_cell(self, event: Event, last: int, mark: Signature | None, *, in_order: bool) -> ApplyOutcome:
        """`in_order`: the log takes no event of an attempt before the one before it was over."""
        data = event.members
        cell_id = data.get("cellId")
        if not isinstance(cell_id, str):
            return _NO_CELL
        if not isinstance(data.get("specId"), str):
            return _NO_SPEC
        correlation = data.get("correlation")
        if isinstance(correlation, dict) and "formationId" in correlation:
            correlation["formationId"] = canonical_uuid(correlation["formationId"])
        known = self._cells.get(cell_id)
        before = None if known is None else known.history
        after = fold(before, event, in_order=in_order)
        if after is None or after is before:
            return _LATE
        if known is not None and before is not None:
            last = max(last, known.last)
            if before.record.run_id in {None, after.record.run_id}:
                mark = worse(mark, known.mark)
        row = cell_row(cell_id if known is None else known.id, after, last, mark)
        if len(row.line) > MAX_CELL_BYTES:
            return _LONG_CELL
        self._put_cell(known, row)
        return APPLIED

    def _put_cell(self, known: CellRow | None, row: CellRow) -> None:
        if known is None:
            self._ids.add(row.id)
            self._by_state[row.state].add(row.id)
            self._seen_at(row.last)
        elif known.state != row.state:
            self._by_state[known.state].remove(row.id)
            self._by_state[row.state].add(row.id)
        before = None if known is None else known.formation
        if before != row.formation:
            _unlist(self._by_formation, before, row.id)
            if row.formation is not None:
                insort(self._by_formation.setdefault(row.formation, []), row.id)
        self._cells[row.id] = row

    def _begin_formation(self, seq: int, id: str, phase: Phase, event: Event, last: int, mark: Signature | None) -> ApplyOutcome:
        """The log may begin after `created`; then the first phase that is left says what is known."""
        data = event.members
        document = data["document"] if phase == "created" and isinstance(data.get("document"), dict) else event.data
        if _is_deep(document):
            return _DEEP
        row = formation_row(
            id=id,
            name=_first(data, "formationName", "name") or "",
            status=status_of(phase) or "PENDING",
            document=msgspec.json.encode(document),
            first=seq,
            last=last,
            mark=mark,
        )
        self._formations[id] = row
        self._formation_ids.add(id)
        self._seen_at(last)
        self._list_name(row)
        return APPLIED

    def _step_formation(self, known: FormationRow, phase: Phase, event: Event, last: int, mark: Signature | None) -> ApplyOutcome:
        try:
            status = next_status(known.status, phase)
        except LifecycleError as error:
            self.illegal += 1
            return ApplyOutcome("ignored", error.text)
        row = formation_row(
            id=known.id,
            name=known.name or _first(event.members, "formationName", "name") or "",
            status=status,
            document=known.document,
            first=known.first,
            last=max(last, known.last),
            mark=worse(mark, known.mark),
        )
        self._unlist_name(known)
        self._formations[row.id] = row
        self._list_name(row)
        return APPLIED

    def _list_name(self, row: FormationRow) -> None:
        insort(self._by_name.setdefault(row.name, []), row.id, key=lambda id: self._formations[id].first)
        if row.status not in TERMINAL:
            insort(self._open.setdefault(row.name, []), row.id)

    def _unlist_name(self, row: FormationRow) -> None:
        ids = self._by_name[row.name]
        del ids[bisect_left(ids, row.first, key=lambda id: self._formations[id].first)]
        if not ids:
            del self._by_name[row.name]
        if row.status not in TERMINAL:
            _unlist(self._open, row.name, row.id)

    def _apply_name(self, seq: int, subject: str, event: Event, last: int) -> ApplyOutcome:
        id = canonical_uuid(event.members.get("formationId"))
        name = event.members.get("formationName")
        if id is None:
            return _NO_FORMATION
        if not isinstance(name, str):
            return _NO_NAME
        if subject.startswith(NAME_PREFIX) and subject != name_subject(name):
            return _FOREIGN_SUBJECT
        known = self._names.get(name)
        outcome = APPLIED
        if known is not None and known.formation != id and self._is_open(known.formation):
            # Written past the rule that a name is free first. Its sequence counts all the same: the next reservation has to expect it.
            id, outcome = known.formation, _TAKEN
        self._names[name] = NameRow(name=name, formation=id, sequence=seq, last=last)
        self._seen_at(last)
        return outcome

    def _is_open(self, id: str) -> bool:
        """Known, and not ended."""
        row = self._formations.get(id)
        return row is not None and row.status not in TERMINAL

    # --- forgetting ---------------------------------------------------------------------------------------------------------------------

    def _seen_at(self, last: int) -> None:
        if self._oldest is not None and last < self._oldest:
            self._oldest = last

    def drop_before(self, unix_ns: int) -> int:
        """Forget every record and reservation whose last event is from before that time, to the millisecond. Gives how many there were.

        This is the rule that the log forgets by. Called with the same times, a projection that lived through all of it holds what one that
        read the rest of the log holds.
        """
        first = unix_ns // _MILLISECOND
        if self._oldest is not None and self._oldest >= first:
            return 0
        cells = [row for row in self._cells.values() if row.last < first]
        formations = [row for row in self._formations.values() if row.last < first]
        names = [row for row in self._names.values() if row.last < first]
        for cell in cells:
            del self._cells[cell.id]
            self._ids.remove(cell.id)
            self._by_state[cell.state].remove(cell.id)
            _unlist(self._by_formation, cell.formation, cell.id)
        for formation in formations:
            self._unlist_name(formation)
            del self._formations[formation.id]
            self._formation_ids.remove(formation.id)
        for name in names:
            del self._names[name.name]
        everything: tuple[Iterable[CellRow | FormationRow | NameRow], ...] = (
            self._cells.values(),
            self._formations.values(),
            self._names.values(),
        )
        self._oldest = min((row.last for rows in everything for row in rows), default=None)
        return len(cells) + len(formations) + len(names)


def _page(parts: list[bytes], ids: list[str], limit: int | None) -> Page:
    """`parts` and `ids` are of one more than the limit where there are as many."""
    if limit is None or len(ids) <= limit:
        return Page(parts, None)
    return Page(parts[:limit], ids[limit - 1] if limit else None)


def _unlist(index: dict[str, list[str]], key: str | None, id: str) -> None:
    if key is not None:
        ids = index[key]
        del ids[bisect_left(ids, id)]
        if not ids:
            del index[key]


def _first(data: Mapping[str, Any], *names: str) -> str | None:
    """The first of these members that is a string."""
    return next((value for name in names if isinstance(value := data.get(name), str)), None)


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for each in level if isinstance(each, dict | list) for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def _nanoseconds(time: str | None) -> int:
    """Zero, older than anything, for a time that cannot be read."""
    try:
        return 0 if time is None else unix_ns(time)
    except TimeSyntaxError:
        return 0
