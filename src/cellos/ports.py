"""The Protocols that have more than one production implementation. All of them are synchronous.

Values that cross a port are frozen structs defined here, so that implementations need not know each other. (Not dataclasses: those import
`inspect`, which costs a one-shot run 6 ms.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

from msgspec import Struct, field

if TYPE_CHECKING:
    from cellos.core.documents import CellSpec

Ended = Literal["exited", "deadline", "interrupted", "lost"]
"""How a command came to its end: by itself (exit or signal), by our deadline, by a stop request, or with its pid 1 unexpectedly gone."""


class Refusal(Struct, frozen=True, kw_only=True):
    """A member of the spec that a backend cannot enforce, and why (a clause that follows `cannot enforce <field>: `)."""

    field: str
    why: str


class Security(Struct, frozen=True, kw_only=True):
    """What the kernel says of a process in the cell: the capability sets as 16 hex digits, and whether they are all that there is."""

    cap_eff: str
    cap_prm: str
    cap_bnd: str
    cap_amb: str
    cap_inh: str
    privileged: bool
    """The effective set holds every capability that this kernel knows."""
    no_new_privs: bool
    seccomp_mode: int
    """0 none, 1 strict, 2 filter (proc_pid_status(5))."""


class Listener(Struct, frozen=True, kw_only=True):
    """A listening stream socket of ours that programs in the cell reach by its path, and nobody else does."""

    descriptor: int
    """Belongs to whoever asked for it, who closes it."""
    path: str
    """As the cell sees it."""


class Isolation(Struct, frozen=True, kw_only=True):
    """What holds a cell, as `started` reports it. Only what was really applied appears."""

    backend: str
    enforced: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    """Limit name to value in its unit: memoryBytes, pids, cpuMicrosPerSecond, workBytes, workInodes, tmpBytes, openFiles, fileBytes, …"""
    unbounded: tuple[str, ...] = ()
    """Resources that nothing limits on this host."""
    security: Security | None = None
    """Measured in the cell; None where it could not be."""
    own_network: bool = False
    """Measured: the cell's network namespace is not ours."""


class Output(Struct, frozen=True, kw_only=True):
    """Where one output stream of a command goes. Both may be wanted; neither means it is read and dropped.

    `descriptor` is never closed nor set non-blocking; when its reader is gone the command gets SIGPIPE, as in any pipeline.
    `wait`: a reader that lives has all the time it takes for the output of a command that ended by itself; the deadline is the command's.
    Without it, and after a command that was ended, it has what is left of the deadline, or 5 s if that is more.
    `escape` turns control bytes into visible text (for a terminal). `capture_bytes` caps what is kept in memory.
    """

    descriptor: int | None = None
    wait: bool = False
    escape: bool = False
    capture_bytes: int = 0


class Command(Struct, frozen=True, kw_only=True):
    """One program to run in a cell. `environment` is complete: nothing is inherited.

    `deadline_seconds` counts from the start of the program. At the deadline, or when `interrupt` (a descriptor) becomes readable,
    the tree gets SIGTERM, `grace_seconds` of time, and SIGKILL; a grace of 0 is SIGKILL at once. So is, at any time, an `interrupt` that is
    a pipe without a writer: whoever could still wait is gone. After the end of the tree both end the wait for a slow reader.
    `stdin` is a descriptor that is relayed through a pipe; None is /dev/null.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    working_directory: str | None = None
    stdin: int | None = None
    stdout: Output = Output()
    stderr: Output = Output()
    deadline_seconds: float | None = None
    grace_seconds: float = 0.0
    interrupt: int | None = None
    on_output: Callable[[str, bytes], None] | None = None
    """Gets what the command writes, as it comes: `stdout` or `stderr`, and the bytes. Called from the thread that runs the command."""


class CommandResult(Struct, frozen=True, kw_only=True):
    """The end of a command, after its whole tree is dead and reaped.

    Exactly one of `exit_code` (0 to 255), `signal` and `spawn_error` is set, save where `ended` is "lost", when all may be None.
    `spawn_errno` tells not found (ENOENT) from not executable (EACCES, ENOEXEC).
    """

    ended: Ended
    exit_code: int | None = None
    signal: int | None = None
    spawn_error: str | None = None
    spawn_errno: int | None = None
    duration_ms: int = 0
    """To the end of the last process; what a reader needs longer does not count."""
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    """More was written than was captured, or output was lost."""
    output_lost: bool = False
    """The reader of a descriptor lives and did not take everything in its time."""
    open_line: bool = False
    """What was written to a terminal last was no line feed."""
    oom_killed: bool = False


class Residue(Struct, frozen=True, kw_only=True):
    """Something of a cell that is still there. `kind`: process, mount, namespace, cgroup, descriptor, file."""

    kind: str
    detail: str


class LiveCell(Protocol):
    """A created cell. `destroy` must be called exactly once, whatever happened before; `run` at most once."""

    isolation: Isolation

    def run(self, command: Command, *, on_started: Callable[[], None]) -> CommandResult:
        """Start the command, relay its streams, wait, and kill and reap everything it left. Blocks.

        `on_started` is called once, after the program was really executed; when it raises, the tree is killed and the error passes on.
        A program that cannot be executed is a result with `spawn_error`, not an exception.
        """
        ...

    def listen(self) -> Listener:
        """Make a socket that the command can connect to. Once, before `run`. Raises HostBackendError."""
        ...

    def open_artifact(self, path: str) -> BinaryIO:
        """Open a regular file of the work directory, after `run`: relative to it, or absolute beneath it.

        Links, other mounts and `..` are refused. Raises ExportError.
        """
        ...

    def destroy(self) -> tuple[Residue, ...]:
        """Remove everything, then look for what stayed. Never raises for something that stayed: it is named in the answer. At most 5 s."""
        ...


class CellBackend(Protocol):
    """What isolates. Implementations may be used from several threads at once."""

    kind: str

    def refusals(self, spec: CellSpec) -> Sequence[Refusal]:
        """Every member of the spec that this backend cannot enforce here. Empty: it can run."""
        ...

    def footprint(self, key: str) -> dict[str, object]:
        """JSON of what `create(key=key)` will make on this host, written down beforehand so that a later process can remove it."""
        ...

    def create(self, spec: CellSpec, *, key: str) -> LiveCell:
        """A cell that is complete but runs nothing yet. `key`: 16 hex digits, unique on this host.

        Raises HostBackendError, ArgvTooLarge; then nothing is left behind.
        """
        ...

    def sweep(self, footprint: Mapping[str, object]) -> tuple[Residue, ...]:
        """Kill and remove what a dead supervisor's cell left; what could not be removed is named."""
        ...


class EventSink(Protocol):
    """Where final event bytes go. The same bytes reach every sink of a run, in order."""

    def emit(self, event_id: str, line: bytes) -> None:
        """Record one event (compact JSON, no line feed). When this returns the sink has the bytes. Raises EventSinkError."""
        ...

    def close(self) -> None:
        """Release descriptors. Idempotent."""
        ...


class SecretBroker(Protocol):
    """Where secrets come from."""

    name: str

    def resolve(self, key: str, *, cell_id: str) -> str:
        """The value of a secret. Raises SecretBrokerError, which never contains a value."""
        ...


class Receipt(Struct, frozen=True, kw_only=True):
    """Proof of one delivered artifact. `destination` carries no credentials."""

    target_kind: str
    target_name: str | None
    destination: str
    bytes_written: int


class ArtifactStore(Protocol):
    """Where artifacts go."""

    kind: str
    """`local`, `http` or `s3`."""
    target: str | None
    """The document's name for it, where it has one."""

    def destination(self, cell_id: str, name: str) -> str | None:
        """Where the artifact would be, as a receipt would say; without credentials. None where that cannot be said."""
        ...

    def put(self, cell_id: str, name: str, source: BinaryIO, *, content_type: str | None = None) -> Receipt:
        """Store one artifact whole or not at all. Raises ExportError."""
        ...
