"""`cellos events`: the record of a run, readable, with the verdict on its chain and its signatures; or all events of a control plane.

The record is read twice, once to check it and once to show it run by run: a place is remembered for each event, so that neither the length
of a record nor runs that are interleaved in it cost much memory.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import click

from cellos.cli import timeline
from cellos.cli.control_plane import server_options
from cellos.core.events import parse_event
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.verify import MAX_LINE_BYTES, Fault, Report, RunReport, Verifier
from cellos.errors import ConfigError, EvidenceError, os_error_text

KEYS = "CELLOS_EVENT_VERIFY_KEYS_PATH"
HMAC_KEYS = "CELLOS_EVENT_VERIFY_HMAC_KEYS_PATH"
REQUIRE_SIGNED = "CELLOS_EVENT_REQUIRE_SIGNED"
_TRUE = frozenset({"1", "true", "yes", "on"})
_SUFFIX = ".jsonl"
_NAMES_SHOWN = 5
_HEX_DIGITS = frozenset("0123456789abcdef")


@click.command(
    epilog="""\b
Examples:
  cellos events                          the latest run of `cellos run`
  cellos events 019a                     the run whose id begins so
  cellos events audit.jsonl --json       every run in a file, one JSON object each
  ssh host cat audit.jsonl | cellos events -
  cellos events audit.jsonl --keys keys.json --require-signed
  cellos events --formation word-count   every run of a formation's members, from the control plane
  cellos events --follow                 what happens from now on, wherever it happens
  cellos events --follow --since 0       and all that did

--follow prints a line per event on a terminal; with --json or into a pipe, one JSON object {"seq", "event"} per line. A connection that is
lost is made again, from the last event on: none is missing, none comes twice.

Exit code: 0 when every run is complete and verified, 1 otherwise. The chain of an unsigned record shows a change to it, but not that
somebody rewrote all of it from some event on, to the end. That shows only against the digest of the last event, noted elsewhere at the
time (--head), and in signed records (--keys). Without --require-signed a record may also be unsigned throughout.

Variables: CELLOS_EVENT_VERIFY_KEYS_PATH, CELLOS_EVENT_VERIFY_HMAC_KEYS_PATH and CELLOS_EVENT_REQUIRE_SIGNED stand for options
that are not given.
"""
)
@click.argument("source", required=False, metavar="[FILE | RUN | -]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per run: its verdict and its events.")
@click.option("--head", metavar="DIGEST", help="The sha256 that the last event must have (`verdict.last` of --json at the time).")
@click.option("--keys", metavar="FILE", help="Check signatures with the public keys in FILE: a JSON object, key id to base64url.")
@click.option("--hmac-keys", metavar="FILE", help="The same with shared keys, for events signed with HMAC.")
@click.option("--require-signed", is_flag=True, help="An event that is not signed is a fault.")
@click.option("--formation", metavar="NAME|ID", help="The record of all runs of a formation, as the control plane's log has it.")
@click.option("-f", "--follow", "following", is_flag=True, help="Show the events of the control plane as they come, until Ctrl-C.")
@click.option("--since", type=click.IntRange(0, (1 << 64) - 1), metavar="SEQ", help="With --follow: the events behind that one, too.")
@click.option("--subject", metavar="FILTER", help="With --follow: events on these subjects only; * is one token, > the rest.")
@server_options
@click.pass_context
def events(
    ctx: click.Context,
    source: str | None,
    as_json: bool,
    head: str | None,
    keys: str | None,
    hmac_keys: str | None,
    require_signed: bool,
    formation: str | None,
    following: bool,
    since: int | None,
    subject: str | None,
    server: str | None,
    token_file: str | None,
) -> None:
    """Show what happened in a run, step by step, and check the record for changes.

    FILE is a file of events (JSON lines), RUN the id of a run of `cellos run` or its beginning, - the standard input. Without any of them:
    the latest run.
    """
    if formation == "":
        raise click.UsageError("--formation takes the name or the id of a formation, and is empty", ctx)
    if following:
        if source or head or keys or hmac_keys or require_signed or formation:
            raise click.UsageError("--follow shows the events of a control plane: no file and no check of a record goes with it", ctx)
        from cellos.cli.follow import follow

        follow(server, token_file, since=since, subject=subject, as_json=as_json)
    if since is not None or subject is not None:
        raise click.UsageError("--since and --subject go with --follow", ctx)
    if formation is None and (server is not None or token_file is not None):
        raise click.UsageError("--server and --token-file go with --follow and --formation", ctx)
    if formation is not None and source is not None:
        raise click.UsageError("give a file or a run, or --formation", ctx)
    if head is not None and (len(head) != 64 or not _HEX_DIGITS.issuperset(head)):
        raise click.UsageError("--head takes a sha256: 64 hex digits, lower case", ctx)
    demand = signatures(os.environ, keys=keys, hmac_keys=hmac_keys, require=require_signed)
    path = "-" if formation is not None or source == "-" else find(source, os.environ)
    where = _shown(path) if formation is None else f"the record of formation {formation}"
    with _open(path) if formation is None else fetched(formation, server, token_file) as file:
        record = check(file, head=head, demand=demand)
        if not record.report.runs and not record.report.faults:
            why = "none of its events belongs to one" if record.report.loose else "it is empty"
            raise EvidenceError(f"no run in {where}: {why}")
        if as_json:
            print_json(record, file, sys.stdout)
        else:
            print_text(record, file, sys.stdout, where=where)
    ctx.exit(0 if record.report.verified else 1)


def fetched(formation: str, server: str | None, token_file: str | None) -> IO[bytes]:
    """All events of a formation's runs, in the order of the log, as a file. Raises ServerError."""
    from tempfile import TemporaryFile

    from cellos.cli.control_plane import connected
    from cellos.core.formation.runs import runs_of

    file = TemporaryFile()  # noqa: SIM115  # the caller closes it
    with connected(server, token_file) as control_plane:
        subject = runs_of(control_plane.formation(formation)["id"])
        cursor = 0
        while page := control_plane.events(since=cursor, limit=1000, subject=subject).events:
            file.writelines(bytes(entry.event) + b"\n" for entry in page)
            cursor = page[-1].seq
    file.seek(0)
    return file


def find(source: str | None, environment: Mapping[str, str]) -> str:
    """The file that is meant by a path, a run id or the beginning of one; None is the latest run. Raises EvidenceError."""
    if source is not None and (os.path.exists(source) or "/" in source):
        return source
    if source == "":
        raise EvidenceError("the name is empty; give a file, a run id or the beginning of one")
    from cellos.supervisor.state import find_state_directory

    state = find_state_directory(environment)
    directory = "" if state is None else state.evidence
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(_SUFFIX)) if directory else []
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise EvidenceError(f"cannot read {directory}: {os_error_text(error)}") from error
    where = f" in {directory}" if directory else ""
    if source is None:
        if not names:
            raise EvidenceError(f"no run is recorded{where}; `cellos run -- COMMAND` makes one")
        return max((os.path.join(directory, name) for name in names), key=_modified)
    if source + _SUFFIX in names:
        return os.path.join(directory, source + _SUFFIX)
    found = [name for name in names if name.startswith(source)]
    if not found:
        raise EvidenceError(f"no file {source}, and no run of that name{where}")
    if len(found) > 1:
        more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
        shown = ", ".join(name.removesuffix(_SUFFIX) for name in found[:_NAMES_SHOWN])
        raise EvidenceError(f"{source} is the beginning of several runs: {shown}{more}")
    return os.path.join(directory, found[0])


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked of signatures: `ring` None is nothing at all."""

    ring: Keyring | None = None
    require: bool = False


def signatures(environment: Mapping[str, str], *, keys: str | None, hmac_keys: str | None, require: bool) -> Demand:
    """What options ask, and variables where there is no option; a blank variable is one that is not set. Raises ConfigError."""
    keys = keys or environment.get(KEYS, "").strip() or None
    hmac_keys = hmac_keys or environment.get(HMAC_KEYS, "").strip() or None
    require = require or environment.get(REQUIRE_SIGNED, "").strip().lower() in _TRUE
    if keys is None and hmac_keys is None:
        if require:
            raise ConfigError(
                f"events are required to be signed (--require-signed or {REQUIRE_SIGNED}), but without keys no signature can be checked: "
                f"give --keys FILE or {KEYS}"
            )
        return Demand()
    from cellos.supervisor.keyfiles import load_keyring

    return Demand(ring=load_keyring(keys, hmac_keys), require=require)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A checked record; `places` has, for each run of the report, where its lines begin in the file. `keys`: there were some."""

    report: Report
    places: tuple[array[int], ...]
    keys: bool


def check(file: IO[bytes], *, head: str | None = None, demand: Demand = Demand()) -> Record:
    """Read a record from its first line to its last. `head`: the digest that the last event of the only run must have."""
    verifier = Verifier(ring=demand.ring, require_signed=demand.require)
    places: list[array[int]] = []
    try:
        for place, line in _lines(file):
            run = verifier.feed(line)
            if run is not None:
                if run == len(places):
                    places.append(array("Q"))
                places[run].append(place)
    except OSError as error:
        raise EvidenceError(f"cannot read the record: {os_error_text(error)}") from error
    report = verifier.finish()
    if head is not None:
        if len(report.runs) != 1:
            raise EvidenceError(f"--head is the digest of one run, and this record has {len(report.runs)}")
        report = verifier.finish(heads={report.runs[0].run_id: head})
    return Record(report=report, places=tuple(places), keys=demand.ring is not None)


def print_text(record: Record, file: IO[bytes], output: IO[str], *, where: str) -> None:
    """Every run with its verdict, then what belongs to no run: of `where`, and not all of it where there is much."""
    paint = output.isatty() and "NO_COLOR" not in os.environ
    for number, run in enumerate(record.report.runs):
        if number:
            output.write("\n")
        start: int | None = None
        for index, line in enumerate(_lines_at(file, record.places[number])):
            event = parse_event(line)
            if index == 0:
                start = timeline.start_of(event)
                output.write(f"{_painted(timeline.header(run, event, keys=record.keys), 'bold', paint=paint)}\n")
            for text in timeline.event_lines(event, start):
                output.write(f"{text}\n")
        colour = {"verified": "green", "unfinished": "yellow"}.get(run.state, "red")
        output.write(f"{_painted(timeline.verdict(run), colour, paint=paint)}\n")
    if record.report.loose:
        output.write(f"\nbeside the runs: {record.report.loose} events of no run, not chained\n")
    for text in timeline.fault_lines(record.report.faults, where):
        output.write(f"{_painted(text, 'red', paint=paint)}\n")


def print_json(record: Record, file: IO[bytes], output: IO[str]) -> None:
    """One object per run on a line of its own, and one about what belongs to no run, if there is anything: faults, and how many events."""
    for run, places in zip(record.report.runs, record.places, strict=True):
        about = {"cellId": run.cell_id, "runId": run.run_id, "specId": run.spec_id, "specHash": run.spec_hash, "verdict": _verdict(run)}
        output.write(json.dumps(about)[:-1] + ', "events": [')
        for index, line in enumerate(_lines_at(file, places)):
            output.write(f"{', ' if index else ''}{json.dumps(json.loads(line))}")
        output.write("]}\n")
    if record.report.faults or record.report.loose:
        rest = {"faults": [_fault(fault) for fault in record.report.faults], "eventsOfNoRun": record.report.loose}
        output.write(f"{json.dumps(rest)}\n")


def _verdict(run: RunReport) -> dict[str, Any]:
    return {
        "state": run.state,
        "count": run.events,
        "first": run.first,
        "last": run.last,
        "startChecked": run.start_checked,
        "signature": run.signature,
        "signers": list(run.signers),
        "fault": None if run.fault is None else _fault(run.fault),
    }


def _fault(fault: Fault) -> dict[str, Any]:
    return {"kind": fault.kind, "line": fault.line, "text": fault.text}


def _open(path: str) -> IO[bytes]:
    """A file that can be read twice. Raises EvidenceError."""
    try:
        given = open(0, "rb", closefd=False) if path == "-" else open(path, "rb")  # noqa: SIM115  # the caller closes it
        if path != "-" and stat.S_ISCHR(os.fstat(given.fileno()).st_mode):
            given.close()
            raise EvidenceError(f"cannot read {_shown(path)}: it is a device, which may have no end")
        if given.seekable():
            return given
        from shutil import copyfileobj
        from tempfile import TemporaryFile

        with given:
            copy = TemporaryFile()  # noqa: SIM115  # as above
            copyfileobj(given, copy)
            copy.seek(0)
            return copy
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        why = os_error_text(error) if isinstance(error, OSError) else error
        raise EvidenceError(f"cannot read {_shown(path)}: {why}") from error


def _shown(path: str) -> str:
    return "standard input" if path == "-" else path


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Every line with its place. Of one that is too long to be an event, only a beginning that is too long, too."""
    longest = MAX_LINE_BYTES + 2
    place = file.tell()
    while line := file.readline(longest):
        length = len(line)
        if length == longest and not line.endswith(b"\n"):
            while rest := file.readline(longest):
                length += len(rest)
                if rest.endswith(b"\n"):
                    line += b"\n"
                    break
        yield place, line
        place += length


def _lines_at(file: IO[bytes], places: array[int]) -> Iterator[bytes]:
    for place in places:
        file.seek(place)
        yield file.readline(MAX_LINE_BYTES + 2).removesuffix(b"\n")


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _painted(text: str, colour: str, *, paint: bool) -> str:
    if not paint:
        return text
    return click.style(text, bold=True) if colour == "bold" else click.style(text, fg=colour)
