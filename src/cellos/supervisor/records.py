"""Records of live runs, and the sweep of those whose supervisor died.

Before a cell is created, `runs/<key>.json` says what the run is and what the backend will make on this host. The supervisor holds an
exclusive lock on it as long as it lives; the kernel drops the lock when it dies, however it dies. So a record that can be locked belongs to
a dead supervisor: `sweep` removes what its cell left, ends its chain with `destroyed` and removes the record. That end is failed,
`supervisor_lost`, forced; or the one that a supervisor noted which could not write it any more. Two sweeps at once do not disturb each
other: one gets the lock, and the other sees that the file is gone.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from cellos.core import events
from cellos.core.events import Draft, RunIdentity, parse_event, parse_signed, present
from cellos.core.evidence.chain import NONCE_BYTES, Chain
from cellos.core.evidence.redact import redact
from cellos.errors import ConfigError, EventSinkError, os_error_text
from cellos.eventlog.jsonl import JsonlSink
from cellos.eventlog.spool import Spool, read_lines, recover
from cellos.ports import CellBackend, EventSink, Residue
from cellos.supervisor.emitter import Emitter, Signer

LOST = "supervisor_lost"
MOST_REASON = 500
"""Characters of a noted reason: the record is written again in the block that it has, since the disk may be full."""
SUFFIX, NEW, BROKEN = ".json", ".new", ".broken"


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a run came to its end."""

    outcome: str
    reason: str | None


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a later process has to know about a run to clean up after it."""

    key: str
    pid: int
    run: RunIdentity
    ttl_seconds: int
    backend: str
    footprint: dict[str, Any]
    spool: str
    keep_spool: bool
    """The spool is the evidence itself, or the only copy of it."""
    jsonl: str | None = None
    jsonl_offset: int = 0
    """Length of the JSONL file when the run began: no event of the run stands before it."""
    redacted_fields: tuple[str, ...] = ()
    """What the run's own supervisor redacted: whoever ends the run does so too."""
    ending: Ending | None = None
    """Noted by a supervisor that could not record its run to the end."""


def redacted(run: RunIdentity, fields: frozenset[str]) -> RunIdentity:
    """A run as its record may know it: what no event may hold, no file of ours does."""
    if not fields:
        return run
    data = redact(present(correlation=run.correlation, tenantId=run.tenant_id, placement=run.placement), fields)
    return msgspec.structs.replace(
        run, correlation=data.get("correlation"), tenant_id=data.get("tenantId"), placement=data.get("placement")
    )


class HeldRecord:
    """A record of a run that this process is responsible for."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def remove(self) -> None:
        """The run has its end. Removed before it is unlocked, so that no sweep sees it."""
        if self._descriptor >= 0:
            _unlink(self.path)
        self.leave()

    def rewrite(self, record: RunRecord) -> None:
        """Say more than at first. Where it cannot be written, the record stays as it was, and nothing is raised: the run is over."""
        old, new = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0), msgspec.json.encode(record)
        try:
            if os.pwrite(self._descriptor, new, 0) != len(new):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self._descriptor, len(new))
        except OSError:
            with suppress(OSError):
                os.pwrite(self._descriptor, old, 0)
                os.ftruncate(self._descriptor, len(old))

    def leave(self) -> None:
        """Unlock the record and leave it to the next sweep. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Sweeper(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep needs of the world."""

    backend_of: Callable[[str], CellBackend | None]
    """The backend of a kind, None where this process has none such."""
    now_ns: Callable[[], int]
    random: Callable[[int], bytes]
    signer: Signer | None = None
    redacted_fields: frozenset[str] = frozenset()
    """Redacted beside what the run's own supervisor redacted."""
    warn: Callable[[str], None]
    """Gets a line for people about what could not be done."""
    reason: str = LOST
    """Of the ends that it writes."""


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was brought to its end for a supervisor that could not."""

    run_id: str
    cell_id: str
    residue: tuple[Residue, ...]
    text: str
    """For people: what was wrong, and that it is right now."""


def hold(directory: str, record: RunRecord) -> HeldRecord:
    """Write a record and lock it. It gets its name only when it is whole and locked, so that a sweep never sees half of one.

    Raises ConfigError.
    """
    path = f"{directory}/{record.key}{SUFFIX}"
    new = f"{directory}/{record.key}{NEW}"
    try:
        while True:
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not _same_file(descriptor, new):  # a sweep took it for the remains of a dead supervisor, between open and lock
                    os.close(descriptor)
                    continue
                _write(descriptor, msgspec.json.encode(record))
                os.rename(new, path)
            except BaseException:
                _unlink(new)
                os.close(descriptor)
                raise
            return HeldRecord(path, descriptor)
    except OSError as error:
        raise ConfigError(f"cannot write the run record {path}: {os_error_text(error)}") from error


def sweep(directory: str, by: Sweeper) -> tuple[Swept, ...]:
    """End every run of the directory whose supervisor is dead. Costs one listing where there is none.

    What cannot be done is told and tried again at the next sweep; a record that cannot be read is set aside under another name. Never
    raises for them.
    """
    done = []
    for name in sorted(os.listdir(directory)):
        if not name.endswith((SUFFIX, NEW)):
            continue
        path = f"{directory}/{name}"
        try:
            held = _lock_abandoned(path)
            if held is None:
                continue
            if name.endswith(NEW):  # its supervisor died before it created anything
                held.remove()
                continue
            try:
                swept = _end_run(path, held, by)
            finally:
                held.leave()
        except Exception as error:  # noqa: BLE001 - somebody else's remains never keep a new run from starting
            by.warn(f"cannot sweep {path}: {error}")
            continue
        if swept is not None:
            done.append(swept)
    return tuple(done)


def _lock_abandoned(path: str) -> HeldRecord | None:
    """The record, locked; None where its supervisor lives or somebody else just swept it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same_file(descriptor, path):
            return HeldRecord(path, descriptor)
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _end_run(path: str, held: HeldRecord, by: Sweeper) -> Swept | None:
    try:
        with open(path, "rb") as file:
            record = msgspec.json.decode(file.read(), type=RunRecord)
    except (msgspec.DecodeError, UnicodeError) as error:
        os.rename(path, path + BROKEN)
        by.warn(f"run record {path} cannot be read ({error}); set aside as {path}{BROKEN}")
        return None
    backend = by.backend_of(record.backend)
    if backend is None:
        by.warn(f"run record {path} is of the {record.backend} backend, which is not there; left for a supervisor that has it")
        return None
    residue = backend.sweep(record.footprint)
    if not os.path.lexists(record.spool):  # made before the cell, removed after the last event: not begun, or wholly told
        held.remove()
        return None
    try:
        ended = _end_evidence(record, residue, by)
    except EventSinkError as error:
        raise EventSinkError(f"{error.text}; mend that, or give the record up: remove {path} (the events are in {record.spool})") from error
    held.remove()
    run = f"run {record.run.run_id} (cell {record.run.cell_id})"
    if not ended:
        text = f"{run} was over, but its events may not all have been sent; {record.jsonl or record.spool} has them now"
    elif record.ending is not None:
        text = f"{run} could not be recorded to its end ({record.ending.reason}); its record is complete now"
    else:
        text = f"{run} was left unfinished by its supervisor; its record is complete now"
    return Swept(run_id=record.run.run_id, cell_id=record.run.cell_id, residue=residue, text=text)


def _end_evidence(record: RunRecord, residue: tuple[Residue, ...], by: Sweeper) -> bool:
    """Continue the chain from the spool with `destroyed`, and give the JSONL file all that it lacks. Whether the first was necessary."""
    run = record.run
    last = recover(record.spool).last
    chain = Chain.after(last) if last is not None else Chain.first(run.run_id, run.spec_hash, by.random(NONCE_BYTES).hex())
    endless = last is None or parse_event(last).type != events.DESTROYED
    if endless:
        signer = signer_after(last, by.signer)
        redacted = by.redacted_fields.union(record.redacted_fields)
        spool = Spool(record.spool, resume=True)
        try:
            emitter = Emitter(chain=chain, spool=spool, redacted_fields=redacted, signer=signer, now_ns=by.now_ns, random=by.random)
            emitter.emit(_end(record, residue, by.reason))
        finally:
            spool.close()
    if record.jsonl is not None:
        sink = JsonlSink(record.jsonl)
        try:
            _catch_up(record, record.jsonl, sink)
        finally:
            sink.close()
    if not record.keep_spool:
        _unlink(record.spool)
    return endless


def signer_after(last: bytes | None, signer: Signer | None) -> Signer | None:
    """Who signs what is added after an event: nobody where that one is not signed, as a run is signed throughout or not at all.

    Another key may take over, but no other algorithm. Raises ConfigError where there has to be a signature that nobody here can make.
    """
    envelope = parse_signed(last)[1] if last is not None else None
    if envelope is None:
        return signer if last is None else None
    if signer is None or signer.algorithm != envelope.algorithm:
        from cellos.core.documents.wording import quoted

        raise ConfigError(
            f"the run was signed ({envelope.algorithm}, key {quoted(envelope.signer_kid)}); start with its signing variables "
            "(CELLOS_EVENT_SIGNING, _KID, _KEY_BASE64) to end its record"
        )
    return signer


def _end(record: RunRecord, residue: tuple[Residue, ...], lost: str) -> Draft:
    ending = record.ending or Ending(outcome="failed", reason=lost)
    draft = events.destroyed(
        record.run,
        ttl_seconds=record.ttl_seconds,
        outcome=ending.outcome,
        reason=ending.reason,
        residue_class="documented_exception" if residue else "none",
        residue_exception=residue,
    )
    return draft if record.ending is not None else Draft(draft.type, {**draft.data, "terminalState": "forced"})


def _catch_up(record: RunRecord, path: str, sink: EventSink) -> None:
    """Send the events of the spool that the JSONL file at `path` lacks, in order.

    What went through a pipe or device cannot be looked up: there all come again, and readers tell by their ids.
    """
    status = os.stat(path)
    missing = dict.fromkeys(read_lines(record.spool))
    if stat.S_ISREG(status.st_mode):
        offset = record.jsonl_offset if record.jsonl_offset <= status.st_size else 0  # shorter than it was: another file under that name
        for line in read_lines(path, offset=offset):
            missing.pop(line, None)
    for line in missing:
        sink.emit(parse_event(line).id, line)


def _same_file(descriptor: int, path: str) -> bool:
    """The lock is worth something only while the locked file still has its name."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    locked = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (locked.st_dev, locked.st_ino)


def _write(descriptor: int, data: bytes) -> None:
    os.ftruncate(descriptor, 0)
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
