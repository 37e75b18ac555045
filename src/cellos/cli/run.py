"""`cellos run -- COMMAND`: one command in a cell, with evidence.

The command's output and exit code are our own; then one line on standard error says how long it took, what isolated it and where the
record is. Codes of ours: 124 time-out, 125 ours, 126 cannot be executed, 127 not found, 128 + n signal n.
"""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cellos.cli.process import StopSignals, say

if TYPE_CHECKING:
    from cellos.client.local import Options
    from cellos.errors import CellosError
    from cellos.sandbox.launcher import Launcher
    from cellos.supervisor.compose import Finished
    from cellos.supervisor.run import CellOutcome

TIMED_OUT, OURS, CANNOT_EXECUTE, NOT_FOUND, BY_SIGNAL = 124, 125, 126, 127, 128
JSON_CAPTURE_BYTES = 16 << 20
MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _duration(_: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """`30s`, `1500ms`, `5m`, `1h`; a bare number is seconds. In milliseconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|)", value, re.ASCII)
    milliseconds = round(float(match[1]) * MILLISECONDS[match[2] or "s"]) if match else 0
    if milliseconds <= 0:
        raise click.BadParameter(f"{value!r} is not a time above 0, like 30s, 1500ms, 5m or 1h", param=option)
    return milliseconds


def _size(_: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """`512M`, `1G`, `65536`. In bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", value, re.ASCII | re.IGNORECASE)
    size = int(match[1]) * BYTES[match[2].upper()] if match else 0
    if not 0 < size < 1 << 63:
        raise click.BadParameter(f"{value!r} is not a size above 0, like 512M or 1G", param=option)
    return size


def _files(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """`FILE` or `FILE:DEST`."""
    found = []
    for value in values:
        file, separator, place = value.partition(":")
        if not os.path.basename(file):
            raise click.BadParameter(f"{value!r} is not FILE or FILE:DEST", param=option)
        found.append((file, place if separator and place else os.path.basename(file)))
    return tuple(found)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-i", "interactive", is_flag=True, help="Relay our standard input to the command; else it reads /dev/null.")
@click.option("--here", is_flag=True, help="The current directory, read-only, is the working directory (else the cell's empty /work).")
@click.option("--ro", "read_only", multiple=True, metavar="DIR", help="Show that directory, read-only, at the same path.")
@click.option("--out", "out", multiple=True, metavar="FILE[:DEST]", callback=_files, help="Copy FILE out of /work after success.")
@click.option("--allow", multiple=True, metavar="HOST[:PORT]", help="Let the command reach that host (not built yet).")
@click.option("--secret", "secrets", multiple=True, metavar="KEY", help="Hand KEY of our environment to the command.")
@click.option(
    "--timeout", "timeout_ms", metavar="TIME", callback=_duration, help="End the command after that time: 30s, 1500ms, 5m, 1h [1h]."
)
@click.option("--mem", "memory_bytes", metavar="SIZE", callback=_size, help="Memory limit: 512M, 1G.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on standard output, the command's output in it, instead of all else."
)
@click.option("--print-spec", is_flag=True, help="Print the document that would be run, and run nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
@click.pass_context
def run(ctx: click.Context, /, *, interactive: bool, as_json: bool, print_spec: bool, **given: Any) -> NoReturn:
    """Run a COMMAND in a cell: no network, no files of this host but the system, nothing left afterwards.

    Exit code: the command's own; 124 time-out, 126 cannot be executed, 127 not found, 128 + n signal n, 125 ours.
    """
    from cellos.client.local import document_bytes, take_secrets
    from cellos.errors import CellosError

    try:
        options = _options(**given)
        if print_spec:
            _write(document_bytes(options))
            ctx.exit(0)
        secrets = take_secrets(options.secrets, os.environ)
        with StopSignals() as stop:
            finished = _execute(options, secrets, ctx.obj, stop.descriptor, interactive=interactive, as_json=as_json)
    except CellosError as error:
        _fail(error, as_json=as_json)
        ctx.exit(OURS)
    code = exit_code(finished.outcome, stopped_by=stop.received)
    if as_json:
        _write(_json(finished, code))
    else:
        from cellos.cli import words

        say(words.closing_line(options.argv[0], finished.outcome, finished.evidence, code))
        for hint in words.hints(options, finished.outcome):
            say(f"cellos: {hint}")
    ctx.exit(code)


def _options(
    *,
    command: tuple[str, ...],
    here: bool,
    read_only: tuple[str, ...],
    secrets: tuple[str, ...],
    **rest: Any,
) -> "Options":
    from cellos.client.local import Options, new_cell_id
    from cellos.errors import ConfigError

    for path in read_only:
        if not os.path.exists(path):
            raise ConfigError(f"--ro {path}: no such directory")
    return Options(
        argv=command,
        here=os.getcwd() if here else None,
        read_only=tuple(os.path.abspath(path) for path in read_only),
        secrets=tuple(dict.fromkeys(secrets)),
        cell_id=new_cell_id(command[0]),
        **rest,
    )


def _execute(
    options: "Options", secrets: Mapping[str, str], launcher: "Launcher | None", interrupt: int, *, interactive: bool, as_json: bool
) -> "Finished":
    from cellos.client.local import run_options
    from cellos.ports import Output
    from cellos.supervisor.compose import open_host, read_config

    host = open_host(read_config(os.environ), launcher, lambda text: say(f"cellos: {text}"))
    if as_json:
        streams = [Output(capture_bytes=JSON_CAPTURE_BYTES)] * 2
    else:
        streams = [Output(descriptor=number, escape=os.isatty(number)) for number in (1, 2)]
    return run_options(
        host,
        options,
        secrets=secrets,
        stdin=0 if interactive else None,
        stdout=streams[0],
        stderr=streams[1],
        interrupt=interrupt,
    )


def exit_code(outcome: "CellOutcome", *, stopped_by: int | None) -> int:
    """What `cellos run` exits with for an outcome. `stopped_by` is the signal that asked us to stop."""
    import errno
    import signal

    command = outcome.command
    if outcome.interrupted:
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


def _fail(error: "CellosError", *, as_json: bool) -> None:
    say(f"cellos: {error}")
    if as_json:
        import msgspec

        _write(msgspec.json.encode({"error": {"code": error.code, "text": str(error)}, "code": OURS}) + b"\n")


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
    }
    return msgspec.json.encode(report) + b"\n"


def _text(name: str, data: bytes) -> dict[str, str]:
    """Output as text; what is not UTF-8 as base64, and said so."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {name: base64.b64encode(data).decode(), f"{name}Encoding": "base64"}


def _write(data: bytes) -> None:
    """All of it to standard output. A reader that went away is no error of ours."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(1, view) :]
    except BrokenPipeError:
        return
