"""Looking a program up in PATH, as execvp(3) does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellos.sandbox.init import _find

ROOT = os.geteuid() == 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a/tool may be executed, b/tool may not, c/tool is a directory, d has none; `tool` also lies here."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    (tmp_path / "c" / "tool").mkdir()
    for name, mode in (("a", 0o755), ("b", 0o644), (".", 0o755)):
        path = tmp_path / name / "tool"
        path.write_text("#!/bin/sh\n")
        path.chmod(mode)
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "tool", 0o755)
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "tool").symlink_to("nowhere")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "tool").symlink_to("tool")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "tool").symlink_to("../a/tool")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{}/a", "{}/a/tool"),
        ("{}/d:{}/a", "{}/a/tool"),
        ("{}/missing:{}/a", "{}/a/tool"),
        ("{}/b:{}/a", "{}/a/tool"),  # a file that may not be executed does not end the search
        ("{}/c:{}/a", "{}/a/tool"),
        ("{}/fifo:{}/a", "{}/a/tool"),
        ("{}/file:{}/a", "{}/a/tool"),  # not a directory at all
        ("{}/loop:{}/dangling:{}/a", "{}/a/tool"),
        ("{}/link:{}/a", "{}/link/tool"),
        ("{}/a:{}/b", "{}/a/tool"),
        ("a", "a/tool"),
        ("", "./tool"),  # an empty part is the working directory
        (":{}/a", "./tool"),
        ("{}/d:", "./tool"),
        ("{}/d::{}/a", "./tool"),
    ],
)
def test_the_first_that_may_be_executed_wins(place: Path, path: str, found: str) -> None:
    assert _find("tool", path.replace("{}", str(place))) == found.replace("{}", str(place))


@pytest.mark.parametrize("path", ["{}/d", "{}/missing", "{}/file", "{}/dangling", "{}/loop"])
def test_nothing_there_is_not_found(place: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _find("tool", path.replace("{}", str(place)))
    assert caught.value.errno == 2


@pytest.mark.parametrize("path", ["{}/b", "{}/c", "{}/fifo", "{}/b:{}/d", "{}/d:{}/b", "{}/b:{}/missing"])
def test_only_what_may_not_be_executed_is_permission_denied(place: Path, path: str) -> None:
    with pytest.raises(PermissionError) as caught:
        _find("tool", path.replace("{}", str(place)))
    assert caught.value.errno == 13


@pytest.mark.skipif(ROOT, reason="root may search every directory")
def test_a_directory_that_may_not_be_searched_is_permission_denied(place: Path) -> None:
    (place / "a").chmod(0)
    with pytest.raises(PermissionError):
        _find("tool", f"{place}/a:{place}/d")
    assert _find("tool", f"{place}/a:{place}/link/../b/../.") == f"{place}/link/../b/.././tool"


@pytest.mark.parametrize("program", ["/nowhere/tool", "./tool", "a/tool", "../x"])
def test_a_name_with_a_slash_is_not_looked_up(place: Path, program: str) -> None:
    assert _find(program, f"{place}/a") == program


def test_an_empty_name_is_not_found(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _find("", f"{place}/a")


def test_the_same_answers_as_the_c_library(place: Path) -> None:
    """`env` looks its program up with execvp: what it says of the same paths is the measure."""
    import subprocess

    for path in ("{}/a", "{}/b", "{}/c:{}/a", "{}/d", "{}/b:{}/d", "{}/file:{}/a", "{}/missing", "{}/fifo", "{}/dangling:{}/a"):
        full = path.replace("{}", str(place))
        measure = subprocess.run(["/usr/bin/env", f"PATH={full}", "tool"], capture_output=True, check=False).returncode
        try:
            _find("tool", full)
            ours = 0
        except FileNotFoundError:
            ours = 127
        except PermissionError:
            ours = 126
        assert ours == measure, path
