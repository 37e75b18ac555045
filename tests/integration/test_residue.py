"""`LiveCell.destroy()` looks for what stayed. Each kind of remains is planted here, seen by its name, and put away again."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellos.backends.linux import LinuxBackend
from cellos.backends.linux_cell import LinuxCell
from cellos.core.documents import parse_execution_cell
from cellos.ports import Command, Residue
from cellos.sandbox import cgroups
from cellos.sandbox.hostids import DIRECTORY as HOST_IDS
from cellos.sandbox.launcher import Launcher

ROOT = os.geteuid() == 0

pytestmark = pytest.mark.linux_backend(may_skip="what only root can plant is not planted by another user")

only_root = pytest.mark.skipif(not ROOT, reason="only root can plant this")
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def backend() -> Iterator[LinuxBackend]:
    with Launcher.start() as launcher:
        yield LinuxBackend(launcher=launcher)


DOCUMENT = {
    "apiVersion": "cellos.io/v1",
    "kind": "ExecutionCell",
    "spec": {
        "id": "x",
        "authority": {"secretRefs": []},
        "lifetime": {"ttlSeconds": 60},
        "run": {"argv": ["true"], "secretDelivery": "env"},
    },
}


@pytest.fixture
def make(backend: LinuxBackend) -> Callable[[], LinuxCell]:
    """Cells whose command has run and made a file."""

    def create() -> LinuxCell:
        made = backend.create(parse_execution_cell(json.dumps(DOCUMENT).encode()).spec, key=os.urandom(8).hex())
        command = Command(argv=["sh", "-c", "echo text > file"], environment={"PATH": "/usr/bin:/bin"}, deadline_seconds=60)
        assert made.run(command, on_started=lambda: None).exit_code == 0
        return made

    return create


@pytest.fixture
def idle(backend: LinuxBackend) -> LinuxCell:
    """A cell that waits for its command."""
    return backend.create(parse_execution_cell(json.dumps(DOCUMENT).encode()).spec, key=os.urandom(8).hex())


@pytest.fixture
def cell(make: Callable[[], LinuxCell]) -> LinuxCell:
    return make()


def kinds(left: tuple[Residue, ...]) -> set[str]:
    return {residue.kind for residue in left}


def details(left: tuple[Residue, ...], kind: str) -> list[str]:
    return [residue.detail for residue in left if residue.kind == kind]


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def namespace_link(cell: LinuxCell, name: str) -> str:
    assert cell.cloned is not None
    return os.readlink(f"/proc/self/fd/{cell.cloned.namespaces[name]}")


def test_a_cell_leaves_nothing_by_itself(cell: LinuxCell) -> None:
    assert cell.destroy() == ()


# -- processes and namespaces -----------------------------------------------------------------------------------------------------------

ENTER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for descriptor in map(int, sys.argv[1:]):
    if libc.setns(descriptor, 0) < 0:
        raise OSError(ctypes.get_errno(), "setns")
os.write(1, b"in")
os.execv("/bin/cat", ["cat"])
"""


@contextlib.contextmanager
def a_guest(*namespaces: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host that has entered namespaces of a cell."""
    argv = [sys.executable, "-c", ENTER, *map(str, namespaces)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=namespaces) as guest:
        assert guest.stdout is not None
        assert os.read(guest.stdout.fileno(), 2) == b"in"
        assert guest.stdin is not None
        guest.stdin.write(b"x")
        guest.stdin.flush()
        assert os.read(guest.stdout.fileno(), 1) == b"x"  # it is cat now
        try:
            yield guest
        finally:
            guest.kill()


def test_a_process_in_a_namespace_of_the_cell(cell: LinuxCell) -> None:
    assert cell.cloned is not None
    held = cell.cloned.namespaces
    link = namespace_link(cell, "net")
    entered = [held["net"]] if ROOT else [held["user"], held["net"]]  # another user has the right to the second only in the first
    with a_guest(*entered) as guest:
        left = cell.destroy()
    assert kinds(left) == {"process", "namespace"}
    assert details(left, "process") == [f"pid {guest.pid} (cat)"]
    assert f"{link} held by pid {guest.pid}" in details(left, "namespace")
    assert len(details(left, "namespace")) == len(entered)


@pytest.mark.alone
@only_root
def test_a_namespace_that_is_bound_to_a_file(cell: LinuxCell, tmp_path: Path) -> None:
    """It lives on without any process."""
    assert cell.cloned is not None
    link = namespace_link(cell, "net")
    place = tmp_path / "net"
    place.touch()
    source = f"/proc/self/fd/{cell.cloned.namespaces['net']}"
    checked(LIBC.mount(source.encode(), str(place).encode(), None, ctypes.c_ulong(0x1000), None))  # MS_BIND
    try:
        left = cell.destroy()
    finally:
        checked(LIBC.umount2(str(place).encode(), 2))
    assert kinds(left) == {"mount", "namespace"}
    assert details(left, "mount") == [f"{link} on {place}"]
    assert details(left, "namespace") == [f"{link} held by the mount {place}"]


# -- mounts -----------------------------------------------------------------------------------------------------------------------------


STEAL = """
import ctypes, os, sys
from cellos.sandbox import syscalls
libc = ctypes.CDLL(None, use_errno=True)
host = os.open("/proc/self/ns/mnt", os.O_RDONLY)
for namespace in (int(sys.argv[1]), host):
    if libc.setns(namespace, 0) < 0:
        raise OSError(ctypes.get_errno(), "setns")
    if namespace != host:
        tree = syscalls.clone_tree("/work", 0)
syscalls.attach_mount(tree, sys.argv[2])
"""


@pytest.mark.alone
@only_root
@pytest.mark.parametrize("name", ["plain", "with a blank"])
def test_the_work_directory_mounted_elsewhere(idle: LinuxCell, tmp_path: Path, name: str) -> None:
    assert idle.cloned is not None
    cell, mounts = idle, idle.cloned.namespaces["mnt"]
    place = tmp_path / name
    place.mkdir()
    subprocess.run([sys.executable, "-c", STEAL, str(mounts), str(place)], pass_fds=[mounts], timeout=60, check=True)
    try:
        assert place.is_mount()
        left = cell.destroy()
    finally:
        checked(LIBC.umount2(str(place).encode(), 2))
    assert [(residue.kind, residue.detail) for residue in left] == [("mount", f"work directory on {place}")]


# -- control groups ---------------------------------------------------------------------------------------------------------------------


def not_waited_for(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This group stays, which needs no proof by 5 s of waiting; others have their time."""
    remove = cgroups.remove
    monkeypatch.setattr(cgroups, "remove", lambda path, *, deadline: remove(path, deadline=0 if path == directory else deadline))


@pytest.mark.needs("limit memory")
def test_a_group_in_the_group(cell: LinuxCell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cell.group is not None
    directory = next(iter(cell.group.directories.values()))
    not_waited_for(directory, monkeypatch)
    os.mkdir(f"{directory}/nested")
    try:
        left = cell.destroy()
        assert os.path.isdir(directory)
    finally:
        os.rmdir(f"{directory}/nested")
        os.rmdir(directory)
    assert [(residue.kind, residue.detail) for residue in left] == [
        ("cgroup", f"{directory}: Device or resource busy, holds the groups nested")
    ]


@pytest.mark.needs("limit processes")
def test_a_foreign_process_in_the_group(cell: LinuxCell, monkeypatch: pytest.MonkeyPatch) -> None:
    if cell.group is None:
        assert cell.destroy() == ()
        pytest.skip("there are no groups here to put a process into")
    directory = list(cell.group.directories.values())[-1]
    not_waited_for(directory, monkeypatch)
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        Path(directory, "cgroup.procs").write_text(str(stranger.pid))
        left = cell.destroy()
        stranger.kill()
    monkeypatch.undo()
    assert cgroups.remove(directory, deadline=time.monotonic() + 60) is None
    assert [(residue.kind, residue.detail) for residue in left] == [("cgroup", f"{directory}: Device or resource busy, holds 1 process")]


# -- descriptors ------------------------------------------------------------------------------------------------------------------------


def test_an_artifact_that_was_not_closed(cell: LinuxCell) -> None:
    with cell.open_artifact("file") as artifact:
        left = cell.destroy()
        assert [(residue.kind, residue.detail) for residue in left] == [("descriptor", f"{artifact.fileno()} (work directory)")]
        assert artifact.read() == b"text\n"


@pytest.mark.parametrize("which", ["control socket", "net"])
def test_a_copy_of_a_descriptor(idle: LinuxCell, which: str) -> None:
    cell = idle
    assert cell.cloned is not None
    if which == "control socket":
        assert cell.control is not None
        copy, name = os.dup(cell.control), which
    else:
        copy, name = os.dup(cell.cloned.namespaces[which]), namespace_link(cell, which)
    try:
        left = cell.destroy()
    finally:
        os.close(copy)
    assert [(residue.kind, residue.detail) for residue in left] == [("descriptor", f"{copy} ({name})")]


# -- files ------------------------------------------------------------------------------------------------------------------------------


@only_root
def test_a_host_id_whose_file_cannot_be_removed(cell: LinuxCell) -> None:
    place = Path(HOST_IDS, str(cell.ids[0]))
    place.unlink()
    place.mkdir()
    try:
        left = cell.destroy()
    finally:
        place.rmdir()
    assert kinds(left) == {"file"}
    assert details(left, "file")[0].startswith(f"{place}: ")


# -- several, and none that is another's ------------------------------------------------------------------------------------------------


def test_several_kinds_are_all_named(cell: LinuxCell) -> None:
    assert cell.cloned is not None
    with cell.open_artifact("file"), a_guest(cell.cloned.namespaces["user"]) as guest:
        left = cell.destroy()
    assert kinds(left) == {"process", "namespace", "descriptor"}
    assert details(left, "process") == [f"pid {guest.pid} (cat)"]


def test_the_remains_of_another_cell_are_not_ours(cell: LinuxCell, make: Callable[[], LinuxCell]) -> None:
    """The kernel gives the numbers of what is gone to the next that asks."""
    other = make()
    with other.open_artifact("file"):
        assert cell.destroy() == ()
        third = make()
        with third.open_artifact("file"):
            assert kinds(other.destroy()) == {"descriptor"}
        assert third.destroy() == ()
