"""Replay: event files that wait, published unchanged under their own ids.

Files are spools (named `<16 hex digits>.jsonl`), dead letters, and any other file of events. Of each run one message is in flight at a time
and the order is that of its chain, whichever files its events lie in; up to 64 runs are in flight at once. What the stream acknowledged
leaves a spool, and a file that has nothing else goes; a file of another name is never changed.

A repeated replay does no harm: within its window a stream drops what it has under the same message id, and readers know events by id.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from cellos.core.events import Event, parse_event
from cellos.errors import ConfigError, EventRefused, EventSinkError, EvidenceError, os_error_text
from cellos.eventlog.dead_letters import SUFFIX, DeadLetter
from cellos.eventlog.jetstream import PubAck
from cellos.eventlog.spool import keep_only

RUNS_IN_FLIGHT = 64

Kind = Literal["spool", "dead letter", "events"]
_SPOOL_NAME = re.compile(r"[0-9a-f]{16}\.jsonl")
_DEAD_LETTER = msgspec.json.Decoder(DeadLetter)


class Identity(Struct, frozen=True, kw_only=True):
    """What a subject is made of."""

    spec_id: str
    run_id: str
    tenant_id: str | None


class Entry(Struct, frozen=True, kw_only=True):
    """An event of a file: what orders it, and where its bytes are."""

    event_id: str
    run_id: str | None
    spec_id: str | None
    tenant_id: str | None
    sequence: int | None
    path: str
    offset: int
    length: int


class WaitingFile(Struct, frozen=True, kw_only=True):
    """A file that was read through. `fault` says why it stays, whatever is sent of it."""

    path: str
    kind: Kind
    entries: tuple[Entry, ...]
    size: int
    modified: float
    """Seconds of the epoch."""
    inode: int
    fault: str | None = None

    @property
    def runs(self) -> tuple[str, ...]:
        """Ids of the runs whose events it holds."""
        return tuple(dict.fromkeys(entry.run_id for entry in self.entries if entry.run_id is not None))


class Log(Protocol):
    """A connection to where events go, as `cellos.eventlog.nats.Connection` is one."""

    def send(self, subject: str, payload: bytes, *, message_id: str) -> int: ...
    def receive(self) -> tuple[int, PubAck | EventSinkError]: ...


class Replayed(Struct, kw_only=True):
    """What became of the entries."""

    acknowledged: set[Entry]
    duplicates: int = 0
    """Of the acknowledged: the stream had them."""
    refused: dict[Entry, str]
    """Events that it will never take."""
    failure: str | None = None
    """Why it ended before everything was sent."""
    interrupted: bool = False


def event_files(places: Iterable[str]) -> list[str]:
    """The files that are meant: each place itself, or the `*.jsonl` of a directory. Raises ConfigError."""
    found: list[str] = []
    for place in places:
        try:
            if os.path.isdir(place):
                found += sorted(os.path.join(place, name) for name in os.listdir(place) if name.endswith(SUFFIX))
            else:
                os.stat(place)
                found.append(place)
        except OSError as error:
            raise ConfigError(f"cannot read {place}: {os_error_text(error)}") from error
    return list(dict.fromkeys(found))


def read_file(path: str) -> WaitingFile | None:
    """Everything about a file but its bytes; None where it is gone. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ConfigError(f"cannot replay {path}: not a regular file")
            entries: list[Entry] = []
            wrapped = False
            fault = None
            for number, (offset, line) in enumerate(_lines(file), 1):
                if not line.endswith(b"\n"):
                    fault = f"line {number} has no end"
                    break
                try:
                    wrapped, entry = _entry(path, offset, line)
                except EvidenceError as error:
                    entries, fault = [], f"line {number}: {error.text}"
                    break
                entries.append(entry)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {os_error_text(error)}") from error
    kind: Kind = "dead letter" if wrapped else "spool" if _SPOOL_NAME.fullmatch(os.path.basename(path)) else "events"
    return WaitingFile(
        path=path, kind=kind, entries=tuple(entries), size=about.st_size, modified=about.st_mtime, inode=about.st_ino, fault=fault
    )


def replay(
    files: Sequence[WaitingFile],
    log: Log,
    subject_of: Callable[[Identity], str],
    on_progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Publish everything that the files hold, and await each acknowledgement. Changes no file.

    An event that the stream will never take is passed over; any other failure ends the replay after the answers to what is in flight.
    """
    done = Replayed(acknowledged=set(), refused={})
    ready = deque(_Run(subject_of(identity), entries) for identity, entries in by_run(files))
    flying: dict[int, tuple[_Run, Entry]] = {}
    try:
        while ready or flying:
            while ready and len(flying) < RUNS_IN_FLIGHT:
                run = ready.popleft()
                entry = run.waiting.popleft()
                try:
                    flying[log.send(run.subject, load(entry), message_id=entry.event_id)] = run, entry
                except EventRefused as error:
                    done.refused[entry] = error.text
                    _go_on(run, ready)
            if not flying:
                continue
            number, answer = log.receive()
            run, entry = flying.pop(number)
            match answer:
                case PubAck():
                    done.acknowledged.add(entry)
                    done.duplicates += answer.duplicate
                    on_progress(len(done.acknowledged))
                case EventRefused():
                    done.refused[entry] = answer.text
                case EventSinkError():
                    done.failure = done.failure or answer.text
                    ready.clear()
            if done.failure is None:
                _go_on(run, ready)
    except EventSinkError as error:
        done.failure = done.failure or error.text
    except KeyboardInterrupt:  # what was acknowledged until now shall not be sent again
        done.failure, done.interrupted = "interrupted", True
    return done


def by_run(files: Iterable[WaitingFile]) -> Iterator[tuple[Identity, list[Entry]]]:
    """The events of each run in the order of its chain; those of no run by themselves, in the order of their files."""
    runs: dict[str, list[Entry]] = {}
    for file in files:
        for entry in file.entries:
            runs.setdefault(entry.run_id or "", []).append(entry)
    for run_id, entries in runs.items():
        if not run_id:
            for entry in entries:
                yield Identity(spec_id=entry.spec_id or "-", run_id="-", tenant_id=entry.tenant_id), [entry]
            continue
        if all(entry.sequence is not None for entry in entries):
            entries.sort(key=lambda entry: entry.sequence or 0)
        spec_id = next((entry.spec_id for entry in entries if entry.spec_id), "-")
        tenant_id = next((entry.tenant_id for entry in entries if entry.tenant_id), None)
        yield Identity(spec_id=spec_id, run_id=run_id, tenant_id=tenant_id), entries


def consume(file: WaitingFile, done: Replayed) -> str | None:
    """Take what was acknowledged out of its file. Why the file still is there, None where it is gone."""
    left = [entry for entry in file.entries if entry not in done.acknowledged]
    if file.fault is not None:
        return file.fault
    if file.kind == "events":
        return "not a spool: kept as it is"
    if not file.entries:
        return "holds no event"
    why = next((done.refused[entry] for entry in left if entry in done.refused), None) or done.failure or "not sent"
    if len(left) == len(file.entries):
        return why
    try:
        with open(file.path, "rb") as opened:
            fcntl.flock(opened.fileno(), fcntl.LOCK_EX)
            now = os.fstat(opened.fileno())
            if (now.st_ino, now.st_size) != (file.inode, file.size):
                return "it has changed meanwhile; replay it again"
            keep_only(file.path, [_bytes(opened.fileno(), entry) for entry in left])
    except FileNotFoundError:
        return None
    except OSError as error:
        return os_error_text(error)
    except EventSinkError as error:
        return error.text
    return why if left else None


def load(entry: Entry) -> bytes:
    """The event's own bytes. Raises EventSinkError."""
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            line = _bytes(descriptor, entry)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EventSinkError(f"cannot read {entry.path}: {os_error_text(error)}") from error
    if len(line) != entry.length:
        raise EventSinkError(f"cannot read {entry.path}: it has changed meanwhile")
    return _unwrapped(line)[1]


class _Run:
    """A run whose events are being sent, one after the other."""

    def __init__(self, subject: str, entries: Iterable[Entry]) -> None:
        self.subject = subject
        self.waiting = deque(entries)


def _go_on(run: _Run, ready: deque[_Run]) -> None:
    if run.waiting:
        ready.append(run)


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in file:
        yield offset, line
        offset += len(line)


def _entry(path: str, offset: int, line: bytes) -> tuple[bool, Entry]:
    wrapped, event = _unwrapped(line)
    parsed = parse_event(event)
    run_id, spec_id = (_text(parsed, name) for name in ("runId", "specId"))
    correlation, chain = (parsed.members.get(name) for name in ("correlation", "chain"))
    tenant = _text(parsed, "tenantId") or (correlation.get("tenantId") if isinstance(correlation, dict) else None)
    sequence = chain.get("seq") if isinstance(chain, dict) else None
    return wrapped, Entry(
        event_id=parsed.id,
        run_id=run_id,
        spec_id=spec_id,
        tenant_id=tenant if isinstance(tenant, str) else None,
        sequence=sequence if isinstance(sequence, int) else None,
        path=path,
        offset=offset,
        length=len(line) - 1,
    )


def _text(event: Event, name: str) -> str | None:
    value = event.members.get(name)
    return value if isinstance(value, str) and value else None


def _unwrapped(line: bytes) -> tuple[bool, bytes]:
    """Whether it is a dead letter, and the event's bytes."""
    try:
        return True, bytes(_DEAD_LETTER.decode(line).event)
    except (msgspec.DecodeError, UnicodeError):
        return False, line.removesuffix(b"\n")


def _bytes(descriptor: int, entry: Entry) -> bytes:
    return os.pread(descriptor, entry.length, entry.offset)
