"""The launcher process: makes cells, and does nothing else. What it is for and its protocol stand in launcher.py."""

from __future__ import annotations

import _socket
import errno
import gc
import marshal
import os
import resource
import select
import time

from cellos.sandbox import cgroups, init, rootfs, seccomp, syscalls
from cellos.sandbox.descriptors import receive, send
from cellos.sandbox.hostids import HostId, HostIds
from cellos.sandbox.launcher import GROUP_PREFIX, HELD_NAMESPACES, LARGEST_PACKET, PARENT_STEP, group_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from typing import Any
else:
    import _signal  # `signal`, `socket` and `json` would double the time that this process takes to start

_CGROUP_REASONS = {errno.EACCES, errno.EBUSY, errno.ENODEV, errno.EOPNOTSUPP}
"""What clone3 answers when it may not place the child in a group; it has other words for namespaces."""
_GROUP_STEPS = {"make control group", "attach to control group"}
_TEARDOWN_SECONDS = 5.0
_FEW = 256
_BIRTH_WORD_BYTES = 64
_REAL_TIME = (os.SCHED_FIFO, os.SCHED_RR)
_OPEN_FILES_NEEDED = 128
"""Init moves its own above 100 while it clears the ones that a command gets."""


def serve(channel_descriptor: str, token: str, ahead: str, refill: str, cgroup_parent: str) -> None:
    """The launcher process: answer requests until the other end is closed. Does not return."""
    broken = _prepare(int(channel_descriptor))
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the kernel reaps our cells; the supervisor watches them through pidfds
    channel = _socket.socket(fileno=int(channel_descriptor))
    workshop = Workshop(f"{os.getpid()}-{token}", cgroup_parent, broken)
    shelf = Shelf(workshop, ahead=int(ahead), refill=bool(refill))
    gc.disable()
    gc.freeze()
    waiting = select.poll()
    waiting.register(channel.fileno(), select.POLLIN)
    while True:
        if shelf.has_room() and not waiting.poll(0):
            shelf.add()
            continue
        packet, _ = receive(channel, LARGEST_PACKET, 0)
        request: dict[str, Any] = marshal.loads(packet) if packet else {"died": True}  # noqa: S302  # from the supervisor
        if "died" in request or "bye" in request:
            shelf.clear()
            if "died" in request:
                workshop.clean_up_all()
            os._exit(0)
        try:
            if "hello" in request:
                channel.send(marshal.dumps(workshop.describe()))
                continue
            if "missing" in request:
                channel.send(marshal.dumps(workshop.missing(shelf.any())))
                continue
            if "returned" in request:
                workshop.clean_up(request["returned"])
                channel.send(marshal.dumps({}))
                continue
            made = shelf.take(request["serial"])
            try:
                send(channel, marshal.dumps(made.answer), made.passed())
            except BrokenPipeError:
                raise
            except OSError as error:  # ETOOMANYREFS: programs of our user, cells among them, hold too many that nobody has received
                workshop.undo(made)
                channel.send(marshal.dumps(_Failed("pass the cell's descriptors", error).answer()))
                continue
        except BrokenPipeError:
            continue  # the next read says the same
        workshop.hand_over(made)


def _prepare(channel: int) -> _Failed | None:
    """Hide this process, close what it inherited, drop its groups; what failed is the answer to every request."""
    os.chdir("/")
    step = "architecture"
    try:
        if not syscalls.architecture_fits():
            raise OSError(errno.ENOSYS, f"this is {os.uname().machine}")
        step = "open files"
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= hard < _OPEN_FILES_NEEDED:
            raise OSError(errno.EMFILE, f"{hard} open files are allowed, {_OPEN_FILES_NEEDED} are needed", "ulimit -n")
        # As many as we may: the kernel also compares it with the descriptors that wait in sockets of our user, those of cells among them.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        step = "set the scheduling class"
        if os.sched_getscheduler(0) in _REAL_TIME:  # which no limit of processor time holds, and no group of version 1 takes in
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        step = "set oom_score_adj"
        _give_up_protection("/proc/self/oom_score_adj")
        step = "hide the launcher"
        syscalls.set_dumpable(False)
        step = "close_range"
        syscalls.close_range(channel + 1)
        step = "map ids"
        if os.geteuid() == 0:
            os.setgroups([])  # inside the cell nobody can: setgroups is denied there
        step = "openat2"
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(syscalls.open_beneath(root, "."))  # a cell whose artifacts nobody could fetch is better not made
        os.close(root)
    except OSError as error:
        return _Failed(step, error)
    return None


def _give_up_protection(path: str) -> None:
    """A service that the kernel spares for want of memory (OOMScoreAdjust= of systemd) hands that on to its children. Cells are not spared:
    at -1000 the kernel ends none of their processes, and a cell at its memory limit would stand still.
    """
    with open(path) as file:
        spared = int(file.read()) < 0
    if spared:
        _write(path, "0")


class _Failed(Exception):
    def __init__(self, step: str, error: OSError) -> None:
        self.step = step
        self.errno = error.errno or 0
        self.text = syscalls.error_text(error, step)

    def answer(self) -> dict[str, object]:
        return {"failed": self.step, "errno": self.errno, "text": self.text}


class Made:
    """A cell that nobody has taken yet, or why there is none."""

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.answer: dict[str, object] = {}
        self.descriptors: list[int] = []
        self.host_id: HostId | None = None

    def passed(self) -> list[int]:
        """What the supervisor gets, in the order of the protocol."""
        return self.descriptors + ([self.host_id.descriptor] if self.host_id and self.descriptors else [])


class Shelf:
    """Cells that were made before anybody asked for them: `ahead` of them, and with `refill` another one for each that was taken."""

    def __init__(self, workshop: Workshop, *, ahead: int, refill: bool) -> None:
        self._workshop = workshop
        self._ahead = ahead
        self._refill = refill
        self._to_make = ahead
        self._made: dict[int, Made] = {}
        """By serial number."""
        self._next = 0

    def has_room(self) -> bool:
        return self._to_make > 0

    def add(self) -> Made:
        made = self._made[self._next] = self._workshop.make(self._next)
        self._next += 1
        self._to_make -= 1
        return made

    def any(self) -> Made:
        return next(iter(self._made.values()), None) or self.add()

    def take(self, serial: int) -> Made:
        """The cell of that number, made now if it was not. Who asked too early counts as well: a one-shot run needs no second cell."""
        made = self._made.pop(serial, None) or self._workshop.make(serial)
        self._next = max(self._next, serial + 1)
        self._drop(below=serial - self._ahead)
        self._to_make = self._ahead - len(self._made) if self._refill else min(self._to_make, self._ahead - self._next)
        return made

    def _drop(self, below: int) -> None:
        """Put away those whose run ended before it had a cell: so long after the others nobody comes for them."""
        for serial in [serial for serial in self._made if serial < below]:
            self._workshop.undo(self._made.pop(serial))

    def clear(self) -> None:
        for made in self._made.values():
            self._workshop.undo(made)


class Workshop:
    """Where cells are made, in the launcher process."""

    def __init__(self, token: str, cgroup_parent: str, broken: _Failed | None) -> None:
        self._token = token
        self._broken = broken
        self._program = seccomp.program()
        self._host_ids = HostIds() if os.geteuid() == 0 else None
        self._hierarchy: cgroups.Hierarchy | None = None
        try:
            self._hierarchy = cgroups.discover(parent=cgroup_parent or None, ours=frozenset({os.getpid(), os.getppid()}))
        except OSError as error:
            self._broken = broken or _Failed(PARENT_STEP, error)
        self._handed_over: dict[int, int | None] = {}
        """Serial number to host id of cells that may still be there."""
        self._look_again_at = _FEW
        if self._hierarchy:
            cgroups.remove_abandoned(self._hierarchy, GROUP_PREFIX)
        if self._host_ids:
            self._host_ids.remove_abandoned()

    def describe(self) -> dict[str, object]:
        if self._broken:
            return self._broken.answer()
        if self._hierarchy is None:
            return {"version": 0}
        hierarchy = self._hierarchy
        return {"version": hierarchy.version, "parents": hierarchy.parents, "controllers": sorted(hierarchy.controllers)}

    def missing(self, tried: Made) -> dict[str, object]:
        """What this host lacks, after an attempt to make a cell."""
        if self._broken:
            return self._broken.answer()
        failed = tried.answer.get("failed")
        controllers = self._hierarchy.controllers if self._hierarchy else frozenset()
        lacks = {
            "unshare": failed is not None and failed not in _GROUP_STEPS,
            "seccomp": not seccomp.is_available(),
            "cgroup-v2": failed in _GROUP_STEPS or not controllers >= {cgroups.MEMORY, cgroups.PIDS},
        }
        return {"missing": [primitive for primitive, lacking in lacks.items() if lacking]}

    def make(self, serial: int) -> Made:
        """Groups, id, clone, maps; a failure is part of what is returned, and leaves nothing."""
        made = Made(serial)
        group = self._group(serial)
        step = ["prepare the clone"]
        try:
            if self._broken:
                raise self._broken
            if group:
                step[0] = "make control group"
                group.create()
            if self._host_ids:
                step[0] = "take a host id"
                made.host_id = self._host_ids.acquire()
            self._clone(made, group, step)
            made.answer["host_id"] = made.host_id.number if made.host_id else None
        except (_Failed, OSError) as error:
            failure = error if isinstance(error, _Failed) else _Failed(step[0], error)
            self.undo(made)
            made.answer = failure.answer()
        return made

    def _clone(self, made: Made, group: cgroups.Group | None, step: list[str]) -> None:
        flags = (
            syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET
            | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP
        )  # fmt: skip
        birth = group.birth_directory() if group else None
        to_join = group.join_paths() if group else []
        cgroup = os.open(birth, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if birth else -1
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        birth_talk, their_birth_talk = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
        joins: list[int] = []
        try:
            step[0] = "attach to control group"
            for path in to_join:
                joins.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))  # noqa: PERF401  # each is closed, should the next one fail
            step[0] = "clone3"
            syscalls.set_dumpable(True)  # else the child's files in /proc are only for CAP_SYS_PTRACE, and we could not write its maps
            pid, pidfd = syscalls.clone3(flags, cgroup=cgroup)
            if pid == 0:
                try:
                    init.run(theirs.fileno(), their_birth_talk.fileno(), joins, program=self._program)
                finally:
                    os._exit(1)
            made.answer["pid"] = pid
            made.descriptors += [pidfd, ours.detach()]
            step[0] = "map ids"
            uid, gid = (made.host_id.number,) * 2 if made.host_id else (os.geteuid(), os.getegid())
            for name, text in (("setgroups", "deny"), ("uid_map", f"{rootfs.CELL_ID} {uid} 1"), ("gid_map", f"{rootfs.CELL_ID} {gid} 1")):
                _write(f"/proc/{pid}/{name}", text)
            for name in HELD_NAMESPACES:  # one by one, so that those that were opened are closed when the next one fails
                made.descriptors.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
            step[0] = "attach to control group"
            their_birth_talk.close()
            word = birth_talk.recv(_BIRTH_WORD_BYTES)
            if word != init.JOINED:
                at, number = marshal.loads(word) if word else (0, errno.ECHILD)  # noqa: S302  # from our fork, before anything else
                raise OSError(number, os.strerror(number), to_join[at] if to_join else None)
            birth_talk.send(init.GO)
        except OSError as error:
            if step[0] == "clone3" and cgroup >= 0 and error.errno in _CGROUP_REASONS:
                step[0] = "attach to control group"
            raise
        finally:
            syscalls.set_dumpable(False)
            for socket in (ours, theirs, birth_talk, their_birth_talk):  # not told to go on, the child ends by itself
                socket.close()
            for descriptor in (*joins, cgroup):
                if descriptor >= 0:
                    os.close(descriptor)

    def _group(self, serial: int) -> cgroups.Group | None:
        return cgroups.Group(self._hierarchy, group_name(self._token, serial)) if self._hierarchy else None

    def hand_over(self, made: Made) -> None:
        """The supervisor has it; our copies of the descriptors go."""
        if not made.descriptors:
            return
        for descriptor in made.passed():
            os.close(descriptor)
        self._handed_over[made.serial] = made.host_id.number if made.host_id else None
        if len(self._handed_over) > self._look_again_at:
            self._handed_over = {serial: number for serial, number in self._handed_over.items() if self._is_there(serial, number)}
            self._look_again_at = max(_FEW, 2 * len(self._handed_over))

    def _is_there(self, serial: int, number: int | None) -> bool:
        group = self._group(serial)
        by_group = group is not None and any(os.path.isdir(directory) for directory in group.directories.values())
        return by_group or (number is not None and self._host_ids is not None and self._host_ids.exists(number))

    def clean_up_all(self) -> None:
        """The supervisor was killed, so its cells are ending now: remove their groups and ids."""
        deadline = time.monotonic() + _TEARDOWN_SECONDS
        for serial in self._handed_over:
            self.clean_up(serial, deadline=deadline)

    def clean_up(self, serial: int, *, deadline: float | None = None) -> None:
        """A cell that was handed over has lost its supervisor, and so its life: remove its groups and its id."""
        deadline = deadline or time.monotonic() + _TEARDOWN_SECONDS
        group, number = self._group(serial), self._handed_over[serial]
        if group:
            group.kill()
        for directory in group.directories.values() if group else ():
            cgroups.remove(directory, deadline=deadline)
        if number is not None and self._host_ids:
            self._host_ids.remove_if_free(number)

    def undo(self, made: Made) -> None:
        """Remove what was made of a cell that nobody took; its init ends with its control socket."""
        deadline = time.monotonic() + _TEARDOWN_SECONDS
        group = self._group(made.serial)
        if made.descriptors:
            pidfd, *others = made.descriptors
            for descriptor in others:
                os.close(descriptor)
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            ended.poll(int(_TEARDOWN_SECONDS * 1000))
            os.close(pidfd)
            made.descriptors = []
        for directory in group.directories.values() if group else ():
            cgroups.remove(directory, deadline=deadline)
        if made.host_id:
            made.host_id.release()
            made.host_id = None


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
