"""Ids are taken by several processes at once, and files come and go under their hands."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cellos.sandbox.hostids import HostId, HostIds

TAKE = """
import os, random, sys
from cellos.sandbox.hostids import HostIds
ids = HostIds(first=100, count=40, directory=sys.argv[1])  # many more than all hold: they move while one walks along them
taken = []
for turn in range(600):
    if taken and (len(taken) == 2 or random.random() < 0.5):
        held = taken.pop(0)
        os.close(os.open(f"{sys.argv[2]}/{held.number}", os.O_RDONLY))  # still there: nobody else put it away
        os.unlink(f"{sys.argv[2]}/{held.number}")
        assert held.release() is None
    else:
        held = ids.acquire()
        # Fails if another holder is in: this is the property.
        os.close(os.open(f"{sys.argv[2]}/{held.number}", os.O_CREAT | os.O_EXCL, 0o600))
        taken.append(held)
    if turn % 7 == 0:
        ids.remove_abandoned()
for held in taken:
    os.unlink(f"{sys.argv[2]}/{held.number}")
    assert held.release() is None
print("fine")
"""


@pytest.fixture
def ids(tmp_path: Path) -> HostIds:
    return HostIds(first=100, count=4, directory=str(tmp_path / "ids"))


def test_an_id_never_has_two_holders(tmp_path: Path) -> None:
    """Four processes take and give back at once, and sweep each other's files meanwhile."""
    ids, held = tmp_path / "ids", tmp_path / "held"
    held.mkdir()
    children = [
        subprocess.Popen([sys.executable, "-c", TAKE, str(ids), str(held)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [child.communicate(timeout=60) for child in children]
    assert answers == [("fine\n", "")] * 4
    assert os.listdir(ids) == []


def test_gives_each_id_once_and_then_says_that_all_are_taken(ids: HostIds) -> None:
    taken = [ids.acquire() for _ in range(4)]
    assert {held.number for held in taken} == {100, 101, 102, 103}
    with pytest.raises(OSError, match="in use") as caught:
        ids.acquire()
    assert caught.value.errno == errno.ENOSPC
    freed = taken.pop()
    assert freed.release() is None
    again = ids.acquire()
    assert again.number == freed.number
    for held in [*taken, again]:
        held.release()


def test_the_directory_is_ours_alone(ids: HostIds, tmp_path: Path) -> None:
    held = ids.acquire()
    assert os.stat(tmp_path / "ids").st_mode & 0o777 == 0o700
    assert os.stat(tmp_path / "ids" / str(held.number)).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(held.descriptor)
    held.release()


def test_a_killed_holder_gives_its_ids_back(tmp_path: Path) -> None:
    take_and_die = (
        "import os, sys; from cellos.sandbox.hostids import HostIds; ids = HostIds(first=100, count=2, directory=sys.argv[1]);"
        "kept = [ids.acquire(), ids.acquire()]; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", take_and_die, str(tmp_path)], timeout=60, check=False)
    assert sorted(os.listdir(tmp_path)) == ["100", "101"]
    ids = HostIds(first=100, count=2, directory=str(tmp_path))
    taken = [ids.acquire(), ids.acquire()]
    assert {held.number for held in taken} == {100, 101}
    for held in taken:
        held.release()


def test_removes_files_of_the_dead_and_none_of_the_living(ids: HostIds, tmp_path: Path) -> None:
    held = ids.acquire()
    dead = (held.number - 100 + 1) % 4 + 100
    (tmp_path / "ids" / str(dead)).touch()
    (tmp_path / "ids" / "readme").touch()
    assert ids.exists(dead)
    ids.remove_abandoned()
    assert not ids.exists(dead)
    assert sorted(os.listdir(tmp_path / "ids")) == sorted([str(held.number), "readme"])
    held.release()


def test_there_is_nothing_to_remove_before_the_first_id(ids: HostIds, tmp_path: Path) -> None:
    ids.remove_abandoned()
    ids.remove_if_free(100)
    assert not (tmp_path / "ids").exists()


def test_a_file_that_was_replaced_between_open_and_lock_is_anothers(ids: HostIds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder lets go and somebody else takes the same number, just before our lock succeeds."""
    first = ids.acquire()
    path = tmp_path / "ids" / str(first.number)
    others: list[int] = []
    import fcntl

    lock = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if not others:
            first.release()
            others.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            lock(others[0], fcntl.LOCK_EX)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    ids.remove_if_free(first.number)
    assert path.exists(), "it removed the file of a living holder"
    monkeypatch.undo()
    taken = [ids.acquire() for _ in range(3)]
    assert first.number not in {held.number for held in taken}
    for held in taken:
        held.release()
    os.close(others[0])


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("/etc/passwd", path)], ids=["directory", "link"])
def test_what_is_no_file_is_passed_over(tmp_path: Path, make: object) -> None:
    make(str(tmp_path / "100"))  # type: ignore[operator]
    ids = HostIds(first=100, count=2, directory=str(tmp_path))
    taken = ids.acquire()
    assert taken.number == 101
    with pytest.raises(OSError, match="in use"):
        ids.acquire()
    taken.release()


def test_says_what_it_could_not_remove(ids: HostIds, tmp_path: Path) -> None:
    held = ids.acquire()
    path = tmp_path / "ids" / str(held.number)
    path.unlink()
    path.mkdir()
    problem = held.release()
    assert problem is not None
    assert problem.startswith(f"{path}: ")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held.descriptor)


def test_a_file_that_is_gone_is_not_left_behind(ids: HostIds, tmp_path: Path) -> None:
    held = ids.acquire()
    (tmp_path / "ids" / str(held.number)).unlink()
    assert held.release() is None


def test_the_start_is_drawn_by_lot(tmp_path: Path) -> None:
    """Else every supervisor would first fight for the same id."""
    numbers = Counter[int]()
    ids = HostIds(first=0, count=1 << 16, directory=str(tmp_path))
    for _ in range(20):
        held: HostId = ids.acquire()
        numbers[held.number] += 1
        held.release()
    assert len(numbers) > 10
