"""The Linux backend: a cell is a process tree in seven namespaces of its own, on a root of its own, with nothing to gain.

The order of things, and what each layer is for, is told in docs/explanation/isolation.md. Here is what a spec may ask for and which limits
apply; a single live cell is in linux_cell.py.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cellos.backends.linux_cell import TEARDOWN_SECONDS, LinuxCell, check_argv, explain, too_little_memory
from cellos.backends.security import last_capability, read_status
from cellos.backends.settings import CPU, MEMORY, NO_LIMIT, PARENT, LinuxSettings
from cellos.errors import ConfigError, HostBackendError, Unenforceable, os_error_text
from cellos.ports import Isolation, Refusal, Residue
from cellos.sandbox import cgroups
from cellos.sandbox.launcher import Launcher, LauncherError
from cellos.sandbox.layout import INOTIFY_INSTANCES, INOTIFY_WATCHES, SHM_BYTES, TMP_BYTES, TMP_INODES, WORK_BYTES, WORK_INODES

if TYPE_CHECKING:
    from cellos.core.documents import CellSpec, CpuMax, Limits


MIB = 1 << 20
DEFAULT_MEMORY_BYTES = 512 * MIB
DEFAULT_PIDS = 256
DEFAULT_CPU_MICROS_PER_SECOND = 1_000_000
OPEN_FILES = 4096
MOST_MOUNTS = 240
"""Root hands each to init as a descriptor, and the kernel passes 253 at once."""
LOCKED_BYTES = 65536
PENDING_SIGNALS = 4096
"""Timers of timer_create(2) among them."""
ENFORCED = (
    "user-namespace", "pid-namespace", "mount-namespace", "network-namespace", "ipc-namespace", "uts-namespace", "cgroup-namespace",
    "private-root", "no-network", "no-capabilities", "no-new-privileges", "landlock", "seccomp",
)  # fmt: skip

_PAGE = resource.getpagesize()
_MOST_MEMORY_BYTES = (1 << 63) - 1
_NOT_ENFORCED = (
    ("authority.egress_rules", "authority.egressRules", "egress is not built yet; without rules the cell has no network"),
    ("authority.dns_authority", "authority.dnsAuthority", "egress is not built yet"),
    ("authority.cdn_authority", "authority.cdnAuthority", "egress is not built yet"),
    ("ingress", "ingress", "nothing is fetched into a cell; mount it with authority.filesystem"),
    ("environment", "environment", "the linux backend runs the host's /usr, not an image"),
    ("telemetry", "telemetry", "no telemetry agent is built yet (under the hardened profile set CELLOS_REQUIRE_TELEMETRY_DECLARED=0)"),
)


class LinuxBackend:
    """Cells on this host's kernel. Thread-safe. Needs a started `launcher`, and waits for it.

    Raises MissingPrimitive, HostBackendError; ConfigError for a setting that this host cannot hold.
    """

    kind = "linux"

    def __init__(self, *, launcher: Launcher, settings: LinuxSettings | None = None) -> None:
        self._launcher = launcher
        self._settings = settings or LinuxSettings()
        try:
            self._hierarchy = launcher.hierarchy()
        except LauncherError as error:
            raise explain(error.step, error.errno, error.text) from error
        if self._settings.memory_bytes and not self._can(cgroups.MEMORY):
            raise ConfigError(f"{MEMORY}: {_no_controller('memory')}")
        if self._settings.cpu_quota_micros and not self._can(cgroups.CPU):
            raise ConfigError(f"{CPU}: {_no_controller('cpu')}")
        self._last_cap = last_capability()
        self._reserved: dict[str, int] = {}

    def refusals(self, spec: CellSpec) -> Sequence[Refusal]:
        refused = refused_anywhere(spec)
        limits = spec.run.limits if spec.run else None
        if limits and limits.memory_max_bytes is not None and not self._can(cgroups.MEMORY):
            refused.append(Refusal(field="spec.run.limits.memoryMaxBytes", why=_no_controller("memory")))
        if limits and limits.cpu_max is not None and not self._can(cgroups.CPU):
            refused.append(Refusal(field="spec.run.limits.cpuMax", why=_no_controller("cpu")))
        return refused

    def footprint(self, key: str) -> dict[str, object]:
        serial = self._reserved[key] = self._launcher.reserve()
        group = self._launcher.group(serial)
        return {"cgroups": sorted(group.directories.values()) if group else []}

    def create(self, spec: CellSpec, *, key: str) -> LinuxCell:
        for refusal in self.refusals(spec):
            raise Unenforceable(field=refusal.field, why=refusal.why)
        if spec.run:
            check_argv(spec.run.argv)
        reserved = self._reserved.pop(key, None)
        try:
            cell = LinuxCell(self._launcher.clone(self._launcher.reserve() if reserved is None else reserved), self._settings.program)
        except LauncherError as error:
            raise explain(error.step, error.errno, error.text) from error
        try:
            cell.isolation = self._set_up(cell, spec)
        except BaseException as error:
            cell.destroy()
            if isinstance(error, OSError):
                raise HostBackendError(f"cannot set up the cell: {error.filename or 'out of resources'}: {error.strerror}") from error
            raise
        return cell

    def sweep(self, footprint: Mapping[str, object]) -> tuple[Residue, ...]:
        directories = footprint.get("cgroups", [])
        left = []
        deadline = time.monotonic() + TEARDOWN_SECONDS
        for directory in directories if isinstance(directories, list) else []:
            if os.path.isdir(directory):
                cgroups.kill_all(directory)
                reason = cgroups.remove(directory, deadline=deadline)
                if reason:
                    left.append(Residue(kind="cgroup", detail=f"{directory}: {reason}"))
        return tuple(left)

    def _can(self, controller: str) -> bool:
        return self._hierarchy is not None and controller in self._hierarchy.controllers

    def _limits(self, declared: Limits | None) -> tuple[dict[str, int], tuple[str, ...], cgroups.Limits]:
        """The limits that will really be applied, what stays unbounded, and what the control groups do of it."""
        limits = {
            "pids": DEFAULT_PIDS if self._can(cgroups.PIDS) else _at_most(resource.RLIMIT_NPROC, DEFAULT_PIDS),
            "workBytes": WORK_BYTES,
            "workInodes": WORK_INODES,
            "tmpBytes": TMP_BYTES,
            "tmpInodes": TMP_INODES,
            "shmBytes": SHM_BYTES,
            "openFiles": _at_most(resource.RLIMIT_NOFILE, OPEN_FILES),
            "fileBytes": _at_most(resource.RLIMIT_FSIZE, WORK_BYTES),
            "lockedBytes": _at_most(resource.RLIMIT_MEMLOCK, LOCKED_BYTES),
            "pendingSignals": _at_most(resource.RLIMIT_SIGPENDING, PENDING_SIGNALS),
            "inotifyInstances": INOTIFY_INSTANCES,
            "inotifyWatches": INOTIFY_WATCHES,
        }
        unbounded = []
        if _core_handler_would_start():
            unbounded.append("core")
        else:
            limits["coreBytes"] = 0
        memory = self._memory(declared.memory_max_bytes if declared else None)
        if memory:
            limits["memoryBytes"] = memory
            limits["swapBytes"] = 0
        else:
            unbounded.append("memory")
        quota, period = self._cpu(declared.cpu_max if declared else None)
        if quota:
            limits["cpuMicrosPerSecond"] = quota * 1_000_000 // period
        else:
            unbounded.append("cpu")
        group = cgroups.Limits(memory_bytes=memory, pids=limits["pids"], cpu_quota_micros=quota, cpu_period_micros=period)
        return limits, tuple(unbounded), group

    def _memory(self, declared: int | None) -> int | None:
        """Bytes, as the kernel counts; None where nothing limits."""
        wanted = next(value for value in (declared, self._settings.memory_bytes, DEFAULT_MEMORY_BYTES) if value is not None)
        if wanted == NO_LIMIT or not self._can(cgroups.MEMORY):
            return None
        return min(wanted, _MOST_MEMORY_BYTES) // _PAGE * _PAGE

    def _cpu(self, declared: CpuMax | None) -> tuple[int | None, int]:
        """Quota, None where nothing limits, and period, in microseconds."""
        settings = self._settings
        if declared:
            quota, period = declared.quota_micros, declared.period_micros or cgroups.DEFAULT_PERIOD_MICROS
        elif settings.cpu_quota_micros is not None:
            quota, period = settings.cpu_quota_micros, settings.cpu_period_micros
        else:
            quota, period = DEFAULT_CPU_MICROS_PER_SECOND * cgroups.DEFAULT_PERIOD_MICROS // 1_000_000, cgroups.DEFAULT_PERIOD_MICROS
        return (quota if quota != NO_LIMIT and self._can(cgroups.CPU) else None), period

    def _set_up(self, cell: LinuxCell, spec: CellSpec) -> Isolation:
        """Everything that this cell has of its own; returns what was applied."""
        limits, unbounded, group_limits = self._limits(spec.run.limits if spec.run else None)
        if cell.group:
            try:
                cell.group.limit(group_limits)
            except OSError as error:
                if error.errno == errno.EBUSY:  # version 1 does not take a memory limit below what is used
                    raise too_little_memory() from error
                raise
            if "swapBytes" in limits and not cell.group.limits_swap():
                del limits["swapBytes"]
                unbounded = (*unbounded, "swap")
        mounts = [(m.source, m.target or m.source) for m in spec.authority.filesystem.mounts] if spec.authority.filesystem else []
        trees = _open_trees(mounts) if mounts and os.geteuid() == 0 else []
        try:
            cell.prepare({"last_cap": self._last_cap, "limits": self._rlimits(limits), "mounts": mounts}, trees)
        finally:
            for tree in trees:
                os.close(tree)
        return Isolation(
            backend=self.kind,
            enforced=ENFORCED,
            limits=limits,
            unbounded=unbounded,
            security=read_status(cell.status, last_capability=self._last_cap),
            own_network=cell.has_own_network(),
        )

    def _rlimits(self, limits: Mapping[str, int]) -> dict[str, int]:
        rlimits = {
            "CORE": _at_most(resource.RLIMIT_CORE, 1),  # 0 would still start the host's core_pattern program, 1 does not (core(5))
            "NOFILE": limits["openFiles"],
            "FSIZE": limits["fileBytes"],
            "MEMLOCK": limits["lockedBytes"],
            "SIGPENDING": limits["pendingSignals"],
            "RTPRIO": 0,  # else who may have real-time processes (limits.conf) hands that on, and no limit of processor time holds them
            "NICE": 0,
        }
        if not self._can(cgroups.PIDS):
            rlimits["NPROC"] = limits["pids"]  # counted within the cell's own user namespace
        return rlimits


def start_launcher(environment: Mapping[str, str], *, ahead: int = 0, refill: bool = False) -> Launcher:
    """The process that makes cells, while it still loads; see `Launcher.start`. Raises HostBackendError."""
    if not sys.executable:
        raise HostBackendError(
            "cannot start the launcher: this Python does not know its own program; set sys.executable to a python3 of the same version"
        )
    try:
        return Launcher.start(ahead=ahead, refill=refill, cgroup_parent=environment.get(PARENT, "").strip())
    except OSError as error:
        raise no_launcher(error) from error


def no_launcher(error: OSError) -> HostBackendError:
    return HostBackendError(f"cannot start the launcher, {sys.executable}: {os_error_text(error)}; see `cellos doctor`")


def missing_primitives(launcher: Launcher) -> tuple[str, ...]:
    """Which of `unshare`, `seccomp` and `cgroup-v2` (limits of memory and processes, by either version) this host does not give us.

    Waits until the launcher has made the cell that the next run takes anyway: called just before that, it costs one message.
    Raises MissingPrimitive, HostBackendError, ConfigError where not even that can be tried.
    """
    try:
        return launcher.missing()
    except LauncherError as error:
        raise explain(error.step, error.errno, error.text) from error


def _no_controller(name: str) -> str:
    from cellos.sandbox.cures import OWN_GROUP

    return f"this host gives us no writable {name} control group; {OWN_GROUP}; or leave the limit out"


def _at_most(limit: int, value: int) -> int:
    """`value`, or our own hard limit where that is lower: nobody can raise it again."""
    _, hard = resource.getrlimit(limit)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _core_handler_would_start() -> bool:
    """Whether the host hands core dumps to a program or socket, and our own hard limit of 0, which nobody can raise to 1, lets it."""
    if _at_most(resource.RLIMIT_CORE, 1):
        return False
    with open("/proc/sys/kernel/core_pattern") as file:
        return file.read(1) in ("|", "@")


def refused_anywhere(spec: CellSpec) -> list[Refusal]:
    """What this backend enforces on no host."""
    refused = []
    for attribute, field, why in _NOT_ENFORCED:
        value: object = spec
        for name in attribute.split("."):
            value = getattr(value, name)
        if value:
            refused.append(Refusal(field=f"spec.{field}", why=why))
    mounts = spec.authority.filesystem.mounts if spec.authority.filesystem else ()
    if len(mounts) > MOST_MOUNTS:
        refused.append(Refusal(field="spec.authority.filesystem.mounts", why=f"{len(mounts)} are more than {MOST_MOUNTS}"))
    for index, mount in enumerate(mounts):
        if mount.mode != "ro":
            refused.append(Refusal(field=f"spec.authority.filesystem.mounts[{index}].mode", why="only read-only mounts are built yet"))
    cpu = spec.run and spec.run.limits and spec.run.limits.cpu_max
    return refused + (_cpu_refusals(cpu.quota_micros, cpu.period_micros) if cpu else [])


def _cpu_refusals(quota: int, period: int | None) -> list[Refusal]:
    """What the scheduler takes (sched-bwc): a period of 1 ms to 1 s, and a quota of 1 ms or more."""
    refused = []
    if quota < 1000:
        refused.append(Refusal(field="spec.run.limits.cpuMax.quotaMicros", why="the kernel takes 1000 or more"))
    if period is not None and not 1000 <= period <= 1_000_000:
        refused.append(Refusal(field="spec.run.limits.cpuMax.periodMicros", why="the kernel takes 1000 to 1000000"))
    return refused


def _open_trees(mounts: Sequence[tuple[str, str]]) -> list[int]:
    """Root opens the sources itself: inside, the cell's id may not even look them up."""
    from cellos.sandbox import syscalls

    trees: list[int] = []
    attributes = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    for index, (source, _) in enumerate(mounts):
        try:
            trees.append(syscalls.clone_tree(source, attributes))
        except OSError as error:
            for tree in trees:
                os.close(tree)
            raise HostBackendError(f"cannot mount {source} (authority.filesystem.mounts[{index}].source): {error.strerror}") from error
    return trees
