"""Control groups of both versions over a plain file tree: what is read, what is written, in which order."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cellos.sandbox import cgroups
from cellos.sandbox.cgroups import CPU, MEMORY, PIDS, Group, Hierarchy, Limits

ALL = frozenset({MEMORY, PIDS, CPU})
V1_FILES = {
    MEMORY: (
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.swappiness",
        "memory.kmem.tcp.limit_in_bytes",
        "memory.oom_control",
    ),
    PIDS: ("pids.max",),
    CPU: ("cpu.cfs_period_us", "cpu.cfs_quota_us"),
}
V2_FILES = ("memory.max", "memory.swap.max", "memory.oom.group", "memory.events", "pids.max", "cpu.max")


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def host_v1(root: Path, *, own: str = "/a/b", controllers: tuple[str, ...] = (MEMORY, PIDS, CPU)) -> str:
    lines = [f"{number}:{name}:{own}" for number, name in enumerate(controllers, 1)]
    files = {"proc/self/cgroup": "\n".join([*lines, "9:name=systemd:/", "0::/x", ""])}
    for controller in controllers:
        for name in ("cgroup.procs", *V1_FILES[controller]):
            files[f"sys/fs/cgroup/{controller}{own}/{name}"] = ""
    return tree(root, files)


def host_v2(
    root: Path,
    *,
    own: str = "/user.slice/x.scope",
    available: str = "cpuset cpu io memory pids",
    enabled: str = "",
    members: str = "",
    handed_on: str = "",
) -> str:
    place = f"sys/fs/cgroup{own}"
    return tree(
        root,
        {
            "proc/self/cgroup": f"0::{own}\n",
            "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
            f"{place}/cgroup.controllers": f"{available}\n",
            f"{place}/cgroup.subtree_control": enabled,
            f"{place}/cgroup.procs": members,
            f"{place}/cellos/cgroup.controllers": f"{available}\n",
            f"{place}/cellos/cgroup.subtree_control": handed_on,
        },
    )


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], list[tuple[str, str]]]:
    """Files, by the end of their path, that answer a number of writes with EBUSY first. Returns the list of all writes."""

    def install(refusals: dict[str, int]) -> list[tuple[str, str]]:
        written: list[tuple[str, str]] = []
        write = cgroups._write

        def answer(path: str, text: str) -> None:
            written.append((path, text))
            for end, left in refusals.items():
                if path.endswith(end) and left:
                    refusals[end] -= 1
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
            if os.path.exists(os.path.dirname(path)):
                Path(path).touch()
            write(path, text)

        monkeypatch.setattr(cgroups, "_write", answer)
        return written

    return install


@pytest.fixture
def not_writable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Root may write everything, so modes would prove nothing: access(2) is answered by the test."""

    def install(*ends: str) -> None:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(ends) and access(path, mode))

    return install


# -- discover, version 1 ----------------------------------------------------------------------------------------------------------------


def test_v1_takes_our_own_groups(tmp_path: Path) -> None:
    found = cgroups.discover(root=host_v1(tmp_path))
    assert found is not None
    assert (found.version, found.controllers) == (1, ALL)
    assert found.parents == {name: f"{tmp_path}/sys/fs/cgroup/{name}/a/b" for name in ALL}


def test_v1_takes_the_root_group_without_a_trailing_slash(tmp_path: Path) -> None:
    found = cgroups.discover(root=host_v1(tmp_path, own=""))
    assert found is not None
    assert found.parents[MEMORY] == f"{tmp_path}/sys/fs/cgroup/memory"


@pytest.mark.parametrize("missing", [MEMORY, PIDS, CPU])
def test_v1_leaves_out_what_cannot_be_written(tmp_path: Path, not_writable: Callable[..., None], missing: str) -> None:
    root = host_v1(tmp_path)
    not_writable(f"/{missing}/a/b")
    found = cgroups.discover(root=root)
    assert found is not None
    assert found.controllers == ALL - {missing}
    assert missing not in found.parents


def test_v1_without_any_writable_group_is_none(tmp_path: Path, not_writable: Callable[..., None]) -> None:
    root = host_v1(tmp_path)
    not_writable("/a/b")
    assert cgroups.discover(root=root) is None


def test_v1_without_bandwidth_control_has_no_cpu(tmp_path: Path) -> None:
    root = host_v1(tmp_path)
    (tmp_path / "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us").unlink()
    found = cgroups.discover(root=root)
    assert found is not None
    assert found.controllers == {MEMORY, PIDS}
    assert CPU not in found.parents


def test_v1_cpu_mounted_together_with_cpuacct(tmp_path: Path) -> None:
    root = host_v1(tmp_path)
    (tmp_path / "proc/self/cgroup").write_text("3:cpu,cpuacct:/a/b\n")
    found = cgroups.discover(root=root)
    assert found is not None
    assert found.parents == {CPU: f"{tmp_path}/sys/fs/cgroup/cpu/a/b"}


def test_a_host_without_control_groups_is_none(tmp_path: Path) -> None:
    assert cgroups.discover(root=str(tmp_path)) is None


def test_v1_takes_the_parent_that_was_named_for_its_controller(tmp_path: Path) -> None:
    root = host_v1(tmp_path)
    before = cgroups.discover(root=root)
    place = tmp_path / "sys/fs/cgroup/memory/cells"
    place.mkdir()
    found = cgroups.discover(root=root, parent="/sys/fs/cgroup/memory/cells")
    assert before is not None
    assert found is not None
    assert found.parents == {**before.parents, "memory": str(place)}


@pytest.mark.parametrize(("parent", "why"), [("/sys/fs/cgroup/memory/none", "No such file"), ("/proc", "it lies in none of the")])
def test_v1_says_why_the_parent_that_was_named_is_of_no_use(tmp_path: Path, parent: str, why: str) -> None:
    with pytest.raises(OSError, match=why) as caught:
        cgroups.discover(root=host_v1(tmp_path), parent=parent)
    assert caught.value.filename == str(tmp_path) + parent


# -- discover, version 2 ----------------------------------------------------------------------------------------------------------------


def v2_directory(root: Path, own: str = "/user.slice/x.scope") -> str:
    return f"{root}/sys/fs/cgroup{own}"


def v2_cells(root: Path, own: str = "/user.slice/x.scope") -> str:
    return f"{v2_directory(root, own)}/cellos"


def test_v2_hands_our_controllers_to_the_children(tmp_path: Path) -> None:
    found = cgroups.discover(root=host_v2(tmp_path))
    assert found is not None
    assert (found.version, found.controllers) == (2, ALL)
    assert found.parents == {"": v2_cells(tmp_path)}
    for directory in (v2_directory(tmp_path), v2_cells(tmp_path)):
        assert Path(directory, "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_v2_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    found = cgroups.discover(root=host_v2(tmp_path, enabled="memory pids"))
    assert found is not None
    assert found.controllers == ALL
    assert Path(v2_directory(tmp_path), "cgroup.subtree_control").read_text().startswith("+cpu")


def test_v2_writes_nothing_where_all_is_there(tmp_path: Path, busy: Callable[..., list[tuple[str, str]]]) -> None:
    written = busy({})
    found = cgroups.discover(root=host_v2(tmp_path, enabled="cpu memory pids io", handed_on="cpu memory pids"))
    assert found is not None
    assert found.controllers == ALL
    assert written == []


def test_v2_names_only_controllers_that_it_was_given(tmp_path: Path) -> None:
    found = cgroups.discover(root=host_v2(tmp_path, available="pids io"))
    assert found is not None
    assert found.controllers == {PIDS}


@pytest.mark.parametrize("end", ["x.scope", "cgroup.subtree_control"])
def test_v2_that_was_not_delegated_is_none(tmp_path: Path, not_writable: Callable[..., None], end: str) -> None:
    root = host_v2(tmp_path)
    not_writable(end)
    assert cgroups.discover(root=root) is None


def test_v2_takes_the_parent_that_was_named(tmp_path: Path) -> None:
    root = host_v2(tmp_path)
    host_v2(tmp_path, own="/cells")
    found = cgroups.discover(root=root, parent="/sys/fs/cgroup/cells")
    assert found is not None
    assert found.parents == {"": v2_cells(tmp_path, "/cells")}


def test_v2_says_why_the_parent_that_was_named_is_of_no_use(
    tmp_path: Path, busy: Callable[..., list[tuple[str, str]]], not_writable: Callable[..., None]
) -> None:
    root = host_v2(tmp_path)
    directory = "/sys/fs/cgroup/cells"
    for parent, members, expected in (
        ("cells", None, (errno.EINVAL, "not an absolute path", "cells")),
        (directory, None, (errno.ENOENT, "No such file or directory", root + directory)),
        ("/proc/self", None, (errno.EINVAL, "not a control group", root + "/proc/self")),
        (directory, "11\n", (errno.EBUSY, "it holds processes of others", root + directory)),
    ):
        if members:
            host_v2(tmp_path, own="/cells", members=members)
            busy({"cells/cgroup.subtree_control": 1})
        with pytest.raises(OSError) as caught:  # noqa: PT011  # what it says is looked at below
            cgroups.discover(root=root, parent=parent, ours=frozenset({10}))
        assert (caught.value.errno, caught.value.strerror, caught.value.filename) == expected
    not_writable("cells")
    with pytest.raises(PermissionError):
        cgroups.discover(root=root, parent=directory)


def test_v2_makes_room_when_only_we_are_in_the_group(tmp_path: Path, busy: Callable[..., list[tuple[str, str]]]) -> None:
    root = host_v2(tmp_path, members="20\n10\n")
    written = busy({"x.scope/cgroup.subtree_control": 1})
    found = cgroups.discover(root=root, ours=frozenset({10, 20}))
    assert found is not None
    assert found.controllers == ALL
    directory = v2_directory(tmp_path)
    assert written == [
        (f"{directory}/cgroup.subtree_control", "+memory +pids +cpu"),
        (f"{directory}/cellos/supervisor/cgroup.procs", "10"),
        (f"{directory}/cellos/supervisor/cgroup.procs", "20"),
        (f"{directory}/cgroup.subtree_control", "+memory +pids +cpu"),
        (f"{directory}/cellos/cgroup.subtree_control", "+memory +pids +cpu"),
    ]


def test_v2_finds_the_group_that_it_moved_aside_in(tmp_path: Path, busy: Callable[..., list[tuple[str, str]]]) -> None:
    """A second launcher of a process, while the first is still in the leaf."""
    root = host_v2(tmp_path, enabled="cpu memory pids", handed_on="cpu memory pids")
    host_v2(tmp_path, own="/user.slice/x.scope/cellos/supervisor", available="cpu memory pids", members="10\n20\n")
    written = busy({})
    found = cgroups.discover(root=root, ours=frozenset({10, 30}))
    assert found is not None
    assert (found.controllers, found.parents) == (ALL, {"": v2_cells(tmp_path)})
    assert written == []


def test_v2_moves_nobody_elses_processes(tmp_path: Path, busy: Callable[..., list[tuple[str, str]]]) -> None:
    root = host_v2(tmp_path, members="10\n11\n")
    written = busy({"x.scope/cgroup.subtree_control": 1})
    assert cgroups.discover(root=root, ours=frozenset({10})) is None
    assert [path for path, _ in written if path.endswith("cgroup.procs")] == []
    assert not os.path.exists(f"{v2_cells(tmp_path)}/supervisor")


@pytest.mark.parametrize(
    "refusals",
    [
        {"x.scope/cgroup.subtree_control": 2},
        {"cellos/cgroup.subtree_control": 1},
        {"x.scope/cgroup.subtree_control": 1, "cellos/supervisor/cgroup.procs": 1},
    ],
)
def test_v2_that_stays_busy_is_none(tmp_path: Path, busy: Callable[..., list[tuple[str, str]]], refusals: dict[str, int]) -> None:
    root = host_v2(tmp_path, members="10\n")
    busy(dict(refusals))
    assert cgroups.discover(root=root, ours=frozenset({10})) is None


# -- what is written --------------------------------------------------------------------------------------------------------------------

LIMITS = Limits(memory_bytes=1 << 20, pids=7, cpu_quota_micros=50_000, cpu_period_micros=100_000)


def hierarchy(root: Path, version: int, controllers: frozenset[str] = ALL) -> Hierarchy:
    parents = {c: f"{root}/{c}" for c in sorted(controllers)} if version == 1 else {"": f"{root}/unified"}
    for parent in parents.values():
        os.makedirs(parent, exist_ok=True)
    return Hierarchy(version=version, parents=parents, controllers=controllers)


def created(root: Path, version: int, controllers: frozenset[str] = ALL, *, without: tuple[str, ...] = ()) -> Group:
    """A group, with the files that the kernel would put into it."""
    group = Group(hierarchy(root, version, controllers), "cell")
    group.create()
    for controller, directory in group.directories.items():
        for name in ("cgroup.procs", *(V1_FILES[controller] if version == 1 else V2_FILES)):
            if name not in without:
                Path(directory, name).touch()
    return group


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file() and path.read_text()}


def test_v1_writes(tmp_path: Path) -> None:
    created(tmp_path, 1).limit(LIMITS)
    assert contents(tmp_path) == {
        "memory/cell/memory.limit_in_bytes": "1048576",
        "memory/cell/memory.memsw.limit_in_bytes": "1048576",
        "memory/cell/memory.swappiness": "0",
        "memory/cell/memory.kmem.tcp.limit_in_bytes": "1048576",
        "pids/cell/pids.max": "7",
        "cpu/cell/cpu.cfs_period_us": "100000",
        "cpu/cell/cpu.cfs_quota_us": "50000",
    }


def test_v2_writes(tmp_path: Path) -> None:
    created(tmp_path, 2).limit(LIMITS)
    assert contents(tmp_path) == {
        "unified/cell/memory.max": "1048576",
        "unified/cell/memory.swap.max": "0",
        "unified/cell/memory.oom.group": "1",
        "unified/cell/pids.max": "7",
        "unified/cell/cpu.max": "50000 100000",
    }


@pytest.mark.parametrize("version", [1, 2])
def test_limits_that_are_not_set_leave_a_resource_alone(tmp_path: Path, version: int) -> None:
    created(tmp_path, version).limit(Limits())
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("version", [1, 2])
def test_a_controller_that_is_not_there_is_not_written(tmp_path: Path, version: int) -> None:
    created(tmp_path, version, frozenset({PIDS})).limit(LIMITS)
    assert [path.rpartition("/")[2] for path in contents(tmp_path)] == ["pids.max"]


def test_v1_memory_comes_before_memory_and_swap() -> None:
    """The kernel refuses a sum that is smaller than its part."""
    plan = cgroups.writes(Hierarchy(version=1, parents={}, controllers=ALL), LIMITS)
    names = [name for _, name, _, _ in plan]
    assert names.index("memory.limit_in_bytes") < names.index("memory.memsw.limit_in_bytes")
    assert names.index("cpu.cfs_period_us") < names.index("cpu.cfs_quota_us")


@pytest.mark.parametrize(("version", "without"), [(1, "memory.memsw.limit_in_bytes"), (2, "memory.swap.max")])
def test_a_kernel_that_does_not_count_swap(tmp_path: Path, version: int, without: str) -> None:
    group = created(tmp_path, version, without=(without,))
    group.limit(LIMITS)
    assert not group.limits_swap()
    assert without not in "".join(contents(tmp_path))
    assert created(tmp_path / "other", version).limits_swap()


def test_a_limit_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    group = created(tmp_path, 1, without=("pids.max",))
    with pytest.raises(OSError, match=r"pids/cell/pids\.max"):
        group.limit(LIMITS)


def test_a_group_that_exists_is_not_taken_over(tmp_path: Path) -> None:
    group = created(tmp_path, 1)
    with pytest.raises(FileExistsError):
        group.create()


def test_v1_attaches_and_v2_gives_birth(tmp_path: Path) -> None:
    first = Group(hierarchy(tmp_path, 1), "cell")
    assert sorted(first.join_paths()) == [f"{tmp_path}/{name}/cell/tasks" for name in ("cpu", "memory", "pids")]
    assert first.birth_directory() is None
    second = Group(hierarchy(tmp_path, 2), "cell")
    assert second.join_paths() == []
    assert second.birth_directory() == f"{tmp_path}/unified/cell"


# -- out of memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name", "text", "kills"),
    [
        (1, "memory/cell/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        (1, "memory/cell/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", 0),  # before Linux 4.13
        (2, "unified/cell/memory.events", "low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 1\n", 2),
        (2, "unified/cell/memory.events", "", 0),
    ],
)
def test_counts_what_was_killed_for_want_of_memory(tmp_path: Path, version: int, name: str, text: str, kills: int) -> None:
    group = created(tmp_path, version)
    (tmp_path / name).write_text(text)
    assert group.out_of_memory_kills() == kills


def test_counts_nothing_where_nobody_counts(tmp_path: Path) -> None:
    assert created(tmp_path, 1, frozenset({PIDS})).out_of_memory_kills() == 0
    gone = created(tmp_path, 2)
    Path(gone.directories[""], "memory.events").unlink()
    assert gone.out_of_memory_kills() == 0


# -- the end ----------------------------------------------------------------------------------------------------------------------------


def test_kills_all_by_one_write_where_the_kernel_can(tmp_path: Path) -> None:
    (tmp_path / "cgroup.kill").touch()
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    cgroups.kill_all(str(tmp_path))
    assert (tmp_path / "cgroup.kill").read_text() == "1"


def test_kills_every_process_of_the_group_and_below(tmp_path: Path) -> None:
    children = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup.procs").write_text(f"{children[0].pid}\n{gone.pid}\n{children[1].pid}\n")
    (tmp_path / "a" / "b" / "cgroup.procs").write_text(f"{children[2].pid}\n")
    cgroups.kill_all(str(tmp_path))
    assert [child.wait(60) for child in children] == [-signal.SIGKILL] * 3


def test_kills_what_was_started_while_it_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    def kill(pid: int, number: int) -> None:
        killed.append(pid)
        if len(killed) < 3:  # it forked just before the signal came
            (tmp_path / "cgroup.procs").write_text("".join(f"{member}\n" for member in [*killed, pid + 1]))

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / "cgroup.procs").write_text("4000001\n")
    cgroups.kill_all(str(tmp_path))
    assert killed == [4000001, 4000002, 4000003]


def test_a_group_that_grows_without_end_does_not_hold_us_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    procs = tmp_path / "cgroup.procs"
    monkeypatch.setattr(os, "kill", lambda pid, _: procs.write_text(f"{pid + 1}\n"))
    procs.write_text("4000001\n")
    cgroups.kill_all(str(tmp_path))


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_is_killed_whole(tmp_path: Path, version: int) -> None:
    group = created(tmp_path, version)
    with subprocess.Popen(["sleep", "1000"]) as child:
        for directory in group.directories.values():
            Path(directory, "cgroup.procs").write_text(f"{child.pid}\n")
        group.kill()
        assert child.wait(60) == -signal.SIGKILL
    for directory in group.directories.values():
        shutil.rmtree(directory)
    group.kill()  # nothing is there any more


def test_a_process_of_another_namespace_does_not_make_us_kill_ourselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel shows it as 0, and kill(0) means our own process group."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    (tmp_path / "cgroup.procs").write_text("0\n4000000\n")
    cgroups.kill_all(str(tmp_path))
    assert killed == [4000000]


def test_a_process_that_is_not_ours_is_left_to_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / "cgroup.procs").write_text("1\n")
    cgroups.kill_all(str(tmp_path))


def test_removes_a_group(tmp_path: Path) -> None:
    (tmp_path / "cell").mkdir()
    assert cgroups.remove(str(tmp_path / "cell"), deadline=0) is None
    assert not (tmp_path / "cell").exists()
    assert cgroups.remove(str(tmp_path / "cell"), deadline=0) is None


def rmdir_is_busy(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    asked: list[str] = []
    rmdir = os.rmdir

    def answer(path: str) -> None:
        asked.append(path)
        if len(asked) <= times:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        rmdir(path)

    monkeypatch.setattr(os, "rmdir", answer)
    return asked


def test_waits_for_the_last_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cell").mkdir()
    asked = rmdir_is_busy(monkeypatch, 3)
    assert cgroups.remove(str(tmp_path / "cell"), deadline=time.monotonic() + 60) is None
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("members", "child", "reason"),
    [
        ("10\n11\n", None, "Device or resource busy, holds 2 processes"),
        ("", "nested", "Device or resource busy, holds the groups nested"),
        ("10\n", "nested", "Device or resource busy, holds 1 process and the groups nested"),
        ("", None, "Device or resource busy"),
    ],
)
def test_says_why_a_group_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: str, child: str | None, reason: str) -> None:
    cell = tmp_path / "cell"
    cell.mkdir()
    (cell / "cgroup.procs").write_text(members)
    if child:
        (cell / child).mkdir()
    rmdir_is_busy(monkeypatch, 1 << 30)
    assert cgroups.remove(str(cell), deadline=time.monotonic()) == reason


def test_does_not_wait_for_what_will_not_change(tmp_path: Path) -> None:
    (tmp_path / "cell").write_text("a file")
    asked = time.monotonic()
    assert cgroups.remove(str(tmp_path / "cell"), deadline=asked + 60) == "Not a directory"
    assert time.monotonic() < asked + 30


def test_removes_what_dead_launchers_left_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    made = hierarchy(tmp_path, 1, frozenset({PIDS, MEMORY}))
    kept = [f"cellos-{os.getpid()}-ab-0", "other-1-ab-0", "cellos-x-0", "cellos-"]
    for parent in made.parents.values():
        for name in [f"cellos-{gone.pid}-ab-0", *kept]:
            Path(parent, name).mkdir()
    cgroups.remove_abandoned(made, "cellos-")
    assert {name for parent in made.parents.values() for name in os.listdir(parent)} == set(kept)
