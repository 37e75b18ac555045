"""The node at work: takes what the queue offers as far as it has room, runs it, and lets go of it when it must.

Everything here is in one loop; cells run in threads, one each. A message of the queue is answered as soon as the log has decided about the
claim, not when the run is over: from then on the log and the lease are what others go by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cellos import __version__
from cellos.core.documents import CellSpec, CpuMax, Limits
from cellos.core.documents import Run as RunSpec
from cellos.core.documents.execution_cell import Authority, Lifetime
from cellos.core.formation.runs import CANCELLED, NODE_DRAINED, NODE_LOST, Attempt, WorkClass
from cellos.core.ids import rfc3339
from cellos.daemon.capacity import Capacity
from cellos.errors import CellosError, EventLogError, EventSinkError, HostBackendError
from cellos.eventlog.connect import LogClient, pause
from cellos.eventlog.leases import Leases, NodeLease
from cellos.eventlog.log import EventLog
from cellos.eventlog.output import OutputWriter
from cellos.eventlog.spool import require_room
from cellos.eventlog.work import WorkItem, WorkQueue
from cellos.node.cancelled import Cancelled
from cellos.node.config import Config
from cellos.node.home import Home
from cellos.node.lease import LeaseKeeper
from cellos.node.run import MemberRun
from cellos.node.work import Work, read_work
from cellos.ports import CellBackend
from cellos.sandbox.launcher import Launcher
from cellos.supervisor.compose import Host, new_run_id

TAKE_SECONDS = 5.0
FULL_SECONDS = 1.0
"""After which work that does not fit now is offered again."""
NEVER_SECONDS = 15.0
"""The same for work that could not fit here at all: another node may take it meanwhile."""
KILL_SECONDS = 10.0
"""What cells that have to end may take of their grace when the node ends."""
TELL_SECONDS = 10.0
"""How long a node that ends waits for the log to take the last events."""
T = TypeVar("T")
_log = logging.getLogger("cellos.node")


def work_classes(backend: CellBackend) -> tuple[WorkClass, ...]:
    """What a backend can enforce on this host: asked of itself."""
    limited = CellSpec(
        id="probe",
        authority=Authority(),
        lifetime=Lifetime(ttl_seconds=1),
        run=RunSpec(argv=("true",), limits=Limits(memory_max_bytes=1 << 30, cpu_max=CpuMax(quota_micros=100_000))),
    )
    return ("base",) if backend.refusals(limited) else ("base", "limits")


class Node:
    """One node with its connection. `run` it until the `stop` event is set."""

    def __init__(
        self,
        config: Config,
        host: Host,
        home: Home,
        client: LogClient,
        *,
        launcher: Launcher | None,
        replicas: int,
        started_ns: int,
    ) -> None:
        self._config = config
        self._host = host
        self._client = client
        self._launcher = launcher
        self._replicas = replicas
        self._started_at = rfc3339(started_ns)
        self._loop = asyncio.get_running_loop()
        self._eventlog = EventLog(client)
        self.classes = work_classes(host.backend)
        self._capacity = Capacity(slots=config.slots, memory_bytes=config.memory_bytes, cpu_micros=config.cpu_micros)
        self._runs: dict[Attempt, MemberRun | None] = {}
        """By attempt; None while it is not yet decided whether it is to be claimed."""
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self._draining = False
        self._told = ""
        self._threads = ThreadPoolExecutor(config.slots, thread_name_prefix="cell")
        self._cancelled = Cancelled(client, self._cancel)
        self._leases = Leases(client, replicas=replicas)
        self._keeper = LeaseKeeper(self._leases, config.lease_seconds, describe=self._describe, on_new_life=home.begin, on_lost=self._lost)

    async def run(self, stop: asyncio.Event) -> None:
        """Raises CellosError where it cannot go on at all."""
        tasks = [asyncio.create_task(work) for work in (self._keeper.run(), self._cancelled.run(), self._keep_launcher(), self._take())]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((*tasks, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            await self._drain(tasks[-1])
        finally:
            await self._end()  # meanwhile the lease is renewed
            for each in (*tasks, stopping):
                each.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
            with contextlib.suppress(EventLogError):  # then it ends by itself
                await self._keeper.end()

    # --- what it says of itself ---------------------------------------------------------------------------------------------------------

    def _describe(self, life: str) -> NodeLease:
        capacity = self._capacity
        return NodeLease(
            node=self._config.id,
            life=life,
            host=socket.gethostname(),
            pid=os.getpid(),
            pool=self._config.pool,
            classes=self.classes,
            slots=capacity.slots,
            slots_free=capacity.slots_free,
            memory_bytes=capacity.memory_bytes,
            memory_free=capacity.memory_free,
            cpu_micros=capacity.cpu_micros,
            cpu_free=capacity.cpu_free,
            lease_ms=self._config.lease_ms,
            eligible=not self._draining,
            draining=self._draining,
            started_at=self._started_at,
            runs=len(self._runs),
            version=__version__,
        )

    async def _keep_launcher(self) -> None:
        """Without it no cell can be made any more. Raises HostBackendError at its end."""
        if self._launcher is None:
            await asyncio.Event().wait()
        assert self._launcher is not None
        descriptor = os.pidfd_open(self._launcher.pid)
        ended = asyncio.Event()
        self._loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        raise HostBackendError(f"the launcher has ended (pid {self._launcher.pid}); no cell can be made any more")

    # --- work ---------------------------------------------------------------------------------------------------------------------------

    async def _take(self) -> None:
        """Ask for as much as there are slots."""
        queue = WorkQueue(self._client, self._config.pool, self.classes, on_trouble=self._trouble)
        await self._cancelled.begun.wait()
        async with queue:
            while True:
                await self._keeper.sure.wait()
                self._room.clear()
                if self._capacity.slots_free == 0:
                    await self._room.wait()
                    continue
                for item in await queue.take(self._capacity.slots_free, TAKE_SECONDS):
                    await self._offer(item)

    async def _offer(self, item: WorkItem) -> None:
        """Begin it, or say when it may be offered again."""
        try:
            work = read_work(item.subject, item.payload, allow_unknown_fields=self._host.config.allow_unknown_fields)
        except CellosError as error:
            _log.error("work that nobody can do", extra={"fields": {"subject": item.subject, "error": str(error)}})
            await item.ack()
            return
        if work.attempt in self._runs and self._runs[work.attempt] is None:
            await item.nak(FULL_SECONDS)  # twice, and not yet claimed: without a message nobody would take it if we died now
        elif work.attempt in self._runs or self._cancelled.is_known(work.attempt.formation_id):
            await item.ack()  # a controller writes `void` in the place of the claim
        elif self._draining or not self._keeper.is_sure:
            await item.nak()
        elif not self._capacity.could_hold(work.need):
            await item.nak(NEVER_SECONDS)
        elif not self._capacity.take(work.need):
            await item.nak(FULL_SECONDS)
        else:
            self._runs[work.attempt] = None
            self._tasks[work.attempt] = asyncio.create_task(self._attempt(item, work))

    async def _attempt(self, item: WorkItem, work: Work) -> None:
        """From the offer to the end of the run, if it becomes ours."""
        run = None
        try:
            try:
                run = await self._claimed(item, work)
                if run is not None:
                    await self._loop.run_in_executor(self._threads, run.execute)
            finally:
                self._capacity.give_back(work.need)
                self._room.set()
            if run is not None:
                await run.finish()
        except Exception:  # noqa: BLE001  # a defect of ours in one run must not end the others
            _log.exception("an attempt failed for a reason that is a defect", extra={"fields": _about(work)})
        finally:
            if run is not None:
                await run.give_up()
            del self._runs[work.attempt], self._tasks[work.attempt]

    async def _claimed(self, item: WorkItem, work: Work) -> MemberRun | None:
        """The run, if the log gives it to us. It may be one that has to end before it begins."""
        life, formation = self._keeper.life, work.attempt.formation_id
        output = OutputWriter(self._client, run_id := new_run_id(), replicas=self._replicas)
        try:
            require_room(self._host.state.spool)
            run = MemberRun(self._host, work, self._eventlog, output, run_id=run_id)
            looking = asyncio.create_task(self._is_to_end(formation))
            try:
                if not await run.claim(node=self._config.id, life=life):
                    await item.ack()
                    return None
                await looking
            except BaseException:
                await run.give_up()
                raise
            finally:
                looking.cancel()
        except EventSinkError as error:  # there is no room for what has to be written down; others may have some
            _log.error("cannot begin a run", extra={"fields": {**_about(work), "error": str(error)}})
            await item.nak(NEVER_SECONDS)
            return None
        await item.ack()
        self._runs[work.attempt] = run
        if await self._is_to_end(formation):  # asked again: what was heard since the first answer is known without asking
            run.stop(CANCELLED)
        if self._keeper.life != life or not self._keeper.is_sure:
            run.stop(NODE_LOST, at_once=True)
        return run

    async def _is_to_end(self, formation_id: str) -> bool:
        return await self._until_it_works(lambda: self._cancelled.is_to_end(formation_id))

    async def _until_it_works(self, ask: Callable[[], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            try:
                answer = await ask()
            except EventLogError as error:
                attempt += 1
                self._trouble(error.text)
                await asyncio.sleep(pause(attempt))
            else:
                self._told = ""
                return answer

    # --- letting go ---------------------------------------------------------------------------------------------------------------------

    def _cancel(self, formation_id: str) -> None:
        for attempt, run in self._runs.items():
            if run is not None and attempt.formation_id == formation_id:
                run.stop(CANCELLED)

    def _lost(self, is_over: bool) -> None:
        """Others may think that the runs are over, so they must be."""
        for run in self._runs.values():
            if run is not None and (is_over or run.work.on_disconnect == "kill"):
                run.stop(NODE_LOST, at_once=True)

    async def _drain(self, taking: asyncio.Task[None]) -> None:
        """Take nothing more, and let the cells end in the time that they have."""
        self._draining = True
        self._keeper.tell_now()
        taking.cancel()
        _log.info("draining", extra={"fields": {"runs": len(self._runs)}})
        if not await self._cells_end(self._config.drain_seconds):
            for run in self._runs.values():
                if run is not None:
                    run.stop(NODE_DRAINED)
            await self._cells_end(KILL_SECONDS)

    async def _end(self) -> None:
        """No cell is left, and what could be told is told."""
        self._draining = True
        for attempt, run in self._runs.items():
            if run is None:
                self._tasks[attempt].cancel()  # the log may yet take the claim, but we do not wait for it
            else:
                run.stop(NODE_DRAINED, at_once=True)
                run.abandon()
        await self._cells_end(None)
        if self._tasks:
            _, untold = await asyncio.wait(self._tasks.values(), timeout=TELL_SECONDS)
            for task in untold:
                task.cancel()
            if untold:
                await asyncio.wait(untold)
                _log.warning("events wait in the spool for the next start", extra={"fields": {"runs": len(untold)}})
        self._threads.shutdown()

    async def _cells_end(self, seconds: float | None) -> bool:
        """Whether no cell is left, in time."""
        try:
            async with asyncio.timeout(seconds):
                while self._capacity.slots_free < self._capacity.slots:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            return False
        return True

    def _trouble(self, text: str) -> None:
        if text != self._told:
            _log.warning("the log does not answer as it should; trying again", extra={"fields": {"error": text}})
        self._told = text


def _about(work: Work) -> dict[str, object]:
    formation, member, number = work.attempt
    return {"formation": formation, "member": member, "attempt": number}
