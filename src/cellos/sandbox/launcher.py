"""The launcher: the only process that makes cells.

It has one thread, no secrets and few modules: clone3 in a process with threads can hang in the child, what is in its memory is copied into
every init, and its size is paid for at every fork. So it is a fresh interpreter (`python -I -S`) with an empty environment, started before
or beside anything else the supervisor does. One serves any number of cells and threads; it ends when its supervisor does.

A request and its answer are one packet each, on a SEQPACKET socket:
    request  {"ids": [uid, gid], "attach": [paths], "in_cgroup": bool, "trees": n, "init": {…}}   with: control, trees…, cgroup directory
    answer   {"pid": n} with the pidfd and a descriptor of each of HELD_NAMESPACES | {"failed": step, "errno": n, "text": …}
"""

from __future__ import annotations

import _thread
import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cellos.sandbox.messages import CloneRequest, InitRequest

    Init = Callable[[InitRequest, int, int, list[int]], None]

HELD_NAMESPACES = ("user", "pid", "mnt", "net")
"""Those that a process, a mount or a descriptor could keep alive by itself; the other three belong to the same user namespace."""
_CHANNEL = 3
_LARGEST_PACKET = 1 << 17
_MOST_DESCRIPTORS = 253
"""What the kernel passes with one packet (SCM_MAX_FD)."""
_CGROUP_REASONS = {errno.EACCES, errno.EBUSY, errno.ENODEV, errno.EOPNOTSUPP}
"""What clone3 answers when it may not place the child in a group; it has other words for namespaces."""
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from cellos.sandbox.launcher import serve; serve(int(sys.argv[2]))"


class LauncherError(Exception):
    """A cell could not be cloned. `step` names what failed; `errno` is the kernel's."""

    def __init__(self, step: str, errno: int, text: str) -> None:
        super().__init__(f"{step}: {text}")
        self.step = step
        self.errno = errno
        self.text = text


class Cloned:
    """A cell that has its namespaces, ids and groups; its init goes on by itself. The owner closes it."""

    __slots__ = ("namespaces", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int, namespaces: dict[str, int]) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.namespaces = namespaces
        """Name to descriptor. Held until somebody has looked for what stayed: while they are open no other namespace gets their number."""

    def close(self) -> None:
        os.close(self.pidfd)
        for descriptor in self.namespaces.values():
            os.close(descriptor)


class Launcher:
    """Our end. Thread-safe; close it, or use `with`."""

    def __init__(self, channel: int, pid: int) -> None:
        self._channel = channel
        self._lock = _thread.allocate_lock()
        self.pid = pid

    @classmethod
    def start(cls) -> Launcher:
        """Start the process; returns at once, while it is still loading. Raises OSError."""
        import _socket  # the C module alone: it is all we need, and `socket` costs 3 ms that the launcher's start would wait for

        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        actions: list[tuple[int, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),  # type: ignore[list-item]  # file actions mix types
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),  # type: ignore[list-item]  # file actions mix types
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _CHANNEL),
        ]
        try:
            pid = os.posix_spawn(
                sys.executable, [sys.executable, "-I", "-S", "-c", _BOOT, package, str(_CHANNEL)], {}, file_actions=actions, setsid=True
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(ours.detach(), pid)

    def clone(self, request: CloneRequest, descriptors: Sequence[int]) -> Cloned:
        """Clone one cell. Raises LauncherError."""
        import json
        import socket

        from cellos.sandbox.descriptors import receive

        packet = json.dumps(request).encode()
        if len(packet) > _LARGEST_PACKET or len(descriptors) > _MOST_DESCRIPTORS:
            raise LauncherError(
                "ask the launcher", errno.EMSGSIZE, f"{len(packet)} bytes and {len(descriptors)} descriptors are more than it takes"
            )
        with self._lock:
            if self._channel < 0:
                raise LauncherError("ask the launcher", 0, "it was closed")
            channel = socket.socket(fileno=self._channel)
            try:
                socket.send_fds(channel, [packet], list(descriptors))
                data, passed = receive(channel, _LARGEST_PACKET, 1 + len(HELD_NAMESPACES))
            except (BrokenPipeError, ConnectionResetError):
                data = b""
            except OSError as error:
                raise LauncherError("ask the launcher", error.errno or 0, error.strerror or str(error)) from error
            finally:
                channel.detach()
        if not data:
            raise LauncherError("ask the launcher", 0, f"it has ended (pid {self.pid}); no cell can be made any more")
        answer = json.loads(data)
        if "failed" in answer:
            for descriptor in passed:
                os.close(descriptor)
            raise LauncherError(answer["failed"], answer["errno"], answer["text"])
        return Cloned(answer["pid"], passed[0], dict(zip(HELD_NAMESPACES, passed[1:], strict=True)))

    def close(self) -> None:
        """End the process and reap it. Cells that live go on: their lifeline is the supervisor."""
        with self._lock:
            if self._channel < 0:
                return
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


def serve(channel_descriptor: int) -> None:
    """The launcher process: answer requests until the other end is closed. Does not return."""
    import gc
    import json
    import signal
    import socket

    from cellos.sandbox import init
    from cellos.sandbox.descriptors import receive

    broken = _prepare(channel_descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps our cells; the supervisor watches them through pidfds
    os.chdir("/")
    channel = socket.socket(fileno=channel_descriptor)
    gc.disable()
    gc.freeze()
    while True:
        packet, descriptors = receive(channel, _LARGEST_PACKET, _MOST_DESCRIPTORS)
        if not packet:
            os._exit(0)
        request: CloneRequest = json.loads(packet)
        passed: list[int] = []
        answer: object
        try:
            if broken:
                raise broken
            pid, passed = _clone(request, descriptors, init.run)
            answer = {"pid": pid}
        except _Failed as failure:
            answer = {"failed": failure.step, "errno": failure.errno, "text": failure.text}
        except OSError as error:
            answer = {"failed": "prepare the clone", "errno": error.errno or 0, "text": error.strerror or str(error)}
        try:
            socket.send_fds(channel, [json.dumps(answer).encode()], passed)
        except BrokenPipeError:
            os._exit(0)
        for descriptor in [*descriptors, *passed]:
            os.close(descriptor)


def _prepare(channel: int) -> _Failed | None:
    """Hide this process, close what it inherited, drop its groups; what failed is the answer to every request."""
    from cellos.sandbox import syscalls

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


def _clone(request: CloneRequest, descriptors: list[int], init: Init) -> tuple[int, list[int]]:
    """Clone, map ids, attach to groups, release; returns the pid and what Cloned holds. The child ends when a later step fails."""
    from cellos.sandbox import rootfs, syscalls

    flags = (
        syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET
        | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP
    )  # fmt: skip
    trees = descriptors[1 : 1 + request["trees"]]
    cgroup = descriptors[-1] if request["in_cgroup"] else -1
    reading, writing = os.pipe2(os.O_CLOEXEC)
    step = "clone3"
    passed: list[int] = []
    try:
        if os.geteuid() != 0:
            syscalls.set_dumpable(True)  # else the child's files in /proc belong to root and we may not write its maps
        pid, pidfd = syscalls.clone3(flags, cgroup=cgroup)
        if pid == 0:
            try:
                init(request["init"], descriptors[0], reading, trees)
            finally:
                os._exit(1)
        passed.append(pidfd)
        step = "map ids"
        uid, gid = request["ids"]
        for name, text in (("setgroups", "deny"), ("uid_map", f"{rootfs.CELL_ID} {uid} 1"), ("gid_map", f"{rootfs.CELL_ID} {gid} 1")):
            _write(f"/proc/{pid}/{name}", text)
        for name in HELD_NAMESPACES:  # one by one, so that those that were opened are closed when the next one fails
            passed.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401
        step = "attach to control group"
        for path in request["attach"]:
            _write(path, str(pid))
        os.write(writing, b"g")
    except OSError as error:
        for descriptor in passed:
            os.close(descriptor)  # without the letter the child ends by itself
        if step == "clone3" and cgroup >= 0 and error.errno in _CGROUP_REASONS:
            step = "attach to control group"
        raise _Failed(step, error) from error
    finally:
        syscalls.set_dumpable(False)
        os.close(reading)
        os.close(writing)
    return pid, passed


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
