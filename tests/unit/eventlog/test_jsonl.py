from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cellos.errors import EventSinkError
from cellos.eventlog import append
from cellos.eventlog.jsonl import MAX_EVENT_BYTES, JsonlSink


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def emit(path: Path, *lines: bytes) -> None:
    sink = JsonlSink(str(path))
    for line in lines:
        sink.emit("id", line)
    sink.close()


def test_reopening_appends(path: Path) -> None:
    emit(path, b"{}")
    emit(path, b"[]")
    assert path.read_bytes() == b"{}\n[]\n"


def test_a_new_file_is_private_and_an_old_one_keeps_its_mode(path: Path) -> None:
    emit(path, b"{}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    emit(path, b"{}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_size_is_what_was_there_before(path: Path) -> None:
    assert JsonlSink(str(path)).size == 0
    path.write_bytes(b"{}\n")
    sink = JsonlSink(str(path))
    assert sink.size == 3
    sink.close()


def test_the_largest_event_passes_and_the_next_is_refused_unwritten(path: Path) -> None:
    sink = JsonlSink(str(path))
    with pytest.raises(EventSinkError) as caught:
        sink.emit("id", b"x" * (MAX_EVENT_BYTES + 1))
    assert str(caught.value) == "event sink: jsonl event too large: 1048577 bytes exceeds MAX_EVENT_BYTES (1048576 bytes)"
    assert path.read_bytes() == b""
    sink.emit("id", b"x" * MAX_EVENT_BYTES)
    sink.close()
    assert path.stat().st_size == MAX_EVENT_BYTES + 1


def test_a_line_that_somebody_left_half_written_is_not_continued(path: Path) -> None:
    path.write_bytes(b'{"a":1}\n{"half')
    emit(path, b'{"b":2}', b'{"c":3}')
    assert path.read_bytes().splitlines() == [b'{"a":1}', b'{"half', b'{"b":2}', b'{"c":3}']


@pytest.mark.parametrize("make", ["directory", "missing parent", "fifo without a reader", "nul"])
def test_what_cannot_be_opened_is_refused_at_once(path: Path, make: str) -> None:
    name = str(path)
    if make == "directory":
        path.mkdir()
    elif make == "missing parent":
        name = str(path / "x")
    elif make == "fifo without a reader":
        os.mkfifo(path)
    else:
        name += "\0"
    with pytest.raises(EventSinkError, match=r"^event sink: jsonl open "):
        JsonlSink(name)


def test_a_reader_that_does_not_read_is_not_waited_for_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "STALL_SECONDS", 0.05)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonlSink(str(path))
    fitting, long = b"1" * 1000, b"2" * 1_000_000
    sink.emit("1", fitting)
    for _ in range(2):
        with pytest.raises(EventSinkError, match=r"jsonl write .*: nobody reads it \(os error 110\)"):
            sink.emit("2", long)
    got = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            got += os.read(reader, 1 << 20)
    sink.emit("3", b"3" * 1000)
    got += os.read(reader, 1 << 20)
    sink.close()
    os.close(reader)
    first, *halves, last = got.splitlines()
    assert (first, last) == (fitting, b"3" * 1000)
    assert all(0 <= len(half) < len(long) for half in halves), "what is left of a line is on a line of its own"


def test_a_slow_reader_gets_everything(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonlSink(str(path))
    os.set_blocking(reader, True)
    lines = [bytes([digit]) * 300_000 for digit in b"12345"]
    got: list[bytes] = []

    def read() -> None:
        with open(reader, "rb") as file:
            got.extend(file.read().splitlines())

    thread = threading.Thread(target=read)
    thread.start()
    for line in lines:
        sink.emit("x", line)
    sink.close()
    thread.join()
    assert got == lines


def test_a_fifo_with_a_reader_is_written_to(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    emit(path, b"{}")
    assert os.read(reader, 100) == b"{}\n"
    os.close(reader)


def test_a_full_device(path: Path) -> None:
    sink = JsonlSink("/dev/full")
    with pytest.raises(EventSinkError, match=r"sink full: /dev/full \(No space left on device \(os error 28\)\)"):
        sink.emit("id", b"{}")
    sink.close()


def test_a_symbolic_link_is_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    emit(tmp_path / "link", b"{}")
    assert path.read_bytes() == b"{}\n"


WRITER = """
import sys
from cellos.eventlog.jsonl import JsonlSink
sink = JsonlSink(sys.argv[1])
for number in range(300):
    sink.emit("id", (sys.argv[2] * 3000 + str(number)).encode())
"""


def test_processes_share_a_file_without_mixing_lines(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(letter * 3000 + str(number) for letter in "abc" for number in range(300))
    for letter in "abc":
        assert [line for line in lines if line[0] == letter] == [letter * 3000 + str(number) for number in range(300)]


def test_a_fifo_that_nobody_reads_is_named_as_such(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events")
    with pytest.raises(EventSinkError, match=r"No such device or address \(os error 6\); it is a FIFO that nobody reads: start its reader"):
        JsonlSink(str(tmp_path / "events"))


def test_a_socket_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("events")
        with pytest.raises(EventSinkError, match=r"\(os error 6\); it is a socket, which nobody can open: name a file or a FIFO$"):
            JsonlSink("events")
