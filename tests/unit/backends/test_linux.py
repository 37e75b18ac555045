"""The Linux backend beyond what every backend promises: refusals, limits as they are inside, what it makes and that nothing of it stays."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cellos.backends import linux, linux_cell
from cellos.backends.linux import LinuxBackend
from cellos.backends.linux_cell import LinuxCell
from cellos.backends.settings import NO_LIMIT, LinuxSettings
from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.errors import ArgvTooLarge, ConfigError, HostBackendError, Unenforceable
from cellos.ports import Command, CommandResult, Isolation, Output
from cellos.sandbox import seccomp
from cellos.sandbox.framing import framed
from cellos.sandbox.hostids import DIRECTORY as HOST_IDS
from cellos.sandbox.launcher import Launcher

pytestmark = pytest.mark.linux_backend

ROOT = os.geteuid() == 0
MIB = 1 << 20
KEY = "0123456789abcdef"
LATE = 60.0


def spec(*, argv: tuple[str, ...] = ("true",), **members: Any) -> CellSpec:
    """A small document; `members` are put over its spec, a level deep."""
    body: dict[str, Any] = {
        "id": "x",
        "authority": {"secretRefs": []},
        "lifetime": {"ttlSeconds": 60},
        "run": {"argv": list(argv), "secretDelivery": "env"},
    }
    for name, value in members.items():
        body[name] = {**body.get(name, {}), **value} if isinstance(value, dict) else value
    document = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}
    return parse_execution_cell(json.dumps(document).encode()).spec


def mounting(*mounts: tuple[Path | str, str]) -> CellSpec:
    return spec(
        authority={"filesystem": {"mounts": [{"source": str(source), "target": target, "mode": "ro"} for source, target in mounts]}}
    )


def limited(**limits: Any) -> CellSpec:
    return spec(run={"limits": limits})


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


@pytest.fixture(scope="module")
def backend(launcher: Launcher) -> LinuxBackend:
    return LinuxBackend(launcher=launcher)


def order(*argv: str, **members: Any) -> Command:
    defaults: dict[str, Any] = {"stdout": Output(capture_bytes=MIB), "stderr": Output(capture_bytes=MIB), "deadline_seconds": LATE}
    members = defaults | members
    return Command(argv=argv, environment={"PATH": "/usr/bin:/bin"}, **members)


def run(backend: LinuxBackend, document: CellSpec, *argv: str, **members: Any) -> CommandResult:
    """One command in a cell of its own, of which nothing stays."""
    cell = backend.create(document, key=KEY)
    try:
        return cell.run(order(*argv, **members), on_started=lambda: None)
    finally:
        assert cell.destroy() == ()


def said(backend: LinuxBackend, document: CellSpec, script: str, **members: Any) -> str:
    """What a shell script prints in a cell."""
    result = run(backend, document, "sh", "-c", script, **members)
    assert (result.exit_code, result.stderr) == (0, b""), result
    return result.stdout.decode()


def left_over() -> dict[str, Any]:
    """Everything of this host that cells could have grown."""
    processes = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == os.getpid()]
    return {
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in os.listdir("/proc/self/fd") if exists(fd)),
        "threads": threading.active_count(),
        "children": sorted(processes),
        "groups": sorted(groups()),
        "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "/pytest-of-" not in line],  # of other runs
        "ids": sorted(filter(abandoned, os.listdir(HOST_IDS))) if ROOT and os.path.isdir(HOST_IDS) else [],
    }


def abandoned(number: str) -> bool:
    """Whether nobody holds that host id; others may be at work beside us. One that we still hold shows among the descriptors."""
    try:
        with open(f"{HOST_IDS}/{number}") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def exists(descriptor: str) -> bool:
    try:
        os.fstat(int(descriptor))
    except OSError:
        return False
    return True


def parent_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def groups() -> Iterator[str]:
    """Groups of launchers that are children of this process; others may be at work beside us."""
    ours = {pid for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == os.getpid()}
    for top in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup"):
        for path, directories, _ in os.walk(top):
            yield from (f"{path}/{name}" for name in directories if name.startswith("cellos-") and name.split("-")[1] in ours)


# -- refusals ---------------------------------------------------------------------------------------------------------------------------

EGRESS = {"host": "api.example.com", "port": 443, "protocol": "tls"}

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("spec.authority.egressRules", {"authority": {"egressRules": [EGRESS]}}),
    ("spec.ingress", {"ingress": {"git": {"url": "https://example.com/x.git", "ref": "main"}}}),
    ("spec.environment", {"environment": {"imageReference": "docker.io/library/busybox:latest"}}),
    (
        "spec.authority.filesystem.mounts[1].mode",
        {
            "authority": {
                "filesystem": {
                    "mounts": [{"source": "/usr", "target": "/a", "mode": "ro"}, {"source": "/usr", "target": "/b", "mode": "rw"}]
                }
            }
        },
    ),
    (
        "spec.authority.filesystem.mounts",
        {"authority": {"filesystem": {"mounts": [{"source": "/usr", "target": f"/mnt/{n}", "mode": "ro"} for n in range(241)]}}},
    ),
]


@pytest.mark.parametrize(("field", "members"), REFUSED, ids=[field for field, _ in REFUSED])
def test_what_cannot_be_enforced_is_refused_by_its_name(backend: LinuxBackend, field: str, members: dict[str, Any]) -> None:
    document = spec(**members)
    assert [refusal.field for refusal in backend.refusals(document)] == [field]
    before = left_over()
    with pytest.raises(Unenforceable) as caught:
        backend.create(document, key=KEY)
    assert caught.value.field == field
    assert left_over() == before


def test_a_plain_document_is_not_refused(backend: LinuxBackend) -> None:
    assert list(backend.refusals(spec())) == []


@pytest.mark.needs("limit processor time")
@pytest.mark.parametrize(
    ("cpu", "field"),
    [
        ({"quotaMicros": 999}, "quotaMicros"),
        ({"quotaMicros": 5000, "periodMicros": 999}, "periodMicros"),
        ({"quotaMicros": 5000, "periodMicros": 1_000_001}, "periodMicros"),
    ],
)
def test_shares_of_the_processor_that_the_kernel_does_not_take(backend: LinuxBackend, cpu: dict[str, int], field: str) -> None:
    assert [refusal.field for refusal in backend.refusals(limited(cpuMax=cpu))] == [f"spec.run.limits.cpuMax.{field}"]


@pytest.mark.parametrize("limits", [{"memoryMaxBytes": 64 * MIB}, {"cpuMax": {"quotaMicros": 50_000}}])
def test_limits_are_enforced_or_refused(backend: LinuxBackend, doctor: Any, limits: dict[str, Any]) -> None:
    """Never anything between: that is the promise."""
    name = next(iter(limits))
    row = {"memoryMaxBytes": "limit memory", "cpuMax": "limit processor time"}[name]
    refused = [refusal.field for refusal in backend.refusals(limited(**limits))]
    assert refused == ([] if doctor.rows[row]["ok"] else [f"spec.run.limits.{name}"])


def test_an_argument_that_execve_would_not_take(backend: LinuxBackend) -> None:
    before = left_over()
    largest = "x" * linux_cell.LARGEST_ARGUMENT
    assert run(backend, spec(argv=("true", largest)), "true", largest).exit_code == 0
    with pytest.raises(ArgvTooLarge):
        backend.create(spec(argv=("true", largest + "x")), key=KEY)
    with pytest.raises(ArgvTooLarge):
        run(backend, spec(), "true", largest + "x")
    assert left_over() == before


# -- limits are what is said ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(backend: LinuxBackend) -> Iterator[Callable[[CellSpec], LinuxCell]]:
    """Cells that the test ends."""
    cells: list[LinuxCell] = []

    def create(document: CellSpec) -> LinuxCell:
        cells.append(backend.create(document, key=KEY))
        return cells[-1]

    yield create
    for cell in cells:
        assert cell.destroy() == ()


def isolation_and_report(backend: LinuxBackend, script: str, document: CellSpec | None = None) -> tuple[Isolation, str]:
    cell = backend.create(document or spec(), key=KEY)
    try:
        result = cell.run(order("sh", "-c", script), on_started=lambda: None)
        assert result.exit_code == 0, result
        return cell.isolation, result.stdout.decode()
    finally:
        assert cell.destroy() == ()


def test_resource_limits_inside_are_the_ones_reported(backend: LinuxBackend, doctor: Any) -> None:
    isolation, text = isolation_and_report(backend, "cat /proc/self/limits")
    inside = {}
    for line in text.splitlines()[1:]:
        name, soft, hard = line[:26].strip(), line[26:47].strip(), line[47:68].strip()
        inside[name] = (soft, hard)
    limits = isolation.limits
    assert inside["Max open files"] == (str(limits["openFiles"]),) * 2
    assert inside["Max file size"] == (str(limits["fileBytes"]),) * 2
    assert inside["Max locked memory"] == (str(limits["lockedBytes"]),) * 2
    assert inside["Max pending signals"] == (str(limits["pendingSignals"]),) * 2
    assert inside["Max realtime priority"] == inside["Max nice priority"] == ("0", "0")
    assert limits["coreBytes"] == 0
    assert inside["Max core file size"] == ("1", "1"), "0 would still start the host's handler of core dumps"
    if "RLIMIT_NPROC" in doctor.rows["limit processes"]["detail"]:
        assert inside["Max processes"] == (str(limits["pids"]),) * 2


def test_sizes_of_file_systems_inside_are_the_ones_reported(backend: LinuxBackend) -> None:
    isolation, text = isolation_and_report(backend, "for d in /work /tmp /dev/shm; do stat -f -c '%S %b %c' $d; done")
    (work, work_inodes), (tmp, tmp_inodes), (shm, _) = (
        (int(size) * int(blocks), int(inodes)) for size, blocks, inodes in (line.split() for line in text.splitlines())
    )
    limits = isolation.limits
    assert (work, work_inodes, tmp, tmp_inodes, shm) == tuple(
        limits[name] for name in ("workBytes", "workInodes", "tmpBytes", "tmpInodes", "shmBytes")
    )


def test_a_lower_limit_of_our_own_is_reported_and_kept(backend: LinuxBackend) -> None:
    """A hard limit can only be lowered: what the supervisor was given is the most that a cell can get."""
    script = """
import json, resource, sys
for name, value in (("NOFILE", 600), ("FSIZE", 1 << 20), ("MEMLOCK", 4096)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
from cellos.backends.linux import LinuxBackend
from cellos.core.documents import parse_execution_cell
from cellos.ports import Command, Output
from cellos.sandbox.launcher import Launcher
with Launcher.start() as launcher:
    cell = LinuxBackend(launcher=launcher).create(parse_execution_cell(sys.argv[1].encode()).spec, key="0" * 16)
    command = Command(argv=["sh", "-c", "ulimit -n; ulimit -f; ulimit -l"], environment={"PATH": "/usr/bin:/bin"},
                      stdout=Output(capture_bytes=99), deadline_seconds=60)
    result = cell.run(command, on_started=lambda: None)
    left = cell.destroy()
    print(json.dumps([cell.isolation.limits, result.stdout.decode().split(), len(left)]))
"""
    document = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {"id": "x", "authority": {"secretRefs": []}}}
    document["spec"] |= {"lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"], "secretDelivery": "env"}}  # type: ignore[operator]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(document)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    limits, inside, left = json.loads(done.stdout)
    assert (limits["openFiles"], limits["fileBytes"], limits["lockedBytes"]) == (600, 1 << 20, 4096)
    assert inside == ["600", str((1 << 20) // 512), "4"]
    assert left == 0


def group_value(cell: LinuxCell, controller: str, name: str) -> str:
    assert cell.group is not None
    directory = cell.group.directories[controller if cell.group.hierarchy.version == 1 else ""]
    return Path(directory, name).read_text().strip()


@pytest.mark.needs("limit memory", "limit processes", "limit processor time")
@pytest.mark.parametrize(
    ("declared", "memory", "micros"),
    [
        ({}, linux.DEFAULT_MEMORY_BYTES, 1_000_000),
        ({"memoryMaxBytes": 64 * MIB, "cpuMax": {"quotaMicros": 50_000, "periodMicros": 200_000}}, 64 * MIB, 250_000),
        ({"memoryMaxBytes": 64 * MIB + 5000, "cpuMax": {"quotaMicros": 30_000}}, 64 * MIB + 4096, 300_000),
        ({"memoryMaxBytes": (1 << 64) - 1, "cpuMax": {"quotaMicros": 200_000}}, (1 << 63) - 4096, 2_000_000),
    ],
)
def test_group_limits_seen_from_outside_are_the_ones_reported(
    live: Callable[[CellSpec], LinuxCell], declared: dict[str, Any], memory: int, micros: int
) -> None:
    cell = live(limited(**declared))
    limits = cell.isolation.limits
    assert (limits["memoryBytes"], limits["cpuMicrosPerSecond"], limits["pids"]) == (memory, micros, linux.DEFAULT_PIDS)
    assert cell.isolation.unbounded == ()
    assert group_value(cell, "pids", "pids.max") == str(limits["pids"])
    assert cell.group is not None
    assert cell.cloned is not None
    if cell.group.hierarchy.version == 1:
        assert group_value(cell, "memory", "memory.limit_in_bytes") == str(memory)
        assert group_value(cell, "memory", "memory.memsw.limit_in_bytes") == str(memory)
        quota, period = (int(group_value(cell, "cpu", f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    else:
        assert group_value(cell, "", "memory.max") == (str(memory) if memory < (1 << 63) - 4096 else "max")  # the kernel's word for it
        assert group_value(cell, "", "memory.swap.max") == "0"
        quota, period = map(int, group_value(cell, "", "cpu.max").split())
    assert quota * 1_000_000 // period == micros
    assert limits["swapBytes"] == 0
    for controller in cell.group.directories:
        assert str(cell.cloned.pid) in group_value(cell, controller, "cgroup.procs").split()


@pytest.mark.needs("limit memory")
@pytest.mark.parametrize("size", [1, 4096])
def test_too_little_memory_to_build_a_cell_is_told(backend: LinuxBackend, size: int) -> None:
    before = left_over()
    try:
        result = run(backend, limited(memoryMaxBytes=size), "true")
    except HostBackendError as error:
        assert "spec.run.limits.memoryMaxBytes) is too small" in str(error)  # noqa: PT017  # one of two ends
    else:  # what was charged before the limit came was enough to build it in, but not to run anything
        assert result.oom_killed
        assert result.exit_code is None
    assert left_over() == before


@pytest.mark.needs("limit memory")
def test_as_much_memory_as_that_message_says_is_enough(backend: LinuxBackend) -> None:
    assert run(backend, limited(memoryMaxBytes=16 * MIB), "true").exit_code == 0


@pytest.mark.needs("limit memory")
def test_a_command_killed_for_want_of_memory_is_told_apart(backend: LinuxBackend) -> None:
    result = run(backend, limited(memoryMaxBytes=32 * MIB), "/usr/bin/tail", "/dev/zero")
    assert (result.signal, result.oom_killed, result.ended) == (9, True, "exited")
    assert not run(backend, limited(memoryMaxBytes=32 * MIB), "sh", "-c", "kill -9 $$").oom_killed


NO_GROUPS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
from cellos.sandbox import launcher as launching
if os.geteuid() != 0:  # none of version 1 is his, and his launcher does not look for one of version 2
    launching._BOOT = launching._BOOT.replace("from", "from cellos.sandbox import cgroups; cgroups.discover = lambda **_: None; from", 1)
else:
    if libc.unshare(0x0002_0000) or libc.mount(None, b"/", None, 0x4_4000, None) or libc.mount(b"x", b"/sys/fs/cgroup", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "hide control groups")
import json
from cellos.backends.linux import LinuxBackend
from cellos.core.documents import parse_execution_cell
from cellos.ports import Command, Output
from cellos.sandbox.launcher import Launcher
document = parse_execution_cell(sys.argv[1].encode()).spec
BOMB = "i=0; while [ $i -lt 400 ]; do sleep 1000 & i=$((i+1)); done; echo all"
def command(text):
    return Command(argv=["sh", "-c", text], environment={"PATH": "/usr/bin:/bin"}, stdout=Output(capture_bytes=99),
                   stderr=Output(capture_bytes=99), deadline_seconds=60)
with Launcher.start() as launcher:
    backend = LinuxBackend(launcher=launcher)
    bomb, other = (backend.create(document, key=key * 16) for key in "ab")
    first = bomb.run(command(BOMB), on_started=lambda: None)
    second = other.run(command("i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; echo all"), on_started=lambda: None)
    left = [*bomb.destroy(), *other.destroy()]
    print(json.dumps([first.stdout.decode(), first.stderr.decode(), second.stdout.decode(), bomb.isolation.limits["pids"],
                      bomb.isolation.unbounded, len(left)]))
"""


def test_without_a_group_the_number_of_processes_is_still_limited() -> None:
    document = {
        "apiVersion": "cellos.io/v1",
        "kind": "ExecutionCell",
        "spec": {
            "id": "x",
            "authority": {"secretRefs": []},
            "lifetime": {"ttlSeconds": 60},
            "run": {"argv": ["true"], "secretDelivery": "env"},
        },
    }
    argv = [sys.executable, "-c", NO_GROUPS, json.dumps(document)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.stderr == ""
    out, error, other, pids, unbounded, left = json.loads(done.stdout)
    assert (out, pids, unbounded, left) == ("", linux.DEFAULT_PIDS, ["memory", "cpu"], 0)
    assert "fork" in error
    assert other == "all\n", "one cell's processes were counted for another's limit"


# -- what is made, and that it goes -----------------------------------------------------------------------------------------------------


def test_the_footprint_is_what_create_makes(backend: LinuxBackend) -> None:
    before = set(groups())
    footprint: Any = backend.footprint(KEY)
    assert set(groups()) == before
    assert not any(os.path.exists(path) for path in footprint["cgroups"])
    cell = backend.create(spec(), key=KEY)
    made = set(groups()) - before
    assert json.loads(json.dumps(footprint)) == {"cgroups": sorted(made)}
    assert bool(made) == (cell.group is not None)
    assert cell.destroy() == ()
    assert set(groups()) == before


def test_footprints_of_two_cells_are_apart(backend: LinuxBackend) -> None:
    first: Any = backend.footprint("a" * 16)
    second: Any = backend.footprint("b" * 16)
    if not first["cgroups"]:
        assert second["cgroups"] == []
        return
    assert not set(first["cgroups"]) & set(second["cgroups"])


@pytest.mark.parametrize("kind", ["source is not there", "target is not there", "second is not there"])
def test_a_create_that_fails_leaves_nothing(backend: LinuxBackend, tmp_path: Path, kind: str) -> None:
    missing = tmp_path / "missing"
    table: dict[str, tuple[list[tuple[Path | str, str]], str]] = {
        "source is not there": ([(missing, "/data")], str(missing)),
        "target is not there": ([("/usr/bin", "/usr/no/such/place")], "/usr/no/such/place"),
        "second is not there": ([("/usr/bin", "/data"), (missing, "/more")], str(missing)),
    }
    mounts, says = table[kind]
    before = left_over()
    with pytest.raises(HostBackendError, match=says):
        backend.create(mounting(*mounts), key=KEY)
    assert left_over() == before
    assert run(backend, spec(), "true").exit_code == 0, "a failure broke the launcher"


FAILING_STEPS = """
import errno, json, os, sys, time
from cellos.backends.linux import LinuxBackend
from cellos.core.documents import parse_execution_cell
from cellos.errors import HostBackendError
from cellos.sandbox import seccomp
from cellos.sandbox.framing import framed
from cellos.sandbox import seccomp, syscalls
from cellos.sandbox.hostids import DIRECTORY
from cellos.sandbox.launcher import Launcher

def processes():
    found = set()
    for pid in os.listdir("/proc"):
        try:
            with open(f"/proc/{pid}/stat") as file:
                found.add((pid, int(file.read().rpartition(")")[2].split()[1])))
        except (OSError, ValueError):
            continue
    return {pid for pid, parent in found if parent in (os.getpid(), launcher.pid)}

def left():
    groups = backend._hierarchy.parents.values() if backend._hierarchy else ()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "processes": sorted(processes()),
        "groups": [n for path in groups for n in os.listdir(path) if n.startswith(f"cellos-{launcher.pid}-")],
        "launcher's fds": len(os.listdir(f"/proc/{launcher.pid}/fd")) if os.geteuid() == 0 else 0,
        "ids": [n for n in backend_ids()],
    }

def backend_ids():
    # only those that our launcher or we hold: others run cells beside us
    if os.geteuid():
        return
    for line in open("/proc/locks"):
        if line.split()[4] in (str(os.getpid()), str(launcher.pid)):
            yield line

answers = {}
document = parse_execution_cell(sys.argv[1].encode()).spec
syscalls.no_new_privileges()
for number in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        seccomp.install(seccomp.denying({number: errno.EPERM}))
        launcher = Launcher.start()
        backend = LinuxBackend(launcher=launcher)
        before = left()
        try:
            backend.create(document, key="0" * 16)
            print("it was made, without", number, flush=True)
        except HostBackendError:
            deadline = time.monotonic() + 30  # the launcher puts its own part away when it has answered
            while (after := left()) != before and time.monotonic() < deadline:
                time.sleep(0.01)
            if after != before:
                print(number, before, after, flush=True)
        launcher.close()
        os._exit(0)
    os.waitpid(child, 0)
print("done")
"""

STEPS = {
    "sethostname": 170, "unshare": 272, "mount": 165, "fsopen": 430, "open_tree": 428, "mount_setattr": 442, "pivot_root": 155,
    "umount2": 166, "keyctl": 250, "capset": 126, "landlock_restrict_self": 446, "seccomp": 317, "pidfd_send_signal": 424,
}  # fmt: skip
"""A call of each step between the clone and the command."""


def test_a_create_that_fails_at_any_step_leaves_nothing() -> None:
    numbers = [number for name, number in STEPS.items() if ROOT or name != "unshare"]  # which only a group of version 1 asks for
    document = {
        "apiVersion": "cellos.io/v1",
        "kind": "ExecutionCell",
        "spec": {
            "id": "x",
            "authority": {"secretRefs": []},
            "lifetime": {"ttlSeconds": 60},
            "run": {"argv": ["true"], "secretDelivery": "env"},
        },
    }
    argv = [sys.executable, "-c", FAILING_STEPS, json.dumps(document), *map(str, numbers)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_process_without_room_for_descriptors_is_told_and_loses_none(backend: LinuxBackend) -> None:
    """Wherever they run out: nothing stays, and the error says that it is files."""
    assert run(backend, spec(), "true").exit_code == 0  # what is imported late is imported
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(descriptor) for descriptor in os.listdir("/proc/self/fd"))
    filled = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
    while filled[-1] < highest:
        filled.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    before = left_over()
    outcomes = []
    for room in range(16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (filled[-1] + 1 + room, hard))
        try:
            outcomes.append(str(run(backend, spec(), "true").exit_code))
        except HostBackendError as error:
            outcomes.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert left_over() == before, room
    for descriptor in filled:
        os.close(descriptor)
    assert outcomes[-1] == "0"
    assert all("oo many open files" in outcome for outcome in outcomes if outcome != "0")
    assert len(set(outcomes)) >= 3, "the limit never came to bear on different steps"


def test_two_hundred_cells_in_a_row_leave_everything_as_it_was(backend: LinuxBackend) -> None:
    assert run(backend, spec(), "true").exit_code == 0
    before = left_over()
    for _ in range(200):
        cell = backend.create(spec(), key=KEY)
        result = cell.run(order("true"), on_started=lambda: None)
        assert (result.exit_code, cell.destroy()) == (0, ())
    assert left_over() == before


def test_a_hundred_cells_at_once(backend: LinuxBackend) -> None:
    """All of them live before the first one runs its command."""
    before = left_over()
    all_there = threading.Barrier(100)

    def one(number: int) -> tuple[CommandResult, int]:
        cell = backend.create(spec(), key=f"{number:016x}")
        try:
            all_there.wait(60)
            return cell.run(order("sh", "-c", f"echo {number} > own; cat /work/*"), on_started=lambda: None), cell.ids[0]
        finally:
            assert cell.destroy() == ()

    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(one, range(100)))
    assert [result.stdout.decode() for result, _ in results] == [f"{number}\n" for number in range(100)]
    if ROOT:
        assert len({host_id for _, host_id in results}) == 100
    assert left_over() == before


def test_destroy_twice_is_harmless(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    assert cell.destroy() == ()
    before = left_over()
    assert cell.destroy() == ()
    assert left_over() == before


def test_a_command_in_a_dead_cell_is_an_error(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    cell.kill()
    with contextlib.suppress(HostBackendError):  # or a result: which of the two depends on how fast it dies
        assert cell.run(order("true"), on_started=lambda: None).ended == "lost"
    assert cell.destroy() == ()
    with pytest.raises(HostBackendError, match="gone"):
        cell.run(order("true"), on_started=lambda: None)


def test_a_cell_that_is_killed_from_outside_is_lost(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    result = cell.run(order("sleep", "1000"), on_started=cell.kill)
    assert (result.ended, result.exit_code, result.spawn_error) == ("lost", None, None)
    assert cell.destroy() == ()


# -- what the command finds -------------------------------------------------------------------------------------------------------------


def test_no_descriptor_but_the_three(backend: LinuxBackend) -> None:
    leaky, other = os.pipe()
    os.set_inheritable(leaky, True)
    try:
        assert said(backend, spec(), "ls /proc/self/fd").split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads
    finally:
        os.close(leaky)
        os.close(other)


def test_signals_are_as_a_program_expects_them(backend: LinuxBackend) -> None:
    assert blocked_and_ignored(said(backend, spec(), "grep -E '^Sig(Blk|Ign)' /proc/self/status")) == [0, 0]


def blocked_and_ignored(text: str) -> list[int]:
    """Masks, without signals 32 and 33, which belong to the C library: its posix_spawn ignores them."""
    return [int(line.split()[1], 16) & ~(3 << 31) for line in text.splitlines() if line]


IGNORING = """
import os, signal, subprocess, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_what_our_caller_ignores_and_blocks_is_not_handed_on() -> None:
    """`nohup`, or a background job of a shell: a command that ignores SIGTERM could not use its grace."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_linux as t\n"
        "from cellos.sandbox.launcher import Launcher\n"
        "with Launcher.start() as launcher:\n"
        "    print(t.said(t.LinuxBackend(launcher=launcher), t.spec(), \"grep -E '^Sig(Blk|Ign)' /proc/self/status\"))\n"
    )
    argv = [sys.executable, "-c", IGNORING, sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    assert blocked_and_ignored(done.stdout) == [0, 0]


def test_the_cell_cannot_interrupt_its_init(backend: LinuxBackend) -> None:
    signals = "INT TERM HUP QUIT USR1 USR2 PIPE ALRM CHLD CONT TSTP XFSZ WINCH KILL STOP"
    result = run(backend, spec(), "sh", "-c", f"for s in {signals}; do kill -$s 1; done; echo alive")
    assert (result.ended, result.stdout) == ("exited", b"alive\n")


def test_a_stop_request_that_comes_with_the_command_is_obeyed(backend: LinuxBackend) -> None:
    """Both messages in one piece, as a busy supervisor may send them."""
    for _ in range(5):
        cell = backend.create(spec(), key=KEY)
        send = cell._send

        def both(data: bytes, descriptors: list[int], *, send: Callable[[bytes, list[int]], None] = send) -> None:
            send(data + framed({"terminate": True}), descriptors)

        cell._send = both  # type: ignore[method-assign]
        result = cell.run(order("sleep", "1000", deadline_seconds=20), on_started=lambda: None)
        assert (result.ended, result.signal) == ("exited", 15)
        assert cell.destroy() == ()


@pytest.mark.parametrize("argument", ["é", "日本", "\udcff\udc80", "a b", "", "-n", "\x01\x7f", "'\"$(x)"])
def test_arguments_arrive_as_they_are(backend: LinuxBackend, argument: str) -> None:
    result = run(backend, spec(), "printf", "%s|", argument, argument)
    assert result.stdout == (os.fsencode(argument) + b"|") * 2


def test_a_program_without_path_is_found_in_the_usual_places(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    result = cell.run(Command(argv=["true"], environment={}, deadline_seconds=LATE), on_started=lambda: None)
    assert result.exit_code == 0
    assert cell.destroy() == ()


@pytest.mark.parametrize(
    ("argv", "directory", "errno", "says"),
    [
        (["nowhere"], None, 2, "No such file or directory (os error 2)"),
        (["/etc/passwd"], None, 13, "Permission denied (os error 13)"),
        (["/usr"], None, 13, "Permission denied (os error 13)"),
        (["true"], "/work/missing", 2, "spec.run.workingDirectory: No such file or directory (os error 2)"),
    ],
)
def test_what_cannot_be_started_is_a_result(backend: LinuxBackend, argv: list[str], directory: str | None, errno: int, says: str) -> None:
    result = run(backend, spec(), *argv, working_directory=directory)
    assert (result.ended, result.exit_code, result.signal, result.spawn_errno, result.spawn_error) == ("exited", None, None, errno, says)


# -- mounts -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that other ids may read, as a cell's are."""
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp") and path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o055)
    place = tmp_path / "shared"
    (place / "below").mkdir(parents=True)
    (place / "file").write_text("content")
    return place


@pytest.mark.parametrize(
    "target", ["/data", "/mnt/data", "/opt/a/b/c", "/work/in", "/tmp/in", "/var/tmp/in", "/home/in", "/usr/share/doc", None]
)
def test_mounts_are_where_they_were_asked_for(backend: LinuxBackend, shared: Path, target: str | None) -> None:
    place = target or str(shared)
    text = said(backend, mounting((shared, place)), f"cat {place}/file; ls {place}; touch {place}/x 2>/dev/null || echo ' sealed'; ls /")
    assert text.startswith("contentbelow\nfile\n sealed\n")
    top = place.split("/")[1]
    assert set(text.split("sealed\n")[1].split()) - {top} <= {
        "bin", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "mnt", "opt", "proc", "root", "run", "sbin", "sys", "tmp", "usr",
        "var", "work",
    }  # fmt: skip


def test_a_file_is_mounted_as_a_file(backend: LinuxBackend, shared: Path) -> None:
    assert said(backend, mounting((shared / "file", "/data/one"), (shared / "file", "/top")), "cat /data/one /top") == "contentcontent"


def test_a_mount_in_another(backend: LinuxBackend, shared: Path) -> None:
    text = said(
        backend, mounting((shared, "/data"), ("/usr/bin", "/data/below")), "cat /data/file; test -x /data/below/env && echo ' both'"
    )
    assert text == "content both\n"


def test_as_many_mounts_as_are_allowed(backend: LinuxBackend, shared: Path) -> None:
    document = mounting(*[(shared, f"/mnt/{number}") for number in range(linux.MOST_MOUNTS)])
    text = said(backend, document, "cat /mnt/*/file | wc -c; ls /proc/self/fd; ls /proc/1/fd 2>/dev/null || true")
    assert text.split() == [str(7 * linux.MOST_MOUNTS), "0", "1", "2", "3"]


# -- what was measured ------------------------------------------------------------------------------------------------------------------


def test_the_kernel_says_that_nothing_is_left_to_gain(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    try:
        security = cell.isolation.security
        assert security is not None
        assert {security.cap_eff, security.cap_prm, security.cap_bnd, security.cap_amb, security.cap_inh} == {"0" * 16}
        assert (security.privileged, security.no_new_privs, security.seccomp_mode) == (False, True, 2)
        assert cell.isolation.own_network is True
    finally:
        assert cell.destroy() == ()


def test_a_network_that_is_ours_is_not_the_cells_own(backend: LinuxBackend) -> None:
    """Measured, not known: with our own namespace in its place the answer is another."""
    cell = backend.create(spec(), key=KEY)
    try:
        assert cell.cloned is not None
        theirs = cell.cloned.namespaces["net"]
        cell.cloned.namespaces["net"] = os.open("/proc/self/ns/net", os.O_RDONLY)
        assert cell.has_own_network() is False
        os.close(cell.cloned.namespaces["net"])
        cell.cloned.namespaces["net"] = theirs
    finally:
        assert cell.destroy() == ()


# -- its socket -------------------------------------------------------------------------------------------------------------------------


CONNECT = "/usr/bin/python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"/run/cellos/secrets.sock\")' 2>&1 | tail -1"


def test_nobody_is_there_unless_somebody_listens(backend: LinuxBackend) -> None:
    assert said(backend, spec(), CONNECT).strip() == "ConnectionRefusedError: [Errno 111] Connection refused"


def test_the_command_cannot_put_another_socket_in_its_place(backend: LinuxBackend) -> None:
    script = "cd /run/cellos; rm -f secrets.sock; mv secrets.sock x; touch y; ls; exit 0"
    result = run(backend, spec(), "sh", "-c", script)
    assert result.stdout == b"secrets.sock\n"
    assert result.stderr.count(b"Read-only file system") == 3


def test_the_host_does_not_see_it(backend: LinuxBackend) -> None:
    before = Path("/proc/net/unix").read_text()
    cell = backend.create(spec(), key=KEY)
    listener = cell.listen()
    try:
        assert not os.path.exists(listener.path)
        assert "secrets.sock" not in Path("/proc/net/unix").read_text().replace(before, "")
    finally:
        os.close(listener.descriptor)
        assert cell.destroy() == ()


def test_a_listener_that_its_owner_keeps_is_residue(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    listener = cell.listen()
    left = cell.destroy()
    os.close(listener.descriptor)
    assert [(residue.kind, residue.detail) for residue in left] == [("descriptor", f"{listener.descriptor} (socket of the cell)")]


# -- settings of the operator -----------------------------------------------------------------------------------------------------------


def with_settings(launcher: Launcher, **settings: Any) -> LinuxBackend:
    return LinuxBackend(launcher=launcher, settings=LinuxSettings(**settings))


@pytest.mark.needs("limit memory", "limit processor time")
def test_defaults_of_the_operator_hold_where_the_document_says_nothing(launcher: Launcher) -> None:
    chosen = with_settings(launcher, memory_bytes=64 * MIB, cpu_quota_micros=5_000, cpu_period_micros=10_000)
    quiet, loud = chosen.create(spec(), key=KEY), chosen.create(limited(memoryMaxBytes=32 * MIB, cpuMax={"quotaMicros": 20_000}), key=KEY)
    try:
        assert (quiet.isolation.limits["memoryBytes"], quiet.isolation.limits["cpuMicrosPerSecond"]) == (64 * MIB, 500_000)
        assert (loud.isolation.limits["memoryBytes"], loud.isolation.limits["cpuMicrosPerSecond"]) == (32 * MIB, 200_000)
        assert [in_the_kernel(quiet), in_the_kernel(loud)] == [(64 * MIB, 5_000, 10_000), (32 * MIB, 20_000, 100_000)]
    finally:
        assert (quiet.destroy(), loud.destroy()) == ((), ())


@pytest.mark.needs("limit memory", "limit processor time")
def test_no_limit_is_said(launcher: Launcher) -> None:
    cell = with_settings(launcher, memory_bytes=NO_LIMIT, cpu_quota_micros=NO_LIMIT).create(spec(), key=KEY)
    assert cell.destroy() == ()
    assert {"memory", "cpu"} <= set(cell.isolation.unbounded)
    assert not {"memoryBytes", "swapBytes", "cpuMicrosPerSecond"} & set(cell.isolation.limits)


def in_the_kernel(cell: LinuxCell) -> tuple[int, int, int]:
    """Memory, quota and period, as the kernel has them."""
    assert cell.group
    directories = cell.group.directories
    if "" in directories:
        quota, period = Path(directories[""], "cpu.max").read_text().split()
        return int(Path(directories[""], "memory.max").read_text()), int(quota), int(period)
    memory = int(Path(directories["memory"], "memory.limit_in_bytes").read_text())
    return memory, *(int(Path(directories["cpu"], f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))  # type: ignore[return-value]


def test_a_limit_that_nothing_here_would_hold_is_refused(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinuxBackend, "_can", lambda self, controller: False)
    with pytest.raises(ConfigError, match=r"^CELLOS_CGROUP_MEMORY_MAX: this host gives us no writable memory control group; "):
        with_settings(launcher, memory_bytes=64 * MIB)
    with pytest.raises(ConfigError, match=r"^CELLOS_CGROUP_CPU_MAX: this host gives us no writable cpu control group; "):
        with_settings(launcher, cpu_quota_micros=1000)
    with_settings(launcher, memory_bytes=NO_LIMIT, cpu_quota_micros=NO_LIMIT)


def test_a_filter_of_the_operators_is_in_effect_beside_ours(launcher: Launcher) -> None:
    uname = 63
    stricter = with_settings(launcher, program=seccomp.denying({uname: errno.EPERM}))
    said_here = run(stricter, spec(), "sh", "-c", "uname; exec unshare -n true")
    assert said_here.stderr.decode().splitlines() == [
        "uname: cannot get system name: Operation not permitted",
        "unshare: unshare failed: Operation not permitted",
    ]
    assert said(stricter, spec(), "grep ^Seccomp_filters /proc/self/status").split() == ["Seccomp_filters:", "2"]


def test_a_filter_allows_nothing_that_ours_does_not(launcher: Launcher) -> None:
    permissive = with_settings(launcher, program=seccomp.denying({}))
    assert run(permissive, spec(), "unshare", "-n", "true").stderr == b"unshare: unshare failed: Operation not permitted\n"


def test_a_filter_kills_the_command_and_not_what_reports_of_it(launcher: Launcher) -> None:
    """Process 1 of the cell is not under it: it needs calls that the command does not."""
    kill_all_but_execve = seccomp.assemble([
        ("load", 0, "", ""), ("equal", 59, "allow", ""), ("return", 0x8000_0000, "", ""), "allow", ("return", 0x7FFF_0000, "", ""),
    ])  # fmt: skip
    result = run(with_settings(launcher, program=kill_all_but_execve), spec(), "true")
    assert (result.ended, result.signal, result.spawn_error) == ("exited", 31, None)


def test_a_filter_that_the_kernel_does_not_take(launcher: Launcher) -> None:
    result = run(with_settings(launcher, program=b"\xff" * 8), spec(), "true")
    assert (result.spawn_error, result.spawn_errno) == ("seccomp: Invalid argument (os error 22)", errno.EINVAL)


def test_a_parent_of_groups_that_is_of_no_use_is_refused_by_name() -> None:
    with Launcher.start(ahead=1, cgroup_parent="/no/such/group") as starting, pytest.raises(ConfigError) as caught:
        LinuxBackend(launcher=starting)
    assert str(caught.value) == "CELLOS_CGROUP_PARENT: create cgroup dir /no/such/group: No such file or directory (os error 2)"


def test_the_gate_says_so_too() -> None:
    with Launcher.start(cgroup_parent="/no/such/group") as starting, pytest.raises(ConfigError, match=r"^CELLOS_CGROUP_PARENT: "):
        linux.missing_primitives(starting)


@pytest.mark.needs("limit memory", "limit processes")
def test_nothing_is_missing_here(launcher: Launcher) -> None:
    assert linux.missing_primitives(launcher) == ()


def test_a_second_destroy_finds_nothing_to_do(backend: LinuxBackend) -> None:
    cell = backend.create(spec(), key=KEY)
    assert (cell.destroy(), cell.destroy()) == ((), ())


@pytest.mark.needs("limit memory")
def test_groups_are_made_below_the_parent(launcher: Launcher) -> None:
    hierarchy = launcher.hierarchy()
    assert hierarchy is not None
    parent = f"{hierarchy.parents.get('memory') or hierarchy.parents['']}/test-{os.getpid()}"
    os.mkdir(parent)
    try:
        with Launcher.start(cgroup_parent=parent) as starting:
            cell = LinuxBackend(launcher=starting).create(spec(), key=KEY)
            assert cell.group
            assert any(directory.startswith(f"{parent}/") for directory in cell.group.directories.values())
            assert cell.destroy() == ()
    finally:
        for path in (f"{parent}/cellos", parent):
            if os.path.isdir(path):
                os.rmdir(path)
