"""The stub beyond what every backend promises: it isolates nothing and says so, and puts its directory away."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.backends import stub
from cellos.backends.stub import StubBackend, StubCell
from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.errors import ExportError, HostBackendError
from cellos.ports import Command, CommandResult, Output
from cellos.supervisor.compose import STUB_WARNING

ROOT = os.geteuid() == 0
KEY = "0123456789abcdef"


def spec(**authority: Any) -> CellSpec:
    body = {"id": "x", "authority": {"secretRefs": [], **authority}, "lifetime": {"ttlSeconds": 60}}
    body["run"] = {"argv": ["true"], "secretDelivery": "env", "limits": {"memoryMaxBytes": 1 << 20, "cpuMax": {"quotaMicros": 1}}}
    document = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}
    return parse_execution_cell(json.dumps(document).encode()).spec


def order(*argv: str, **members: Any) -> Command:
    defaults: dict[str, Any] = {"stdout": Output(capture_bytes=1 << 20), "stderr": Output(capture_bytes=1 << 20), "deadline_seconds": 60}
    members = defaults | members
    return Command(argv=argv, environment={"PATH": "/usr/bin:/bin"}, **members)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: the path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="stub-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubBackend:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return StubBackend()


@pytest.fixture
def cell(backend: StubBackend) -> Iterator[StubCell]:
    made = backend.create(spec(), key=KEY)
    yield made
    assert made.destroy() == ()


def run(cell: StubCell, script: str, **members: Any) -> CommandResult:
    return cell.run(order("sh", "-c", script, **members), on_started=lambda: None)


def test_it_accepts_what_it_does_not_enforce(backend: StubBackend) -> None:
    rules = [{"host": "api.example.com", "port": 443, "protocol": "tls"}]
    mounts = {"mounts": [{"source": "/usr", "target": "/data", "mode": "rw"}]}
    assert list(backend.refusals(spec(egressRules=rules, filesystem=mounts))) == []


def test_and_says_that_it_enforces_nothing(cell: StubCell) -> None:
    assert cell.isolation.backend == "stub"
    assert cell.isolation.enforced == ()
    assert dict(cell.isolation.limits) == {}
    assert {"memory", "cpu", "pids", "files"} <= set(cell.isolation.unbounded)
    assert "isolat" in STUB_WARNING


def test_what_holds_the_command_is_what_holds_us(cell: StubCell) -> None:
    """Measured all the same: a capability or filter less for us is one less for it."""
    mine = dict(line.split(":", 1) for line in Path("/proc/thread-self/status").read_text().splitlines())
    security = cell.isolation.security
    assert security is not None
    assert security.cap_eff == mine["CapEff"].strip()
    assert security.seccomp_mode == int(mine["Seccomp"])
    assert security.no_new_privs == bool(int(mine["NoNewPrivs"]))
    assert cell.isolation.own_network is False


# -- its socket -------------------------------------------------------------------------------------------------------------------------


def test_only_this_user_gets_to_its_socket(cell: StubCell) -> None:
    listener = cell.listen()
    os.close(listener.descriptor)
    assert os.stat(os.path.dirname(listener.path)).st_mode & 0o777 == 0o700
    assert os.path.dirname(listener.path) != cell.directory, "artifacts and sockets do not mix"


def test_a_path_that_no_socket_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    cell = StubBackend().create(spec(), key=KEY)
    with pytest.raises(HostBackendError, match=r"cannot listen at .*: AF_UNIX path too long"):
        cell.listen()
    assert cell.destroy() == ()
    assert os.listdir(deep) == []


# -- its directory ----------------------------------------------------------------------------------------------------------------------


def test_the_footprint_is_what_create_makes(backend: StubBackend, tmp_path: Path) -> None:
    footprint = backend.footprint(KEY)
    assert os.listdir(tmp_path) == []
    cell = backend.create(spec(), key=KEY)
    assert len(os.listdir(tmp_path)) == 1, "the socket's directory is made when a socket is asked for"
    os.close(cell.listen().descriptor)
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(json.loads(json.dumps(footprint)).values())
    assert os.stat(cell.directory).st_mode & 0o777 == 0o700
    assert cell.destroy() == ()
    assert os.listdir(tmp_path) == []


def test_the_command_starts_in_it(cell: StubCell) -> None:
    assert run(cell, "pwd; echo text > file").stdout.decode().strip() == cell.directory
    with cell.open_artifact("file") as relative, cell.open_artifact(f"{cell.directory}/file") as absolute:
        assert relative.read() == absolute.read() == b"text\n"


def test_a_directory_that_is_there_already_is_not_taken_over(backend: StubBackend, tmp_path: Path) -> None:
    """The place is in a directory that everybody may write to."""
    trap = Path(str(next(iter(backend.footprint(KEY).values()))))
    trap.symlink_to(tmp_path)
    with pytest.raises(HostBackendError, match="File exists"):
        backend.create(spec(), key=KEY)
    assert trap.is_symlink()


def test_a_second_destroy_finds_nothing_to_do(backend: StubBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    assert (cell.destroy(), cell.destroy()) == ((), ())


def test_a_sweep_removes_it(backend: StubBackend, tmp_path: Path) -> None:
    cell = backend.create(spec(), key=KEY)
    os.close(cell.listen().descriptor)
    run(cell, "mkdir -p a/b; touch a/b/c; ln -s / root; mkfifo fifo")
    assert backend.sweep(backend.footprint(KEY)) == ()
    assert os.listdir(tmp_path) == []
    assert cell.destroy() == ()


def test_a_sweep_does_not_follow_a_link(backend: StubBackend, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    trap = Path(str(next(iter(backend.footprint(KEY).values()))))
    trap.symlink_to(precious)
    left = backend.sweep(backend.footprint(KEY))
    assert [residue.kind for residue in left] == ["file"]
    assert str(trap) in left[0].detail
    assert (precious / "file").exists()


@pytest.mark.skipif(ROOT, reason="root may remove every file")
def test_what_cannot_be_removed_is_named(backend: StubBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    run(cell, "mkdir -p sealed/x; chmod 500 sealed")
    left = cell.destroy()
    assert [residue.kind for residue in left] == ["file"]
    assert cell.directory in left[0].detail
    os.chmod(f"{cell.directory}/sealed", 0o700)
    assert cell.destroy() == ()


@pytest.mark.parametrize("path", ["missing", "../x", "/etc/passwd", "link", "directory", "fifo", ""])
def test_only_regular_files_of_it_can_be_fetched(cell: StubCell, path: str) -> None:
    run(cell, "ln -s /etc/passwd link; mkdir directory; mkfifo fifo")
    with pytest.raises(ExportError):
        cell.open_artifact(path)


# -- the command ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "directory", "errno", "says"),
    [
        (["nowhere"], None, 2, "No such file or directory (os error 2)"),
        (["/etc/passwd"], None, 13, "Permission denied (os error 13)"),
        (["true"], "/nowhere", 2, "spec.run.workingDirectory: No such file or directory (os error 2)"),
        (["true"], "/etc/passwd", 20, "spec.run.workingDirectory: Not a directory (os error 20)"),
    ],
)
def test_what_cannot_be_started_is_a_result(cell: StubCell, argv: list[str], directory: str | None, errno: int, says: str) -> None:
    started: list[None] = []
    result = cell.run(order(*argv, working_directory=directory), on_started=lambda: started.append(None))
    assert (result.ended, result.exit_code, result.signal, result.spawn_errno, result.spawn_error) == ("exited", None, None, errno, says)
    assert started == []


def is_gone(pid: int) -> bool:
    """Dead, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < deadline:
        os.sched_yield()
    return is_gone(pid)


TREE = "sh -c 'echo $$ >> pids; sleep 1000' & setsid sh -c 'echo $$ >> pids; sleep 1000' & sh -c 'sleep 1000' & "
TREE += "while [ $(wc -l < pids 2>/dev/null || echo 0) -lt 2 ]; do :; done; "


@pytest.mark.parametrize("how", ["deadline", "interrupt"])
def test_the_whole_tree_is_killed(cell: StubCell, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    pids = Path(cell.directory, "pids")
    before, now = time.monotonic(), time.monotonic

    def clock() -> float:
        """It begins to go when the tree is there."""
        return now() if pids.exists() and pids.read_text().count("\n") == 2 else before

    monkeypatch.setattr("cellos.backends.relay.time.monotonic", clock)
    try:
        members: dict[str, Any] = {"deadline_seconds": 0.1} if how == "deadline" else {"interrupt": reading}
        script = TREE + ("sleep 1000" if how == "deadline" else f"echo x > /proc/{os.getpid()}/fd/{writing}; sleep 1000")
        result = run(cell, script, **members)
    finally:
        os.close(reading)
        os.close(writing)
    assert (result.ended, result.signal) == ("deadline" if how == "deadline" else "interrupted", signal.SIGKILL)
    assert [wait_until_gone(int(pid)) for pid in pids.read_text().split()] == [True, True]


def test_what_it_leaves_in_its_session_is_killed(cell: StubCell) -> None:
    result = run(cell, "sleep 1000 & echo $! > pid; echo done")
    assert (result.ended, result.exit_code, result.stdout) == ("exited", 0, b"done\n")
    assert wait_until_gone(int(Path(cell.directory, "pid").read_text()))


def test_a_failure_to_note_the_start_kills_and_reaps(cell: StubCell) -> None:
    class NoteError(Exception):
        pass

    def fail() -> None:
        raise NoteError

    with pytest.raises(NoteError):
        cell.run(order("sleep", "1000"), on_started=fail)
    with pytest.raises(ChildProcessError):
        os.waitpid(cell._child, os.WNOHANG)


def test_a_command_that_cannot_be_watched_is_not_left_running(cell: StubCell, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def refuse(pid: int) -> int:
        pids.append(pid)
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(HostBackendError, match="Too many open files"):
        cell.run(order("sleep", "1000"), on_started=lambda: None)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)


def test_many_in_a_row_leave_nothing(backend: StubBackend, tmp_path: Path) -> None:
    before = (sorted(os.listdir("/proc/self/fd")), children())
    for number in range(50):
        cell = backend.create(spec(), key=f"{number:016x}")
        assert run(cell, "exit 3").exit_code == 3
        assert cell.destroy() == ()
    assert (sorted(os.listdir("/proc/self/fd")), children()) == before
    assert os.listdir(tmp_path) == []


def children() -> str:
    return "".join(Path(f"/proc/self/task/{task}/children").read_text() for task in os.listdir("/proc/self/task"))


def test_what_the_command_left_in_its_session_is_killed_at_once(backend: StubBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in process groups of their own, which a shell with job control makes."""
    monkeypatch.setattr(stub, "_DRAIN_SECONDS", 1000.0)
    cell = backend.create(spec(), key=KEY)
    began = time.monotonic()
    result = cell.run(order("bash", "-c", "set -m; sleep 60 & echo $!"), on_started=lambda: None)
    assert time.monotonic() - began < 50, "waited for the output that the background process holds open"
    assert cell.destroy() == ()
    assert is_gone(int(result.stdout))
