"""What `cellos run` does where somebody does not read, does not wait, or stops it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.cli.process import AGAIN_SECONDS
from cellos.core.evidence.verify import verify

pytestmark = pytest.mark.linux_backend

COMPLETED = "dev.cellos.events.cell.command.v1.completed"
Ends = Callable[[Any], None]


def record_of(commands: Any) -> tuple[list[bytes], dict[str, Any]]:
    """The lines of the one record, and what it says of the command's end."""
    [path] = (commands.state / "evidence").glob("*")
    lines = path.read_bytes().splitlines()
    [completed] = [event["data"] for event in map(json.loads, lines) if event["type"] == COMPLETED]
    return lines, completed


def until(reached: Callable[[], bool], *, seconds: float = 60) -> None:
    """Look again and again at what other processes do."""
    never = select.poll()
    for _ in range(int(seconds * 50)):
        if reached():
            return
        never.poll(20)
    raise AssertionError("it did not come")


def runs(argument: str) -> bool:
    """Whether any process has this argument."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if argument.encode() in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_output_that_is_given_up_is_said_and_recorded(commands: Any, ends: Ends) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    unique = f"1000.{os.getpid()}"
    script = f"head -c 30000 /dev/zero; echo written >&2; exec sleep {unique}"  # the cell's own pipe takes what ours does not
    python, option, main = commands.line("cellos")
    main = f"import cellos.backends.relay as relay; relay._KILL_SECONDS = 1000.0; {main}"
    process = subprocess.Popen(
        [python, option, main, "run", "--", "sh", "-c", script],
        env=commands.environment, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ends(process)
    os.close(writing)
    try:
        assert process.stderr
        assert process.stderr.readline() == "written\n"
        until(lambda: runs(unique))
        process.send_signal(signal.SIGTERM)  # it asks the command to stop
        until(lambda: not runs(unique))
        time.sleep(AGAIN_SECONDS)
        process.send_signal(signal.SIGTERM)  # this one ends the wait for us, who do not read
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        os.close(reading)
    _, error = process.communicate(timeout=60)
    assert error.startswith("cellos: stopped after ")
    assert " · output was lost: it was not read in time · events " in error
    lines, completed = record_of(commands)
    assert completed["outputLost"] is True
    assert verify(lines).verified
    printed = commands.run("cellos", "events")
    assert ", OUTPUT WAS LOST: sh -c 'head -c 30000" in printed.stdout


def test_ctrl_backslash_is_a_stop_like_others(commands: Any, ends: Ends) -> None:
    process = commands.start("cellos", "run", "--", "sh", "-c", "echo up; sleep 1000")
    ends(process)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGQUIT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGQUIT
    assert error.startswith("cellos: stopped after ")
    assert verify(record_of(commands)[0]).verified


def test_the_time_limit_holds_while_we_are_stopped(commands: Any, ends: Ends) -> None:
    unique = f"unique-{os.getpid()}"
    script = f"exec sh -c 'echo up; sleep 1000' {unique}"  # what says that it is up can be found
    process = commands.start("cellos", "run", "--timeout", "2s", "--", "sh", "-c", script)
    ends(process)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: not runs(unique))
    finally:
        process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 124
    assert error.startswith("cellos: time-out after 2 s")
    lines, completed = record_of(commands)
    assert completed["spawnError"] == "command timed out after 2000 ms (spec.run.timeoutMs)"
    assert verify(lines).verified


def test_a_cell_cannot_end_its_time_early(commands: Any) -> None:
    done = commands.run("cellos", "run", "--timeout", "60s", "--", "sh", "-c", "kill -ALRM 1; exit 7")
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("#!/no/such/thing -x\n", "its interpreter /no/such/thing: No such file or directory (os error 2)"),
        ("#! /no/\x1b[31m\n", "its interpreter /no/\\x1b[31m: No such file or directory (os error 2)"),
        (None, "No such file or directory (os error 2)"),
    ],
)
def test_a_script_whose_interpreter_is_missing(commands: Any, tmp_path: Path, text: str | None, line: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o755)
    if text is not None:
        (place / "script").write_text(text)
        (place / "script").chmod(0o755)
    done = commands.run("cellos", "run", "--here", "--", "./script", cwd=place)
    assert done.returncode == 127
    assert done.stderr.startswith(f"cellos: cannot start ./script: {line} · ")


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["printf", "plain"], b"plain\r\ncellos: exit 0"),
        (["echo", "plain"], b"plain\r\ncellos: exit 0"),
        (["true"], b"cellos: exit 0"),
    ],
)
def test_the_closing_line_begins_a_line(commands: Any, ends: Ends, argv: list[str], shown: bytes) -> None:
    ours, theirs = pty.openpty()
    process = commands.start("cellos", "run", "--", *argv, stdout=theirs, stderr=theirs)
    ends(process)
    os.close(theirs)
    found = b""
    try:
        while chunk := os.read(ours, 1000):
            found += chunk
    except OSError:  # EIO: everybody has closed it
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    assert found.startswith(shown)


HAND_OVER = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(socket.send_fds(s, [b'x'], [1]))"


def test_an_output_that_the_command_gave_away_is_not_waited_for(commands: Any, tmp_path: Path) -> None:
    place = tmp_path / "shown"
    place.mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "s"))
        (place / "s").chmod(0o777)
        listening.listen()
        command = ["/usr/bin/python3", "-c", HAND_OVER, str(place / "s")]
        done = commands.run("cellos", "run", "--ro", str(place), "--", *command)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "lost" not in done.stderr


BLOCKING = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_signals_that_the_caller_blocks_do_not_hide_the_end_of_a_command(commands: Any) -> None:
    line = [sys.executable, "-c", BLOCKING, *commands.line("cellos"), "run", "--timeout", "30s", "--", "sh", "-c", "exit 4"]
    assert subprocess.run(line, env=commands.environment, capture_output=True, timeout=60, check=False).returncode == 4
