"""A backend in memory: nothing is run and nothing is isolated, time does not pass, and every step can be told to fail.

A command's argv[0] names one of these programs:

    exits N                 ends with status N
    dies N                  ends by signal N
    writes TEXT [TEXT]      to standard output, to standard error
    environment             NAME=value lines
    copies                  standard input to standard output
    sleeps                  until the deadline or a stop request
    stubborn                the same, and ignores SIGTERM
    asks PATH               what a socket sends, to standard output
    file PATH TEXT          makes a regular file
    link PATH, fifo PATH    makes something that is not one
    vanishes                the cell's init is gone

Any other name is not found; `unreadable` is found but cannot be executed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Literal

from cellos.core.documents import CellSpec
from cellos.errors import ExportError, HostBackendError
from cellos.ports import Command, CommandResult, Isolation, Listener, Output, Refusal, Residue, Security

Step = Literal["create", "listen", "run", "started", "open_artifact", "destroy", "sweep"]
WORK = "/work"
NONE = "0" * 16
UNPRIVILEGED = Security(
    cap_eff=NONE, cap_prm=NONE, cap_bnd=NONE, cap_amb=NONE, cap_inh=NONE, privileged=False, no_new_privs=True, seccomp_mode=2
)


class FakeBackend:
    """CellBackend. `fail` maps a step to the error it raises; `residue` is what `destroy` and `sweep` report."""

    kind = "fake"

    def __init__(
        self,
        *,
        fail: Mapping[Step, BaseException] | None = None,
        refuses: Sequence[Refusal] = (),
        residue: Sequence[Residue] = (),
        isolation: Isolation | None = None,
    ) -> None:
        self.fail = dict(fail or {})
        self.refuses = tuple(refuses)
        self.residue = tuple(residue)
        self.isolation = isolation or Isolation(
            backend=self.kind,
            enforced=("memory",),
            limits={"memoryBytes": 1 << 29},
            unbounded=("cpu",),
            security=UNPRIVILEGED,
            own_network=True,
        )
        self.calls: list[str] = []
        self.commands: list[Command] = []
        self.keys: set[str] = set()
        self._lock = threading.Lock()

    def refusals(self, spec: CellSpec) -> Sequence[Refusal]:
        return self.refuses

    def footprint(self, key: str) -> dict[str, object]:
        return {"key": key}

    def create(self, spec: CellSpec, *, key: str) -> FakeCell:
        self.step("create")
        with self._lock:
            if key in self.keys:
                raise HostBackendError(f"cell key {key} is in use")
            self.keys.add(key)
        return FakeCell(self, key)

    def sweep(self, footprint: Mapping[str, object]) -> tuple[Residue, ...]:
        self.step("sweep")
        self.forget(str(footprint["key"]))
        return self.residue

    def forget(self, key: str) -> None:
        """A cell is gone."""
        with self._lock:
            self.keys.discard(key)

    def step(self, name: Step) -> None:
        """Note that a step was reached; raise what it was told to raise."""
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]


class FakeCell:
    """LiveCell of the fake backend. Its work directory is a dict of path to content, None for what is no regular file."""

    def __init__(self, backend: FakeBackend, key: str) -> None:
        self.isolation = backend.isolation
        self.files: dict[str, bytes | None] = {}
        self._backend = backend
        self._key = key
        self._socket_directory: str | None = None
        self._run = False
        self._destroyed = False

    def run(self, command: Command, *, on_started: Callable[[], None]) -> CommandResult:
        if self._run or self._destroyed:
            raise HostBackendError("a cell runs one command, before it is destroyed")
        self._run = True
        self._backend.commands.append(command)
        self._backend.step("run")
        program = PROGRAMS.get(command.argv[0])
        if program is None:
            number = errno.EACCES if command.argv[0] == "unreadable" else errno.ENOENT
            return CommandResult(ended="exited", spawn_error=f"{os.strerror(number)} (os error {number})", spawn_errno=number)
        self._backend.step("started")
        on_started()
        return program(self, command)

    def listen(self) -> Listener:
        self._backend.step("listen")
        if self._socket_directory is not None or self._destroyed:
            raise HostBackendError("a cell's socket is asked for once, before its end")
        self._socket_directory = tempfile.mkdtemp(prefix="cellos-fake-")
        listening = socket.socket(socket.AF_UNIX)
        path = f"{self._socket_directory}/secrets.sock"
        listening.bind(path)
        listening.listen()
        return Listener(descriptor=listening.detach(), path=path)

    def open_artifact(self, path: str) -> BinaryIO:
        self._backend.step("open_artifact")
        if path.startswith("/"):
            if not path.startswith(WORK + "/"):
                raise ExportError(f"read artifact {path}: outside the work directory")
            path = path.removeprefix(WORK + "/")
        if ".." in path.split("/"):
            raise ExportError(f"read artifact {path}: outside the work directory")
        if path not in self.files:
            raise ExportError(f"read artifact {path}: {os.strerror(errno.ENOENT)} (os error {errno.ENOENT})")
        content = self.files[path]
        if content is None:
            raise ExportError(f"read artifact {path}: not a regular file")
        return io.BytesIO(content)

    def destroy(self) -> tuple[Residue, ...]:
        if self._destroyed:
            raise HostBackendError("a cell is destroyed once")
        self._destroyed = True
        if self._socket_directory is not None:
            shutil.rmtree(self._socket_directory)
        self._backend.forget(self._key)
        self._backend.step("destroy")
        return self._backend.residue


Program = Callable[[FakeCell, Command], CommandResult]


def _exits(cell: FakeCell, command: Command) -> CommandResult:
    return CommandResult(ended="exited", exit_code=int(command.argv[1]))


def _unread(cell: FakeCell, command: Command) -> CommandResult:
    return CommandResult(ended="exited", exit_code=int(command.argv[1]), truncated=True, output_lost=True)


def _dies(cell: FakeCell, command: Command) -> CommandResult:
    return CommandResult(ended="exited", signal=int(command.argv[1]))


def _vanishes(cell: FakeCell, command: Command) -> CommandResult:
    return CommandResult(ended="lost")


def _writes(cell: FakeCell, command: Command) -> CommandResult:
    texts = [text.encode() for text in command.argv[1:]] + [b""]
    return _ended(command, stdout=texts[0], stderr=texts[1])


def _environment(cell: FakeCell, command: Command) -> CommandResult:
    return _ended(command, stdout="".join(f"{name}={value}\n" for name, value in command.environment.items()).encode())


def _copies(cell: FakeCell, command: Command) -> CommandResult:
    received = b""
    while command.stdin is not None and (chunk := os.read(command.stdin, 1 << 16)):
        received += chunk
    return _ended(command, stdout=received)


def _asks(cell: FakeCell, command: Command) -> CommandResult:
    received = b""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(command.argv[1])
        except OSError:
            return CommandResult(ended="exited", exit_code=1)
        while chunk := connection.recv(1 << 16):
            received += chunk
    return _ended(command, stdout=received)


def _sleeps(cell: FakeCell, command: Command) -> CommandResult:
    """Time does not pass: the deadline is there at once, unless somebody already asked to stop."""
    patience = 0.0 if command.deadline_seconds is not None else None
    if command.interrupt is not None and select.select([command.interrupt], [], [], patience)[0]:
        return CommandResult(ended="interrupted", signal=_signal_of(command))
    if command.deadline_seconds is None:
        raise HostBackendError("this program would sleep for ever")
    return CommandResult(ended="deadline", signal=_signal_of(command), duration_ms=int(command.deadline_seconds * 1000))


def _file(cell: FakeCell, command: Command) -> CommandResult:
    cell.files[command.argv[1]] = command.argv[2].encode()
    return CommandResult(ended="exited", exit_code=0)


def _special(cell: FakeCell, command: Command) -> CommandResult:
    cell.files[command.argv[1]] = None
    return CommandResult(ended="exited", exit_code=0)


PROGRAMS: dict[str, Program] = {
    "exits": _exits,
    "unread": _unread,
    "dies": _dies,
    "vanishes": _vanishes,
    "writes": _writes,
    "environment": _environment,
    "copies": _copies,
    "asks": _asks,
    "sleeps": _sleeps,
    "stubborn": _sleeps,
    "file": _file,
    "link": _special,
    "fifo": _special,
}


def _signal_of(command: Command) -> int:
    return 9 if command.argv[0] == "stubborn" or command.grace_seconds == 0 else 15


def _ended(command: Command, *, stdout: bytes = b"", stderr: bytes = b"") -> CommandResult:
    for name, data in (("stdout", stdout), ("stderr", stderr)):
        if data and command.on_output is not None:
            command.on_output(name, data)
    captured = [_deliver(command.stdout, stdout), _deliver(command.stderr, stderr)]
    truncated = any(
        output.capture_bytes and len(data) > output.capture_bytes for output, data in ((command.stdout, stdout), (command.stderr, stderr))
    )
    return CommandResult(ended="exited", exit_code=0, stdout=captured[0], stderr=captured[1], truncated=truncated)


def _deliver(output: Output, data: bytes) -> bytes:
    if output.descriptor is not None:
        os.write(output.descriptor, data)
    return data[: output.capture_bytes]
