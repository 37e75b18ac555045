"""Attacks on what a command is given or inherits: terminals, descriptors, variables, keys.

As everywhere in the tour, each is first seen to work outside.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

PYTHON = "/usr/bin/python3"
ROOT = os.geteuid() == 0
SECRET = "canary-7b20de41"

WHY_SKIPPED = "what an ordinary user may not do outside proves nothing inside"
pytestmark = pytest.mark.linux_backend(user_may_skip=WHY_SKIPPED)

PIPES = ["/dev/null", "pipe", "pipe"]
END = b"<end>"


# ---------------------------------------------------------------- terminals


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """A pseudo-terminal whose slave becomes somebody's controlling one."""

    master: int
    slave: int

    @property
    def take_over(self) -> list[str]:
        """Start a command line with this and run it in a new session: the terminal is its controlling one, and its standard error."""
        text = "import os, sys; t = os.open(sys.argv[1], os.O_RDWR); os.dup2(t, 0); os.dup2(t, 2); os.execv(sys.argv[2], sys.argv[2:])"
        return [PYTHON, "-I", "-c", text, os.ttyname(self.slave)]

    def typed(self) -> str:
        """What the terminal's user would now find typed, without waiting."""
        os.set_blocking(self.slave, False)
        try:
            return os.read(self.slave, 4096).decode()
        except BlockingIOError:
            return ""

    def shown(self) -> bytes:
        """Everything written to the terminal so far. It comes a moment later than the write returns, but in order."""
        os.write(self.slave, END)
        text = b""
        while not text.endswith(END):
            assert select.select([self.master], [], [], 60)[0], text
            text += os.read(self.master, 65536)
        return text.removesuffix(END)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    import pty
    import tty

    master, slave = pty.openpty()
    tty.setraw(slave)
    try:
        yield Terminal(master=master, slave=slave)
    finally:
        os.close(master)
        os.close(slave)


WAYS = ("descriptor 0", "descriptor 1", "descriptor 2", "/dev/tty", "high bits", "become session leader")


def test_typing_for_the_user_of_the_terminal(commands: Any, attack: Any, outside: Callable[..., Any], terminal: Terminal) -> None:
    control = outside("kernel", "type_for_user", "x", before=terminal.take_over, start_new_session=True)
    if not ROOT and control["descriptor 0"] in {"EIO", "EPERM"}:
        pytest.skip(f"dev.tty.legacy_tiocsti forbids it outside: {WHY_SKIPPED}")
    assert control["descriptor 0"] == control["/dev/tty"] == control["high bits"] == "done"
    assert terminal.typed() == "xxxx"

    # The supervisor has the terminal as its controlling one; the cell must not get it by any way.
    for options in ([], ["-i"]):
        line = [*terminal.take_over, *commands.line("cellos"), "run", *options, "--", *attack("kernel"), "type_for_user", "x"]
        done = subprocess.run(line, stdout=subprocess.PIPE, env=commands.environment, start_new_session=True, timeout=60, check=False)
        assert done.returncode == 0, terminal.shown()
        answers = json.loads(done.stdout)
        assert set(answers) == set(WAYS)
        assert "done" not in answers.values()
        assert {answers[way] for way in WAYS[:3]} == {"EPERM"}
        assert terminal.typed() == ""


ESCAPES = b"\x1b]0;title\x07 \x1b[2J \xc2\x9b31m \x9b31m \x1bP \x08\x7f \xe2\x80\xae"


def test_escape_sequences_do_not_reach_the_terminal(commands: Any, terminal: Terminal) -> None:
    argv = [PYTHON, "-I", "-c", f"import os; os.write(1, {ESCAPES!r}); os.write(2, {ESCAPES!r})"]
    subprocess.run(argv, stdout=terminal.slave, stderr=terminal.slave, check=True, timeout=60)
    assert terminal.shown() == ESCAPES * 2

    done = commands.run("cellos", "run", "--", *argv, stdout=terminal.slave, stderr=terminal.slave)
    assert done.returncode == 0
    shown = terminal.shown()
    assert shown.count(b"]0;title") == 2, "the text itself stays readable"
    for control in (b"\x1b", b"\x07", b"\x08", b"\x7f", b"\xc2\x9b", b"\x9b3", "\u202e".encode()):
        assert control not in shown


def test_escape_sequences_stay_whole_in_a_pipe(commands: Any) -> None:
    argv = [PYTHON, "-I", "-c", f"import os; os.write(1, {ESCAPES!r})"]
    done = subprocess.run(
        [*commands.line("cellos"), "run", "--", *argv], capture_output=True, env=commands.environment, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, ESCAPES)


# ---------------------------------------------------------------- descriptors


def test_descriptors_are_not_inherited(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """Descriptors that somebody left open for the supervisor, one of them far above the others."""
    left = os.memfd_create("left")
    os.write(left, SECRET.encode())
    os.set_inheritable(left, True)
    far = 900
    os.dup2(left, far, inheritable=True)
    try:
        control = outside("processes", "descriptors", pass_fds=[left, far])
        assert control["extra"] == {str(left): SECRET, str(far): SECRET}
        assert inside("processes", "descriptors", pass_fds=[left, far]) == {"numbers": [0, 1, 2], "extra": {}, "standard": PIPES}
    finally:
        os.close(left)
        os.close(far)


def test_descriptors_are_three(inside: Callable[..., Any]) -> None:
    assert inside("processes", "descriptors") == {"numbers": [0, 1, 2], "extra": {}, "standard": PIPES}


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_descriptors_are_three_where_our_caller_closed_one(closed: int, commands: Any, attack: Any, tmp_path: Any) -> None:
    """What the supervisor opens next must not become a standard stream of the cell."""
    line = [*commands.line("cellos"), "run", "--out", "answer:" + str(tmp_path / "answer"), "--", "/bin/sh", "-c", '"$@" > answer', "sh",
            *attack("processes"), "descriptors"]  # fmt: skip
    without = [sys.executable, "-c", f"import os, sys; os.close({closed}); os.execv(sys.argv[1], sys.argv[1:])"]
    done = subprocess.run(
        [*without, *line], capture_output=True, stdin=subprocess.DEVNULL, env=commands.environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "answer").read_text()) == {
        "numbers": [0, 1, 2], "extra": {}, "standard": ["/dev/null", "/work/answer", "pipe"],
    }  # fmt: skip


# ---------------------------------------------------------------- variables and keys


def test_variables_of_the_caller(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """A value that the caller has in its environment is in no process that a cell can see."""
    variables = {"API_TOKEN": SECRET}
    assert outside("processes", "find", SECRET, env=variables)["found"] == ["environ"]
    assert inside("processes", "find", SECRET, variables=variables) == {"found": [], "few": True}


def test_a_secret_that_was_asked_for_is_there(inside: Callable[..., Any]) -> None:
    """The counterpart: what was handed over is found, so the search above would have found the rest."""
    found = inside("processes", "find", SECRET, options=["--secret", "API_TOKEN"], variables={"API_TOKEN": SECRET})
    assert found == {"found": ["environ"], "few": True}


PLANT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(250, 1, None) > 0  # join a new session keyring
assert libc.syscall(248, b"user", sys.argv[1].encode(), sys.argv[1].encode(), len(sys.argv[1]), -3) > 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_keys_of_the_caller(commands: Any, attack: Any, outside: Callable[..., Any]) -> None:
    plant = [PYTHON, "-I", "-c", PLANT, SECRET]
    assert outside("kernel", "find_key", SECRET, before=plant) == {"read": SECRET, "request_key": True, "listed": True}

    line = [*plant, *commands.line("cellos"), "run", "--", *attack("kernel"), "find_key", SECRET]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, env=commands.environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"read": "ENOSYS", "request_key": "ENOSYS", "listed": False}
