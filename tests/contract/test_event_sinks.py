"""What every EventSink promises, asked of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.errors import EventSinkError
from cellos.eventlog.jsonl import JsonlSink
from cellos.eventlog.spool import Spool
from cellos.ports import EventSink
from cellos.testing.sink import RecordingSink

LINES = [b'{"type":"a","n":%d}' % n for n in range(20)]


class Subject:
    """A sink and a way to see what it holds."""

    def __init__(self, sink: EventSink, held: Callable[[], list[bytes]], path: Path) -> None:
        self.sink = sink
        self.held = held
        self.path = path


@pytest.fixture(params=["jsonl", "spool", "recording"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    path = tmp_path / "events.jsonl"
    if request.param == "recording":
        recording = RecordingSink()
        yield Subject(recording, lambda: list(recording.lines), path)
        return
    sink: JsonlSink | Spool = JsonlSink(str(path)) if request.param == "jsonl" else Spool(str(path))
    yield Subject(sink, lambda: path.read_bytes().splitlines(), path)
    sink.close()


def test_an_event_is_there_when_emit_returns(subject: Subject) -> None:
    for count, line in enumerate(LINES, 1):
        subject.sink.emit(str(count), line)
        assert subject.held() == LINES[:count]


def test_lines_are_kept_byte_for_byte(subject: Subject) -> None:
    line = '{"type":"a","text":"café ✓\\n\\u2028"}'.encode()
    subject.sink.emit("1", line)
    assert subject.held() == [line]


def test_close_is_idempotent(subject: Subject) -> None:
    subject.sink.close()
    subject.sink.close()


@pytest.fixture
def nearly_full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A disk that takes so many more bytes: writes come back short, then fail."""
    real = os.write

    def arm(room: int) -> None:
        left = room

        def write(descriptor: int, data: Any) -> int:
            nonlocal left
            if left == 0:
                raise OSError(28, os.strerror(28))
            written = real(descriptor, bytes(data)[:left])
            left -= written
            return written

        monkeypatch.setattr(os, "write", write)

    return arm


@pytest.mark.parametrize("subject", ["jsonl", "spool"], indirect=True)
@pytest.mark.parametrize("room", [0, 1, 7, len(LINES[0])])
def test_a_full_disk_leaves_whole_events_only(
    subject: Subject, nearly_full: Callable[[int], None], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject.sink.emit("0", LINES[0])
    nearly_full(room)
    with pytest.raises(EventSinkError) as caught:
        subject.sink.emit("1", LINES[1])
    assert str(caught.value) == f"event sink: sink full: {subject.path} (No space left on device (os error 28))"
    assert subject.path.read_bytes() == LINES[0] + b"\n"
    monkeypatch.undo()
    subject.sink.emit("2", LINES[2])
    assert subject.held() == [LINES[0], LINES[2]]


@pytest.mark.parametrize("subject", ["jsonl", "spool"], indirect=True)
def test_a_short_write_is_completed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:3]))
    subject.sink.emit("0", LINES[0])
    assert subject.held() == LINES[:1]
