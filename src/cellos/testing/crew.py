"""A controller and a node for tests that only look: it writes into the log what they would, at once and without running anything.

    with Crew(nats_url) as crew:
        run = crew.run(formation_id, "build")     dispatched and claimed
        run.start(); run.write("stdout", b"…"); run.end(exit_code=0)

Nothing is guarded: a test writes what it wants to be seen.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from cellos.core import events
from cellos.core.events import Event, RunIdentity, canonical_bytes, finished
from cellos.core.formation import events as formation_events
from cellos.core.formation import runs
from cellos.core.formation.events import subject_of
from cellos.core.formation.members import cell_id
from cellos.core.formation.runs import Attempt, run_subject, work_subject
from cellos.core.formation.transitions import Phase
from cellos.core.ids import UUID_RANDOM_BYTES, rfc3339, uuid7
from cellos.eventlog.connect import LogClient, Settings, connect
from cellos.eventlog.leases import ControllerLease, Leases, NodeLease, ensure_leases
from cellos.eventlog.log import EventLog
from cellos.eventlog.output import OutputStream, OutputWriter, ensure_output
from cellos.eventlog.stream import ensure_stream

SECONDS = 60.0
LEASE_MS = 24 * 3600 * 1000
"""Nobody renews it, and no test takes longer."""
_T = TypeVar("_T")


class Crew:
    """One connection, with a loop and a thread of its own; use with `with`."""

    def __init__(self, nats_url: str, *, node: str = "node-1", life: str = "life-1") -> None:
        self.node = node
        self.life = life
        self.skew_ns = 0
        """How far the node's clock is ahead."""
        self._url = nats_url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Crew:
        self._thread.start()
        self._do(self._connect())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connect(self) -> None:
        self._client: LogClient = await connect(Settings(url=self._url), name="crew")
        self._log = EventLog(self._client)
        self._leases = Leases(self._client)
        await ensure_stream(self._client)
        await ensure_leases(self._client)
        await ensure_output(self._client)

    def phase(self, formation_id: str, phase: Phase, *, name: str = "demo", reason: str | None = None, **data: Any) -> int:
        """An event of the formation: its sequence."""
        event = formation_events.phase_event(
            formation_id, phase, name=name, cell_count=1, reason=reason, event_id=new_id(), time=rfc3339(time.time_ns())
        )
        event = msgspec.structs.replace(event, data={**event.members, **data})
        return self.publish(subject_of(formation_id, phase), event)

    def dispatch(self, formation_id: str, member_id: str, number: int = 1, *, pool: str = "default", phase: Phase = "launching") -> None:
        """Ask for an attempt."""
        attempt = Attempt(formation_id, member_id, number)
        self.phase(formation_id, phase, dispatched=[{"memberId": member_id, "attempt": number}])
        event = runs.dispatched(
            attempt,
            name="demo",
            pool=pool,
            work="base",
            spec={},
            on_disconnect="kill",
            event_id=new_id(),
            time=rfc3339(time.time_ns()),
        )
        self.publish(work_subject(pool, "base", attempt), event)

    def run(self, formation_id: str, member_id: str, number: int = 1) -> CrewRun:
        """Ask for an attempt, and claim it."""
        self.dispatch(formation_id, member_id, number)
        return CrewRun(self, Attempt(formation_id, member_id, number))

    def lease(self, **changes: Any) -> None:
        """The node is there."""
        lease = NodeLease(
            node=self.node,
            life=self.life,
            host="host-1",
            pid=4242,
            pool="default",
            classes=("base", "limits"),
            slots=4,
            slots_free=3,
            memory_bytes=8 << 30,
            memory_free=4 << 30,
            cpu_micros=2_000_000,
            cpu_free=1_500_000,
            lease_ms=LEASE_MS,
            started_at=rfc3339(time.time_ns()),
            runs=1,
            version="0.1.0",
        )
        lease = msgspec.structs.replace(lease, **changes)
        self._do(self._leases.put(f"nodes.{lease.life}", msgspec.json.encode(lease), None))

    def controller(self, name: str = "controller-1", lease_ms: int = LEASE_MS) -> None:
        """A controller is there."""
        lease = ControllerLease(controller=name, host="host-1", pid=4243, lease_ms=lease_ms, started_at=rfc3339(time.time_ns()))
        self._do(self._leases.put(f"controllers.{name}", msgspec.json.encode(lease), None))

    def publish(self, subject: str, event: Event) -> int:
        """Any event: its sequence."""
        return self._do(self._log.publish(subject, canonical_bytes(event), message_id=event.id)).sequence

    def writer(self, run_id: str) -> OutputWriter:
        """Of a run's output, to be used by `call`."""

        async def make() -> OutputWriter:
            return OutputWriter(self._client, run_id)

        return self._do(make())

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """In the loop."""
        return self._do(work)

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)


class CrewRun:
    """An attempt that the crew's node has claimed."""

    def __init__(self, crew: Crew, attempt: Attempt) -> None:
        self.crew = crew
        self.attempt = attempt
        self.run_id = new_id()
        self.cell_id = cell_id(attempt.formation_id, attempt.member_id)
        self._identity = RunIdentity(
            cell_id=self.cell_id,
            spec_id=attempt.member_id,
            run_id=self.run_id,
            spec_hash="0" * 64,
            correlation={"formationId": attempt.formation_id, "memberId": attempt.member_id},
        )
        self._output = crew.writer(self.run_id)
        self.say(runs.claimed(self._identity, attempt, node=crew.node, life=crew.life, pool="default"))

    def say(self, draft: events.Draft) -> None:
        """An event of the run."""
        self.crew.publish(run_subject(self.attempt), finished(draft, event_id=new_id(), time=rfc3339(time.time_ns() + self.crew.skew_ns)))

    def start(self) -> CrewRun:
        """Its cell is there."""
        self.say(events.started(self._identity, ttl_seconds=60, isolation={"backend": "stub", "enforced": []}))
        return self

    def write(self, stream: OutputStream, data: bytes) -> None:
        """Some output, which is in its stream then."""

        async def write() -> None:
            self._output.add(stream, data)
            await self._output.drained()

        self.crew.call(write())

    def finish_output(self) -> None:
        """There will be no more of it."""

        async def end() -> None:
            self._output.end()
            await self._output.drained()

        self.crew.call(end())

    def end(self, exit_code: int = 0, *, reason: str | None = None, output: bool = True) -> None:
        """It is over. Without `output`, its output has no end: as when its node died."""
        if output:
            self.finish_output()
            self.say(events.command_completed(self._identity, argv=["true"], exit_code=exit_code, duration_ms=7))
        succeeded = exit_code == 0 and reason is None
        why = None if succeeded else reason or f"command exited with status {exit_code}"
        outcome = "succeeded" if succeeded else "failed"
        self.say(events.destroyed(self._identity, ttl_seconds=60, outcome=outcome, reason=why, residue_class="none"))


def new_id() -> str:
    return uuid7(time.time_ns() // 1_000_000, os.urandom(UUID_RANDOM_BYTES))
