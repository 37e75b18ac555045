"""The Linux backend: a cell is a process tree in seven namespaces of its own, on a root of its own, with nothing to gain.

The order of things, and what each layer is for, is told in docs/explanation/isolation.md. This module owns the descriptors of a cell:
the pidfd of its init, the control socket that is also its lifeline, and the mount of its work directory.
"""

from __future__ import annotations

import _socket
import errno
import io
import json
import os
import resource
import select
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from cellos.backends.relay import Relay
from cellos.errors import ArgvTooLarge, ExportError, HostBackendError, MissingPrimitive, Unenforceable
from cellos.ports import Command, CommandResult, Isolation, Refusal, Residue
from cellos.sandbox import cgroups, seccomp, syscalls
from cellos.sandbox import residue as remains
from cellos.sandbox.cures import OWN_GROUP, cure
from cellos.sandbox.descriptors import receive, send
from cellos.sandbox.launcher import Cloned, Launcher, LauncherError
from cellos.sandbox.rootfs import SHM_BYTES, TMP_BYTES, TMP_INODES, WORK_BYTES, WORK_INODES

if TYPE_CHECKING:
    from cellos.core.documents import CellSpec, Limits
    from cellos.sandbox.messages import InitRequest

MIB = 1 << 20
DEFAULT_MEMORY_BYTES = 512 * MIB
DEFAULT_PIDS = 256
DEFAULT_CPU_MICROS_PER_SECOND = 1_000_000
OPEN_FILES = 4096
MOST_MOUNTS = 240
"""Root hands each to init as a descriptor, and the kernel passes 253 at once."""
LOCKED_BYTES = 65536
LARGEST_ARGUMENT = 131071
"""Bytes of one argument that execve takes, without its NUL (MAX_ARG_STRLEN of execve(2))."""

ENFORCED = (
    "user-namespace", "pid-namespace", "mount-namespace", "network-namespace", "ipc-namespace", "uts-namespace", "cgroup-namespace",
    "private-root", "no-network", "no-capabilities", "no-new-privileges", "landlock", "seccomp",
)  # fmt: skip

_TEARDOWN_SECONDS = 5.0
_START_REPORT_MILLISECONDS = 100
_PAGE = resource.getpagesize()
_MOST_MEMORY_BYTES = (1 << 63) - 1
_NOT_ENFORCED = (
    ("authority.egress_rules", "authority.egressRules", "egress is not built yet; without rules the cell has no network"),
    ("authority.dns_authority", "authority.dnsAuthority", "egress is not built yet"),
    ("authority.cdn_authority", "authority.cdnAuthority", "egress is not built yet"),
    ("ingress", "ingress", "nothing is fetched into a cell; mount it with authority.filesystem"),
    ("environment", "environment", "the linux backend runs the host's /usr, not an image"),
    ("telemetry", "telemetry", "no telemetry agent is built yet"),
)


class LinuxBackend:
    """Cells on this host's kernel. Thread-safe. Needs a started `launcher`, and waits for it. Raises MissingPrimitive, HostBackendError."""

    kind = "linux"

    def __init__(self, *, launcher: Launcher) -> None:
        self._launcher = launcher
        try:
            self._hierarchy = launcher.hierarchy()
        except LauncherError as error:
            raise _explain(error.step, error.errno, error.text) from error
        try:
            with open("/proc/sys/kernel/cap_last_cap") as file:
                self._last_cap = int(file.read())
        except OSError as error:
            raise HostBackendError(f"cannot ask the kernel for its capabilities: {error.filename}: {error.strerror}") from error
        _require_openat2()
        self._program = seccomp.program().hex()
        self._reserved: dict[str, int] = {}

    def refusals(self, spec: CellSpec) -> Sequence[Refusal]:
        refused = []
        for attribute, field, why in _NOT_ENFORCED:
            value: object = spec
            for name in attribute.split("."):
                value = getattr(value, name)
            if value:
                refused.append(Refusal(field=f"spec.{field}", why=why))
        limits = spec.run.limits if spec.run else None
        mounts = spec.authority.filesystem.mounts if spec.authority.filesystem else ()
        if len(mounts) > MOST_MOUNTS:
            refused.append(Refusal(field="spec.authority.filesystem.mounts", why=f"{len(mounts)} are more than {MOST_MOUNTS}"))
        for index, mount in enumerate(mounts):
            if mount.mode != "ro":
                refused.append(Refusal(field=f"spec.authority.filesystem.mounts[{index}].mode", why="only read-only mounts are built yet"))
        if limits and limits.memory_max_bytes is not None and not self._can(cgroups.MEMORY):
            refused.append(Refusal(field="spec.run.limits.memoryMaxBytes", why=_no_controller("memory")))
        if limits and limits.cpu_max is not None and not self._can(cgroups.CPU):
            refused.append(Refusal(field="spec.run.limits.cpuMax", why=_no_controller("cpu")))
        elif limits and limits.cpu_max is not None:
            refused += _cpu_refusals(limits.cpu_max.quota_micros, limits.cpu_max.period_micros)
        return refused

    def footprint(self, key: str) -> dict[str, object]:
        serial = self._reserved[key] = self._launcher.reserve()
        group = self._launcher.group(serial)
        return {"cgroups": sorted(group.directories.values()) if group else []}

    def create(self, spec: CellSpec, *, key: str) -> LinuxCell:
        for refusal in self.refusals(spec):
            raise Unenforceable(field=refusal.field, why=refusal.why)
        if spec.run:
            _check_argv(spec.run.argv)
        reserved = self._reserved.pop(key, None)
        try:
            cell = LinuxCell(self._launcher.clone(self._launcher.reserve() if reserved is None else reserved))
        except LauncherError as error:
            raise _explain(error.step, error.errno, error.text) from error
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
        deadline = time.monotonic() + _TEARDOWN_SECONDS
        for directory in directories if isinstance(directories, list) else []:
            if os.path.isdir(directory):
                cgroups.kill_all(directory)
                reason = cgroups.remove(directory, deadline=deadline)
                if reason:
                    left.append(Residue(kind="cgroup", detail=f"{directory}: {reason}"))
        return tuple(left)

    def _can(self, controller: str) -> bool:
        return self._hierarchy is not None and controller in self._hierarchy.controllers

    def _limits(self, declared: Limits | None) -> tuple[dict[str, int], tuple[str, ...]]:
        """The limits that will really be applied, and what stays unbounded."""
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
        }
        unbounded = []
        if _core_handler_would_start():
            unbounded.append("core")
        else:
            limits["coreBytes"] = 0
        if self._can(cgroups.MEMORY):
            wanted = declared.memory_max_bytes if declared and declared.memory_max_bytes else DEFAULT_MEMORY_BYTES
            limits["memoryBytes"] = min(wanted, _MOST_MEMORY_BYTES) // _PAGE * _PAGE  # as the kernel counts
            limits["swapBytes"] = 0
        else:
            unbounded.append("memory")
        if self._can(cgroups.CPU):
            cpu = declared.cpu_max if declared else None
            period = (cpu.period_micros if cpu else None) or cgroups.DEFAULT_PERIOD_MICROS
            limits["cpuMicrosPerSecond"] = cpu.quota_micros * 1_000_000 // period if cpu else DEFAULT_CPU_MICROS_PER_SECOND
        else:
            unbounded.append("cpu")
        return limits, tuple(unbounded)

    def _set_up(self, cell: LinuxCell, spec: CellSpec) -> Isolation:
        """Everything that this cell has of its own; returns what was applied."""
        limits, unbounded = self._limits(spec.run.limits if spec.run else None)
        if cell.group:
            cpu = spec.run.limits.cpu_max if spec.run and spec.run.limits else None
            try:
                _limit_group(cell.group, limits, cpu.quota_micros if cpu else None, cpu.period_micros if cpu else None)
            except OSError as error:
                if error.errno == errno.EBUSY:  # version 1 does not take a memory limit below what is used
                    raise _too_little_memory() from error
                raise
            if cgroups.MEMORY in cell.group.hierarchy.controllers and not cell.group.limits_swap():
                del limits["swapBytes"]
                unbounded = (*unbounded, "swap")
        mounts = [(m.source, m.target or m.source) for m in spec.authority.filesystem.mounts] if spec.authority.filesystem else []
        trees = _open_trees(mounts) if os.geteuid() == 0 else []
        try:
            cell.prepare({"last_cap": self._last_cap, "limits": self._rlimits(limits), "mounts": mounts, "program": self._program}, trees)
        finally:
            for tree in trees:
                os.close(tree)
        return Isolation(backend=self.kind, enforced=ENFORCED, limits=limits, unbounded=unbounded)

    def _rlimits(self, limits: Mapping[str, int]) -> dict[str, int]:
        rlimits = {
            "CORE": _at_most(resource.RLIMIT_CORE, 1),  # 0 would still start the host's core_pattern program, 1 does not (core(5))
            "NOFILE": limits["openFiles"],
            "FSIZE": limits["fileBytes"],
            "MEMLOCK": limits["lockedBytes"],
        }
        if not self._can(cgroups.PIDS):
            rlimits["NPROC"] = limits["pids"]  # counted within the cell's own user namespace
        return rlimits


class LinuxCell:
    """One cell from its clone to the residue check. Owned by one thread."""

    def __init__(self, cloned: Cloned) -> None:
        self.isolation = Isolation(backend=LinuxBackend.kind)
        self.group = cloned.group
        self.cloned: Cloned | None = cloned
        self.control_socket: _socket.socket | None = _socket.socket(fileno=cloned.control)
        self.ids = (cloned.host_id.number, cloned.host_id.number) if cloned.host_id else (os.geteuid(), os.getegid())
        self.work: int | None = None
        self._identities: remains.Identities = {}
        self._messages: list[dict[str, Any]] = []
        self._buffer = b""
        self._commanded = False
        self._on_started: Callable[[], None] = lambda: None
        self._remember("control socket", cloned.control)

    # -- the control socket

    def prepare(self, request: InitRequest, trees: list[int]) -> None:
        """Tell init what this cell has of its own, and wait until it is built and confined. Raises HostBackendError."""
        assert self.control_socket is not None
        try:
            _signal(self.pidfd, 0)
        except ProcessLookupError:
            pass  # it has just ended; why is told next
        except OSError as error:
            raise _explain("pidfd_send_signal", error.errno or 0, error.strerror or str(error)) from error
        self.control_socket.settimeout(_TEARDOWN_SECONDS)
        message: dict[str, Any] | None = None
        try:
            try:
                self._send(json.dumps(request).encode() + b"\n", trees)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has ended, and its last words are there to be read
            while message is None:
                data, descriptors = receive(self.control_socket, 4096, 1)
                if descriptors:
                    self.work = descriptors[0]
                    self._remember("work directory", self.work)
                if not data:
                    raise self._ended_early()
                self._buffer += data
                message = self._next_message()
        except TimeoutError:
            raise HostBackendError("the cell's init did not answer within 5 s") from None
        except ConnectionResetError:
            raise self._ended_early() from None
        if "failed" in message:
            raise _explain(message["failed"], message["errno"], message["text"])
        if self.work is None:
            raise HostBackendError("cannot take the cell's work directory: this process has too many open files")

    def _send(self, data: bytes, descriptors: list[int]) -> None:
        """A line with descriptors, in as many pieces as it takes. Raises OSError."""
        assert self.control_socket is not None
        sent = send(self.control_socket, data, descriptors)
        if sent < len(data):  # an empty send to a command that has already ended would be EPIPE
            self.control_socket.sendall(data[sent:])

    def _ended_early(self) -> HostBackendError:
        if self.group and self.group.out_of_memory_kills():
            return _too_little_memory()
        return HostBackendError("the cell's init ended while it built the cell")

    def _next_message(self) -> dict[str, Any] | None:
        if b"\n" not in self._buffer:
            return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _remember(self, name: str, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._identities[(status.st_dev, status.st_ino)] = name

    # -- relay.Process

    @property
    def pidfd(self) -> int:
        assert self.cloned is not None
        return self.cloned.pidfd

    @property
    def control(self) -> int | None:
        return self.control_socket.fileno() if self.control_socket else None

    def on_control(self) -> None:
        assert self.control_socket is not None
        try:
            data = self.control_socket.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._close_control()
            return
        self._buffer += data
        while (message := self._next_message()) is not None:
            self._messages.append(message)
            if "started" in message:
                self._on_started()

    def terminate(self) -> None:
        if self.control_socket:
            try:
                self.control_socket.sendall(b'{"terminate": true}\n')
            except BrokenPipeError:
                return  # it has just ended

    def ended(self) -> None:
        """The kernel has ended everything with process 1."""

    def kill(self) -> None:
        self._hear_of_the_start()
        if self.cloned:
            try:
                _signal(self.cloned.pidfd, 9)
            except ProcessLookupError:
                return
            except OSError:
                self._close_control()  # its end is also the end of init

    def _hear_of_the_start(self) -> None:
        """A command that is killed right after its start did start: give init the moment that it needs to say so."""
        if self._commanded and not self._messages and self.control_socket:
            poll = select.poll()
            poll.register(self.control_socket, select.POLLIN)
            if poll.poll(_START_REPORT_MILLISECONDS):
                self.on_control()

    # -- ports.LiveCell

    def run(self, command: Command, *, on_started: Callable[[], None]) -> CommandResult:
        _check_argv(command.argv)
        if self.control_socket is None or self.cloned is None:
            raise HostBackendError("the cell is gone")
        self._on_started = on_started
        request = {"argv": list(command.argv), "env": dict(command.environment), "cwd": command.working_directory or "/work"}
        started = time.monotonic()
        with Relay(command) as relay:
            for descriptor in relay.child_ends:
                os.fchown(descriptor, *self.ids)  # else the cell could not open /dev/stdout by name
            try:
                self._send(json.dumps(request).encode() + b"\n", relay.child_ends)
            except OSError as error:
                raise HostBackendError(f"cannot hand the command to the cell: {error.strerror or error}") from error
            self._commanded = True
            self.control_socket.setblocking(False)
            relay.release_child_ends()
            try:
                ended = relay.watch(self, started=started, drain_seconds=None)
            except BaseException:
                self.kill()
                raise
            stdout, stderr, truncated = relay.captured
        return self._result(ended, round((time.monotonic() - started) * 1000), stdout, stderr, truncated)

    def _result(self, ended: str, duration_ms: int, stdout: bytes, stderr: bytes, truncated: bool) -> CommandResult:
        answer: dict[str, Any] = {}
        for message in self._messages:
            answer |= message
        out_of_memory = bool(self.group and self.group.out_of_memory_kills())
        exit_code = signal = spawn_error = spawn_errno = None
        if "not_started" in answer:
            spawn_errno = answer["not_started"]
            what = "spec.run.workingDirectory: " if answer["step"] == "chdir" else ""
            spawn_error = f"{what}{os.strerror(spawn_errno)} (os error {spawn_errno})"
        elif "exited" in answer:
            exit_code = answer["exited"] if answer["exited"] >= 0 else None
            signal = -answer["exited"] if answer["exited"] < 0 else None
        elif ended == "exited":
            # Init died before it could report: killed with the whole cell, which only the kernel does.
            ended = "exited" if out_of_memory else "lost"
            signal = 9 if out_of_memory else None
        else:
            signal = 9  # we killed the tree
        return CommandResult(
            ended=ended,  # type: ignore[arg-type]  # one of the four words
            exit_code=exit_code,
            signal=signal,
            spawn_error=spawn_error,
            spawn_errno=spawn_errno,
            duration_ms=duration_ms,
            stdout=stdout,
            stderr=stderr,
            truncated=truncated,
            oom_killed=out_of_memory,
        )

    def open_artifact(self, path: str) -> BinaryIO:
        relative = path.removeprefix("/work/") if path.startswith("/work/") else path
        if self.work is None:
            raise ExportError(f"{path}: the cell has no work directory")
        # The descriptor of the mount only names it; opening "." through it gives one that openat2 starts from.
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.work)
        try:
            descriptor = syscalls.open_beneath(directory, relative)
        except OSError as error:
            raise ExportError(f"{path}: {_EXPORT_REASONS.get(error.errno or 0, error.strerror)}") from error
        finally:
            os.close(directory)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ExportError(f"{path}: not a regular file")
        return io.open(descriptor, "rb")  # noqa: UP020  # `open` would read as os.open here

    def destroy(self) -> tuple[Residue, ...]:
        if self.cloned is None:
            return ()
        deadline = time.monotonic() + _TEARDOWN_SECONDS
        left: list[Residue] = []
        self.kill()
        if not _wait_for_end(self.pidfd, deadline):
            left.append(Residue(kind="process", detail=f"pid {self.cloned.pid} did not end within 5 s of SIGKILL"))
        self._close_control()
        os.close(self.pidfd)
        left += self._look()
        for descriptor in [*self.cloned.namespaces.values(), *([] if self.work is None else [self.work])]:
            os.close(descriptor)
        for directory in self.group.directories.values() if self.group else ():
            reason = cgroups.remove(directory, deadline=deadline)
            if reason:
                left.append(Residue(kind="cgroup", detail=f"{directory}: {reason}"))
        problem = self.cloned.host_id.release() if self.cloned.host_id else None
        if problem:
            left.append(Residue(kind="file", detail=problem))
        self.cloned = self.work = None
        return tuple(left)

    def _look(self) -> list[Residue]:
        """What is still there besides the descriptors that we close next.

        They are held until then: the kernel gives the numbers of a namespace or mount that is gone to the next cell, which would then be
        taken for the remains of this one. The two that were closed before make room for the look, where a process has no more.
        """
        assert self.cloned is not None
        ours = {*self.cloned.namespaces.values(), *([] if self.work is None else [self.work])}
        try:
            return [Residue(kind=kind, detail=detail) for kind, detail in remains.look(self.cloned.namespaces, self._identities, ours=ours)]
        except OSError as error:
            return [Residue(kind="process", detail=f"cannot look for processes that stayed: {error.strerror}")]

    def _close_control(self) -> None:
        if self.control_socket:
            self.control_socket.close()
            self.control_socket = None


_EXPORT_REASONS = {
    errno.ENOENT: "no such file in the work directory",
    errno.ELOOP: "symbolic links are not followed",
    errno.EXDEV: "it lies outside the work directory",
    errno.ENXIO: "not a regular file",
    errno.EACCES: "permission denied",
}


def _signal(pidfd: int, number: int) -> None:
    import signal

    signal.pidfd_send_signal(pidfd, number)


def _wait_for_end(pidfd: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, round((deadline - time.monotonic()) * 1000))))


def _no_controller(name: str) -> str:
    return f"this host gives us no writable {name} control group; {OWN_GROUP}; or leave the limit out"


def _too_little_memory() -> HostBackendError:
    return HostBackendError("the memory limit (spec.run.limits.memoryMaxBytes) is too small to build the cell in; 16 MiB are enough")


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


def _cpu_refusals(quota: int, period: int | None) -> list[Refusal]:
    """What the scheduler takes (sched-bwc): a period of 1 ms to 1 s, and a quota of 1 ms or more."""
    refused = []
    if quota < 1000:
        refused.append(Refusal(field="spec.run.limits.cpuMax.quotaMicros", why="the kernel takes 1000 or more"))
    if period is not None and not 1000 <= period <= 1_000_000:
        refused.append(Refusal(field="spec.run.limits.cpuMax.periodMicros", why="the kernel takes 1000 to 1000000"))
    return refused


def _check_argv(argv: Sequence[str]) -> None:
    for argument in argv:
        size = len(os.fsencode(argument))
        if size > LARGEST_ARGUMENT:
            raise ArgvTooLarge(encoded_bytes=size, limit_bytes=LARGEST_ARGUMENT)


def _limit_group(group: cgroups.Group, limits: Mapping[str, int], quota: int | None, period: int | None) -> None:
    group.limit(
        cgroups.Limits(
            memory_bytes=limits.get("memoryBytes"),
            pids=limits["pids"],
            cpu_quota_micros=quota or limits.get("cpuMicrosPerSecond", 0) * cgroups.DEFAULT_PERIOD_MICROS // 1_000_000 or None,
            cpu_period_micros=period or cgroups.DEFAULT_PERIOD_MICROS,
        )
    )


def _open_trees(mounts: Sequence[tuple[str, str]]) -> list[int]:
    """Root opens the sources itself: inside, the cell's id may not even look them up."""
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


def _require_openat2() -> None:
    """A cell whose artifacts nobody could fetch is better not run."""
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(syscalls.open_beneath(root, "."))
    except OSError as error:
        raise _explain("openat2", error.errno or 0, error.strerror or str(error)) from error
    finally:
        os.close(root)


def _explain(step: str, number: int, text: str) -> HostBackendError:
    """A failed step as an error that says what to do about it, where that is known."""
    remedy = cure(step, number)
    if remedy:
        return MissingPrimitive(primitive=step, why=text, cure=remedy)
    return HostBackendError(f"cannot {step}: {text}")
