"""One live cell of the Linux backend, from its clone to the look for what stayed.

It owns the descriptors of the cell: the pidfd of its init, the control socket that is also its lifeline, the mount of its work directory,
and the socket bound inside, until somebody asks to listen on it.
"""

from __future__ import annotations

import _socket
import errno
import os
import resource
import select
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from cellos.backends.settings import PARENT
from cellos.errors import ArgvTooLarge, CellosError, ConfigError, ExportError, HostBackendError, MissingPrimitive
from cellos.ports import Command, CommandResult, Isolation, Listener, Residue
from cellos.sandbox import cgroups
from cellos.sandbox.descriptors import receive, send
from cellos.sandbox.framing import framed
from cellos.sandbox.launcher import PARENT_STEP, Cloned
from cellos.sandbox.layout import SOCKET_PATH

if TYPE_CHECKING:
    import signal as _signal

    from cellos.backends.relay import Relay
    from cellos.ports import Ended
    from cellos.sandbox import residue as remains
    from cellos.sandbox.messages import CommandRequest, InitRequest
else:
    import _signal  # `signal` itself makes enums of all its numbers, which takes 0.6 ms


TEARDOWN_SECONDS = 5.0
_START_REPORT_MILLISECONDS = 100
_BACKLOG = 64
"""Programs in the cell that may wait to be accepted."""
_SPAWN_STEPS = {"chdir": "spec.run.workingDirectory: ", "seccomp": "seccomp: "}
_INIT_WAITS_SECONDS = 1.0
"""How long after the time limit a cell ends by itself; we end it at the limit, and cannot while we are stopped (SIGSTOP, Ctrl-Z)."""
_MOST_INIT_SECONDS = 1e8
"""Three years, which every kernel takes for a timer."""
LARGEST_ARGUMENT = 131071
"""Bytes of one argument that execve takes, without its NUL (MAX_ARG_STRLEN of execve(2))."""


class LinuxCell:
    """One cell from its clone to the residue check. Owned by one thread. `program`: a filter for the command, on top of the cell's."""

    def __init__(self, cloned: Cloned, program: bytes = b"") -> None:
        self.isolation = Isolation(backend="linux")
        self.group = cloned.group
        self._program = program
        self.cloned: Cloned | None = cloned
        self.control_socket: _socket.socket | None = _socket.socket(fileno=cloned.control)
        self.ids = (cloned.host_id.number, cloned.host_id.number) if cloned.host_id else (os.geteuid(), os.getegid())
        self.work: int | None = None
        self.status = ""
        """What init read of itself in /proc, once it was confined."""
        self._bound: int | None = None
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
            _signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:
            pass  # it has just ended; why is told next
        except OSError as error:
            raise explain("pidfd_send_signal", error.errno or 0, error.strerror or str(error)) from error
        self.control_socket.settimeout(TEARDOWN_SECONDS)
        message: dict[str, Any] | None = None
        try:
            try:
                self._send(framed(request), trees)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has ended, and its last words are there to be read
            _load_what_comes_later()
            while message is None or "built" in message:
                message = self._next_message()
                if message:
                    continue
                data, descriptors = receive(self.control_socket, 4096, 2)
                if descriptors:
                    self._take(descriptors)
                if not data:
                    raise self._ended_early()
                self._buffer += data
        except TimeoutError:
            raise HostBackendError("the cell's init did not answer within 5 s") from None
        except ConnectionResetError:
            raise self._ended_early() from None
        if "failed" in message:
            raise explain(message["failed"], message["errno"], message["text"])
        if self._bound is None:  # the last of them
            raise HostBackendError("cannot take the cell's work directory: this process has too many open files")
        self.status = message["status"]

    def _take(self, descriptors: list[int]) -> None:
        """The work directory, and the bound socket, if this process has room for it."""
        self.work, *rest = descriptors
        self._remember("work directory", self.work)
        for self._bound in rest:
            self._remember("socket of the cell", self._bound)

    def _send(self, data: bytes, descriptors: list[int]) -> None:
        """A message with descriptors, in as many pieces as it takes. Raises OSError."""
        assert self.control_socket is not None
        try:
            sent = send(self.control_socket, data, descriptors)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            # The kernel compares what programs of our user, cells among them, have in flight with the files that we may have open. It stays
            # at that: other threads may be here, too.
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            sent = send(self.control_socket, data, descriptors)
        if sent < len(data):  # an empty send to a command that has already ended would be EPIPE
            self.control_socket.sendall(data[sent:])

    def _ended_early(self) -> HostBackendError:
        if self.group and self.group.out_of_memory_kills():
            return too_little_memory()
        return HostBackendError("the cell's init ended while it built the cell")

    def _next_message(self) -> dict[str, Any] | None:
        if b"\n" not in self._buffer:
            return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = msgspec.json.decode(line)
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
                self.control_socket.sendall(framed({"terminate": True}))
            except BrokenPipeError:
                return  # it has just ended

    def ended(self) -> None:
        """The kernel has ended everything with process 1."""

    def kill(self) -> None:
        self._hear_of_the_start()
        if self.cloned is None or _wait_for_end(self.pidfd, 0):
            return
        try:
            _signal.pidfd_send_signal(self.pidfd, _signal.SIGKILL)
        except ProcessLookupError:
            return
        except OSError:
            self._close_control()  # its end is also the end of init
        if self.group:
            self.group.kill()  # init's end is the end of all others, but they may keep the processor from it

    def _hear_of_the_start(self) -> None:
        """A command that is killed right after its start did start: give init the moment that it needs to say so."""
        if self._commanded and not self._messages and self.control_socket:
            poll = select.poll()
            poll.register(self.control_socket, select.POLLIN)
            if poll.poll(_START_REPORT_MILLISECONDS):
                self.on_control()

    # -- ports.LiveCell

    def run(self, command: Command, *, on_started: Callable[[], None]) -> CommandResult:
        check_argv(command.argv)
        if self.control_socket is None or self.cloned is None:
            raise HostBackendError("the cell is gone")
        self._on_started = on_started
        request: CommandRequest = {
            "argv": list(command.argv),
            "env": dict(command.environment),
            "cwd": command.working_directory or "/work",
            "seconds": _seconds_of_init(command),
            "filter": self._program,
        }
        from cellos.backends.relay import Relay

        started = time.monotonic()
        with Relay(command) as relay:
            for descriptor in relay.child_ends:
                os.fchown(descriptor, *self.ids)  # else the cell could not open /dev/stdout by name
            try:
                self._send(framed(request), relay.child_ends)
            except OSError as error:
                raise HostBackendError(f"cannot hand the command to the cell: {_why_not_sent(error)}") from error
            self._commanded = True
            self.control_socket.setblocking(False)
            relay.release_child_ends()
            try:
                ended = relay.watch(self, started=started)
            except BaseException:
                self.kill()
                raise
        return self._result(ended, relay)

    def _result(self, ended: Ended, relay: Relay) -> CommandResult:
        answer: dict[str, Any] = {}
        for message in self._messages:
            answer |= message
        out_of_memory = bool(self.group and self.group.out_of_memory_kills())
        exit_code = signal = spawn_error = spawn_errno = None
        if "not_started" in answer:
            spawn_errno = answer["not_started"]
            spawn_error = f"{_spawn_step(answer)}{os.strerror(spawn_errno)} (os error {spawn_errno})"
        elif "exited" in answer:
            exit_code = answer["exited"] if answer["exited"] >= 0 else None
            signal = -answer["exited"] if answer["exited"] < 0 else None
        elif ended == "exited" and "overdue" in answer:  # we did not look after it: stopped, or without a processor
            ended, signal = "deadline", 9
        elif ended == "exited":
            # Init died before it could report: killed with the whole cell, which only the kernel does.
            ended = "exited" if out_of_memory else "lost"
            signal = 9 if out_of_memory else None
        else:
            signal = 9  # we killed the tree
        stdout, stderr, truncated = relay.captured
        return CommandResult(
            ended=ended,
            exit_code=exit_code,
            signal=signal,
            spawn_error=spawn_error,
            spawn_errno=spawn_errno,
            duration_ms=relay.duration_ms,
            stdout=stdout,
            stderr=stderr,
            truncated=truncated,
            output_lost=relay.lost,
            open_line=relay.open_line,
            oom_killed=out_of_memory,
        )

    def listen(self) -> Listener:
        if self._bound is None:
            raise HostBackendError("the cell has no socket to listen on: it was asked for before, or the cell is gone")
        socket = _socket.socket(fileno=self._bound)
        try:
            socket.listen(_BACKLOG)
        except OSError as error:
            raise HostBackendError(f"cannot listen inside the cell: {error.strerror}") from error
        finally:
            socket.detach()
        descriptor, self._bound = self._bound, None
        return Listener(descriptor=descriptor, path=SOCKET_PATH)

    def has_own_network(self) -> bool:
        """Whether the kernel says that the cell's network namespace is not ours."""
        assert self.cloned is not None
        theirs, ours = os.fstat(self.cloned.namespaces["net"]), os.stat("/proc/self/ns/net")
        return (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino)

    def open_artifact(self, path: str) -> BinaryIO:
        relative = path.removeprefix("/work/") if path.startswith("/work/") else path
        if self.work is None:
            raise ExportError(f"{path}: the cell has no work directory")
        from cellos.backends.exports import open_regular

        return open_regular(".", relative, relative_to=self.work)

    def destroy(self) -> tuple[Residue, ...]:
        if self.cloned is None:
            return ()
        deadline = time.monotonic() + TEARDOWN_SECONDS
        left: list[Residue] = []
        self.kill()
        if not _wait_for_end(self.pidfd, deadline):
            left.append(Residue(kind="process", detail=f"pid {self.cloned.pid} did not end within 5 s of SIGKILL"))
        self._close_control()
        os.close(self.pidfd)
        if self._bound is not None:
            os.close(self._bound)
            self._bound = None
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
        from cellos.sandbox import residue as remains

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


def _seconds_of_init(command: Command) -> float:
    if command.deadline_seconds is None:
        return 0.0
    return min(command.deadline_seconds + command.grace_seconds + _INIT_WAITS_SECONDS, _MOST_INIT_SECONDS)


def _why_not_sent(error: OSError) -> str:
    if error.errno != errno.ETOOMANYREFS:
        return error.strerror or str(error)
    return "programs of this user, cells among them, have more descriptors in flight than this process may have open; raise `ulimit -Hn`"


def _spawn_step(answer: dict[str, Any]) -> str:
    """What could not be done to start the command, before the reason."""
    interpreter = answer.get("interpreter")
    return f"its interpreter {interpreter}: " if interpreter else _SPAWN_STEPS.get(answer["step"], "")


def _load_what_comes_later() -> None:
    """Init needs 2 ms from its request to its answer: time in which the first run of a process can load what it uses afterwards."""
    import cellos.backends.relay
    import cellos.sandbox.residue  # noqa: F401  # into sys.modules


def _wait_for_end(pidfd: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, round((deadline - time.monotonic()) * 1000))))


def too_little_memory() -> HostBackendError:
    return HostBackendError(
        "the memory limit (--mem, spec.run.limits.memoryMaxBytes) is too small to build the cell in; 16 MiB are enough; "
        "where none is asked for it is CELLOS_CGROUP_MEMORY_MAX"
    )


def check_argv(argv: Sequence[str]) -> None:
    for argument in argv:
        size = len(os.fsencode(argument))
        if size > LARGEST_ARGUMENT:
            raise ArgvTooLarge(encoded_bytes=size, limit_bytes=LARGEST_ARGUMENT)


def explain(step: str, number: int, text: str) -> CellosError:
    """A failed step as an error that says what to do about it, where that is known."""
    if step == PARENT_STEP:
        return ConfigError(f"{PARENT}: {step} {text} (os error {number})")
    from cellos.sandbox.cures import cure

    remedy = cure(step, number)
    if remedy:
        return MissingPrimitive(primitive=step, why=text, cure=remedy)
    return HostBackendError(f"cannot {step}: {text}")
