"""The launcher as its supervisors know it: many at once, killed, left alone, closed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from cellos.backends.linux import LinuxBackend
from cellos.core.documents import CellSpec
from cellos.errors import HostBackendError
from cellos.ports import Command, CommandResult
from cellos.sandbox.hostids import DIRECTORY as HOST_IDS
from cellos.sandbox.launcher import Launcher, LauncherError

pytestmark = pytest.mark.linux_backend

ROOT = os.geteuid() == 0
RunIn = Callable[..., CommandResult]


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def ended(pidfd: int, seconds: float = 60) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


# -- life and end -----------------------------------------------------------------------------------------------------------------------


def test_starts_and_ends_without_a_trace() -> None:
    before = descriptors()
    launcher = Launcher.start()
    pidfd = os.pidfd_open(launcher.pid)
    launcher.close()
    assert ended(pidfd, 0), "close returned before the end"
    with pytest.raises(ChildProcessError):
        os.waitpid(launcher.pid, os.WNOHANG)  # no zombie
    os.close(pidfd)
    launcher.close()  # again
    assert descriptors() == before


def test_an_interrupt_is_for_the_supervisor() -> None:
    """Who sends it to all our processes wants an orderly end, not the interpreter's words about one."""
    launcher = Launcher.start()
    for _ in range(2):
        launcher.missing()
        os.kill(launcher.pid, signal.SIGINT)
    launcher.missing()
    launcher.close()


def test_a_closed_launcher_says_so() -> None:
    launcher = Launcher.start()
    launcher.close()
    with pytest.raises(LauncherError, match="closed"):
        launcher.clone(launcher.reserve())


def test_closing_right_after_the_start_is_fine() -> None:
    for ahead in (0, 1):
        launcher = Launcher.start(ahead=ahead)
        launcher.close()
        with pytest.raises(ChildProcessError):
            os.waitpid(launcher.pid, os.WNOHANG)


def test_cells_outlive_a_launcher_that_was_closed(plain: CellSpec, order: Callable[..., Command]) -> None:
    launcher = Launcher.start()
    cell = LinuxBackend(launcher=launcher).create(plain, key="0" * 16)
    launcher.close()
    assert cell.run(order("echo", "still"), on_started=lambda: None).stdout == b"still\n"
    assert cell.destroy() == ()


def test_a_killed_launcher_is_an_error_that_says_so(plain: CellSpec, order: Callable[..., Command]) -> None:
    before = descriptors()
    launcher = Launcher.start()
    backend = LinuxBackend(launcher=launcher)
    cell = backend.create(plain, key="0" * 16)
    os.kill(launcher.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(HostBackendError, match=rf"cannot ask the launcher: it has ended \(pid {launcher.pid}\)"):
            backend.create(plain, key="1" * 16)
    assert cell.run(order("echo", "still"), on_started=lambda: None).stdout == b"still\n"
    assert cell.destroy() == ()
    launcher.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(launcher.pid, os.WNOHANG)
    assert descriptors() == before


SUPERVISOR = """
import os, sys
from cellos.backends.linux import LinuxBackend
from cellos.core.documents import parse_execution_cell
from cellos.ports import Command
from cellos.sandbox.launcher import Launcher
launcher = Launcher.start()
backend = LinuxBackend(launcher=launcher)
footprint = backend.footprint("0" * 16)
cell = backend.create(parse_execution_cell(sys.argv[1].encode()).spec, key="0" * 16)
print(launcher.pid, cell.cloned.pid, cell.ids[0], ":".join(footprint["cgroups"]), flush=True)
cell.run(Command(argv=["sleep", "1000"], environment={"PATH": "/usr/bin:/bin"}), on_started=lambda: print("started", flush=True))
"""

DOCUMENT = (
    '{"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {"id": "x", "authority": {"secretRefs": []}, "lifetime":'
    ' {"ttlSeconds": 60}, "run": {"argv": ["true"], "secretDelivery": "env"}}}'
)


def test_all_ends_with_a_supervisor_that_is_killed() -> None:
    argv = [sys.executable, "-c", SUPERVISOR, DOCUMENT]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        launcher, init, host_id, groups = supervisor.stdout.readline().rstrip("\n").split(" ")
        assert supervisor.stdout.readline() == "started\n"
        pidfds = [os.pidfd_open(int(pid)) for pid in (launcher, init)]
        supervisor.kill()
    try:
        assert all(ended(pidfd) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    # The launcher ends last: it has put away what the dead cannot.
    assert [group for group in groups.split(":") if group and os.path.exists(group)] == []
    assert not ROOT or not os.path.exists(f"{HOST_IDS}/{host_id}")


# -- many at once -----------------------------------------------------------------------------------------------------------------------


def test_sixteen_threads_share_one(backend: LinuxBackend, run_in: RunIn) -> None:
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda number: run_in(backend, "sh", "-c", f"echo {number}; exit {number % 7}"), range(96)))
    assert [result.stdout for result in results] == [f"{number}\n".encode() for number in range(96)]
    assert [result.exit_code for result in results] == [number % 7 for number in range(96)]


def test_one_serves_several_backends(launcher: Launcher, run_in: RunIn) -> None:
    assert [run_in(LinuxBackend(launcher=launcher), "true").exit_code for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("ahead", [1, 3])
def test_cells_made_ahead_are_used_or_put_away(ahead: int, run_in: RunIn) -> None:
    with Launcher.start(ahead=ahead) as launcher:
        backend = LinuxBackend(launcher=launcher)
        for _ in range(2):
            assert run_in(backend, "cat", "/etc/hostname").stdout == b"cell\n"
        group = launcher.group(0)
        parents = {os.path.dirname(directory) for directory in group.directories.values()} if group else set()
        pid = launcher.pid
    left = [name for parent in parents for name in os.listdir(parent) if name.startswith(f"cellos-{pid}-")]
    assert left == []


# -- what it holds ----------------------------------------------------------------------------------------------------------------------


def test_it_has_one_thread_and_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "sesame")
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    os.set_inheritable(writing, True)
    try:
        with Launcher.start() as launcher:
            launcher.hierarchy()  # it is there now
            place = Path("/proc", str(launcher.pid))
            assert len(os.listdir(place / "task")) == 1
            assert b"sesame" not in (place / "cmdline").read_bytes()
            if ROOT:
                assert (place / "environ").read_bytes() == b""
                pipes = {os.readlink(f"/proc/self/fd/{fd}") for fd in (reading, writing)}
                assert pipes.isdisjoint(os.readlink(entry) for entry in (place / "fd").iterdir())
                assert (place / "cwd").readlink() == Path("/")
                assert "Groups:\t \n" in (place / "status").read_text()
            else:
                for name in ("environ", "mem", "maps"):
                    with pytest.raises(PermissionError), open(place / name, "rb") as file:
                        file.read(1)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.linux_backend(user_may_skip=True)
@pytest.mark.skipif(not ROOT, reason="only root has capabilities to go without")
def test_root_needs_no_right_to_look_into_other_processes(tmp_path: Path) -> None:
    """CAP_SYS_PTRACE would be a right over the whole host; a container's root does not have it."""
    program = "import cellos, sys; sys.exit(cellos.run(['true']).exit_code)"
    without = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", sys.executable, "-c", program]
    environment = os.environ | {"CELLOS_STATE_DIR": str(tmp_path)}
    done = subprocess.run(without, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_init_of_a_cell_is_hidden_from_its_user(backend: LinuxBackend, run_in: RunIn) -> None:
    """The command has the same user id as process 1, but finds nothing of it: its command line has paths of the host."""
    result = run_in(backend, "sh", "-c", "cat /proc/1/cmdline; ls /proc/1 /proc/1/fd; cat /proc/1/comm; ps ax | grep workshop[.]; true")
    assert result.stdout == b""
    assert result.stderr.count(b"No such file") >= 3


@pytest.mark.needs("limit memory")
def test_a_starved_init_does_not_keep_its_cell_alive(backend: LinuxBackend, plain: CellSpec, order: Callable[..., Command]) -> None:
    """It would take the others with it, but gets no processor from them: the group is killed as a whole."""
    cell = backend.create(plain, key=os.urandom(8).hex())
    assert cell.cloned is not None
    pid, processor = cell.cloned.pid, min(os.sched_getaffinity(0))

    def starve() -> None:
        """The command was started already: it would inherit that."""
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        os.sched_setaffinity(pid, {processor})

    busy = "import os, signal\nfor _ in range(60):\n  if not os.fork():\n    break\n"
    busy += f"signal.alarm(60); os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    try:
        result = cell.run(msgspec.structs.replace(order("/usr/bin/python3", "-c", busy), deadline_seconds=2), on_started=starve)
        assert (result.ended, result.signal) == ("deadline", 9)
    finally:
        left = cell.destroy()
    assert left == ()


def test_it_works_where_the_standard_streams_are_closed() -> None:
    """As in a daemon: the first descriptors that it gets are then 0, 1 and 2."""
    program = (
        "import os, sys\nfor descriptor in (0, 1, 2): os.close(descriptor)\n"
        "from cellos.sandbox.launcher import Launcher\nlauncher = Launcher.start()\n"
        "try:\n    launcher.hierarchy()\nexcept BaseException as error:\n    code = 1\nelse:\n    code = 7\n"
        "launcher.close()\nos._exit(code)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


def test_a_failing_start_is_the_answer_to_every_request() -> None:
    """It is a process of its own: what it could not do at its start must be told by its answers."""
    program = (
        "import errno, sys\nfrom cellos.sandbox import seccomp, syscalls\nfrom cellos.sandbox.launcher import Launcher, LauncherError\n"
        "syscalls.no_new_privileges()\nseccomp.install(seccomp.denying({436: errno.ENOSYS}))\n"
        "with Launcher.start() as launcher:\n    for _ in range(2):\n        try:\n            launcher.clone(launcher.reserve())\n"
        "        except LauncherError as error:\n            print(error.step, error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("close_range 38\n" * 2, "")


def test_descriptors_that_cannot_be_passed_are_an_answer() -> None:
    """The kernel refuses while the user has too many in flight, which passes. The launcher is there for more than one cell."""
    program = (
        "import errno, sys\nfrom cellos.sandbox import seccomp, syscalls\nfrom cellos.sandbox.launcher import Launcher, LauncherError\n"
        "sendmsg = 46\nsyscalls.no_new_privileges()\nseccomp.install(seccomp.denying({sendmsg: errno.ETOOMANYREFS}))\n"
        "with Launcher.start() as launcher:\n    for _ in range(2):\n        try:\n            launcher.clone(launcher.reserve())\n"
        "        except LauncherError as error:\n            print(error.step, error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("pass the cell's descriptors 109\n" * 2, "")


@pytest.mark.parametrize(
    ("ours", "of_cells"), [(os.SCHED_FIFO, os.SCHED_OTHER), (os.SCHED_RR, os.SCHED_OTHER), (os.SCHED_IDLE, os.SCHED_IDLE)]
)
def test_a_real_time_class_is_not_handed_on(ours: int, of_cells: int) -> None:
    """No limit of processor time holds such a process. What takes less than its share may go on so."""
    program = (
        "import contextlib, os, sys\nfrom cellos.sandbox.launcher import Launcher\n"
        "with contextlib.suppress(PermissionError):  # who may not take the class has none to hand on\n"
        "    os.sched_setscheduler(0, int(sys.argv[1]), os.sched_param(int(sys.argv[2])))\n"
        "with Launcher.start() as launcher:\n    print(os.sched_getscheduler(launcher.clone(launcher.reserve()).pid))\n"
    )
    priority = str(os.sched_get_priority_min(ours))
    done = subprocess.run([sys.executable, "-c", program, str(ours), priority], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{of_cells}\n", "")


def test_an_interpreter_that_is_gone_is_an_error() -> None:
    before = descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with contextlib.suppress(LauncherError), pytest.raises(OSError, match="nowhere"):
            Launcher.start()
    assert descriptors() == before


# -- what the host lacks ----------------------------------------------------------------------------------------------------------------

MISSING = """
import json, sys
from cellos.sandbox import launcher, seccomp, syscalls
denied, groups = json.loads(sys.argv[1]), sys.argv[2]
if groups != "all":
    there = "None" if groups == "none" else f"cgroups.Hierarchy(version=2, parents={{'': '/tmp'}}, controllers=frozenset({groups.split()}))"
    launcher._BOOT = launcher._BOOT.replace("from", f"from cellos.sandbox import cgroups; cgroups.discover = lambda **_: {there}; from", 1)
if denied:
    syscalls.no_new_privileges()
    seccomp.install(seccomp.denying({int(number): 38 for number in denied}))  # ENOSYS: posix_spawn has another way
with launcher.Launcher.start(ahead=int(sys.argv[3])) as started:
    print(json.dumps([started.missing(), started.missing()]))
"""


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    ("denied", "groups", "missing"),
    [
        ([], "none", ["cgroup-v2"]),
        ([435], "none", ["unshare", "cgroup-v2"]),
        ([317], "none", ["seccomp", "cgroup-v2"]),
        ([435, 317], "none", ["unshare", "seccomp", "cgroup-v2"]),
        ([435], "memory pids", ["unshare"]),
        ([435], "memory pids cpu", ["unshare"]),
        ([435], "memory cpu", ["unshare", "cgroup-v2"]),
        ([435], "pids", ["unshare", "cgroup-v2"]),
    ],
)
def test_what_the_host_lacks_is_tried(denied: list[int], groups: str, missing: list[str], ahead: int) -> None:
    argv = [sys.executable, "-c", MISSING, json.dumps(denied), groups, str(ahead)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [missing, missing]


@pytest.mark.needs("limit memory", "limit processes")
def test_this_host_lacks_nothing(launcher: Launcher) -> None:
    assert launcher.missing() == ()


def test_the_cell_that_was_tried_is_the_next_one(plain: CellSpec) -> None:
    with Launcher.start() as starting:
        starting.missing()
        children = Path(f"/proc/{starting.pid}/task/{starting.pid}/children").read_text().split()
        cell = LinuxBackend(launcher=starting).create(plain, key="0123456789abcdef")
        assert cell.cloned
        assert children == [str(cell.cloned.pid)]
        assert cell.destroy() == ()
