from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cellos.errors import ConfigError
from cellos.supervisor import state
from cellos.supervisor.state import candidates, check_state_directory, evidence_directory, find_state_directory, open_state_directory


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /var/tmp."""
    (tmp_path / "shared").mkdir(mode=0o1777)
    monkeypatch.setattr(state, "SHARED", (str(tmp_path / "shared"),))
    return tmp_path / "shared"


def test_places_in_their_order() -> None:
    shared = state.SHARED[0]
    assert list(candidates({"HOME": "/root", "XDG_STATE_HOME": "/x"}, 0)) == ["/var/lib/cellos", f"{shared}/cellos-0"]
    assert list(candidates({"HOME": "/home/u", "XDG_STATE_HOME": "/x"}, 7)) == [
        "/x/cellos",
        "/home/u/.local/state/cellos",
        f"{shared}/cellos-7",
    ]
    assert list(candidates({"HOME": "", "XDG_STATE_HOME": "relative"}, 7)) == [f"{shared}/cellos-7"]


def test_the_chosen_one_is_made_with_its_parts(tmp_path: Path) -> None:
    found = open_state_directory({"CELLOS_STATE_DIR": str(tmp_path / "a/b")})
    assert found.path == str(tmp_path / "a/b")
    for path in (found.path, found.runs, found.spool, found.evidence):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert open_state_directory({"CELLOS_STATE_DIR": found.path}) == found
    assert evidence_directory({"CELLOS_STATE_DIR": found.path}) == found.evidence


def test_a_relative_choice_is_meant_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_state_directory({"CELLOS_STATE_DIR": "mine"}).path == str(tmp_path / "mine")


def test_the_next_place_is_taken_where_one_cannot_be_written(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(state, "candidates", lambda *_: [str(tmp_path / "file/cellos"), str(shared / "cellos"), str(tmp_path / "last")])
    assert open_state_directory({}).path == str(shared / "cellos")
    assert not (tmp_path / "last").exists()


def test_when_none_can_be_written_each_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(state, "candidates", lambda *_: [str(tmp_path / "file/a"), str(tmp_path / "file/b")])
    with pytest.raises(ConfigError, match=r"file/a: Not a directory \(os error 20\); .*/file/b: .*set CELLOS_STATE_DIR$"):
        open_state_directory({})


def test_a_choice_that_cannot_be_used_is_an_error_and_no_other_place_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^CELLOS_STATE_DIR: cannot use .*/file/x: Not a directory \(os error 20\)$"):
        open_state_directory({"CELLOS_STATE_DIR": str(tmp_path / "file/x")})


def test_to_find_one_makes_none(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"CELLOS_STATE_DIR": str(tmp_path / "a/b")}
    places = [str(tmp_path / "first"), str(shared / "second"), str(tmp_path / "third")]
    monkeypatch.setattr(state, "candidates", lambda *_: places)
    assert find_state_directory(chosen) is None
    assert find_state_directory({}) is None
    assert os.listdir(tmp_path) == ["shared"]
    made = open_state_directory(chosen)
    assert find_state_directory(chosen) == made
    os.mkdir(places[1], 0o700)
    found = find_state_directory({})
    assert found is not None
    assert found.path == places[1]
    assert os.listdir(found.path) == []


class TestUnsafePlaces:
    def test_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "theirs")
        with pytest.raises(ConfigError, match="not a directory \\(symbolic links are refused\\)"):
            open_state_directory({"CELLOS_STATE_DIR": str(tmp_path / "link")})
        assert list((tmp_path / "theirs").iterdir()) == []

    def test_a_directory_of_somebody_else(self, shared: Path) -> None:
        (shared / "cellos-4242").mkdir(mode=0o700)
        with pytest.raises(ConfigError, match=rf"belongs to uid {os.geteuid()}, not to 4242"):
            open_state_directory({}, user=4242)

    def test_one_that_others_may_write_to(self, tmp_path: Path) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o770)
        with pytest.raises(ConfigError, match=r"others may write to it \(mode 0770\)"):
            open_state_directory({"CELLOS_STATE_DIR": str(tmp_path / "open")})
        with pytest.raises(ConfigError, match="others may write to it"):
            find_state_directory({"CELLOS_STATE_DIR": str(tmp_path / "open")})

    def test_a_part_that_is_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "runs").symlink_to("/")
        tmp_path.chmod(0o700)
        with pytest.raises(ConfigError, match="runs: not a directory"):
            open_state_directory({"CELLOS_STATE_DIR": str(tmp_path)})


def test_the_doctor_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLOS_STATE_DIR", str(tmp_path / "good"))
    row = check_state_directory()
    assert (row.ok, row.detail, row.cure) == (True, str(tmp_path / "good"), "")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CELLOS_STATE_DIR", str(tmp_path / "file"))
    row = check_state_directory()
    assert not row.ok
    assert "not a directory" in row.detail
    assert "CELLOS_STATE_DIR" in row.cure
