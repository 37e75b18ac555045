"""One command in a cell on this host, without a document, a server or configuration.

`run` is what `import cellos` offers. `cellos run` goes the same way: options become an ExecutionCell document, the document is run.
"""

import _thread
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from cellos.brokers.memory import MemoryBroker
from cellos.core.deadline import Deadline
from cellos.core.documents import MAX_DOCUMENT_BYTES, parse_execution_cell, raw_spec_hash
from cellos.core.documents.rules import is_own
from cellos.errors import CellosError, ConfigError, Unenforceable
from cellos.ports import Isolation, Output, Receipt, Residue
from cellos.supervisor.compose import Finished, Host, Order, execute, open_host
from cellos.supervisor.config import Config, read_config

if TYPE_CHECKING:
    from cellos.artifacts.files import PlacedFiles
    from cellos.sandbox.launcher import Launcher

DEFAULT_TTL_SECONDS = 3600
"""Longest life of a cell for which no time-out was given."""
DEFAULT_CAPTURE_BYTES = 16 << 20


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and with what. Paths are absolute; `out` maps a file of the work directory to where it goes."""

    argv: tuple[str, ...]
    allow: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    timeout_ms: int | None = None
    memory_bytes: int | None = None
    here: str | None = None
    read_only: tuple[str, ...] = ()
    out: tuple[tuple[str, str], ...] = ()
    cell_id: str


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended.

    Of `exit_code`, `signal` and `spawn_error` exactly one is set, unless the cell itself broke. `outcome` is succeeded or failed, `reason`
    the first failure. `stdout` and `stderr` are what was captured; `truncated` says that there was more. `events` is the record's path.
    """

    exit_code: int | None
    signal: int | None
    spawn_error: str | None
    spawn_errno: int | None
    timed_out: bool
    interrupted: bool
    oom_killed: bool
    stdout: bytes
    stderr: bytes
    truncated: bool
    duration_ms: int
    """From the start of the command to the end of its last process."""
    run_id: str
    cell_id: str
    outcome: str
    reason: str | None
    isolation: Isolation
    residue: tuple[Residue, ...]
    receipts: tuple[Receipt, ...]
    deadline: Deadline | None
    """The limit that ended the command, where one did."""
    events: str
    head: str
    """Digest of the record's last event: noted elsewhere, it lets `cellos events --head` see a cut or rewritten end."""
    unacknowledged: int = 0
    """How many events NATS does not have, where they go there."""


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    allow: Sequence[str] = (),
    secrets: Mapping[str, str] | Iterable[str] = (),
    timeout: float | None = None,
    memory: int | None = None,
    here: bool = False,
    read_only: Sequence[str | os.PathLike[str]] = (),
    out: Mapping[str | os.PathLike[str], str | os.PathLike[str]] | Sequence[str | os.PathLike[str]] = (),
    stdin: bytes | None = None,
    capture: int | None = DEFAULT_CAPTURE_BYTES,
) -> RunResult:
    """Run a command in a cell and wait for it.

    `timeout` is in seconds, `memory` in bytes. `here` makes the current directory, read-only, the working directory; `read_only` names more
    directories, visible at the same path. `secrets` are variables of the command: a mapping, or names to take from our environment. `out`
    maps files of the work directory to where they are copied, or lists those that go to the current directory. `stdin` is what the command
    reads. `capture` is how many bytes of each output stream are kept; None lets them pass to our own.

    How the command ended, whatever that is, is a result. Raises CellosError where no cell could be made for it, TypeError for a wrong type.
    The variables of docs/reference/supervisor.md apply, CELLOS_STATE_DIR (where records are kept) among them. May be called from several
    threads. All of it is in docs/reference/python.md.
    """
    from cellos.client import arguments

    words = arguments.texts("argv", argv, why="there is no shell")
    values = arguments.secrets(secrets)
    capture = arguments.capture(capture)
    options = Options(
        argv=words,
        allow=arguments.texts("allow", allow),
        secrets=tuple(values),
        timeout_ms=arguments.milliseconds(timeout),
        memory_bytes=arguments.memory(memory),
        here=absolute("") if arguments.flag("here", here) else None,
        read_only=tuple(absolute(path) for path in arguments.directories(read_only)),
        out=arguments.places(out),
        cell_id=new_cell_id(words[0] if words else ""),
    )
    streams = [Output(capture_bytes=capture) if capture is not None else Output(descriptor=number, wait=True) for number in (1, 2)]
    source = None if stdin is None else _readable(arguments.content(stdin))
    try:
        finished = run_options(_shared_host(), options, secrets=values, stdin=source, stdout=streams[0], stderr=streams[1])
    finally:
        if source is not None:
            os.close(source)
    return to_result(finished)


def run_options(
    host: Host,
    options: Options,
    *,
    secrets: Mapping[str, str],
    stdin: int | None = None,
    stdout: Output,
    stderr: Output,
    interrupt: int | None = None,
) -> Finished:
    """Build the document and run it; its record stays in the evidence directory. Raises CellosError where no cell was made."""
    if options.allow:
        raise Unenforceable(field="spec.authority.egressRules", why="egress is not built yet")
    raw = document_bytes(options)
    order = Order(
        document=parse_execution_cell(raw),
        spec_hash=raw_spec_hash(raw),
        broker=MemoryBroker(secrets),
        artifacts=_places(options) if options.out else None,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        interrupt=interrupt,
        keep_evidence=True,
    )
    return execute(host, order)


def to_result(finished: Finished) -> RunResult:
    """The result of a run whose record stayed. Raises CellosError for one that broke before its command had come to an end."""
    outcome, command = finished.outcome, finished.outcome.command
    if finished.evidence is None or command is None:
        raise CellosError(outcome.reason or "the run has no record")
    return RunResult(
        exit_code=command.exit_code,
        signal=command.signal,
        spawn_error=command.spawn_error,
        spawn_errno=command.spawn_errno,
        timed_out=outcome.timed_out is not None,
        interrupted=outcome.interrupted,
        oom_killed=command.oom_killed,
        stdout=command.stdout,
        stderr=command.stderr,
        truncated=command.truncated,
        duration_ms=command.duration_ms,
        run_id=outcome.run_id,
        cell_id=outcome.cell_id,
        outcome=outcome.outcome,
        reason=outcome.reason,
        isolation=outcome.isolation,
        residue=outcome.residue,
        receipts=outcome.receipts,
        deadline=outcome.timed_out,
        events=finished.evidence,
        head=outcome.head,
        unacknowledged=finished.unacknowledged.events,
    )


def build_document(options: Options) -> dict[str, Any]:
    """The ExecutionCell document of the options. Raises ConfigError for what no document can say."""
    for position, argument in enumerate(options.argv):
        _check_text(argument, f"argument {position}")
    command: dict[str, Any] = {"argv": list(options.argv), "secretDelivery": "env"}
    if options.here is not None:
        command["workingDirectory"] = options.here
    if options.timeout_ms is not None:
        command["timeoutMs"] = options.timeout_ms
    if options.memory_bytes is not None:
        command["limits"] = {"memoryMaxBytes": options.memory_bytes}
    authority: dict[str, Any] = {}
    sources = dict.fromkeys(([options.here] if options.here is not None else []) + list(options.read_only))
    if sources:
        for source in sources:
            _check_text(source, "the directory")
            if source == "/" or is_own(source):
                raise ConfigError(f"cannot show {source} to the cell, which has its own there: choose a directory below it, or elsewhere")
        authority["filesystem"] = {"mounts": [{"source": source, "target": source, "mode": "ro"} for source in sources]}
    if options.secrets:
        authority["secretRefs"] = list(options.secrets)
    if options.allow:
        authority["egressRules"] = [_egress_rule(destination) for destination in options.allow]
    ttl = DEFAULT_TTL_SECONDS if options.timeout_ms is None else math.ceil(options.timeout_ms / 1000)
    spec: dict[str, Any] = {"id": options.cell_id, "run": command, "authority": authority, "lifetime": {"ttlSeconds": ttl}}
    if options.out:
        spec["export"] = {"artifacts": [{"name": name, "path": path} for name, path, _ in _artifacts(options)]}
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": spec}


def document_bytes(options: Options) -> bytes:
    """The document as it is printed, hashed and run. Raises ConfigError."""
    raw = msgspec.json.format(msgspec.json.encode(build_document(options)), indent=2) + b"\n"
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise ConfigError(
            f"the command is too long: with its options it makes {len(raw)} bytes of a document, and {MAX_DOCUMENT_BYTES} are read"
        )
    return raw


def new_cell_id(program: str) -> str:
    """A cell id that tells people what runs in it: the program's name and eight random digits."""
    name = "".join(character if character.isascii() and character.isalnum() else "-" for character in os.path.basename(program))
    return f"{name.strip('-')[:40] or 'cell'}-{os.urandom(4).hex()}"


def absolute(path: str) -> str:
    """As seen from the current directory, which is "". Raises ConfigError where that is gone."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        raise ConfigError("the current directory no longer exists; go to one that does") from error


def take_secrets(keys: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The values of the named variables. Raises ConfigError for one that is not set, or has no value."""
    values = {}
    for key in keys:
        if not environment.get(key):
            raise ConfigError(f"secret {key} is {'empty' if key in environment else 'not set'} in the environment")
        values[key] = environment[key]
    return values


def _artifacts(options: Options) -> list[tuple[str, str, str]]:
    """(artifact name, path in the cell, destination). A name has fewer characters than a path, and occurs once. Raises ConfigError."""
    found = []
    for position, (path, place) in enumerate(options.out):
        _check_text(path, "the file to copy out")
        if "\0" in path + place:
            raise ConfigError(f"out: a path with a NUL byte names no file: {path!r}, {place!r}")
        parts = path.removeprefix("/work/").split("/")
        if parts[0] == "" or ".." in parts:
            raise ConfigError(f"out: {path!r} lies outside the work directory: name a file below /work, without '..'")
        name = os.path.basename(path)
        if name in ("", "."):
            raise ConfigError(f"out: {path} is a directory: name a file, several may be given")
        if os.path.basename(place) in ("", ".", ".."):
            raise ConfigError(f"out: cannot copy to {place!r}, a directory: name the file, too, as {os.path.join(place, name)}")
        base = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
        found.append((f"out{position}-{base}".replace("..", "--")[:128], path, place))
    return found


def _places(options: Options) -> "PlacedFiles":
    """What copies the files to where they go, after a look at whether it can. Raises ConfigError."""
    from cellos.artifacts.files import PlacedFiles

    places = {name: absolute(place) for name, _, place in _artifacts(options)}
    for place in places.values():
        _check_text(place, "the destination to copy to")
    placed = PlacedFiles(places)
    placed.check()
    return placed


def _egress_rule(destination: str) -> dict[str, Any]:
    host, separator, port = destination.rpartition(":")
    if not separator:
        host, port = destination, "443"
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--allow {destination}: expected HOST or HOST:PORT")
    return {"host": host, "port": int(port)}


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raw = text.encode(errors="surrogateescape")
        shown = raw.decode(errors="backslashreplace")
        if shown.encode() == raw:
            raise ConfigError(f"{what} is no text in this locale: {shown}; set LC_ALL=C.UTF-8") from error
        raise ConfigError(f"{what} is not UTF-8, and a document is: {shown}") from error


def _readable(content: bytes) -> int:
    descriptor = os.memfd_create("cellos-stdin", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class _Shared:
    """The launcher and host of this process, made at the first run."""

    def __init__(self) -> None:
        self.lock = _thread.allocate_lock()
        self.launcher: Launcher | None = None
        self.config: Config | None = None
        self.host: Host | None = None


_shared = _Shared()


def _begin_anew() -> None:
    """In a forked child: the launcher is its parent's, and ends with that one; and a thread that is not here may have held the lock."""
    if _shared.launcher is not None:
        _shared.launcher.forget()
    _shared.__init__()  # type: ignore[misc]  # made anew, under the name that everybody knows


os.register_at_fork(after_in_child=_begin_anew)


def _shared_host() -> Host:
    import atexit

    config = read_config(os.environ)
    with _shared.lock:
        if _shared.launcher is None and config.backend == "linux":
            from cellos.backends.linux import start_launcher

            _shared.launcher = start_launcher(os.environ)
            atexit.register(_end_launcher)
        if _shared.host is None or _shared.config != config:
            _shared.host, _shared.config = open_host(config, _shared.launcher, _warn), config
        return _shared.host


def _end_launcher() -> None:
    """At the end of this process. A forked child inherits the call, and not the launcher."""
    if _shared.launcher is not None:
        _shared.launcher.close()


def _warn(text: str) -> None:
    import warnings

    warnings.warn(text, RuntimeWarning, stacklevel=4)
