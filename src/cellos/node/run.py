"""One attempt of a member on this node: claimed in the log, run in a cell, told event by event.

    spool file -> `claimed` acknowledged -> policies, record, cell (in a thread of its own) -> `destroyed` acknowledged -> spool removed

Nothing is run before the log took the claim. Whatever happens after that, the run gets its `destroyed`: where no cell could be made, its
reason says why. A run that was closed by somebody else has no say any more: its cell is killed and its spool put aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from cellos.core import events
from cellos.core.documents import ExecutionCell
from cellos.core.events import RunIdentity
from cellos.core.formation.runs import claimed, run_subject
from cellos.errors import CellosError, EventLogError, EventSinkError, WrongSequence
from cellos.eventlog.log import EventLog
from cellos.eventlog.output import OutputWriter
from cellos.eventlog.run_log import RunPublisher
from cellos.eventlog.spool import Spool
from cellos.node.alone import tell_alone
from cellos.node.output import recording
from cellos.node.work import Work
from cellos.supervisor import records, trust
from cellos.supervisor.compose import Host, Order, admit, make_broker, make_deps, make_emitter, new_chain, open_stores
from cellos.supervisor.config import Fallback, refuse_fallbacks
from cellos.supervisor.records import RunRecord
from cellos.supervisor.run import CellOutcome, run_cell
from cellos.supervisor.trust import Rejected

ASIDE = "refused"
"""What the spool of a run is named that somebody else closed."""
_AGAIN_SECONDS = 1.0
_log = logging.getLogger("cellos.node.run")


class MemberRun:
    """Made and owned by the loop; `execute` runs in a thread. `on_refused` is called in the loop when the run is no longer ours."""

    def __init__(self, host: Host, work: Work, log: EventLog, output: OutputWriter | None = None, *, run_id: str) -> None:
        self.work = work
        self.run: RunIdentity = work.identity(run_id)
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._output = output
        self._eventlog = log
        self._publisher = RunPublisher(
            log, run_subject(work.attempt), last_sequence=0, on_refused=self._closed_by_another, on_trouble=self._trouble
        )
        self._spool = Spool(f"{host.state.spool}/{self.run.run_id}.jsonl")
        self._emitter = make_emitter(host, new_chain(self.run), self._spool, [_Outlet(self._publisher)])
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        self._stop_reason: str | None = None
        self._outcome: CellOutcome | None = None
        self._rejection: events.Draft | None = None
        self._abandoned = threading.Event()

    async def claim(self, *, node: str, life: str) -> bool:
        """Whether the run is ours. Waits for the log, however long it is away. Raises EventSinkError."""
        try:
            self._emitter.emit(claimed(self.run, self.work.attempt, node=node, life=life, pool=self.work.pool))
        except EventSinkError:
            self._close()
            os.unlink(self._spool.path)
            raise
        try:
            await self._publisher.drained()
        except EventLogError:
            self._close()
            os.unlink(self._spool.path)
            return False
        return True

    def stop(self, reason: str, *, at_once: bool = False) -> None:
        """End it: with the document's grace, or at once. The first reason counts; may be called again to be quicker."""
        if self._writing < 0:
            return
        if self._stop_reason is None:
            self._stop_reason = reason
            os.write(self._writing, b"s")
        if at_once:
            os.close(self._writing)
            self._writing = -1

    def abandon(self) -> None:
        """The node ends, whatever is still to be told: the next one tells it."""
        self._abandoned.set()

    # --- in the thread ------------------------------------------------------------------------------------------------------------------

    def execute(self) -> None:
        """From the claim to the last event. Blocks. Never raises."""
        document = self.work.document
        reason = self._stop_reason or self.work.fault
        try:
            if reason is None and document is not None:
                self._run(document)
        except Rejected as rejection:
            reason, self._rejection = str(rejection), rejection.draft
        except CellosError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  # whatever it is, the run gets its end
            reason = f"internal error: {type(error).__name__}"
            _log.exception("a run failed for a reason that is a defect", extra={"fields": self._fields})
        self._end(reason, document.spec.lifetime.ttl_seconds if document is not None else 0)

    def _run(self, document: ExecutionCell) -> None:
        """As a supervisor would; where it raises, there is no cell."""
        host = self._host
        order = Order(document=document, spec_hash=self.work.spec_hash, broker=make_broker(host.config), interrupt=self._reading)
        trust.check_document(document.spec, host.config)
        granted = trust.grant(document, host.config, host.trust, host.warn)
        fallbacks: list[Fallback] = []
        with open_stores(order, granted.document.spec, host.config, fallbacks) as stores:
            if host.config.strict:
                refuse_fallbacks(fallbacks)
            for fallback in fallbacks:
                host.warn(f"not followed: {fallback.text}")
            granted = admit(host, granted, self.run, stores)
            key = os.urandom(8).hex()
            record = RunRecord(
                key=key,
                pid=os.getpid(),
                run=records.redacted(self.run, host.config.redacted_fields),
                ttl_seconds=granted.document.spec.lifetime.ttl_seconds,
                backend=host.backend.kind,
                footprint=host.backend.footprint(key),
                spool=self._spool.path,
                keep_spool=True,
                redacted_fields=tuple(sorted(host.config.redacted_fields)),
            )
            held = records.hold(host.state.runs, record)
            try:
                deps = make_deps(host, order, granted, self.run, key, self._emitter, stores)
                more: dict[str, Any] = {
                    "stop_reason": lambda: self._stop_reason,
                    "check_program": self._before_the_command(deps.check_program),
                }
                more["environment"] = {**deps.environment, **self.work.environment}
                if self._output is not None:
                    more["record_output"] = recording(self._loop, self._output, deps.record_output)
                self._outcome = run_cell(granted.document, msgspec.structs.replace(deps, **more))
            finally:
                held.remove()  # the cell is gone, or there was none; the spool says the rest

    def _before_the_command(self, check: Callable[[Sequence[str]], None] | None) -> Callable[[Sequence[str]], None]:
        """What the operator asks of a command; and one that is to end must not even begin."""

        def require(argv: Sequence[str]) -> None:
            if self._stop_reason is not None:
                raise CellosError(self._stop_reason)
            if check is not None:
                check(argv)

        return require

    def _end(self, reason: str | None, ttl: int) -> None:
        """Make sure of the last event: a full disk is waited for, as a run without end would be for ever."""
        outcome = self._outcome
        residue = outcome.residue if outcome is not None else ()
        draft = events.destroyed(
            self.run,
            ttl_seconds=ttl,
            outcome="failed",
            reason=reason or (outcome.reason if outcome is not None else None),
            residue_class="documented_exception" if residue else "none",
            residue_exception=residue,
        )
        while not self._emitter.complete and not self._try_to_emit(draft):
            if self._abandoned.wait(_AGAIN_SECONDS):
                return

    def _try_to_emit(self, draft: events.Draft) -> bool:
        try:
            self._emitter.emit(draft)
        except EventSinkError as error:
            _log.error("an event could not be recorded", extra={"fields": {**self._fields, "error": str(error)}})
            return False
        return True

    # --- in the loop again --------------------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """After `execute`: until the log has everything, or has refused it."""
        self._close()
        if self._output is not None:
            self._output.end()
        try:
            await self._publisher.drained()
        except EventLogError:
            put_aside(self._spool.path)
        else:
            if self._emitter.complete:
                os.unlink(self._spool.path)
        if self._rejection is not None:
            with contextlib.suppress(EventLogError):  # why it was refused stands in the run's last event, too
                await tell_alone(self._host, self._eventlog, [self._rejection])
        if self._output is not None:
            await self._output.drained()

    async def give_up(self) -> None:
        """What the log does not have stays in the spool."""
        self._close()
        await self._publisher.close()
        if self._output is not None:
            await self._output.close()

    def _close(self) -> None:
        """Idempotent."""
        self._spool.close()
        for descriptor in (self._reading, self._writing):
            if descriptor >= 0:
                os.close(descriptor)
        self._reading = self._writing = -1

    def _closed_by_another(self, error: EventLogError) -> None:
        if self._emitter.count > 1 or not isinstance(error, WrongSequence):  # else somebody else was quicker to claim it
            _log.warning("the run is no longer ours", extra={"fields": {**self._fields, "error": error.text}})
        self.stop("the run was closed by somebody else", at_once=True)

    def _trouble(self, text: str) -> None:
        _log.warning("events wait for the log", extra={"fields": {**self._fields, "error": text}})

    @property
    def _fields(self) -> dict[str, Any]:
        formation, member, number = self.work.attempt
        return {"formation": formation, "member": member, "attempt": number, "run": self.run.run_id}


class _Outlet:
    """The publisher as a sink of the emitter. It has taken an event as soon as it knows of it: the spool holds the event."""

    def __init__(self, publisher: RunPublisher) -> None:
        self.emit = publisher.add

    def close(self) -> None:
        """The run's owner closes the publisher."""


def put_aside(path: str) -> None:
    """Keep the spool of a run that somebody else closed, under a name that no one replays."""
    try:
        os.rename(path, f"{path}.{ASIDE}")
    except FileNotFoundError:
        return
