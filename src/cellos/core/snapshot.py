"""A projection as bytes: what a server writes down, so that its next start need not read the whole log.

    magic 8 | format 4 | header length 4 | header | body length 8 | sha256 of magic to header and of the body 32 | body

Numbers are big-endian. The header says which log it is of, and where in it; `read_header` needs no more. The body is groups of rows in
MessagePack, each with its length before it. `FORMAT` counts up with every change of the bytes and also of what a projection makes of a
message: a snapshot is as good as reading the log anew, or it is not used.

A snapshot is used only where the stream has the same `created`, and at the cursor the message that had this digest: after a power cut a
log may use sequence numbers again. That is for the reader of the log to check; here it is only carried.
"""

# Annotations are evaluated at once: msgspec would otherwise evaluate each as text.
import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import TypeVar

import msgspec

from cellos.core.projection import Projection
from cellos.core.rows import CellRow, Contents, FormationRow, NameRow, share_texts
from cellos.errors import SnapshotDamaged, SnapshotForeign, SnapshotNewer

MAGIC = b"CELLPROJ"
FORMAT = 1
_ROWS_PER_GROUP = 1000
"""Between two groups another thread gets its turn."""

_PREFIX = struct.Struct(">8sII")
_MIDDLE = struct.Struct(">Q32s")
_LENGTH = struct.Struct(">I")

_Row = TypeVar("_Row", CellRow, FormationRow, NameRow)


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a log: when the stream was created, a sequence, and the sha256 (hex) of the message there; empty for sequence 0."""

    stream_created: str
    sequence: int
    digest: str


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is of. `keys` names the keys that signatures were checked with, as the writer chose to; empty without any.

    `cells`, `formations` and `names` are how many rows there are.
    """

    position: Position
    keys: str
    cells: int
    formations: int
    names: int


_encode = msgspec.msgpack.Encoder().encode
_header = msgspec.msgpack.Decoder(Header).decode
_decode_cells = msgspec.msgpack.Decoder(list[CellRow])
_decode_formations = msgspec.msgpack.Decoder(list[FormationRow])
_decode_names = msgspec.msgpack.Decoder(list[NameRow])


def write(contents: Contents, position: Position, *, keys: str = "") -> bytes:
    """The snapshot of what `Projection.freeze` gave. Touches no projection, so it may run in another thread."""
    if position.sequence != contents.cursor:
        raise ValueError(f"a snapshot at {contents.cursor} cannot be one at {position.sequence}")
    header = _encode(
        Header(
            position=position,
            keys=keys,
            cells=len(contents.cells),
            formations=len(contents.formations),
            names=len(contents.names),
        )
    )
    parts = [*_groups(contents.cells), *_groups(contents.formations), *_groups(contents.names)]
    front = _PREFIX.pack(MAGIC, FORMAT, len(header)) + header
    digest = sha256(front)
    length = 0
    for part in parts:
        digest.update(part)
        length += len(part)
    return b"".join((front, _MIDDLE.pack(length, digest.digest()), *parts))


def read_header(snapshot: bytes) -> Header:
    """Of whole snapshots and of longer beginnings of them. Raises SnapshotDamaged and SnapshotNewer; the checksum is not looked at."""
    header, _ = _front(snapshot)
    return header


def read(snapshot: bytes, *, stream_created: str | None = None, keys: str = "") -> tuple[Projection, Position]:
    """The projection of a snapshot, and where in the log it is. `stream_created`: of the log that there is now, where that is known.

    Raises SnapshotDamaged: not, or no longer, what `write` wrote; SnapshotNewer: of a later version of this program; SnapshotForeign: of
    another stream, or made with other keys. None of them can be used; all that helps is to read the log.
    """
    header, at = _front(snapshot)
    view = memoryview(snapshot)
    if len(view) < at + _MIDDLE.size:
        raise SnapshotDamaged("it ends before its body begins")
    length, expected = _MIDDLE.unpack_from(view, at)
    body = view[at + _MIDDLE.size :]
    if len(body) != length:
        raise SnapshotDamaged(f"its body has {len(body)} bytes and should have {length}")
    digest = sha256(view[:at])
    digest.update(body)
    if digest.digest() != expected:
        raise SnapshotDamaged("its checksum does not fit")
    if stream_created is not None and header.position.stream_created != stream_created:
        raise SnapshotForeign(f"it is of a stream created {header.position.stream_created}, and this one was created {stream_created}")
    if header.keys != keys:
        raise SnapshotForeign("its signatures were checked with other keys than are configured now")
    groups = _ungrouped(body)
    try:
        contents = Contents(
            cursor=header.position.sequence,
            cells=_rows(groups, header.cells, _decode_cells),
            formations=_rows(groups, header.formations, _decode_formations),
            names=_rows(groups, header.names, _decode_names),
        )
    except (msgspec.DecodeError, UnicodeDecodeError, struct.error) as error:
        raise SnapshotDamaged(f"its rows cannot be read: {error}") from error
    share_texts(contents.cells)
    return Projection(contents), header.position


def _front(snapshot: bytes) -> tuple[Header, int]:
    """The header, and where it ends."""
    if not snapshot.startswith(MAGIC) or len(snapshot) < _PREFIX.size:
        raise SnapshotDamaged("it does not begin as a snapshot does")
    _, version, length = _PREFIX.unpack_from(snapshot)
    if version > FORMAT:
        raise SnapshotNewer(f"it has format {version}, and this program knows formats up to {FORMAT}")
    if version != FORMAT:
        raise SnapshotDamaged(f"there is no format {version}")
    end = _PREFIX.size + length
    try:
        return _header(snapshot[_PREFIX.size : end]), end
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(f"its header cannot be read: {error}") from error


def _groups(rows: list[_Row]) -> Iterator[bytes]:
    for start in range(0, len(rows), _ROWS_PER_GROUP):
        group = _encode(rows[start : start + _ROWS_PER_GROUP])
        yield _LENGTH.pack(len(group))
        yield group


def _ungrouped(body: memoryview) -> Iterator[memoryview]:
    at = 0
    while at < len(body):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size + length
        yield body[at - length : at]


def _rows(groups: Iterator[memoryview], count: int, decoder: msgspec.msgpack.Decoder[list[_Row]]) -> list[_Row]:
    rows: list[_Row] = []
    while len(rows) < count and (group := next(groups, None)) is not None:
        rows += decoder.decode(group)
    if len(rows) != count:
        raise SnapshotDamaged(f"it has {len(rows)} rows where its header says {count}")
    return rows
