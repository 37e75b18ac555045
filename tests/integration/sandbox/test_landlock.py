"""Landlock by itself: in a plain process, where nothing else would say no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.sandbox import landlock

pytestmark = pytest.mark.needs("restrict with Landlock")

PROGRAM = """
import json, os, socket, sys
from cellos.sandbox import landlock, syscalls
landlock.WRITABLE = (sys.argv[1],)
os.chdir(sys.argv[1])
syscalls.no_new_privileges()
landlock.restrict()
def attempt(action):
    try:
        return [None, repr(action())]
    except OSError as error:
        return [error.errno, ""]
def write(path, flags=os.O_WRONLY):
    os.close(os.open(path, flags))
def abstract(name):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\\0" + name)
print(json.dumps(attempt(lambda: eval(sys.argv[2]))))
"""

EACCES, EPERM, EXDEV = 13, 1, 18


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[[str], int | None]:
    """The errno of an expression that is tried where only `tmp_path`/in may be written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("text")

    def run(expression: str) -> int | None:
        argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), expression]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        answer: list[Any] = json.loads(done.stdout)
        return answer[0]  # type: ignore[no-any-return]

    return run


def test_this_kernel_has_a_version() -> None:
    assert landlock.abi() >= 1


@pytest.mark.parametrize(
    "expression",
    [
        "open('/etc/passwd').read()",
        "os.listdir('/')",
        "open('new', 'w').write('x')",
        "os.mkdir('d') or os.rename('d', 'e') or os.rmdir('e')",
        "os.symlink('/etc/passwd', 'l')",
        "os.system('true') and 1/0",
        "write('/dev/null')",
        "write('/dev/zero', os.O_RDWR)",
        "write('/proc/self/coredump_filter')",
        "open('../out/file').read()",
        "os.kill(os.getpid(), 0)",
    ],
)
def test_what_stays_allowed(attempt: Callable[[str], int | None], expression: str) -> None:
    assert attempt(expression) is None


@pytest.mark.parametrize(
    ("expression", "errno"),
    [
        ("open('../out/file', 'w')", EACCES),
        ("open('../out/file', 'a')", EACCES),
        ("open('../out/new', 'w')", EACCES),
        ("os.mkdir('../out/d')", EACCES),
        ("os.unlink('../out/file')", EACCES),
        ("os.symlink('x', '../out/l')", EACCES),
        ("os.mkfifo('../out/fifo')", EACCES),
        ("open('x', 'w').close() or os.rename('x', '../out/x')", EXDEV),
        ("open('y', 'w').close() or os.link('y', '../out/y')", EXDEV),
    ],
)
def test_what_does_not(attempt: Callable[[str], int | None], expression: str, errno: int) -> None:
    assert attempt(expression) in {errno, EACCES}


@pytest.mark.parametrize("expression", ["os.truncate('../out/file', 0)"])
def test_truncating_is_writing(attempt: Callable[[str], int | None], expression: str, tmp_path: Path) -> None:
    if landlock.abi() < 3:
        pytest.skip("Landlock of this kernel does not know truncation (version 3, Linux 6.2)")
    assert attempt(expression) == EACCES
    assert (tmp_path / "out" / "file").read_text() == "text"


def test_signals_do_not_leave(attempt: Callable[[str], int | None]) -> None:
    if landlock.abi() < 6:
        pytest.skip("Landlock of this kernel does not know signals (version 6, Linux 6.12)")
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            assert attempt(f"os.kill({other.pid}, 0)") == EPERM
        finally:
            other.kill()


def test_abstract_sockets_of_others_are_out_of_reach(attempt: Callable[[str], int | None]) -> None:
    if landlock.abi() < 6:
        pytest.skip("Landlock of this kernel does not know abstract sockets (version 6, Linux 6.12)")
    import socket

    name = f"cellos-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        assert attempt(f"abstract({name!r})") == EPERM
