"""`cellos-supervisor SPEC | -`: one cell from one ExecutionCell document.

Exit code 0 where the run succeeded, 1 for every failure, 128 + n where signal n ended it. What the command writes passes through;
everything of ours goes to standard error.

The launcher is started before the modules that take long to import: both then load at the same time.
"""

import gc
import os
import sys

from cellos.cli.process import StopSignals, leave, say, secure_standard_streams, start_launcher, unexpected

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cellos.sandbox.launcher import Launcher

DEFAULT_SPEC = "contracts/examples/execution-cell-minimal.valid.json"

HELP = """\
Usage: cellos-supervisor SPEC     run the cell of an ExecutionCell document (JSON)
       cellos-supervisor -        the same, document from standard input
       cellos-supervisor --version | -V | --help

Variables: CELLOS_CELL_BACKEND, CELL_OS_JSONL_EVENTS, CELLOS_RUN_ID, CELLOS_RUN_TIMEOUT_MS, CELLOS_STATE_DIR and more;
see docs/reference/supervisor.md. Exit code: 0 success, 1 any failure, 128 + n ended by signal n.
"""


def main() -> None:
    """Entry point of `cellos-supervisor`."""
    gc.disable()  # a short life with little garbage: each collection would only walk the modules
    secure_standard_streams()
    try:
        code = _main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # noqa: BLE001  # whatever it is, the user gets one line and the documented exit code
        say(f"Error: {unexpected(error)}")
        code = 1
    leave(code)


def _main(arguments: list[str]) -> int:
    first = arguments[0] if arguments else DEFAULT_SPEC
    if first in ("--version", "-V"):
        from cellos import __version__

        os.write(1, f"cellos-supervisor {__version__}\n".encode())
        return 0
    if first in ("--help", "-h"):
        os.write(1, HELP.encode())
        return 0
    launcher = None
    try:
        if os.environ.get("CELLOS_CELL_BACKEND", "linux") in ("", "linux"):
            launcher = start_launcher()
        return _run(first, launcher)
    finally:
        if launcher is not None:
            launcher.close()


def _run(path: str, launcher: "Launcher | None") -> int:
    from cellos.brokers.memory import MemoryBroker
    from cellos.core.documents import parse_execution_cell, raw_spec_hash
    from cellos.errors import ArgvTooLarge, CellosError, HostBackendError
    from cellos.ports import Output
    from cellos.supervisor.compose import Order, directory_store, execute, open_host, read_config

    try:
        config = read_config(os.environ)
        raw = _read_spec(path)
        document = parse_execution_cell(raw, allow_unknown_fields=config.allow_unknown_fields)
        with StopSignals() as stop:
            host = open_host(config, launcher, lambda text: say(f"cellos-supervisor: {text}"))
            order = Order(
                document=document,
                spec_hash=raw_spec_hash(raw),
                run_id=config.run_id,
                broker=MemoryBroker(),
                artifacts=directory_store(config),
                stdout=Output(descriptor=1, escape=os.isatty(1)),
                stderr=Output(descriptor=2, escape=os.isatty(2)),
                interrupt=stop.descriptor,
            )
            finished = execute(host, order)
    except (HostBackendError, ArgvTooLarge) as error:
        say(f"Error: cell create: {error}")
        return 1
    except CellosError as error:
        say(f"Error: {error}")
        return 1
    if finished.evidence is not None:
        say(f"cellos-supervisor: events are in {finished.evidence}; set CELL_OS_JSONL_EVENTS to choose a file")
    if finished.outcome.reason is not None:
        say(f"Error: {finished.outcome.reason}")
    if finished.outcome.interrupted and stop.received is not None:
        return 128 + stop.received
    return 0 if finished.outcome.reason is None else 1


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
