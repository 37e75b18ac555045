"""Control groups, version 1 and 2: memory, number of processes, processor time (cgroups(7)).

`discover` finds where this process may make groups, `writes` is pure and says which file gets which text, `Group` does it.
Every path goes through `root`, so that tests can use a plain directory tree.
"""

from __future__ import annotations

import errno
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping  # the launcher would load `collections` for it

MEMORY, PIDS, CPU = "memory", "pids", "cpu"
CONTROLLERS = (MEMORY, PIDS, CPU)
_CELLS, _LEAF = "cellos", "cellos/supervisor"
"""On version 2, below the group that is ours: where cells are made, and where we go ourselves, as a group with members hands no controllers
to its children. Cells lie one level deeper than they must: systemd takes controllers away from the children of a unit that is not declared
as delegated, at its next daemon-reload, and limits with them. It cannot where those hand them on to children of their own."""
_V1_MOUNT_NAMES = {MEMORY: "memory", PIDS: "pids", CPU: "cpu"}
DEFAULT_PERIOD_MICROS = 100_000
_MOST_ROUNDS = 32


class Limits:
    """What a group enforces; None leaves a resource alone. CPU: `cpu_quota_micros` of every `cpu_period_micros`."""

    __slots__ = ("cpu_period_micros", "cpu_quota_micros", "memory_bytes", "pids")

    def __init__(
        self,
        *,
        memory_bytes: int | None = None,
        pids: int | None = None,
        cpu_quota_micros: int | None = None,
        cpu_period_micros: int = DEFAULT_PERIOD_MICROS,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.pids = pids
        self.cpu_quota_micros = cpu_quota_micros
        self.cpu_period_micros = cpu_period_micros


class Hierarchy:
    """Where groups are made: `version` 1 has a parent directory for each controller, 2 has one for all (under the key "")."""

    __slots__ = ("controllers", "parents", "version")

    def __init__(self, *, version: int, parents: Mapping[str, str], controllers: frozenset[str]) -> None:
        self.version = version
        self.parents = dict(parents)
        self.controllers = controllers

    def directories(self, name: str) -> dict[str, str]:
        """Controller (or "" on version 2) to the directory of the group `name`."""
        return {controller: f"{parent}/{name}" for controller, parent in self.parents.items()}


def discover(*, root: str = "", parent: str | None = None, ours: frozenset[int] = frozenset()) -> Hierarchy | None:
    """The groups that this process may use, or None where it may not make any.

    Version 2 is taken where it has controllers, and needs a directory that was delegated to us (Delegate= of a systemd unit): our own group
    if it holds no process besides `ours`, as a group with members cannot hand controllers to its children. One that has moved aside before
    is known by the name of that leaf, so that a second launcher of a process finds the same group.
    Only controllers that can really be written to are named.

    `parent`: a directory to use instead of our own group; on version 1 it stands for the controllers in whose hierarchy it lies. Raises
    OSError, with a path, where it cannot be used: somebody chose it.
    """
    own = _own_groups(_read(f"{root}/proc/self/cgroup"))
    mount = f"{root}/sys/fs/cgroup"
    if parent is not None and not os.path.isabs(parent):
        raise OSError(errno.EINVAL, "not an absolute path", parent)
    if os.path.exists(f"{mount}/cgroup.controllers"):
        if parent is not None:
            return _discover_v2(root + parent, ours)
        try:
            return _discover_v2(mount + own.get("", "/").removesuffix(f"/{_LEAF}").rstrip("/"), ours)
        except OSError:
            return None
    chosen = {} if parent is None else _chosen_v1(mount, root + parent)
    parents = {}
    for controller in CONTROLLERS:
        if controller in chosen:
            parents[controller] = chosen[controller]
        elif controller in own:
            path = f"{mount}/{_V1_MOUNT_NAMES[controller]}{own[controller].rstrip('/')}"
            if os.access(path, os.W_OK):
                parents[controller] = path
    if CPU in parents and not os.path.exists(f"{parents[CPU]}/cpu.cfs_quota_us"):
        del parents[CPU]  # a kernel without CFS bandwidth control
    return Hierarchy(version=1, parents=parents, controllers=frozenset(parents)) if parents else None


def _chosen_v1(mount: str, directory: str) -> dict[str, str]:
    """Controller to `directory`, for those in whose hierarchy it lies. Raises OSError."""
    _require_writable(directory)
    place = os.path.realpath(directory)
    chosen = {}
    for controller, name in _V1_MOUNT_NAMES.items():
        hierarchy = os.path.realpath(f"{mount}/{name}")  # cpu is a link to cpu,cpuacct on many hosts
        if place == hierarchy or place.startswith(hierarchy + "/"):
            chosen[controller] = directory
    if not chosen:
        raise OSError(errno.EINVAL, f"it lies in none of the control groups {', '.join(_V1_MOUNT_NAMES.values())}", directory)
    return chosen


def _discover_v2(directory: str, ours: frozenset[int]) -> Hierarchy:
    """Raises OSError where the directory is none of ours, or somebody came, or one of us went, while we moved."""
    _require_writable(directory)
    if not os.path.exists(f"{directory}/cgroup.subtree_control"):
        raise OSError(errno.EINVAL, "not a control group", directory)
    _require_writable(f"{directory}/cgroup.subtree_control")
    cells = f"{directory}/{_CELLS}"
    try:
        _hand_down(directory)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        _make_room(directory, ours)
        _hand_down(directory)
    os.makedirs(cells, exist_ok=True)
    return Hierarchy(version=2, parents={"": cells}, controllers=_hand_down(cells))


def _require_writable(path: str) -> None:
    if not os.access(path, os.W_OK):
        number = errno.EACCES if os.path.exists(path) else errno.ENOENT
        raise OSError(number, os.strerror(number), path)


def _hand_down(directory: str) -> frozenset[str]:
    """Let the children have our controllers, as far as `directory` has them itself; returns those that they have. Raises OSError."""
    available = _read(f"{directory}/cgroup.controllers").split()
    enabled = _read(f"{directory}/cgroup.subtree_control").split()
    wanted = [controller for controller in CONTROLLERS if controller in available and controller not in enabled]
    if wanted:
        _write(f"{directory}/cgroup.subtree_control", " ".join("+" + controller for controller in wanted))
    return frozenset(CONTROLLERS) & {*enabled, *wanted}


def _make_room(directory: str, ours: frozenset[int]) -> None:
    """Move ourselves into a leaf of our own group. Raises OSError where somebody else lives there."""
    members = {int(pid) for pid in _read(f"{directory}/cgroup.procs").split()}
    if members - ours:
        raise OSError(errno.EBUSY, "it holds processes of others", directory)
    leaf = f"{directory}/{_LEAF}"
    os.makedirs(leaf, exist_ok=True)
    for pid in sorted(members):
        _write(f"{leaf}/cgroup.procs", str(pid))


def writes(hierarchy: Hierarchy, limits: Limits) -> list[tuple[str, str, str, bool]]:
    """(controller, file, text, required) in the order in which they are written. A file that is not required may be missing on a host."""
    plan: list[tuple[str, str, str, bool]] = []
    if hierarchy.version == 1:
        if limits.memory_bytes is not None and MEMORY in hierarchy.controllers:
            plan.append((MEMORY, "memory.limit_in_bytes", str(limits.memory_bytes), True))
            plan.append((MEMORY, "memory.memsw.limit_in_bytes", str(limits.memory_bytes), False))
            plan.append((MEMORY, "memory.swappiness", "0", False))
            # What sockets hold, which version 1 counts on its own, and not at all without this. Else it is the host's, up to tcp_mem.
            plan.append((MEMORY, "memory.kmem.tcp.limit_in_bytes", str(limits.memory_bytes), False))
        if limits.pids is not None and PIDS in hierarchy.controllers:
            plan.append((PIDS, "pids.max", str(limits.pids), True))
        if limits.cpu_quota_micros is not None and CPU in hierarchy.controllers:
            plan.append((CPU, "cpu.cfs_period_us", str(limits.cpu_period_micros), True))
            plan.append((CPU, "cpu.cfs_quota_us", str(limits.cpu_quota_micros), True))
        return plan
    if limits.memory_bytes is not None and MEMORY in hierarchy.controllers:
        plan.append(("", "memory.max", str(limits.memory_bytes), True))
        plan.append(("", "memory.swap.max", "0", False))
        plan.append(("", "memory.oom.group", "1", False))
    if limits.pids is not None and PIDS in hierarchy.controllers:
        plan.append(("", "pids.max", str(limits.pids), True))
    if limits.cpu_quota_micros is not None and CPU in hierarchy.controllers:
        plan.append(("", "cpu.max", f"{limits.cpu_quota_micros} {limits.cpu_period_micros}", True))
    return plan


class Group:
    """The group of one cell: one directory per hierarchy."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self.hierarchy = hierarchy
        self.directories = hierarchy.directories(name)

    def create(self) -> None:
        """Make the directories. Raises OSError; what was made stays, for `remove`."""
        for directory in self.directories.values():
            os.mkdir(directory, 0o755)

    def limit(self, limits: Limits) -> None:
        """Write the limits. Raises OSError with the path."""
        for controller, name, text, required in writes(self.hierarchy, limits):
            path = f"{self.directories[controller]}/{name}"
            if required or os.path.exists(path):
                _write(path, text)

    def join_paths(self) -> list[str]:
        """Files to which the child itself writes 0 to come in. Empty on version 2, where it is born in the group.

        Everybody else who moves a process locks out all forks and exits of the host first, and mostly waits 12 ms for that.
        """
        return [f"{directory}/tasks" for directory in self.directories.values()] if self.hierarchy.version == 1 else []

    def birth_directory(self) -> str | None:
        """The directory for CLONE_INTO_CGROUP, on version 2."""
        return self.directories[""] if self.hierarchy.version == 2 else None

    def limits_swap(self) -> bool:
        """Whether the kernel has a file to limit swap by; asked once the group exists."""
        names = {1: (MEMORY, "memory.memsw.limit_in_bytes"), 2: ("", "memory.swap.max")}
        controller, name = names[self.hierarchy.version]
        return os.path.exists(f"{self.directories.get(controller, '')}/{name}")

    def kill(self) -> None:
        """End every process in it, process 1 of the cell among them; what could not be ended shows when the group is removed."""
        try:
            kill_all(next(iter(self.directories.values())))  # on version 1 all have the same members
        except OSError:
            return

    def out_of_memory_kills(self) -> int:
        """How many processes of the group the kernel killed for want of memory; 0 where it does not say."""
        path = {1: "memory.oom_control", 2: "memory.events"}[self.hierarchy.version]
        directory = self.directories.get(MEMORY if self.hierarchy.version == 1 else "")
        if directory is None:
            return 0
        fields = dict(line.split(" ", 1) for line in _read(f"{directory}/{path}").splitlines() if " " in line)
        return int(fields.get("oom_kill", "0"))


def kill_all(directory: str) -> None:
    """SIGKILL to every process in the group and below, and to what they still start meanwhile."""
    if os.path.exists(f"{directory}/cgroup.kill"):
        _write(f"{directory}/cgroup.kill", "1")
        return
    known = {"0"}  # a process of another process namespace; to kill it would be to kill our own process group
    for _ in range(_MOST_ROUNDS):
        found = {pid for path, _, _ in os.walk(directory) for pid in _read(f"{path}/cgroup.procs").split()} - known
        if not found:
            return
        known |= found
        for pid in found:
            try:
                os.kill(int(pid), 9)
            except (ProcessLookupError, PermissionError):
                continue  # it ended between the two calls, or is not ours: then `remove` will tell


def remove(directory: str, *, deadline: float) -> str | None:
    """Remove a group, waiting until `deadline` (time.monotonic) for its last process; the reason when it stays, None when it is gone."""
    while True:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                return f"{error.strerror}{_contents(directory)}"
            time.sleep(0.001)
        else:
            return None


def _contents(directory: str) -> str:
    members = _read(f"{directory}/cgroup.procs").split()
    try:
        children = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    except OSError:
        children = []
    held = [f"{len(members)} process{'es' if len(members) > 1 else ''}"] if members else []
    if children:
        held.append(f"the groups {', '.join(children)}")
    return f", holds {' and '.join(held)}" if held else ""


def remove_abandoned(hierarchy: Hierarchy, prefix: str) -> None:
    """Remove empty groups `<prefix><pid>-…` whose process is gone: it was killed before anybody knew of them."""
    for parent in hierarchy.parents.values():
        for name in os.listdir(parent):
            pid = name.removeprefix(prefix).partition("-")[0]
            if name.startswith(prefix) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                remove(f"{parent}/{name}", deadline=0)


def _own_groups(text: str) -> dict[str, str]:
    """Controller to path, from /proc/self/cgroup; version 2 has the controller ""."""
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        # ENODEV: the group went away between open and read; EOPNOTSUPP: a group of threads has no list of processes
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.EACCES, errno.EOPNOTSUPP):
            return ""
        raise


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(descriptor)
