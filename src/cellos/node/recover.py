"""What a former life of this node left in its spool: told to the log now, as far as the log will hear it.

The sweep of records has ended the cells, and the chains of those that had one. Here every spool is brought to its end and published after
what the log has already. Where the log has nothing of it, nothing was run, and where it has something else, somebody closed the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from cellos.core import events
from cellos.core.events import Event, RunIdentity, parse_event
from cellos.core.evidence.chain import Chain
from cellos.core.formation.runs import CLAIMED, NODE_RESTARTED, Attempt, run_subject
from cellos.errors import CellosError, ConfigError, EventLogError
from cellos.eventlog.log import EventLog
from cellos.eventlog.run_log import RunPublisher
from cellos.eventlog.spool import Spool, read_lines, recover
from cellos.node.run import put_aside
from cellos.supervisor.compose import Host, make_emitter
from cellos.supervisor.records import signer_after

SUFFIX = ".jsonl"
BROKEN = ".broken"
_log = logging.getLogger("cellos.node.recover")


class Left(Struct, frozen=True, kw_only=True):
    """The spool of a run that was claimed by a former life, whole: its last event is `destroyed`."""

    path: str
    subject: str
    lines: tuple[bytes, ...]
    ids: tuple[str, ...]


def read_left(host: Host) -> list[Left]:
    """The spools of the host's directory, brought to their end. One that cannot be read is put aside."""
    found = []
    for name in sorted(os.listdir(host.state.spool)):
        path = f"{host.state.spool}/{name}"
        if not name.endswith(SUFFIX):
            continue
        try:
            left = _complete(host, path)
        except ConfigError as error:
            _log.error(
                "a run of a former life cannot be ended; left for a start that can", extra={"fields": {"path": path, "error": str(error)}}
            )
            continue
        except CellosError as error:
            _log.error("a spool cannot be read; put aside", extra={"fields": {"path": path, "error": str(error)}})
            os.rename(path, path + BROKEN)
            continue
        if left is None:
            os.unlink(path)  # not even the claim was written to its end
        else:
            found.append(left)
    return found


async def tell(left: Left, log: EventLog) -> str:
    """Publish what the log lacks: `complete`; `unclaimed`, it was never ours; `refused`, somebody closed it. Waits for the log.

    Raises EventLogError where nobody can tell; then nothing was done.
    """
    last = await log.last(left.subject)
    if last is None:
        os.unlink(left.path)
        return "unclaimed"
    if last.message_id not in left.ids:
        put_aside(left.path)
        return "refused"
    publisher = RunPublisher(log, left.subject, last_sequence=last.sequence)
    begin = left.ids.index(last.message_id) + 1
    for event_id, line in zip(left.ids[begin:], left.lines[begin:], strict=True):
        publisher.add(event_id, line)
    try:
        await publisher.drained()
    except EventLogError:
        put_aside(left.path)
        return "refused"
    finally:
        await publisher.close()
    os.unlink(left.path)
    return "complete"


def _complete(host: Host, path: str) -> Left | None:
    """Raises CellosError."""
    recover(path)
    lines = list(read_lines(path))
    if not lines:
        return None
    parsed = [parse_event(line) for line in lines]
    attempt, run = _whose(parsed[0])
    if parsed[-1].type != events.DESTROYED:
        host = msgspec.structs.replace(host, signer=signer_after(lines[-1], host.signer))
        spool = Spool(path, resume=True)
        try:
            emitter = make_emitter(host, Chain.after(lines[-1]), spool, ())
            emitter.emit(_restarted(run, parsed))
        finally:
            spool.close()
        lines = list(read_lines(path))
        parsed = [parse_event(line) for line in lines]
    return Left(path=path, subject=run_subject(attempt), lines=tuple(lines), ids=tuple(event.id for event in parsed))


def _restarted(run: RunIdentity, parsed: Sequence[Event]) -> events.Draft:
    """Of a run whose cell left no record: there was none."""
    ttl = next((event.members.get("ttlSeconds") for event in parsed if event.type == events.STARTED), 0)
    draft = events.destroyed(run, ttl_seconds=int(ttl or 0), outcome="failed", reason=NODE_RESTARTED, residue_class="none")
    return events.Draft(draft.type, {**draft.data, "terminalState": "forced"})


def _whose(event: Event) -> tuple[Attempt, RunIdentity]:
    """Raises EventLogError where the first event is no claim."""
    data = event.members
    try:
        if event.type != CLAIMED:
            raise KeyError("claimed")
        attempt = Attempt(data["formationId"], data["memberId"], data["attempt"])
        correlation = data["correlation"]
        run = RunIdentity(
            cell_id=data["cellId"],
            spec_id=data["specId"],
            run_id=data["runId"],
            spec_hash=data["specHash"],
            correlation=correlation,
            tenant_id=correlation.get("tenantId"),
        )
    except (KeyError, AttributeError) as error:
        raise EventLogError(f"its first event is no claim of ours ({error})") from error
    return attempt, run
