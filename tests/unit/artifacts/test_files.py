from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.artifacts.files import DirectoryStore, PlacedFiles, check_artifact_name, check_cell_segment
from cellos.errors import ConfigError, ExportError


@pytest.fixture(autouse=True, params=["files without a name", "named files"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of file system. One that does not know the flag sees a directory opened for writing: EISDIR (open(2))."""
    if request.param == "named files":
        monkeypatch.setattr("cellos.artifacts.files._UNNAMED", os.O_WRONLY)


class Broken(io.BytesIO):
    """Fails after its first piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError(5, os.strerror(5))
        return super().read(3)


class TestDirectoryStore:
    def test_an_artifact_arrives_whole(self, tmp_path: Path) -> None:
        content = os.urandom((1 << 20) * 2 + 7)
        receipt = DirectoryStore(str(tmp_path / "out")).put("cell-1", "report.bin", io.BytesIO(content))
        assert (tmp_path / "out/cell-1/report.bin").read_bytes() == content
        assert os.listdir(tmp_path / "out/cell-1") == ["report.bin"]
        assert (receipt.target_kind, receipt.target_name) == ("local", None)
        assert (receipt.destination, receipt.bytes_written) == ("cell-1/report.bin", len(content))

    @pytest.mark.parametrize("make", ["file", "link", "dangling link", "directory"])
    def test_what_exists_is_never_replaced(self, tmp_path: Path, make: str) -> None:
        (tmp_path / "cell-1").mkdir()
        place = tmp_path / "cell-1/a"
        (tmp_path / "other").write_text("other")
        if make == "file":
            place.write_text("old")
        elif make == "directory":
            place.mkdir()
        else:
            place.symlink_to(tmp_path / ("other" if make == "link" else "nothing"))
        with pytest.raises(ExportError, match=r"^export sink: export copy -> .*/cell-1/a: File exists \(os error 17\)$"):
            DirectoryStore(str(tmp_path)).put("cell-1", "a", io.BytesIO(b"new"))
        assert (tmp_path / "other").read_text() == "other"
        assert not (tmp_path / "nothing").exists()
        assert os.listdir(tmp_path / "cell-1") == ["a"]

    def test_a_cell_directory_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "root/cell-1").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ExportError, match=r"^export sink: export mkdir: "):
            DirectoryStore(str(tmp_path / "root")).put("cell-1", "a", io.BytesIO(b"x"))
        assert os.listdir(tmp_path / "elsewhere") == []

    def test_a_source_that_breaks_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"Input/output error \(os error 5\)"):
            DirectoryStore(str(tmp_path)).put("cell-1", "a", Broken(b"abcdef"))
        assert os.listdir(tmp_path / "cell-1") == []

    def test_a_root_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ExportError, match=r"^export sink: export mkdir: "):
            DirectoryStore(str(tmp_path / "file/x")).put("cell-1", "a", io.BytesIO(b"x"))

    @pytest.mark.parametrize("cell_id", ["", ".", "..", "a/b", "a\\b", "a\0b"])
    def test_a_cell_id_is_one_segment(self, cell_id: str) -> None:
        with pytest.raises(ExportError, match=r"^export sink: export cell_id must be a single path segment"):
            check_cell_segment(cell_id)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("", "artifact name must not be empty"),
            ("a\0b", "NUL byte"),
            ("/a", "an absolute path"),
            ("a/b", "path separators ('/' or '\\')"),
            ("a\\b", "path separators ('/' or '\\')"),
            ("..", "would traverse outside the export directory"),
            ("~a", "must not start with '~'"),
        ],
    )
    def test_a_name_names_a_file(self, name: str, text: str) -> None:
        with pytest.raises(ExportError) as caught:
            check_artifact_name(name)
        assert text in str(caught.value)


def put(path: Path) -> None:
    """A file goes there, and the check had nothing against it."""
    store = PlacedFiles({"a": str(path)})
    store.check()
    store.put("cell-1", "a", io.BytesIO(b"new"))


def refused(path: Path | str, reason: str) -> None:
    """Nothing goes there, and the check says why, too."""
    store = PlacedFiles({"a": str(path)})
    with pytest.raises(ConfigError, match=rf"^out: cannot copy to {path}: {reason}"):
        store.check()
    with pytest.raises(ExportError, match=rf"^export sink: export copy -> {path}: {reason}"):
        store.put("cell-1", "a", io.BytesIO(b"x"))


def bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


class TestPlacedFiles:
    def test_each_goes_where_its_owner_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        store = PlacedFiles({"a": "here.txt", "b": str(tmp_path / "there.txt")})
        receipts = [store.put("cell-1", name, io.BytesIO(name.encode())) for name in "ab"]
        assert ((tmp_path / "here.txt").read_text(), (tmp_path / "there.txt").read_text()) == ("a", "b")
        assert [receipt.destination for receipt in receipts] == ["here.txt", str(tmp_path / "there.txt")]
        assert sorted(os.listdir(tmp_path)) == ["here.txt", "there.txt"]

    def test_a_regular_file_is_replaced_and_its_permissions_stay(self, tmp_path: Path) -> None:
        place = tmp_path / "a"
        for mode in (0o600, 0o444, 0o4777):
            place.write_text("old")
            place.chmod(mode)
            put(place)
            assert (place.read_text(), place.stat().st_mode & 0o7777) == ("new", mode & 0o777)
            place.unlink()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
    def test_its_owner_stays(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        os.chown(tmp_path / "a", 4711, 4712)
        put(tmp_path / "a")
        made = (tmp_path / "a").stat()
        assert (made.st_uid, made.st_gid, (tmp_path / "a").read_text()) == (4711, 4712, "new")

    def test_its_other_hard_links_keep_what_they_have(self, tmp_path: Path) -> None:
        (tmp_path / "other").write_text("old")
        (tmp_path / "a").hardlink_to(tmp_path / "other")
        put(tmp_path / "a")
        assert ((tmp_path / "a").read_text(), (tmp_path / "other").read_text()) == ("new", "old")

    @pytest.mark.parametrize("target", ["d/target", "{tmp}/d/target", "more"])
    def test_a_link_stays_and_its_file_is_replaced(self, tmp_path: Path, target: str) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d/target").write_text("old")
        (tmp_path / "more").symlink_to("d/target")
        (tmp_path / "a").symlink_to(target.format(tmp=tmp_path))
        put(tmp_path / "a")
        assert (tmp_path / "a").is_symlink()
        assert (tmp_path / "d/target").read_text() == "new"
        assert os.listdir(tmp_path / "d") == ["target"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root makes links of others")
    def test_a_link_of_somebody_else_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "ours").write_text("ours")
        (tmp_path / "a").symlink_to("ours")
        os.lchown(tmp_path / "a", 4711, 4711)
        refused(tmp_path / "a", r"it is a symbolic link of another user \(uid 4711\), which is not followed; name the file itself")
        assert (tmp_path / "ours").read_text() == "ours"

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (os.mkdir, "it is a directory, and only a regular file is replaced; name a file in it"),
            (os.mkfifo, "it is a FIFO, and only a regular file is replaced; name a file, or let the command print what it makes"),
            (bind, "it is a socket, and only"),
            (lambda path: os.symlink("/dev/null", path), "it is a character device, and only"),
            (lambda path: os.symlink("nothing", path), "it is a symbolic link that leads to nothing; name the file itself"),
            (lambda path: os.symlink("a", path), "too many symbolic links"),
            (lambda path: os.symlink("/proc/self/fd/0", path), "it stands for an open file of a process; name a file, or let"),
        ],
    )
    def test_what_is_no_regular_file_stays(self, tmp_path: Path, make: Callable[[str], object], reason: str) -> None:
        make(str(tmp_path / "a"))
        before = os.lstat(tmp_path / "a")
        refused(tmp_path / "a", reason)
        assert os.lstat(tmp_path / "a").st_ino == before.st_ino
        assert os.listdir(tmp_path) == ["a"]

    def test_what_appears_while_it_is_copied_stays(self, tmp_path: Path) -> None:
        class Slow(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if not self.tell():
                    os.mkfifo(tmp_path / "a")
                return super().read(size)

        with pytest.raises(ExportError, match=r"^export sink: export copy -> .*/a: it is a FIFO, and only a regular file is replaced"):
            PlacedFiles({"a": str(tmp_path / "a")}).put("cell-1", "a", Slow(b"new"))
        assert (tmp_path / "a").is_fifo()
        assert os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("", "it is a directory"),
            ("none/a", r"its directory: No such file or directory \(os error 2\)"),
            ("file/a", r"its directory: Not a directory \(os error 20\)"),
        ],
    )
    def test_places_that_cannot_be(self, tmp_path: Path, place: str, reason: str) -> None:
        (tmp_path / "file").write_text("")
        refused(f"{tmp_path}/{place}", reason)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_directory_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        refused(tmp_path / "a", "nothing can be written in its directory; choose another one")
        tmp_path.chmod(0o700)

    @pytest.mark.parametrize("second", ["a", "link", "d/../a", "linked/a"])
    def test_two_files_for_one_place(self, tmp_path: Path, second: str) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "a").write_text("old")
        (tmp_path / "link").symlink_to("a")
        (tmp_path / "linked").symlink_to(".")
        with pytest.raises(ConfigError, match=r"^out: two files would go to one place, .*/a.*; give each a destination of its own$"):
            PlacedFiles({"1": f"{tmp_path}/a", "2": f"{tmp_path}/{second}"}).check()
        PlacedFiles({"1": f"{tmp_path}/a", "2": f"{tmp_path}/d/a"}).check()

    def test_a_check_keeps_nothing_open(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").write_text("")
        before = os.listdir("/proc/self/fd")
        PlacedFiles({"a": str(tmp_path / "a")}).check()
        refused(tmp_path, "it is a directory")
        assert len(os.listdir("/proc/self/fd")) == len(before)

    def test_a_source_that_breaks_keeps_what_was_there(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        with pytest.raises(ExportError):
            PlacedFiles({"a": str(tmp_path / "a")}).put("cell-1", "a", Broken(b"abcdef"))
        assert (tmp_path / "a").read_text() == "old"
        assert os.listdir(tmp_path) == ["a"]

    def test_a_name_without_a_place(self) -> None:
        with pytest.raises(ExportError, match='no destination was given for artifact "b"'):
            PlacedFiles({}).put("cell-1", "b", io.BytesIO(b""))


def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(bytes(data)[:2]) or 0

    monkeypatch.setattr("builtins.open", lambda descriptor, *_, **__: Slow(descriptor, "w"))
    receipt = DirectoryStore(str(tmp_path)).put("cell-1", "a", io.BytesIO(b"abcdef"))
    monkeypatch.undo()
    assert (receipt.bytes_written, (tmp_path / "cell-1/a").read_bytes()) == (6, b"abcdef")
