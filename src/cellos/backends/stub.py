"""The stub backend: runs the command on the host and isolates nothing. Only by explicit choice, for trying things out.

It still clears the environment, keeps a deadline, and kills what it can find of the tree: the command's session and its descendants. A
descendant that moved to another session after its parent died is not found, neither to be killed nor as residue.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

from cellos.backends.exports import open_regular
from cellos.backends.relay import Relay
from cellos.backends.security import last_capability, read_status
from cellos.errors import HostBackendError, os_error_text
from cellos.ports import Command, CommandResult, Isolation, Listener, Refusal, Residue, Security

if TYPE_CHECKING:
    from cellos.core.documents import CellSpec

_DRAIN_SECONDS = 1.0
"""How long output may still come from a process that escaped."""
_END_SECONDS = 1.0
_BACKLOG = 64
_DIRECTORY, _SOCKET_DIRECTORY = "directory", "socketDirectory"


class StubBackend:
    """No isolation at all. Thread-safe."""

    kind = "stub"

    def refusals(self, spec: CellSpec) -> Sequence[Refusal]:
        return ()

    def footprint(self, key: str) -> dict[str, object]:
        directory = os.path.join(tempfile.gettempdir(), f"cellos-stub-{key}")
        return {_DIRECTORY: directory, _SOCKET_DIRECTORY: f"{directory}.socket"}

    def create(self, spec: CellSpec, *, key: str) -> StubCell:
        footprint = self.footprint(key)
        directory = str(footprint[_DIRECTORY])
        security = _own_security()
        _make(directory)
        return StubCell(directory, str(footprint[_SOCKET_DIRECTORY]), security)

    def sweep(self, footprint: Mapping[str, object]) -> tuple[Residue, ...]:
        return _remove(str(footprint[_DIRECTORY])) + _remove(str(footprint[_SOCKET_DIRECTORY]))


class StubCell:
    """A directory and a command, which is held by what holds this process."""

    control = None

    def __init__(self, directory: str, socket_directory: str, security: Security | None) -> None:
        self.isolation = Isolation(backend="stub", unbounded=("memory", "cpu", "pids", "files"), security=security)
        self.directory = directory
        self._socket_directory = socket_directory
        self._child = -1
        self._pidfd = -1

    @property
    def pidfd(self) -> int:
        return self._pidfd

    def on_control(self) -> None:
        """There is no control descriptor."""

    def ended(self) -> None:
        """What it left in its session holds its output open."""
        _signal_all(self._child, signal.SIGKILL)

    def terminate(self) -> None:
        _signal_all(self._child, signal.SIGTERM)

    def kill(self) -> None:
        _signal_all(self._child, signal.SIGKILL)

    def run(self, command: Command, *, on_started: Callable[[], None]) -> CommandResult:
        started = time.monotonic()
        with Relay(command) as relay:
            try:
                self._start(command, relay)
            except OSError as error:
                # subprocess names the directory where it is that which cannot be entered
                what = "spec.run.workingDirectory: " if error.filename == command.working_directory else ""
                return CommandResult(ended="exited", spawn_error=what + os_error_text(error), spawn_errno=error.errno)
            relay.release_child_ends()
            try:
                on_started()
                ended = relay.watch(self, started=started, drain_seconds=_DRAIN_SECONDS)
            finally:
                _signal_all(self._child, signal.SIGKILL)
                _, status = os.waitpid(self._child, 0)
                os.close(self._pidfd)
            stdout, stderr, truncated = relay.captured
        code = os.waitstatus_to_exitcode(status)
        return CommandResult(
            ended=ended,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            duration_ms=relay.duration_ms,
            stdout=stdout,
            stderr=stderr,
            truncated=truncated,
            output_lost=relay.lost,
            open_line=relay.open_line,
        )

    def _start(self, command: Command, relay: Relay) -> None:
        import subprocess

        out, error, *stdin = relay.child_ends
        process = subprocess.Popen(
            list(command.argv),
            env=dict(command.environment),
            cwd=command.working_directory or self.directory,
            stdin=stdin[0] if stdin else subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            start_new_session=True,
        )
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            process.kill()
            process.wait()
            raise HostBackendError(f"cannot watch the command: {os_error_text(error)}") from error
        self._child = process.pid
        process.returncode = 0  # we wait for it ourselves

    def listen(self) -> Listener:
        """In a directory that only this user may enter: on the host, as there is no inside."""
        import _socket

        _make(self._socket_directory)
        path = f"{self._socket_directory}/secrets.sock"
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            socket.bind(path)
            socket.listen(_BACKLOG)
        except OSError as error:  # the kernel takes 107 bytes of path
            socket.close()
            raise HostBackendError(f"cannot listen at {path}: {error.strerror or error}") from error
        return Listener(descriptor=socket.detach(), path=path)

    def open_artifact(self, path: str) -> BinaryIO:
        relative = os.path.relpath(path, self.directory) if os.path.isabs(path) else path
        return open_regular(self.directory, relative)

    def destroy(self) -> tuple[Residue, ...]:
        deadline = time.monotonic() + _END_SECONDS
        while (left := list(_session(self._child))) and time.monotonic() < deadline:
            time.sleep(0.001)  # killed, and not gone yet
        processes = tuple(Residue(kind="process", detail=f"pid {pid} of the command's session") for pid in left)
        return processes + _remove(self.directory) + _remove(self._socket_directory)


def _own_security() -> Security | None:
    with open("/proc/thread-self/status", errors="replace") as file:
        return read_status(file.read(), last_capability=last_capability())


def _make(directory: str) -> None:
    try:
        os.mkdir(directory, 0o700)
    except OSError as error:
        raise HostBackendError(f"cannot make {directory}: {error.strerror}") from error


def _remove(directory: str) -> tuple[Residue, ...]:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return ()
    except OSError as error:
        return (Residue(kind="file", detail=f"{directory}: {error.strerror}"),)
    return ()


def _signal_all(pid: int, number: int) -> None:
    """`pid`, everything that descends from it, and its session. Itself first: a shell whose child was killed would end by itself."""
    for member in (pid, *({*_descendants(pid), *_session(pid)} - {pid})):
        try:
            os.kill(member, number)
        except (ProcessLookupError, PermissionError):
            continue


def _session(leader: int) -> Iterator[int]:
    """Living processes of the session that `leader` began, the leader itself left out (proc_pid_stat(5))."""
    for name in os.listdir("/proc") if leader > 0 else ():
        if not name.isdigit() or int(name) == leader:
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state not in "ZX":
            yield int(name)


def _descendants(pid: int) -> Iterator[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        return
    for child in children:
        yield from _descendants(child)
        yield child
