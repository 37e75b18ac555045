"""`cellos-supervisor SPEC | -`: one cell from one ExecutionCell document.

Exit code 0 where the run succeeded, 1 for every failure, 128 + n where signal n ended it. What the command writes passes through;
everything of ours goes to standard error.

The launcher is started before the modules that take long to import: both then load at the same time.
"""

import gc
import os
import sys

from cellos.cli.process import StopSignals, leave, load_msgspec, say, secure_standard_streams, start_launcher, unexpected
from cellos.compiled import prefer_compiled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cellos.core.documents import ExecutionCell
    from cellos.sandbox.launcher import Launcher
    from cellos.supervisor.compose import Finished
    from cellos.supervisor.config import Config

DEFAULT_SPEC = "contracts/examples/execution-cell-minimal.valid.json"
_ERROR_FD = "CELLOS_ERROR_FD"
LEVELS = ("off", "error", "warn", "info", "debug", "trace")

HELP = """\
Usage: cellos-supervisor SPEC               run the cell of an ExecutionCell document (JSON, or YAML in a .yaml file)
       cellos-supervisor -                  the same, document from standard input
       cellos-supervisor --validate [SPEC]  check document, policies and keys, run nothing
       cellos-supervisor secret get KEY     in a cell with secretDelivery runtimeBroker: print a secret
       cellos-supervisor --version | -V | --help

Everything else is set by variables, CELLOS_CELL_BACKEND, CELL_OS_JSONL_EVENTS, NATS_URL, CELLOS_BROKER and more: see
docs/reference/supervisor.md. Exit code: 0 success, 1 any failure, 128 + n ended by signal n.

Examples:
  CELL_OS_JSONL_EVENTS=events.jsonl cellos-supervisor spec.json
  cellos-supervisor --validate spec.yaml
"""


class _UsageError(Exception):
    """The command line cannot be understood."""


def main() -> None:
    """Entry point of `cellos-supervisor`."""
    gc.disable()  # a short life with little garbage: each collection would only walk the modules
    secure_standard_streams()
    if _ERROR_FD in os.environ:
        _keep(os.environ[_ERROR_FD])
    prefer_compiled()
    try:
        code = _main(sys.argv[1:])
    except _UsageError as error:
        say(f"Error: {error} (see: cellos-supervisor --help)")
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # noqa: BLE001  # one of ours or not, the user gets one line and the documented exit code
        _refuse(error)
        code = 1
    leave(code)


def _main(arguments: list[str]) -> int:
    match arguments:
        case ["--version" | "-V", *_]:
            from cellos import __version__

            os.write(1, f"cellos-supervisor {__version__}\n".encode())
            return 0
        case ["--help" | "-h", *_]:
            os.write(1, HELP.encode())
            return 0
        case ["secret", *rest]:
            from cellos.cli import secret

            return secret.main(rest)
        case ["--validate", *rest]:
            return _validate(_one_path(rest))
        case [first, *_] if first.startswith("-") and first != "-":
            raise _UsageError(f"unknown option {first}")
    path = _one_path(arguments)
    launcher = start_launcher()
    try:
        load_msgspec()
        return _run(path, launcher)
    finally:
        if launcher is not None:
            launcher.close()


def _keep(descriptor: str) -> None:
    """It is for us, not for what we start, unless it is a standard stream: the launcher without those would give their numbers to its own.

    One that is not open now is none: its number may soon be that of a file of ours.
    """
    try:
        number = int(descriptor)
        os.set_inheritable(number, number <= 2)
    except (OSError, ValueError, OverflowError):
        del os.environ[_ERROR_FD]


def _one_path(arguments: "Sequence[str]") -> str:
    if len(arguments) > 1:
        raise _UsageError(f"one document at a time; do not know what to do with {arguments[1]}")
    return arguments[0] if arguments else DEFAULT_SPEC


def _refuse(error: Exception) -> None:
    """No cell was made: say why to people, and to whoever started us and wants to know."""
    from cellos.errors import ArgvTooLarge, HostBackendError

    text = f"{'cell create: ' if isinstance(error, (HostBackendError, ArgvTooLarge)) else ''}{unexpected(error)}"
    say(f"Error: {text}")
    if _ERROR_FD in os.environ:
        try:
            os.write(int(os.environ[_ERROR_FD]), text.encode(errors="replace"))
        except (OSError, ValueError, OverflowError):
            pass


def _run(path: str, launcher: "Launcher | None") -> int:
    from cellos.core.documents import raw_spec_hash
    from cellos.ports import Output
    from cellos.supervisor.compose import Order, execute, make_broker, open_host

    config, document, raw = _read(path)
    with StopSignals() as stop:
        host = open_host(config, launcher, _warn)
        if launcher is not None:
            _require_primitives(config, launcher)
        order = Order(
            document=document,
            spec_hash=raw_spec_hash(raw),
            run_id=config.run_id,
            broker=make_broker(config),
            stdout=Output(descriptor=1, escape=os.isatty(1)),
            stderr=Output(descriptor=2, escape=os.isatty(2)),
            interrupt=stop.descriptor,
        )
        finished = execute(host, order)
    code = _tell(finished, config)
    return 128 + stop.received if finished.outcome.interrupted and stop.received is not None else code


def _read(path: str) -> "tuple[Config, ExecutionCell, bytes]":
    """Configuration and document, both checked as far as they can be without a host. Raises CellosError."""
    from cellos.core.documents import parse_execution_cell
    from cellos.core.documents.parse import syntax_of
    from cellos.supervisor import profile, trust
    from cellos.supervisor.config import read_config

    config = read_config(os.environ)
    missing = profile.forced_missing(os.environ.get(profile.FORCED))
    if missing is not None:
        profile.enforce(config.profile, missing, _warn)
    if _shown("info"):
        say(profile.banner(config.profile))
    raw = _read_spec(path)
    document = parse_execution_cell(raw, allow_unknown_fields=config.allow_unknown_fields, syntax=syntax_of(path, raw))
    trust.check_document(document.spec, config)
    return config, document, raw


def _require_primitives(config: "Config", launcher: "Launcher") -> None:
    """Ask what the host lacks, unless a test said it. Where nothing is to be isolated (`stub`) nobody asks. Raises CellosError."""
    from cellos.backends.linux import missing_primitives
    from cellos.sandbox.cures import OWN_GROUP
    from cellos.supervisor import profile

    if profile.FORCED in os.environ:
        return
    missing = missing_primitives(launcher)
    profile.enforce(config.profile, missing, _warn, cure=OWN_GROUP if "cgroup-v2" in missing else "")


def _tell(finished: "Finished", config: "Config") -> int:
    """Say what people have to know about a run; its exit code where no signal ended it."""
    evidence = finished.evidence
    if not_sent := finished.not_sent():
        _warn(not_sent)
    elif evidence is not None and config.jsonl is not None:
        _warn(f"{config.jsonl} does not have all events; they are in {evidence}, and the next start tries again")
    elif evidence is not None and _shown("info"):
        say(f"cellos-supervisor: events are in {evidence}; set CELL_OS_JSONL_EVENTS to choose a file")
    if finished.outcome.residue:
        _warn("left behind: " + ", ".join(f"{each.kind} {each.detail}" for each in finished.outcome.residue))
    if finished.outcome.reason is not None:
        say(f"Error: {finished.outcome.reason}")
        return 1
    return 0


def _validate(path: str) -> int:
    from cellos.core.documents import raw_spec_hash
    from cellos.supervisor.validate import summary

    config, document, raw = _read(path)
    os.write(1, summary(config, document, path=path, digest=raw_spec_hash(raw), warn=_warn))
    return 0


def _warn(text: str) -> None:
    if _shown("warn"):
        say(f"cellos-supervisor: {text}")


def _shown(level: str) -> bool:
    """Whether RUST_LOG lets lines of a level through. Filters of single modules (`a=debug`) are those of another program's modules."""
    words = [word.strip().lower() for word in os.environ.get("RUST_LOG", "").split(",") if "=" not in word]
    most = next((word for word in words if word in LEVELS), "info")
    return LEVELS.index(level) <= LEVELS.index(most)


def _read_spec(path: str) -> bytes:
    """The bytes of the document, at most one more than a document may have. Raises ConfigError."""
    from cellos.core.documents.strict import MAX_DOCUMENT_BYTES
    from cellos.errors import ConfigError, os_error_text

    shown = "from stdin" if path == "-" else path
    try:
        descriptor = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY)
        with open(descriptor, "rb", closefd=path != "-") as file:
            return file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        hint = " (no SPEC was given; see --help)" if path == DEFAULT_SPEC else ""
        raise ConfigError(f"read cell spec {shown}: {os_error_text(error)}{hint}") from error
    except ValueError as error:  # a NUL byte in the name cannot come from a command line, but from a caller of ours
        raise ConfigError(f"read cell spec {shown!r}: {error}") from error


if __name__ == "__main__":
    main()
