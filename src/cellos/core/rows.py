"""What a projection keeps of each cell, formation and name: the record as JSON, and beside it what indexes and the next event need.

Rows are many, so they are small; they are replaced, never changed, so another thread may write down what was there a moment ago.
"""

# Annotations are evaluated at once: msgspec would otherwise evaluate each as text.
import sys
from typing import Any

import msgspec

from cellos.core.cell import CellHistory, CellRecord, State
from cellos.core.formation.transitions import FormationStatus
from cellos.core.messages import Signature

_WORSE: dict[Signature | None, int] = {None: 0, "verified": 1, "unsigned": 2, "invalid": 3}

_encode = msgspec.json.Encoder().encode
_cell_record = msgspec.json.Decoder(CellRecord).decode


class FormationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a formation. `document` is the admitted document, or the data of its first event where that carries none."""

    id: str
    name: str
    status: FormationStatus
    document: Any


# gc=False: the collector need not walk them, nothing in them can be part of a cycle.


class CellRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A cell. `since` is what `core.cell.CellHistory` has, `last` the time of the newest event, by which it is forgotten.

    `last` is in milliseconds: in nanoseconds it would be an integer of the next size.
    """

    id: str
    line: bytes
    state: State
    formation: str | None
    since: int | None
    last: int
    mark: Signature | None
    superseded: tuple[str, ...]

    @property
    def history(self) -> CellHistory:
        return CellHistory(record=_cell_record(self.line), since=self.since, superseded=self.superseded)


class FormationRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A formation. `first` is the sequence of its first event."""

    id: str
    line: bytes
    name: str
    status: FormationStatus
    first: int
    last: int
    mark: Signature | None

    @property
    def document(self) -> bytes:
        return bytes(_formation_line(self.line).document)


class NameRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A reserved name. `formation` has it, or had it; `sequence` is that of the last reservation."""

    name: str
    formation: str
    sequence: int
    last: int


class Contents(msgspec.Struct, frozen=True, gc=False):
    """All that a projection holds. Cells and formations in ascending order of their ids."""

    cursor: int
    cells: list[CellRow]
    formations: list[FormationRow]
    names: list[NameRow]


class _FormationLine(msgspec.Struct):
    document: msgspec.Raw


_formation_line = msgspec.json.Decoder(_FormationLine).decode


def worse(one: Signature | None, other: Signature | None) -> Signature | None:
    """A record is worth as much as the worst event behind it."""
    return one if _WORSE[one] >= _WORSE[other] else other


def cell_row(id: str, history: CellHistory, last: int, mark: Signature | None) -> CellRow:
    """`id`: the text that the indexes have, where they have one; a second one would cost as much as the record's dearest member."""
    record = history.record
    return CellRow(
        id=id,
        line=_marked(_encode(record), mark),
        state=record.state,
        formation=None if record.formation_id is None else sys.intern(record.formation_id),  # one text for all of its cells
        since=history.since,
        last=last,
        mark=mark,
        superseded=history.superseded,
    )


def formation_row(
    *,
    id: str,
    name: str,
    status: FormationStatus,
    document: bytes,
    first: int,
    last: int,
    mark: Signature | None,
) -> FormationRow:
    """`document` is JSON."""
    line = _marked(_encode(FormationRecord(id=id, name=name, status=status, document=msgspec.Raw(document))), mark)
    return FormationRow(id, line, name, status, first, last, mark)


def share_texts(rows: list[CellRow]) -> None:
    """Rows that were read from bytes each have their own text of the formation's id; those of a projection share it."""
    for row in rows:
        if row.formation is not None:
            msgspec.structs.force_setattr(row, "formation", sys.intern(row.formation))


def _marked(line: bytes, mark: Signature | None) -> bytes:
    """A copy: what the encoder gives holds on to the buffer that it was written in, which is half as long again."""
    return b"".join((line, b"") if mark is None else (line[:-1], b',"signature":"', mark.encode(), b'"}'))
