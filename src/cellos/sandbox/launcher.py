"""The launcher, seen from the supervisor: the only process that makes cells, see workshop.py for its inside.

It has one thread, no secrets and few modules: clone3 in a process with threads can hang in the child, what is in its memory is copied into
every init, and its size is paid for at every fork. So it is a fresh interpreter (`python -I -S`) with an empty environment, started before
or beside anything else the supervisor does. One serves any number of cells and threads; it ends when its supervisor does, and if that died
it first removes the groups and ids of the cells that died with it.

Nothing that a document says goes there: a cell is cloned, mapped and put into its groups, and gets everything else from the supervisor over
its control socket. That is why one can be made ahead, while the supervisor still reads the document (or runs the cell before).

A request and its answer are one packet each, marshalled, on a SEQPACKET socket:
    {"hello": true}    {"version": 0, 1 or 2, "parents": {…}, "controllers": […]} | {"failed": step, "errno": n, "text": …}
    {"missing": true}  {"missing": […]}, once a cell was made or could not be; it waits to be asked for
    {"serial": n}      {"pid": n, "host_id": n or null} with the pidfd, the control socket, a descriptor of each of HELD_NAMESPACES and the
                       lock on the host id, if there is one | {"failed": step, "errno": n, "text": …}
    {"returned": n}    {}, once that cell is gone: the supervisor had no room for its descriptors
    {"bye": true}      none: the supervisor ends as it should, and removes what is its own

This module is imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import _thread
import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cellos.sandbox import cgroups
    from cellos.sandbox.hostids import HostId

HELD_NAMESPACES = ("user", "pid", "mnt", "net")
"""Those that a process, a mount or a descriptor could keep alive by itself; the other three belong to the same user namespace."""
LARGEST_PACKET = 1 << 14
GROUP_PREFIX = "cellos-"
PARENT_STEP = "create cgroup dir"
"""The step that fails where the given parent of control groups cannot be used."""
_CHANNEL = 3
_BOOT = """\
import _signal; _signal.signal(_signal.SIGINT, _signal.SIG_IGN); _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
import sys; sys.path.insert(0, sys.argv[1])
from cellos.compiled import prefer_compiled; prefer_compiled()
from cellos.sandbox.workshop import serve; serve(*sys.argv[2:])
"""
"""Who interrupts all our processes means the supervisor. What its caller blocked would be blocked in the process 1 of every cell."""


def group_name(token: str, serial: int) -> str:
    """Name of a cell's control groups. `token` begins with the launcher's pid."""
    return f"{GROUP_PREFIX}{token}-{serial}"


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
    def start(cls, *, ahead: int = 0, refill: bool = False, cgroup_parent: str = "") -> Launcher:
        """Start the process; returns at once, while it is still loading. Raises OSError.

        `ahead`: how many cells it makes before they are asked for, with `refill` again and again; what nobody asks for goes when we close.
        `cgroup_parent`: directory of a control group that is ours to use, instead of our own.
        """
        import _socket  # the C module alone: it is all we need, and `socket` costs 3 ms that the launcher's start would wait for

        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        token = os.urandom(4).hex()
        actions: list[tuple[int, ...]] = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _CHANNEL),  # first: where ours are closed, theirs may be 0 or 1
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),  # type: ignore[list-item]  # file actions mix types
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),  # type: ignore[list-item]  # file actions mix types
        ]
        argv = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _BOOT,
            package,
            str(_CHANNEL),
            token,
            str(ahead),
            "refill" if refill else "",
            cgroup_parent,
        ]
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
            from cellos.sandbox import cgroups

            answer, _ = self._ask({"hello": True}, 0)
            if answer["version"]:
                self._hierarchy = cgroups.Hierarchy(
                    version=answer["version"], parents=answer["parents"], controllers=frozenset(answer["controllers"])
                )
            self._said_hello = True
        return self._hierarchy

    def missing(self) -> tuple[str, ...]:
        """Which of `unshare`, `seccomp` and `cgroup-v2` this host does not give us; the last stands for limits of memory and processes, by
        either version of control groups. Tried, not looked up: a cell is made, and the next `clone` takes it. Raises LauncherError.
        """
        answer, _ = self._ask({"missing": True}, 0)
        return tuple(answer["missing"])

    def reserve(self) -> int:
        """The serial number of a cell to come, for `group` and `clone`."""
        with self._lock:
            serial, self._serial = self._serial, self._serial + 1
        return serial

    def group(self, serial: int) -> cgroups.Group | None:
        """The control groups of a cell that exists or is to come."""
        from cellos.sandbox import cgroups

        hierarchy = self.hierarchy()
        return cgroups.Group(hierarchy, group_name(self._token, serial)) if hierarchy else None

    def clone(self, serial: int) -> Cloned:
        """The cell of that number, made ahead or now. Raises LauncherError; then nothing of it is left."""
        from cellos.sandbox.hostids import HostId

        group = self.group(serial)
        answer, passed = self._ask({"serial": serial}, 3 + len(HELD_NAMESPACES))
        if len(passed) < 2 + len(HELD_NAMESPACES) + bool(answer["host_id"]):
            for descriptor in passed:
                os.close(descriptor)
            self._ask({"returned": serial}, 0)
            raise LauncherError("take the cell's descriptors", errno.EMFILE, "this process has too many open files")
        pidfd, control, *rest = passed
        namespaces = dict(zip(HELD_NAMESPACES, rest, strict=False))
        host_id = HostId(answer["host_id"], rest[-1]) if answer["host_id"] else None
        return Cloned(pid=answer["pid"], pidfd=pidfd, control=control, namespaces=namespaces, host_id=host_id, group=group)

    def _ask(self, request: dict[str, object], most: int) -> tuple[dict[str, Any], list[int]]:
        """One request and its answer, with up to `most` descriptors."""
        import _socket
        import marshal

        from cellos.sandbox.descriptors import receive

        with self._lock:
            if self._channel < 0:
                raise LauncherError("ask the launcher", 0, "it was closed")
            channel = _socket.socket(fileno=self._channel)
            try:
                channel.send(marshal.dumps(request))
                data, passed = receive(channel, LARGEST_PACKET, most)
            except (BrokenPipeError, ConnectionResetError):
                data = b""
            except OSError as error:
                raise LauncherError("ask the launcher", error.errno or 0, error.strerror or str(error)) from error
            finally:
                channel.detach()
        if not data:
            raise LauncherError("ask the launcher", 0, f"it has ended (pid {self.pid}); no cell can be made any more")
        answer: dict[str, Any] = marshal.loads(data)  # noqa: S302  # from the launcher, which reads nothing of anybody else
        if "failed" in answer:
            raise LauncherError(answer["failed"], answer["errno"], answer["text"])
        return answer, passed

    def close(self) -> None:
        """End the process and reap it. Cells that live go on: their lifeline is the supervisor."""
        import marshal

        with self._lock:
            if self._channel < 0:
                return
            try:
                os.write(self._channel, marshal.dumps({"bye": True}))
            except BrokenPipeError:
                pass  # it was killed
            os.close(self._channel)
            self._channel = -1
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            return  # somebody in our process reaps all children

    def forget(self) -> None:
        """In a forked child: the process is not its own, and waits for the end of all who hold the channel. Without the lock, whose owner
        may have stayed behind.
        """
        channel, self._channel = self._channel, -1
        if channel >= 0:
            os.close(channel)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
