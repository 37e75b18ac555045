from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from cellos.artifacts.files import DirectoryStore, PlacedFiles, check_artifact_name, check_cell_segment
from cellos.errors import ExportError


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


class TestPlacedFiles:
    def test_each_goes_where_its_owner_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        store = PlacedFiles({"a": "here.txt", "b": str(tmp_path / "there.txt")})
        receipts = [store.put("cell-1", name, io.BytesIO(name.encode())) for name in "ab"]
        assert ((tmp_path / "here.txt").read_text(), (tmp_path / "there.txt").read_text()) == ("a", "b")
        assert [receipt.destination for receipt in receipts] == ["here.txt", str(tmp_path / "there.txt")]
        assert sorted(os.listdir(tmp_path)) == ["here.txt", "there.txt"]

    def test_what_is_there_is_replaced_and_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("target")
        (tmp_path / "a").symlink_to(tmp_path / "target")
        PlacedFiles({"a": str(tmp_path / "a")}).put("cell-1", "a", io.BytesIO(b"new"))
        assert (tmp_path / "target").read_text() == "target"
        assert not (tmp_path / "a").is_symlink()
        assert (tmp_path / "a").read_text() == "new"

    @pytest.mark.parametrize(
        ("place", "reason"), [("", "Is a directory"), ("none/a", "No such file or directory"), ("file/a", "Not a directory")]
    )
    def test_places_that_cannot_be(self, tmp_path: Path, place: str, reason: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ExportError, match=rf"export copy -> .*: {reason} \(os error \d+\)$"):
            PlacedFiles({"a": f"{tmp_path}/{place}"}).put("cell-1", "a", io.BytesIO(b"x"))

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
