from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from cellos.errors import EventSinkError
from cellos.eventlog.dead_letters import DeadLetters, DlqSink, directory_fault
from cellos.ports import EventSink
from cellos.testing.sink import RecordingSink

LINE = (
    b'{"specversion":"1.0","id":"e1","source":"s","type":"t","datacontenttype":null,'
    b'"data":{"n":1e-7,"t":"\xc3\xa9"},"time":null,"traceparent":null}'
)


class Boom:
    """A sink that takes nothing."""

    def __init__(self) -> None:
        self.closed = 0

    def emit(self, event_id: str, line: bytes) -> None:
        raise EventSinkError("primary boom")

    def close(self) -> None:
        self.closed += 1


def letters(directory: Path) -> DeadLetters:
    return DeadLetters(str(directory), now_ms=lambda: 1700000000123)


def test_a_dead_letter_is_one_line_with_the_error_and_the_events_own_bytes(tmp_path: Path) -> None:
    path = letters(tmp_path).store("e1", LINE, "event sink: primary boom")
    assert path == f"{tmp_path}/1700000000123-e1.jsonl"
    assert Path(path).read_bytes() == b'{"error":"event sink: primary boom","event":' + LINE + b"}\n"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.parametrize(
    ("event_id", "name"),
    [
        ("0a0a-é/..\x00 b", "1-0a0a-__..__b.jsonl"),
        ("", "1-_.jsonl"),
        ("urn:cellos:event:x", "1-urn_cellos_event_x.jsonl"),
        ("x" * 300, f"1-{'x' * 200}.jsonl"),
    ],
)
def test_names_hold_no_character_that_a_shell_or_a_path_minds(tmp_path: Path, event_id: str, name: str) -> None:
    DeadLetters(str(tmp_path), now_ms=lambda: 1).store(event_id, LINE, "e")
    assert os.listdir(tmp_path) == [name]


def test_the_same_event_of_two_sinks_in_one_millisecond_gets_two_files(tmp_path: Path) -> None:
    store = letters(tmp_path)
    paths = [store.store(event_id, LINE, f"error {number}") for number, event_id in enumerate(("a:b", "a:b", "a;b"))]
    assert [os.path.basename(path) for path in paths] == [
        "1700000000123-a_b.jsonl",
        "1700000000123-a_b-2.jsonl",
        "1700000000123-a_b-3.jsonl",
    ]
    assert [json.loads(Path(path).read_bytes())["error"] for path in paths] == ["error 0", "error 1", "error 2"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = letters(tmp_path)
    real = os.write
    room = [10]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, os.strerror(28))
        taken, room[0] = room[0], 0
        return real(descriptor, data[:taken])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(EventSinkError, match="No space left on device"):
        store.store("e1", LINE, "e")
    assert os.listdir(tmp_path) == []


def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    assert json.loads(Path(letters(tmp_path).store("e1", LINE, "e")).read_bytes())["event"] == json.loads(LINE)


def test_the_probe_leaves_nothing_and_is_not_stopped_by_an_old_one(tmp_path: Path) -> None:
    (tmp_path / f".cellos-dlq-probe-{os.getpid()}").touch()
    assert directory_fault(str(tmp_path)) is None
    assert os.listdir(tmp_path) == [f".cellos-dlq-probe-{os.getpid()}"]


def test_a_directory_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert directory_fault(str(tmp_path / "missing")) == "no such directory; make it, or correct the name"
    assert directory_fault(str(tmp_path / "file")) == "not a directory"
    assert directory_fault("/proc") is not None
    assert not (tmp_path / "missing").exists()
    with pytest.raises(EventSinkError) as caught:
        DeadLetters(str(tmp_path / "missing"))
    assert caught.value.text == "no such directory; make it, or correct the name"


def test_an_event_that_the_sink_does_not_take_is_kept_and_no_error(tmp_path: Path) -> None:
    inner = Boom()
    sink: EventSink = DlqSink(inner, letters(tmp_path))
    sink.emit("e1", LINE)
    [name] = os.listdir(tmp_path)
    assert json.loads((tmp_path / name).read_bytes()) == {"error": "event sink: primary boom", "event": json.loads(LINE)}
    sink.close()
    assert inner.closed == 1


def test_an_event_that_the_sink_takes_is_not_kept(tmp_path: Path) -> None:
    inner = RecordingSink()
    sink = DlqSink(inner, letters(tmp_path))
    sink.emit("e1", LINE)
    assert inner.lines == [LINE]
    assert os.listdir(tmp_path) == []
    assert sink.stored == 0


def test_an_event_that_cannot_be_kept_either_is_the_error_of_the_sink(tmp_path: Path) -> None:
    directory = tmp_path / "dlq"
    directory.mkdir()
    sink = DlqSink(Boom(), letters(directory))
    directory.rmdir()
    with pytest.raises(EventSinkError, match="primary boom"):
        sink.emit("e1", LINE)
    assert sink.stored == 0
