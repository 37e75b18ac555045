"""The launcher: the only process that makes cells.

It has one thread, no secrets and few modules: clone3 in a process with threads can hang in the child, what is in its memory is copied into
every init, and its size is paid for at every fork. So it is a fresh interpreter (`python -I -S`) with an empty environment, started before
or beside anything else the supervisor does. One serves any number of cells and threads; it ends when its supervisor does, and if that died
it first removes the groups and ids of the cells that died with it.

Nothing that a document says comes here: a cell is cloned, mapped and put into its groups, and gets everything else from the supervisor over
its control socket. That is why one can be made ahead, while the supervisor still reads the document (or runs the cell before).

A request and its answer are one packet each, on a SEQPACKET socket:
    {"hello": true}    {"version": 0, 1 or 2, "parents": {…}, "controllers": […]}
    {"serial": n}      {"pid": n, "host_id": n or null} with the pidfd, the control socket, a descriptor of each of HELD_NAMESPACES and the
                       lock on the host id, if there is one | {"failed": step, "errno": n, "text": …}
    {"bye": true}      none: the supervisor ends as it should, and removes what is its own
"""

from __future__ import annotations

import _thread
import errno
import os
import sys

from cellos.sandbox import cgroups
from cellos.sandbox.hostids import HostId, HostIds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HELD_NAMESPACES = ("user", "pid", "mnt", "net")
"""Those that a process, a mount or a descriptor could keep alive by itself; the other three belong to the same user namespace."""
_CHANNEL = 3
_LARGEST_PACKET = 1 << 14
_CGROUP_REASONS = {errno.EACCES, errno.EBUSY, errno.ENODEV, errno.EOPNOTSUPP}
"""What clone3 answers when it may not place the child in a group; it has other words for namespaces."""
_GROUP_PREFIX = "cellos-"
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from cellos.sandbox.launcher import serve; serve(*sys.argv[2:])"
_TEARDOWN_SECONDS = 5.0
_MOST_REMEMBERED = 256


class LauncherError(Exception):
    """A cell could not be cloned. `step` names what failed; `errno` is the kernel's."""

    def __init__(self, step: str, errno: int, text: str) -> None:
        super().__init__(f"{step}: {text}")
        self.step = step
        self.errno = errno
        self.text = text


class Cloned:
    """A cell that has its namespaces, ids and groups, and whose init waits at `control`. The owner closes every descriptor here."""

    __slots__ = ("control", "group", "host_id", "namespaces", "pid", "pidfd")

    def __init__(
        self, *, pid: int, pidfd: int, control: int, namespaces: dict[str, int], host_id: HostId | None, group: cgroups.Group | None
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.control = control
        self.namespaces = namespaces
        """Name to descriptor. Held until somebody has looked for what stayed: while they are open no other namespace gets their number."""
        self.host_id = host_id
        self.group = group
        """Its groups, still without limits."""


class Launcher:
    """Our end. Thread-safe; close it, or use `with`."""

    def __init__(self, channel: int, pid: int, token: str) -> None:
        self._channel = channel
        self._token = token
        self._lock = _thread.allocate_lock()
        self._serial = 0
        self._hierarchy: cgroups.Hierarchy | None = None
        self._said_hello = False
        self.pid = pid

    @classmethod
    def start(cls, *, ahead: int = 0, cgroup_parent: str = "") -> Launcher:
        """Start the process; returns at once, while it is still loading. Raises OSError.

        `ahead`: how many cells it may make before they are asked for, one at a time; what is never asked for goes when we close.
        `cgroup_parent`: directory of control group version 2 that is ours to use, instead of our own.
        """
        import _socket  # the C module alone: it is all we need, and `socket` costs 3 ms that the launcher's start would wait for

        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        token = os.urandom(4).hex()
        actions: list[tuple[int, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),  # type: ignore[list-item]  # file actions mix types
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),  # type: ignore[list-item]  # file actions mix types
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _CHANNEL),
        ]
        argv = [sys.executable, "-I", "-S", "-c", _BOOT, package, str(_CHANNEL), token, str(ahead), cgroup_parent]
        try:
            pid = os.posix_spawn(sys.executable, argv, {}, file_actions=actions, setsid=True)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(ours.detach(), pid, f"{pid}-{token}")

    def hierarchy(self) -> cgroups.Hierarchy | None:
        """The control groups that cells get, None where there are none. Waits until the launcher is there. Raises LauncherError."""
        if not self._said_hello:
            answer, _ = self._ask({"hello": True}, 0)
            if answer["version"]:
                self._hierarchy = cgroups.Hierarchy(
                    version=answer["version"], parents=answer["parents"], controllers=frozenset(answer["controllers"])
                )
            self._said_hello = True
        return self._hierarchy

    def reserve(self) -> int:
        """The serial number of a cell to come, for `group` and `clone`."""
        with self._lock:
            serial, self._serial = self._serial, self._serial + 1
        return serial

    def group(self, serial: int) -> cgroups.Group | None:
        """The control groups of a cell that exists or is to come."""
        hierarchy = self.hierarchy()
        return cgroups.Group(hierarchy, _group_name(self._token, serial)) if hierarchy else None

    def clone(self, serial: int) -> Cloned:
        """The cell of that number, made ahead or now. Raises LauncherError; then nothing of it is left."""
        group = self.group(serial)
        answer, passed = self._ask({"serial": serial}, 3 + len(HELD_NAMESPACES))
        pidfd, control, *rest = passed
        namespaces = dict(zip(HELD_NAMESPACES, rest, strict=False))
        host_id = HostId(answer["host_id"], rest[-1]) if answer["host_id"] else None
        return Cloned(pid=answer["pid"], pidfd=pidfd, control=control, namespaces=namespaces, host_id=host_id, group=group)

    def _ask(self, request: dict[str, object], most: int) -> tuple[dict[str, Any], list[int]]:
        """One request and its answer, with up to `most` descriptors."""
        import json
        import socket

        from cellos.sandbox.descriptors import receive

        with self._lock:
            if self._channel < 0:
                raise LauncherError("ask the launcher", 0, "it was closed")
            channel = socket.socket(fileno=self._channel)
            try:
                channel.send(json.dumps(request).encode())
                data, passed = receive(channel, _LARGEST_PACKET, most)
            except (BrokenPipeError, ConnectionResetError):
                data = b""
            except OSError as error:
                raise LauncherError("ask the launcher", error.errno or 0, error.strerror or str(error)) from error
            finally:
                channel.detach()
        if not data:
            raise LauncherError("ask the launcher", 0, f"it has ended (pid {self.pid}); no cell can be made any more")
        answer: dict[str, Any] = json.loads(data)
        if "failed" in answer:
            raise LauncherError(answer["failed"], answer["errno"], answer["text"])
        return answer, passed

    def close(self) -> None:
        """End the process and reap it. Cells that live go on: their lifeline is the supervisor."""
        with self._lock:
            if self._channel < 0:
                return
            try:
                os.write(self._channel, b'{"bye": true}')
            except BrokenPipeError:
                pass  # it was killed
            os.close(self._channel)
            self._channel = -1
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            return  # somebody in our process reaps all children

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(channel_descriptor: str, token: str, ahead: str, cgroup_parent: str) -> None:
    """The launcher process: answer requests until the other end is closed. Does not return."""
    import gc
    import json
    import select
    import signal
    import socket

    from cellos.sandbox.descriptors import receive

    broken = _prepare(int(channel_descriptor))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps our cells; the supervisor watches them through pidfds
    channel = socket.socket(fileno=int(channel_descriptor))
    workshop = _Workshop(f"{os.getpid()}-{token}", cgroup_parent, broken)
    gc.disable()
    gc.freeze()
    waiting = select.poll()
    waiting.register(channel, select.POLLIN)
    spare: _Made | None = None
    spares_left, next_serial = int(ahead), 0
    while True:
        if spare is None and spares_left > 0 and not waiting.poll(0):
            spare, spares_left = workshop.make(next_serial), spares_left - 1
        packet, _ = receive(channel, _LARGEST_PACKET, 0)
        request = json.loads(packet or b'{"died": true}')
        if "died" in request or "bye" in request:
            if spare:
                workshop.undo(spare)
            if "died" in request:
                workshop.clean_up()
            os._exit(0)
        try:
            if "hello" in request:
                channel.send(json.dumps(workshop.describe()).encode())
                continue
            serial = request["serial"]
            made, spare = (spare, None) if spare and spare.serial == serial else (workshop.make(serial), spare)
            next_serial = max(next_serial, serial + 1)
            socket.send_fds(channel, [json.dumps(made.answer).encode()], made.passed())
        except BrokenPipeError:
            continue  # the next read says the same
        workshop.hand_over(made)


def _prepare(channel: int) -> _Failed | None:
    """Hide this process, close what it inherited, drop its groups; what failed is the answer to every request."""
    from cellos.sandbox import syscalls

    os.chdir("/")
    step = "hide the launcher"
    try:
        syscalls.set_dumpable(False)
        step = "close_range"
        syscalls.close_range(channel + 1)
        step = "map ids"
        if os.geteuid() == 0:
            os.setgroups([])  # inside the cell nobody can: setgroups is denied there
    except OSError as error:
        return _Failed(step, error)
    return None


class _Failed(Exception):
    def __init__(self, step: str, error: OSError) -> None:
        self.step = step
        self.errno = error.errno or 0
        self.text = f"{error.filename or step}: {error.strerror}"


class _Made:
    """A cell that nobody has taken yet, or why there is none."""

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.answer: dict[str, object] = {}
        self.descriptors: list[int] = []
        self.host_id: HostId | None = None

    def passed(self) -> list[int]:
        """What the supervisor gets, in the order of the protocol."""
        return self.descriptors + ([self.host_id.descriptor] if self.host_id and self.descriptors else [])


class _Workshop:
    """Where cells are made, in the launcher process."""

    def __init__(self, token: str, cgroup_parent: str, broken: _Failed | None) -> None:
        self._token = token
        self._broken = broken
        self._host_ids = HostIds() if os.geteuid() == 0 else None
        self._hierarchy = cgroups.discover(parent=cgroup_parent or None, ours=frozenset({os.getpid(), os.getppid()}))
        self._handed_over: dict[int, int | None] = {}
        """Serial number to host id of cells that may still be there."""
        if self._hierarchy:
            cgroups.remove_abandoned(self._hierarchy, _GROUP_PREFIX)
        if self._host_ids:
            self._host_ids.remove_abandoned()

    def describe(self) -> dict[str, object]:
        if self._hierarchy is None:
            return {"version": 0}
        hierarchy = self._hierarchy
        return {"version": hierarchy.version, "parents": hierarchy.parents, "controllers": sorted(hierarchy.controllers)}

    def make(self, serial: int) -> _Made:
        """Groups, id, clone, maps; a failure is part of what is returned, and leaves nothing."""
        made = _Made(serial)
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
            made.answer = {"failed": failure.step, "errno": failure.errno, "text": failure.text}
        return made

    def _clone(self, made: _Made, group: cgroups.Group | None, step: list[str]) -> None:
        import socket

        from cellos.sandbox import init, rootfs, syscalls

        flags = (
            syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET
            | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP
        )  # fmt: skip
        birth = group.birth_directory() if group else None
        attach = group.attach_paths() if group else []
        cgroup = os.open(birth, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if birth else -1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        step[0] = "clone3"
        try:
            if os.geteuid() != 0:
                syscalls.set_dumpable(True)  # else the child's files in /proc belong to root and we may not write its maps
            pid, pidfd = syscalls.clone3(flags, cgroup=cgroup)
            if pid == 0:
                try:
                    init.run(theirs.fileno(), reading, attached_v1=bool(attach))
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
            for path in attach:
                _write(path, str(pid))
            os.write(writing, b"g")
        except OSError as error:
            if step[0] == "clone3" and cgroup >= 0 and error.errno in _CGROUP_REASONS:
                step[0] = "attach to control group"
            raise
        finally:
            syscalls.set_dumpable(False)
            ours.close()
            theirs.close()
            for descriptor in (reading, writing, cgroup):  # without the letter the child ends by itself
                if descriptor >= 0:
                    os.close(descriptor)

    def _group(self, serial: int) -> cgroups.Group | None:
        return cgroups.Group(self._hierarchy, _group_name(self._token, serial)) if self._hierarchy else None

    def hand_over(self, made: _Made) -> None:
        """The supervisor has it; our copies of the descriptors go."""
        if not made.descriptors:
            return
        for descriptor in made.passed():
            os.close(descriptor)
        self._handed_over[made.serial] = made.host_id.number if made.host_id else None
        if len(self._handed_over) > _MOST_REMEMBERED:
            self._handed_over = {serial: number for serial, number in self._handed_over.items() if self._is_there(serial, number)}

    def _is_there(self, serial: int, number: int | None) -> bool:
        group = self._group(serial)
        by_group = group is not None and any(os.path.isdir(directory) for directory in group.directories.values())
        return by_group or (number is not None and self._host_ids is not None and self._host_ids.exists(number))

    def clean_up(self) -> None:
        """The supervisor was killed, so its cells are ending now: remove their groups and ids."""
        import time

        deadline = time.monotonic() + _TEARDOWN_SECONDS
        for serial, number in self._handed_over.items():
            group = self._group(serial)
            for directory in group.directories.values() if group else ():
                cgroups.remove(directory, deadline=deadline)
            if number is not None and self._host_ids:
                self._host_ids.remove_if_free(number)

    def undo(self, made: _Made) -> None:
        """Remove what was made of a cell that nobody took; its init ends with its control socket."""
        import select
        import time

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


def _group_name(token: str, serial: int) -> str:
    return f"{_GROUP_PREFIX}{token}-{serial}"


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
