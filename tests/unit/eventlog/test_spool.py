from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import EventSinkError
from cellos.eventlog import spool
from cellos.eventlog.spool import Spool, keep_only, read_lines, recover, require_room, spooled_bytes

LINES = st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")), max_size=6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def test_a_spool_is_private_and_new(path: Path) -> None:
    Spool(str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(EventSinkError, match="File exists"):
        Spool(str(path))


def test_a_link_is_never_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    for resume in (False, True):
        with pytest.raises(EventSinkError, match="spool open"):
            Spool(str(path), resume=resume)
    assert not (tmp_path / "elsewhere").exists()


def test_resuming_appends(path: Path) -> None:
    path.write_bytes(b"one\n")
    continued = Spool(str(path), resume=True)
    continued.emit("id", b"two")
    continued.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_missing_spool_is_empty(path: Path) -> None:
    assert recover(str(path)).last is None
    assert list(read_lines(str(path))) == []
    assert not path.exists()


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
@given(lines=LINES, torn=st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")))
def test_recovery_cuts_the_half_line_and_finds_the_last_whole_one(
    block: int, lines: list[bytes], torn: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("spool") / "run.jsonl"
    whole = b"".join(line + b"\n" for line in lines)
    path.write_bytes(whole + torn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_BLOCK", block)
        found = recover(str(path))
    assert found.last == (lines[-1] if lines else None)
    assert found.torn_bytes == len(torn)
    assert path.read_bytes() == whole
    assert list(read_lines(str(path))) == lines


def test_lines_from_an_offset_on(path: Path) -> None:
    path.write_bytes(b"one\ntwo\nhalf")
    assert list(read_lines(str(path), offset=4)) == [b"two"]


def test_a_directory_is_an_error_of_ours(path: Path) -> None:
    path.mkdir()
    with pytest.raises(EventSinkError, match="Is a directory"):
        recover(str(path))
    with pytest.raises(EventSinkError, match="Is a directory"):
        list(read_lines(str(path)))


def test_a_full_spool_directory_takes_no_new_run_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 600)
    (tmp_path / "b.jsonl").write_bytes(b"x" * 399)
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)
    assert spooled_bytes(str(tmp_path)) == 999
    require_room(str(tmp_path), limit=1000)
    (tmp_path / "c.jsonl").write_bytes(b"x")
    with pytest.raises(EventSinkError) as caught:
        require_room(str(tmp_path), limit=1000)
    assert caught.value.text.startswith(f"spool full: {tmp_path} holds 0.0 MiB")
    assert caught.value.text.endswith(f"send them: cellos spool replay {tmp_path}")


def test_a_run_may_begin_below_256_mib(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate((256 << 20) - 1)
    require_room(str(tmp_path))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b"x")
    with pytest.raises(EventSinkError, match=r"holds 256\.0 MiB of events that wait for NATS, and no run begins above 256 MiB"):
        require_room(str(tmp_path))


def test_only_what_waits_is_kept(path: Path) -> None:
    path.write_bytes(b"one\ntwo\nthree\n")
    keep_only(str(path), [b"two", b"three"])
    assert path.read_bytes() == b"two\nthree\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keep_only(str(path), [])
    assert list(path.parent.iterdir()) == []
    keep_only(str(path), [])


def test_a_spool_stays_as_it_was_when_the_rest_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"one\ntwo\n")

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(EventSinkError, match="No space left"):
        keep_only(str(path), [b"two"])
    assert path.read_bytes() == b"one\ntwo\n"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
