import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellos.core import snapshot
from cellos.core.events import COMMAND_COMPLETED, DESTROYED, FS_TOUCH, STARTED, Event, SignedEnvelope, canonical_bytes
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import HMAC_SHA256, Signer, verify
from cellos.core.formation.events import FORMATION_TYPE, NAME_RESERVED
from cellos.core.formation.transitions import PHASES
from cellos.core.projection import Projection
from cellos.core.snapshot import FORMAT, Header, Position, read, read_header, write
from cellos.errors import SnapshotDamaged, SnapshotError, SnapshotForeign, SnapshotNewer

CREATED = "2026-01-01T00:00:00.123456789Z"
FORMATIONS = [f"{digit * 8}-0000-4000-8000-000000000000" for digit in "9a1"]
SIGNER = Signer("k", HMAC_SHA256, b"secret")
RING = Keyring(hmac={"k": b"secret"})
SECOND = 1_000_000_000


def check(envelope: SignedEnvelope) -> None:
    verify(envelope, RING)


def line(kind: str, second: int, **data: Any) -> bytes:
    return canonical_bytes(Event(id="e", source="t", type=kind, data=data, time=f"2026-01-01T00:00:{second:02d}Z"))


CELL_EVENTS = st.builds(
    lambda kind, cell, run, second, formation: line(
        kind,
        second,
        cellId=cell,
        specId="s",
        outcome="failed",
        exitCode=1,
        **({"runId": run} if run else {}),
        **({"correlation": {"formationId": formation}} if formation else {}),
    ),
    st.sampled_from([STARTED, COMMAND_COMPLETED, DESTROYED, FS_TOUCH]),
    st.sampled_from(["c", "a", "b", "é"]),
    st.sampled_from(["", "r1", "r2", "r3"]),
    st.integers(0, 30),
    st.none() | st.sampled_from(FORMATIONS),
)
FORMATION_EVENTS = st.builds(
    lambda id, word, name: line(FORMATION_TYPE + word, 0, formationId=id, formationName=name, document={"name": name}),
    st.sampled_from(FORMATIONS),
    st.sampled_from(PHASES),
    st.sampled_from(["", "x", "y"]),
)
NAME_EVENTS = st.builds(
    lambda id, name: line(NAME_RESERVED, 0, formationId=id, formationName=name), st.sampled_from(FORMATIONS), st.sampled_from(["x", "y"])
)
_PLAIN = Event(id="e", source="t", type=STARTED, data={"cellId": "c", "specId": "s"})
MESSAGES = (
    CELL_EVENTS | FORMATION_EVENTS | NAME_EVENTS | st.sampled_from([b"", b"\xff", b"{}", SIGNER.wrap(_PLAIN, canonical_bytes(_PLAIN))])
)
STEPS = st.lists(MESSAGES | st.integers(0, 40), max_size=40)
"""Messages, and times before which all is forgotten. The log stores one message a second."""


def play(projection: Projection, steps: list[bytes | int], *, keys: bool) -> None:
    for step in steps:
        if isinstance(step, int):
            projection.drop_before(step * SECOND)
        else:
            seq = projection.cursor + 1
            projection.apply(seq, "cellos.events.v1", step, stored_ns=seq * SECOND, verify=check if keys else None)


def position(projection: Projection) -> Position:
    return Position(stream_created=CREATED, sequence=projection.cursor, digest="ab" * 32)


def saved(projection: Projection, keys: str = "") -> bytes:
    return write(projection.freeze(), position(projection), keys=keys)


def everything(projection: Projection) -> Any:
    """What any reader can see, and what decides about the events to come."""
    states = (None, "pending", "running", "destroyed")
    return (
        projection.freeze(),
        [projection.cells(state=state, formation=formation) for state in states for formation in (None, *FORMATIONS)],  # type: ignore[arg-type]
        projection.formations(),
        [(projection.formation_by_name(name), projection.name(name)) for name in ("", "x", "y")],
        projection.counts(),
    )


@given(STEPS, st.lists(st.integers(0, 40), max_size=3), st.booleans())
@settings(max_examples=200)
def test_restarts_anywhere_change_nothing(steps: list[bytes | int], restarts: list[int], keys: bool) -> None:
    whole = Projection()
    play(whole, steps, keys=keys)
    restarted, done = Projection(), 0
    for restart in sorted(restarts):
        play(restarted, steps[done:restart], keys=keys)
        restarted, _ = read(saved(restarted))
        done = max(done, restart)
    play(restarted, steps[done:], keys=keys)
    assert everything(restarted) == everything(whole)
    assert saved(restarted) == saved(whole)


def full() -> Projection:
    """More cells than one group of rows has."""
    projection = Projection()
    for number in range(2500):
        kind = (STARTED, DESTROYED)[number % 2]
        data = {"cellId": f"c{number * 7919 % 2500}", "specId": "s", "correlation": {"formationId": FORMATIONS[number % 3]}}
        projection.apply(number + 1, "", line(kind, 0, **data))
    projection.apply(2501, "", line(NAME_RESERVED, 0, formationId=FORMATIONS[0], formationName="x"))
    projection.apply(2502, "", line(FORMATION_TYPE + "created", 0, formationId=FORMATIONS[0], formationName="x"))
    return projection


class TestWhole:
    def test_of_nothing(self) -> None:
        restored, where = read(write(Projection().freeze(), Position(stream_created=CREATED, sequence=0, digest="")))
        assert everything(restored) == everything(Projection())
        assert where == Position(stream_created=CREATED, sequence=0, digest="")

    def test_of_several_groups(self) -> None:
        projection = full()
        restored, where = read(saved(projection), stream_created=CREATED)
        assert everything(restored) == everything(projection)
        assert where == position(projection)
        assert restored.counts() == {"pending": 0, "running": 1250, "destroyed": 1250, "formations": 1}

    def test_what_was_frozen_stays_while_the_projection_goes_on(self) -> None:
        projection = full()
        frozen, where = projection.freeze(), position(projection)
        projection.apply(2503, "", line(DESTROYED, 0, cellId="c0", specId="s"))
        projection.apply(2504, "", line(STARTED, 0, cellId="new", specId="s"))
        projection.drop_before(1 << 62)
        assert write(frozen, where) == saved(full())

    def test_the_header_alone(self) -> None:
        data = saved(full(), keys="k1")
        expected = Header(
            position=Position(stream_created=CREATED, sequence=2502, digest="ab" * 32), keys="k1", cells=2500, formations=1, names=1
        )
        assert read_header(data) == read_header(data[:400]) == expected

    def test_cells_of_a_formation_share_its_id(self) -> None:
        restored, _ = read(saved(full()))
        assert len({id(row.formation) for row in restored.freeze().cells}) == 3

    def test_it_is_of_the_cursor_that_it_says(self) -> None:
        with pytest.raises(ValueError, match="a snapshot at 0 cannot be one at 5"):
            write(Projection().freeze(), Position(stream_created=CREATED, sequence=5, digest=""))


class TestUnusable:
    @pytest.mark.parametrize("data", [b"", b"CELL", b"{}", b"CELLPROJ", b"x" * 1000, snapshot.MAGIC[::-1] + b"\0" * 100])
    def test_no_snapshot_at_all(self, data: bytes) -> None:
        for reader in (read, read_header):
            with pytest.raises(SnapshotDamaged, match="it does not begin as a snapshot does"):
                reader(data)

    @given(st.integers(min_value=0), st.integers(1, 255))
    def test_any_changed_byte_shows(self, at: int, by: int) -> None:
        data = bytearray(SMALL)
        data[at % len(data)] ^= by
        with pytest.raises(SnapshotError):
            read(bytes(data))

    @given(st.integers(min_value=0))
    def test_any_missing_end_shows(self, length: int) -> None:
        with pytest.raises(SnapshotDamaged):
            read(SMALL[: length % len(SMALL)])

    def test_anything_after_the_end_shows(self) -> None:
        with pytest.raises(SnapshotDamaged, match=r"its body has \d+ bytes and should have \d+"):
            read(SMALL + b"\0")

    def test_a_torn_write(self) -> None:
        """A file that was made as long as it should be, before its end was written."""
        with pytest.raises(SnapshotDamaged, match="its checksum does not fit"):
            read(SMALL[:-20] + b"\0" * 20)

    def test_a_later_format(self) -> None:
        later = SMALL[:8] + struct.pack(">I", FORMAT + 1) + b"whatever that may be"
        for reader in (read, read_header):
            with pytest.raises(SnapshotNewer, match="it has format 2, and this program knows formats up to 1"):
                reader(later)

    def test_a_format_that_never_was(self) -> None:
        with pytest.raises(SnapshotDamaged, match="there is no format 0"):
            read(SMALL[:8] + struct.pack(">I", 0) + SMALL[12:])

    def test_another_stream(self) -> None:
        with pytest.raises(SnapshotForeign, match=r"created 2026-01-01T00:00:00\.123456789Z, and this one was created 2027"):
            read(SMALL, stream_created="2027-01-01T00:00:00Z")

    @pytest.mark.parametrize(("written", "wanted"), [("", "k"), ("k", ""), ("k", "other")])
    def test_other_keys(self, written: str, wanted: str) -> None:
        data = saved(Projection(), keys=written)
        with pytest.raises(SnapshotForeign, match="other keys"):
            read(data, keys=wanted)
        read(data, keys=written)

    def test_damage_is_told_before_anything_that_it_says(self) -> None:
        with pytest.raises(SnapshotDamaged):
            read(SMALL[:-1] + bytes([SMALL[-1] ^ 1]), stream_created="another", keys="other")

    @pytest.mark.parametrize("cells", [0, 3, 5])
    def test_rows_and_header_disagree(self, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
        real = snapshot.Header
        monkeypatch.setattr(snapshot, "Header", lambda **members: real(**{**members, "cells": cells}))
        data = saved(small())
        with pytest.raises(SnapshotDamaged, match="rows"):
            read(data)


def small() -> Projection:
    projection = Projection()
    for cell in "abcd":
        projection.apply(projection.cursor + 1, "", line(STARTED, 0, cellId=cell, specId="s"))
    projection.apply(projection.cursor + 1, "", line(FORMATION_TYPE + "created", 0, formationId=FORMATIONS[0], formationName="x"))
    return projection


SMALL = saved(small())
