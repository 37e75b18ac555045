"""Attacks on what the host has only so much of, and on the end of a cell: bombs, fills, core dumps, orphans.

As everywhere in the tour, each is first seen to work outside, where it is bounded and cleaned up.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PYTHON = "/usr/bin/python3"
ROOT = os.geteuid() == 0

WHY_SKIPPED = "what an ordinary user may not do outside proves nothing inside"
pytestmark = pytest.mark.linux_backend(user_may_skip=WHY_SKIPPED)


@pytest.fixture
def limits(commands: Any) -> dict[str, int]:
    """The limits that a run says it has."""
    found: dict[str, int] = commands.cell(["/bin/true"])["isolation"]["limits"]
    return found


# ---------------------------------------------------------------- processes and memory


def test_fork_bomb(limits: dict[str, int], outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    assert outside("resources", "fork_bomb", "300") == {"processes": 300, "stopped by": "nothing"}
    bomb = inside("resources", "fork_bomb", "300")
    assert bomb["stopped by"] == "Resource temporarily unavailable"
    assert limits["pids"] - 5 <= bomb["processes"] < limits["pids"] < 300


def memory_is_limited(doctor: Any) -> bool:
    return bool(doctor.rows["limit memory"]["ok"])


def test_memory_bomb(doctor: Any, commands: Any, attack: Any, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """Where no memory control group is writable the limit is refused: it would be a promise that nobody keeps."""
    assert outside("resources", "memory_bomb", "300") == 300
    if not memory_is_limited(doctor):
        done = commands.run("cellos", "run", "--mem", "128M", "--", "/bin/true")
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("cellos: cannot enforce")
        assert "spec.run.limits.memoryMaxBytes: this host gives us no writable memory control group" in done.stderr
        return
    assert inside("resources", "memory_bomb", "300", options=["--mem", "512M"]) == 300, "with room the same program succeeds"
    report = commands.cell([*attack("resources"), "memory_bomb", "300"], "--mem", "128M")
    assert report["isolation"]["limits"]["memoryBytes"] == 128 << 20
    assert report["oomKilled"]
    # The kernel ends the bomb (version 1 of control groups) or the whole cell (version 2).
    assert report["code"] == 128 + signal.SIGKILL or json.loads(report["stdout"]) == "signal 9"
    assert report["residue"] == []


@pytest.mark.needs("limit memory")
def test_memory_of_sockets(commands: Any, attack: Any, outside: Callable[..., Any]) -> None:
    """What waits in sockets is memory of the cell, and not the host's, which has only so much for all of its connections."""
    assert outside("resources", "fill_sockets", "80") == 80
    report = commands.cell([*attack("resources"), "fill_sockets", "80"], "--mem", "32M")
    # Version 1 of control groups counts it beside the memory of the program, version 2 together with it.
    assert report["oomKilled"] or json.loads(report["stdout"]) < 48
    assert report["residue"] == []


def test_memory_is_limited_unasked(doctor: Any, commands: Any) -> None:
    isolation = commands.cell(["/bin/true"])["isolation"]
    assert ("memoryBytes" in isolation["limits"]) == memory_is_limited(doctor) == ("memory" not in isolation["unbounded"])


# ---------------------------------------------------------------- files


@pytest.fixture
def yard() -> Iterator[str]:
    """A directory for what fills up outside, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cellos-yard-") as place:
        yield place


@pytest.mark.parametrize(("place", "limit"), [("/work", "workBytes"), ("/tmp", "tmpBytes"), ("/dev/shm", "shmBytes")])
def test_filling_by_bytes(
    place: str, limit: str, limits: dict[str, int], yard: str, outside: Callable[..., Any], inside: Callable[..., Any]
) -> None:
    size = limits[limit] >> 20
    assert outside("resources", "fill_bytes", yard, str(size + 4)) == size + 4
    assert inside("resources", "fill_bytes", place, str(size + 4)) == "ENOSPC"
    assert inside("resources", "fill_bytes", place, str(size)) == size, "what the limit promises is there"


@pytest.mark.parametrize(("place", "limit"), [("/work", "workInodes"), ("/tmp", "tmpInodes"), ("/dev/shm", "tmpInodes")])
def test_filling_by_inodes(
    place: str, limit: str, limits: dict[str, int], yard: str, outside: Callable[..., Any], inside: Callable[..., Any]
) -> None:
    more = str(limits[limit] + 8)
    assert outside("resources", "fill_inodes", yard, more) == int(more)
    assert inside("resources", "fill_inodes", place, more) == "ENOSPC"


def test_one_big_file(limits: dict[str, int], yard: str, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    size = limits["fileBytes"] >> 20
    assert outside("resources", "big_file", yard, str(size + 1)) is True
    assert inside("resources", "big_file", "/work", str(size + 1)) == "EFBIG"


def test_open_files(limits: dict[str, int], outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    more = limits["openFiles"] + 8
    if outside("resources", "open_files", str(more)) == "EMFILE":
        pytest.skip(f"this user may not open that many: {WHY_SKIPPED}")
    assert inside("resources", "open_files", str(more)) == "EMFILE"


@pytest.mark.alone
@pytest.mark.parametrize(("what", "limit"), [("inotify_instances", "inotifyInstances"), ("timers", "pendingSignals")])
def test_what_is_counted_for_each_user(
    what: str, limit: str, limits: dict[str, int], outside: Callable[..., Any], inside: Callable[..., Any]
) -> None:
    """An ordinary user's cells are that user's, who has only so much of it."""
    more = limits[limit] + 16
    room = outside("resources", what, str(more))  # all of it, where nobody else of this user has most of it
    assert inside("resources", what, str(more)) == (limits[limit] if ROOT else min(room, limits[limit]))


@pytest.mark.alone
def test_descriptors_in_flight(commands: Any, attack: Any, ends: Callable[[Any], None], outside: Callable[..., Any]) -> None:
    """The kernel counts them for each user, and an ordinary user's cells are that user's: one must not keep the others from starting."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not ROOT and most < 8192:
        pytest.skip(f"cells and this user may have as many open files ({most}): then nothing tells them apart")
    holding = [*attack("resources"), "hold_descriptors"]
    if not ROOT:  # whom the kernel does not count, and whose cells have users of their own
        with subprocess.Popen(holding, stdout=subprocess.PIPE) as outsider:
            assert outsider.stdout
            assert outsider.stdout.readline() == b"up\n"
            assert outside("resources", "pass_descriptor") == "ETOOMANYREFS"
            outsider.kill()
        _wait_for(lambda: bool(outside("resources", "pass_descriptor") == 1))
    cell = commands.start("cellos", "run", "--", *holding)
    ends(cell)
    assert cell.stdout.readline() == "up\n"
    assert commands.cell(["/bin/true"], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1024), most)))["code"] == 0
    cell.terminate()
    cell.wait()


# ---------------------------------------------------------------- core dumps

PATTERN = "/proc/sys/kernel/core_pattern"


def test_core_dump(yard: str, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """Whether the kernel writes a file or asks a program of the host to take it, a cell gives it nothing."""
    control = outside("resources", "dump_core", yard)
    if not control["dumped"]:
        assert not ROOT, "root can have core dumps"
        pytest.skip(f"this user has no core dumps (ulimit -c): {WHY_SKIPPED}")
    assert inside("resources", "dump_core", "/work") == {"raised": False, "signal": signal.SIGABRT, "dumped": False, "files": []}


@pytest.mark.alone
@pytest.mark.skipif(not ROOT, reason="only root can set the handler of core dumps")
def test_handler_of_core_dumps(yard: str, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """The handler runs as root of the host, and is fed by who crashed: it must not even start."""
    calls = Path(yard, "calls")
    calls.touch()
    handler = Path(yard, "handler")
    handler.write_text(f"#!/bin/sh\ncat > /dev/null\necho $1 >> {calls}\n")
    handler.chmod(0o755)
    place = Path(yard, "place")
    place.mkdir()
    before = Path(PATTERN).read_text()
    Path(PATTERN).write_text(f"|{handler} %E")
    try:
        assert outside("resources", "dump_core", str(place))["dumped"]
        assert inside("resources", "dump_core", "/work") == {"raised": False, "signal": signal.SIGABRT, "dumped": False, "files": []}
        # They start in order: once a later dump was handled, that of the cell would have been, too.
        assert outside("resources", "dump_core", str(place))["dumped"]
        _wait_for(lambda: len(calls.read_text().splitlines()) >= 2)
        assert len(calls.read_text().splitlines()) == 2
    finally:
        Path(PATTERN).write_text(before)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---------------------------------------------------------------- what outlives the command

WAITING = [PYTHON, "-I", "-c", "import signal; print('up', flush=True); signal.pause()"]


def test_orphans(inside: Callable[..., Any], outside: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    """A process that left its session and ignores what it may is gone with the command, however long it meant to stay."""
    mark = f"cellos-orphan-{os.getpid()}-{os.urandom(4).hex()}"
    sleeper = [*WAITING, mark]
    assert outside("resources", "leave_orphan", *sleeper) == "left"
    left = carrying(mark)
    assert left, "outside it stays"
    for pid in left:
        request.addfinalizer(functools.partial(_end, pid))
        _end(pid)
    _wait_for(lambda: not carrying(mark))

    assert inside("resources", "leave_orphan", *sleeper) == "left"
    assert carrying(mark) == []


def test_a_command_that_will_not_end(commands: Any) -> None:
    """The same for a tree that a time-out ends."""
    mark = f"cellos-deaf-{os.getpid()}-{os.urandom(4).hex()}"
    deaf = "trap '' TERM INT HUP; (setsid sh -c 'trap \"\" TERM; while :; do sleep 300; done' \"$0\" &) ; while :; do sleep 300; done"
    report = commands.cell(["/bin/sh", "-c", deaf, mark], "--timeout", "300ms")
    assert (report["code"], report["timedOut"], report["residue"]) == (124, True, [])
    assert carrying(mark) == []


def test_killing_the_supervisor(commands: Any, ends: Callable[[Any], None], request: pytest.FixtureRequest) -> None:
    """A command does not survive whoever watches it; the next start ends its record."""
    mark = f"cellos-lost-{os.getpid()}-{os.urandom(4).hex()}"
    watcher = [PYTHON, "-I", "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
    with subprocess.Popen([*watcher, *WAITING, mark], stdout=subprocess.PIPE) as unwatched:
        assert unwatched.stdout
        assert unwatched.stdout.readline() == b"up\n"
        [survivor] = [pid for pid in carrying(mark) if pid != unwatched.pid]
        request.addfinalizer(functools.partial(_end, survivor))
        unwatched.kill()
        unwatched.wait()
        assert carrying(mark) == [survivor], "outside it stays"
        _end(survivor)

    mark = mark.replace("lost", "gone")
    deaf = ["/bin/sh", "-c", "trap '' TERM INT HUP; (setsid sleep 300 &); echo up; while :; do sleep 300; done", mark]
    watched = commands.start("cellos", "run", "--", *deaf)
    ends(watched)
    assert watched.stdout.readline() == "up\n"
    command = [pid for pid in carrying(mark) if pid != watched.pid]
    assert command
    pidfds = [os.pidfd_open(pid) for pid in command]
    watched.kill()
    deadline = time.monotonic() + 100  # the command would live for 300 s
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0], "it outlived the supervisor"
        os.close(pidfd)
    watched.wait()
    assert carrying(mark) == []

    after = commands.run("cellos", "run", "--", "/bin/true")
    assert after.returncode == 0
    assert "was left unfinished by its supervisor; its record is complete now" in after.stderr
    records = sorted(commands.state.glob("evidence/*"))
    assert len(records) == 2
    shown = commands.run("cellos", "events", str(records[0]))
    assert shown.returncode == 0
    assert json.loads(records[0].read_bytes().splitlines()[-1])["data"]["reason"] == "supervisor_lost"
    assert [path for path in commands.state.rglob("*") if path.is_file() and path not in records] == []


def carrying(mark: str) -> list[int]:
    """Processes of this host with `mark` in their command line."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(name) != os.getpid() and mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
