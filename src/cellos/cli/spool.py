"""`cellos spool`: events that NATS has not acknowledged yet: what waits, and sending it.

A run that is not over keeps its spool to itself. Where a supervisor died, the next start of one ends the run; then its events can be sent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from cellos.errors import EventSinkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cellos.eventlog.replay import Identity, Replayed, WaitingFile

    _SubjectOf = Callable[[Identity], str]

NOT_OVER = "its run is not over"
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def spool() -> None:
    """Events that wait to be sent to NATS."""


@spool.command(
    epilog="""\b
Examples:
  cellos spool replay                       what waits in the state directory
  cellos spool replay /var/lib/dlq          the dead letters of that directory
  cellos spool replay --dry-run             what would be sent, and on which subject

Exit code: 0 when everything was acknowledged, 1 when something still waits; the output says what, where and why.
"""
)
@click.argument("places", nargs=-1, metavar="[DIR | FILE]...")
@click.option("--nats-url", metavar="URL", help="The server; default NATS_URL. Credentials are safer in the variable.")
@click.option("--subject", metavar="SUBJECT", help="Publish everything on this subject, whatever the variables say.")
@click.option("--dry-run", is_flag=True, help="Send nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.pass_context
def replay(ctx: click.Context, places: tuple[str, ...], nats_url: str | None, subject: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Send waiting events to NATS, unchanged, each run in its order.

    What the stream has acknowledged leaves its spool; a spool or dead letter of which nothing is left is removed. Other files of events can
    be sent, too, and stay as they are.
    """
    from cellos.eventlog import nats_url as urls
    from cellos.eventlog.replay import consume
    from cellos.eventlog.subject import read_subject_settings, resolve_subject

    settings = read_subject_settings({"CELL_OS_EVENTS_SUBJECT": subject} if subject else os.environ)

    def subject_of(run: Identity) -> str:
        return resolve_subject(settings, spec_id=run.spec_id, run_id=run.run_id, tenant_id=run.tenant_id)

    url = nats_url or os.environ.get("NATS_URL", "").strip() or urls.DEFAULT_URL
    urls.read_servers(url)
    files, unfinished = _waiting(places)
    if dry_run:
        _print_plan(files, unfinished, subject_of, as_json=as_json)
        return
    done = _send(files, url, subject_of)
    states = {file.path: consume(file, done) for file in files}
    _print_result(files, unfinished, done, states, urls.shown_url(url), as_json=as_json)
    left = done.failure or done.refused or any(file.fault for file in files) or any(_stays(file, states) for file in files)
    ctx.exit(INTERRUPTED if done.interrupted else 1 if left else 0)


@spool.command("ls")
@click.argument("places", nargs=-1, metavar="[DIR | FILE]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per file.")
def list_waiting(places: tuple[str, ...], *, as_json: bool) -> None:
    """List what waits: run, events, bytes, age, file."""
    files, unfinished = _waiting(places)
    now = time.time()
    rows = []
    for file in [*files, *unfinished]:
        state = file.fault or (NOT_OVER if file in unfinished else "waits")
        age = max(0, int(now - file.modified))
        if as_json:
            about = {"file": file.path, "kind": file.kind, "runs": file.runs, "events": len(file.entries), "bytes": file.size}
            click.echo(json.dumps(about | {"ageSeconds": age, "state": state}))
        else:
            rows.append((_run_of(file), str(len(file.entries)), str(file.size), _age(age), state, file.path))
    if rows:
        _print_table(("RUN", "EVENTS", "BYTES", "AGE", "STATE", "FILE"), rows)
    elif not as_json:
        click.echo("nothing waits")


def _waiting(places: Sequence[str]) -> tuple[list[WaitingFile], list[WaitingFile]]:
    """Files to send, and those whose run is not over. Raises ConfigError."""
    from cellos.eventlog.replay import event_files, read_file

    files: list[WaitingFile] = []
    unfinished: list[WaitingFile] = []
    for path in event_files(places or _default_directory(os.environ)):
        file = read_file(path)
        if file is not None:
            (unfinished if file.kind == "spool" and _has_record(path) else files).append(file)
    return files, unfinished


def _default_directory(environment: Mapping[str, str]) -> Sequence[str]:
    """The spools of this user; none where nothing was ever run."""
    from cellos.supervisor.state import find_state_directory

    state = find_state_directory(environment)
    return [] if state is None else [state.spool]


def _has_record(path: str) -> bool:
    """A supervisor writes the record of a run before its spool, and removes it when the run is over. See supervisor/records.py."""
    from cellos.supervisor.records import SUFFIX
    from cellos.supervisor.state import RUNS

    directory, name = os.path.split(os.path.abspath(path))
    return os.path.lexists(f"{os.path.dirname(directory)}/{RUNS}/{name.partition('.')[0]}{SUFFIX}")


def _send(files: Sequence[WaitingFile], url: str, subject_of: _SubjectOf) -> Replayed:
    from cellos.eventlog import nats
    from cellos.eventlog.replay import Replayed
    from cellos.eventlog.replay import replay as send_all

    total = sum(len(file.entries) for file in files)
    if not total:
        return Replayed(acknowledged=set(), refused={})
    try:
        connection = nats.connect(url, ca_file=os.environ.get("NATS_CA_FILE", "").strip() or None)
    except EventSinkError as error:
        return Replayed(acknowledged=set(), refused={}, failure=error.text)
    watched = sys.stderr is not None and sys.stderr.isatty()

    def show(count: int) -> None:
        if watched and (count % 100 == 0 or count == total):
            sys.stderr.write(f"\r{count} of {total} events acknowledged" + ("\n" if count == total else ""))

    try:
        return send_all(files, connection, subject_of, show)
    finally:
        connection.close()


def _stays(file: WaitingFile, states: Mapping[str, str | None]) -> bool:
    return file.kind != "events" and states[file.path] is not None and bool(file.entries)


def _print_plan(files: Sequence[WaitingFile], unfinished: Sequence[WaitingFile], subject_of: _SubjectOf, *, as_json: bool) -> None:
    from cellos.eventlog.replay import by_run

    plan = [(run.run_id, len(entries), subject_of(run)) for run, entries in by_run(files)]
    faults = [(file.path, file.fault) for file in files if file.fault] + [(file.path, NOT_OVER) for file in unfinished]
    if as_json:
        runs = [{"runId": run_id, "events": events, "subject": subject} for run_id, events, subject in plan]
        click.echo(json.dumps({"runs": runs, "skipped": [{"file": path, "reason": why} for path, why in faults]}))
        return
    if plan:
        _print_table(("RUN", "EVENTS", "SUBJECT"), [(run_id, str(events), subject) for run_id, events, subject in plan])
    for path, why in faults:
        click.echo(f"{path}: {why}", err=True)
    click.echo(f"{sum(events for _, events, _ in plan)} events of {len(plan)} runs would be sent")


def _print_result(
    files: Sequence[WaitingFile],
    unfinished: Sequence[WaitingFile],
    done: Replayed,
    states: Mapping[str, str | None],
    server: str,
    *,
    as_json: bool,
) -> None:
    waiting = sum(len(file.entries) for file in files) - len(done.acknowledged)
    if as_json:
        about = [
            {
                "file": file.path,
                "kind": file.kind,
                "runs": file.runs,
                "events": len(file.entries),
                "acknowledged": sum(entry in done.acknowledged for entry in file.entries),
                "removed": states[file.path] is None,
                "reason": states[file.path],
            }
            for file in files
        ]
        about += [{"file": file.path, "kind": file.kind, "runs": file.runs, "removed": False, "reason": NOT_OVER} for file in unfinished]
        totals = {"acknowledged": len(done.acknowledged), "duplicates": done.duplicates, "waiting": waiting, "error": done.failure}
        click.echo(json.dumps({"server": server} | totals | {"files": about}))
        return
    for file in files:
        why = states[file.path]
        if why is not None and (file.kind != "events" or file.fault):
            click.echo(f"{file.path}: {why}", err=True)
    for file in unfinished:
        click.echo(f"{file.path}: {NOT_OVER}", err=True)
    if not files:
        click.echo("nothing waits" if not unfinished else "nothing else waits")
        return
    again = f" ({done.duplicates} of them it had already)" if done.duplicates else ""
    rest = f"; {waiting} still wait" if waiting else ""
    click.echo(f"{len(done.acknowledged)} events acknowledged by {server}{again}{rest}")


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _run_of(file: WaitingFile) -> str:
    if len(file.runs) == 1:
        return file.runs[0]
    return f"{len(file.runs)} runs" if file.runs else "-"


def _age(seconds: int) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
