"""Control groups of the kernel: version 1 by its controllers; version 2 by its life and death, where its controllers are not to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellos.sandbox import cgroups

ROOT = os.geteuid() == 0
MOUNT = Path("/sys/fs/cgroup")


def version_2() -> Path | None:
    """Where a hierarchy of version 2 is mounted, with controllers or without."""
    for place in (MOUNT, MOUNT / "unified"):
        if (place / "cgroup.controllers").exists():
            return place
    return None


@pytest.fixture
def unified() -> Iterator[Path]:
    """An empty group of version 2."""
    place = version_2()
    if place is None:
        pytest.skip("no control group version 2 is mounted here")
    if not ROOT:
        pytest.skip("only root may make groups here")
    made = place / f"test-{os.getpid()}"
    made.mkdir()
    yield made
    for path, _, _ in os.walk(made, topdown=False):
        os.rmdir(path)


def test_v2_birth_kill_and_removal(unified: Path) -> None:
    """With no controller at all: the child is born in the group, dies by cgroup.kill, and the group can be removed."""
    program = (
        "import os, sys, select; from cellos.sandbox.syscalls import clone3\n"
        "group = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)\n"
        "pid, pidfd = clone3(0, cgroup=group)\n"
        "if pid == 0:\n    os.execv('/bin/sleep', ['sleep', '1000'])\n"
        "print(pid, open(sys.argv[1] + '/cgroup.procs').read().split(), flush=True)\n"
        "select.select([pidfd], [], [], 60)\nprint(os.waitpid(pid, 0)[1])\n"
    )
    made = cgroups.Hierarchy(version=2, parents={"": str(unified)}, controllers=frozenset())
    group = cgroups.Group(made, "cell")
    group.create()
    group.limit(cgroups.Limits(memory_bytes=1 << 20, pids=3, cpu_quota_micros=1000))
    birth = group.birth_directory()
    assert birth == str(unified / "cell")
    with subprocess.Popen([sys.executable, "-c", program, birth], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, members = parent.stdout.readline().split(" ", 1)
        assert members == f"['{pid}']\n"
        assert cgroups.remove(birth, deadline=time.monotonic()) == "Device or resource busy, holds 1 process"
        cgroups.kill_all(birth)
        assert parent.stdout.readline() == "9\n"
    assert cgroups.remove(birth, deadline=time.monotonic() + 60) is None


CELL_ON_VERSION_2 = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, flags):
    if libc.mount(source, target, None, flags, None):
        raise OSError(ctypes.get_errno(), "mount")
if libc.unshare(0x0002_0000):
    raise OSError(ctypes.get_errno(), "unshare")
mount(None, b"/", 0x4_4000)
if sys.argv[1] != "/sys/fs/cgroup":
    mount(os.fsencode(sys.argv[1]), b"/sys/fs/cgroup", 0x1000)
from cellos.backends.linux import LinuxBackend
from cellos.core.documents import parse_execution_cell
from cellos.ports import Command, Output
from cellos.sandbox.launcher import Launcher
with Launcher.start(cgroup_parent=sys.argv[2]) as launcher:
    backend = LinuxBackend(launcher=launcher)
    footprint = backend.footprint("0" * 16)["cgroups"]
    cell = backend.create(parse_execution_cell(sys.argv[3].encode()).spec, key="0" * 16)
    with open(footprint[0] + "/cgroup.procs") as file:
        born_inside = file.read().split() == [str(cell.cloned.pid)]
    command = Command(argv=["cat", "/proc/self/cgroup"], environment={"PATH": "/usr/bin:/bin"}, stdout=Output(capture_bytes=999),
                      deadline_seconds=60)
    result = cell.run(command, on_started=lambda: None)
    left = len(cell.destroy())
    print(json.dumps([launcher.hierarchy().version, footprint, born_inside, result.stdout.decode(), left, os.path.exists(footprint[0])]))
"""

DOCUMENT = (
    '{"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {"id": "x", "authority": {"secretRefs": []}, "lifetime":'
    ' {"ttlSeconds": 60}, "run": {"argv": ["true"], "secretDelivery": "env"}}}'
)


@pytest.mark.linux_backend(may_skip="needs a mounted hierarchy of version 2, and root to make groups in it")
def test_a_cell_is_born_into_a_group_of_version_2(unified: Path) -> None:
    place = version_2()
    assert place is not None
    parent = f"/sys/fs/cgroup/{unified.name}"
    argv = [sys.executable, "-c", CELL_ON_VERSION_2, str(place), parent, DOCUMENT]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    version, footprint, born_inside, own, left, still_there = json.loads(done.stdout)
    assert (version, born_inside, left, still_there) == (2, True, 0, False)
    assert footprint[0].startswith(parent + "/")
    assert own.splitlines()[-1] == "0::/", "the cell sees where on the host it is"
    assert [name for _, names, _ in os.walk(unified) for name in names if name.startswith("cellos-")] == []


@pytest.mark.linux_backend(may_skip="the controllers of this host may be bound to version 1")
def test_limits_of_version_2_hold(unified: Path) -> None:
    available = (unified / "cgroup.controllers").read_text().split()
    if not {"memory", "pids", "cpu"} <= set(available):
        pytest.skip("the memory, pids and cpu controllers are bound to version 1 here; writes are tested against a file tree")
    found = cgroups.discover(parent=str(unified))
    assert found is not None
    assert found.controllers == {"memory", "pids", "cpu"}
    group = cgroups.Group(found, "cell")
    group.create()
    group.limit(cgroups.Limits(memory_bytes=1 << 24, pids=3, cpu_quota_micros=50_000))
    cell = unified / "cell"
    assert [(cell / name).read_text().strip() for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")] == [
        str(1 << 24), "0", "3", "50000 100000",
    ]  # fmt: skip
    assert cgroups.remove(str(cell), deadline=time.monotonic()) is None


@pytest.mark.needs("limit processes")
def test_v1_or_v2_the_real_group_of_this_process_is_found() -> None:
    found = cgroups.discover(ours=frozenset({os.getpid()}))
    if found is None:
        pytest.skip("no writable control group: the number of processes is limited by RLIMIT_NPROC here")
    assert all(os.path.isdir(parent) for parent in found.parents.values())
    if found.version == 1:
        pid = str(os.getpid())
        assert all(pid in Path(parent, "cgroup.procs").read_text().split() for parent in found.parents.values())
