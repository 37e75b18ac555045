"""`cellos run -- COMMAND`: one command in a cell, with evidence.

The command's output and exit code are our own; then one line on standard error says how long it took, what isolated it and where the
record is. Codes of ours: 124 time-out, 125 ours, 126 cannot be executed, 127 not found, 128 + n signal n.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cellos.cli.process import OUTPUT_LOST, StopSignals, say, write_all

if TYPE_CHECKING:
    from cellos.client.local import Options
    from cellos.sandbox.launcher import Launcher
    from cellos.supervisor.compose import Finished
    from cellos.supervisor.run import CellOutcome

TIMED_OUT, OURS, CANNOT_EXECUTE, NOT_FOUND, BY_SIGNAL = 124, 125, 126, 127, 128
JSON_CAPTURE_BYTES = 16 << 20


def run(launcher: "Launcher | None", *, interactive: bool, as_json: bool, print_spec: bool, **given: Any) -> int:
    """Do what the options of run_options.py say; the exit code."""
    from cellos.client.local import document_bytes, take_secrets
    from cellos.errors import CellosError

    try:
        options = _options(**given)
        if print_spec:
            return _write(document_bytes(options), 0)
        secrets = take_secrets(options.secrets, os.environ)
        with StopSignals() as stop:
            finished = _execute(options, secrets, launcher, stop.descriptor, interactive=interactive, as_json=as_json)
    except CellosError as error:
        say(f"cellos: {error}")
        if as_json:
            print_error(error.code, str(error))
        return OURS
    code = exit_code(finished.outcome, stopped_by=stop.received)
    if not as_json:
        _conclude(options, finished, code)
    if not_sent := finished.not_sent():
        say(f"cellos: {not_sent}")
    return _write(_json(finished, code), code) if as_json else code


def _conclude(options: "Options", finished: "Finished", code: int) -> None:
    """The closing line, and what may help."""
    from cellos.cli import words

    if finished.outcome.command and finished.outcome.command.open_line and os.isatty(2):
        say("")
    say(words.closing_line(options.argv[0], finished.outcome, finished.evidence, code))
    for hint in words.hints(options, finished.outcome):
        say(f"cellos: {hint}")


def _options(
    *,
    command: tuple[str, ...],
    here: bool,
    read_only: tuple[str, ...],
    secrets: tuple[str, ...],
    **rest: Any,
) -> "Options":
    from cellos.client.local import Options, absolute, new_cell_id
    from cellos.errors import ConfigError, os_error_text

    for path in read_only:
        try:
            os.stat(path)
        except OSError as error:
            raise ConfigError(f"--ro {path}: {os_error_text(error)}") from error
    return Options(
        argv=command,
        here=absolute("") if here else None,
        read_only=tuple(absolute(path) for path in read_only),
        secrets=tuple(dict.fromkeys(secrets)),
        cell_id=new_cell_id(command[0]),
        **rest,
    )


def _execute(
    options: "Options", secrets: Mapping[str, str], launcher: "Launcher | None", interrupt: int, *, interactive: bool, as_json: bool
) -> "Finished":
    from cellos.client.local import run_options
    from cellos.ports import Output
    from cellos.supervisor.compose import open_host
    from cellos.supervisor.config import read_config

    host = open_host(read_config(os.environ), launcher, lambda text: say(f"cellos: {text}"))
    if as_json:
        streams = [Output(capture_bytes=JSON_CAPTURE_BYTES)] * 2
    else:
        streams = [Output(descriptor=_writable(number), wait=True, escape=os.isatty(number)) for number in (1, 2)]
    return run_options(
        host,
        options,
        secrets=secrets,
        stdin=0 if interactive else None,
        stdout=streams[0],
        stderr=streams[1],
        interrupt=interrupt,
    )


def _writable(descriptor: int) -> int:
    """The same. Raises ConfigError where all that is written there would be lost."""
    import fcntl

    from cellos.errors import ConfigError

    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise ConfigError(f"standard {'output' if descriptor == 1 else 'error'} is not open for writing")
    return descriptor


def exit_code(outcome: "CellOutcome", *, stopped_by: int | None) -> int:
    """What `cellos run` exits with for an outcome. `stopped_by` is the signal that asked us to stop."""
    import errno

    command = outcome.command
    if outcome.interrupted:
        import signal

        return BY_SIGNAL + (stopped_by or signal.SIGINT)
    if command is None or command.ended == "lost":
        return OURS
    if outcome.timed_out is not None:
        return TIMED_OUT
    if command.spawn_error is not None:
        if command.spawn_error.startswith("spec."):  # a member of the document, not the program
            return OURS
        return NOT_FOUND if command.spawn_errno == errno.ENOENT else CANNOT_EXECUTE
    if command.signal is not None:
        return BY_SIGNAL + command.signal
    if command.exit_code == 0 and outcome.reason is not None:
        return OURS
    return OURS if command.exit_code is None else command.exit_code


def print_error(code: str, text: str) -> None:
    """What `--json` prints where no cell was run."""
    import msgspec

    _write(msgspec.json.encode({"error": {"code": code, "text": text}, "code": OURS}) + b"\n", OURS)


def _json(finished: "Finished", code: int) -> bytes:
    import msgspec

    outcome, command = finished.outcome, finished.outcome.command
    report: dict[str, Any] = {
        "code": code,
        "runId": outcome.run_id,
        "cellId": outcome.cell_id,
        "outcome": outcome.outcome,
        "reason": outcome.reason,
        "exitCode": command and command.exit_code,
        "signal": command and command.signal,
        "spawnError": command and command.spawn_error,
        "timedOut": outcome.timed_out is not None,
        "interrupted": outcome.interrupted,
        "oomKilled": bool(command and command.oom_killed),
        "durationMs": command.duration_ms if command else None,
        "totalMs": outcome.duration_ms,
        **_text("stdout", command.stdout if command else b""),
        **_text("stderr", command.stderr if command else b""),
        "truncated": bool(command and command.truncated),
        "isolation": {
            "backend": outcome.isolation.backend,
            "enforced": list(outcome.isolation.enforced),
            "limits": dict(outcome.isolation.limits),
            "unbounded": list(outcome.isolation.unbounded),
        },
        "residue": [{"kind": each.kind, "detail": each.detail} for each in outcome.residue],
        "artifacts": [{"destination": each.destination, "bytesWritten": each.bytes_written} for each in outcome.receipts],
        "events": finished.evidence,
        "head": outcome.head,
        "unacknowledged": finished.unacknowledged.events,
    }
    return msgspec.json.encode(report) + b"\n"


def _text(name: str, data: bytes) -> dict[str, str]:
    """Output as text; what is not UTF-8 as base64, and said so."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {name: base64.b64encode(data).decode(), f"{name}Encoding": "base64"}


def _write(data: bytes, code: int) -> int:
    """All of it to standard output; `code`, or ours where it cannot be written. A reader that went away is no error of ours."""
    try:
        write_all(1, data)
    except BrokenPipeError:
        pass
    except OSError as error:
        say(f"cellos: {OUTPUT_LOST}{error.strerror}")
        return OURS
    return code
