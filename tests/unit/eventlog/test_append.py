from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellos.errors import EventSinkError
from cellos.eventlog.append import Appender


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.fixture
def file(path: Path) -> Iterator[Appender]:
    appender = Appender(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), str(path))
    yield appender
    appender.close()


def fail_after(monkeypatch: pytest.MonkeyPatch, path: Path, room: int, *, then: bytes = b"") -> None:
    """The next write takes `room` bytes; before it fails, somebody else appends `then`."""
    real, calls = os.write, 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(descriptor, data[:room])
        if then:
            with path.open("ab") as other:
                other.write(then)
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "write", write)


def test_what_another_writer_appended_is_never_cut(file: Appender, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.append(b"one")
    fail_after(monkeypatch, path, 3, then=b"theirs\n")
    with pytest.raises(EventSinkError, match=r"Input/output error \(os error 5\)"):
        file.append(b"second")
    assert path.read_bytes() == b"one\nsectheirs\n"
    monkeypatch.undo()
    file.append(b"third")
    assert path.read_bytes() == b"one\nsectheirs\n\nthird\n"


def test_a_lock_that_is_not_to_be_had_does_not_stop_anybody(file: Appender, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    file.append(b"one")
    assert path.read_bytes() == b"one\n"
