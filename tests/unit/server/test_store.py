from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellos.core.projection import Projection
from cellos.errors import ConfigError
from cellos.eventlog.stored import Cursor
from cellos.server.store import FILE, SnapshotStore

EVENT = (
    b'{"specversion":"1.0","id":"e","source":"s","type":"dev.cellos.events.cell.lifecycle.v1.started","data":{"cellId":"c","specId":"s"}}'
)
CURSOR = Cursor(stream_created="2026-01-01T00:00:00Z", sequence=1, digest="0" * 64)


def full() -> Projection:
    projection = Projection()
    projection.apply(1, "s", EVENT)
    return projection


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "a/b")


def test_what_is_saved_is_loaded(directory: str) -> None:
    store = SnapshotStore(directory)
    assert store.load() is None
    assert store.save(full().freeze(), CURSOR) == os.stat(store.path).st_size
    found = store.load()
    assert found is not None
    projection, cursor = found
    assert (cursor, projection.cell("c")) == (CURSOR, full().cell("c"))
    assert sorted(os.listdir(directory)) == ["lock", FILE]
    store.close()


def test_one_server_at_a_time(directory: str) -> None:
    store = SnapshotStore(directory)
    with pytest.raises(ConfigError, match="another server uses it"):
        SnapshotStore(directory)
    store.close()
    SnapshotStore(directory).close()


@pytest.mark.parametrize(
    ("raw", "word"), [(b"", "damaged"), (b"nonsense", "damaged"), (b"CELLPROJ\xff\xff\xff\xff\x00\x00\x00\x00", "newer")]
)
def test_what_cannot_be_used_is_kept_for_people(directory: str, raw: bytes, word: str) -> None:
    store = SnapshotStore(directory)
    Path(store.path).write_bytes(raw)
    assert store.load() is None
    (aside,) = [name for name in os.listdir(directory) if name != "lock"]
    assert aside.startswith(f"{FILE}.{word}-")
    assert Path(directory, aside).read_bytes() == raw
    store.close()


def test_other_keys_make_other_records(directory: str) -> None:
    store = SnapshotStore(directory)
    store.save(full().freeze(), CURSOR)
    store.close()
    store = SnapshotStore(directory, keys="other")
    assert store.load() is None
    assert any(name.startswith(f"{FILE}.foreign-") for name in os.listdir(directory))
    store.close()


def test_a_save_that_fails_leaves_the_last_one(directory: str) -> None:
    store = SnapshotStore(directory)
    store.save(full().freeze(), CURSOR)
    before = Path(store.path).read_bytes()
    os.mkdir(f"{store.path}.new")
    with pytest.raises(IsADirectoryError):
        store.save(full().freeze(), CURSOR)
    assert Path(store.path).read_bytes() == before
    store.close()


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="CELLOS_SERVER_STATE_DIR"):
        SnapshotStore(str(tmp_path / "file/below"))
