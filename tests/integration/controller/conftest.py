"""Controllers in this process, a node that only writes what a node writes, and what the log must be like in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from cellos.controller.config import Config
from cellos.controller.loop import Controller
from cellos.core import events
from cellos.core.events import Draft, RunIdentity, canonical_bytes, finished, parse_event
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.verify import verify
from cellos.core.formation.documents import parse_formation
from cellos.core.formation.events import DELETED, created, phase_event, subject_of, subjects_of
from cellos.core.formation.runs import CANCELLED, RUN_PREFIX, WORK_PREFIX, Attempt, attempt_of, claimed, run_subject
from cellos.core.formation.state import FormationState
from cellos.core.formation.transitions import TERMINAL
from cellos.core.ids import UUID_RANDOM_BYTES, rfc3339, uuid7
from cellos.errors import EventLogError, Rebuild, WrongSequence
from cellos.eventlog.connect import LogClient, Settings, connect
from cellos.eventlog.leases import NODES, Leases, NodeLease
from cellos.eventlog.log import EventLog
from cellos.eventlog.reader import Reader
from cellos.eventlog.run_log import RunPublisher
from cellos.eventlog.stored import Stored
from cellos.eventlog.stream import ensure_stream
from cellos.eventlog.work import WorkItem, WorkQueue

SECONDS = 60.0
Plan = Callable[[str, int], str]
"""Of a member's attempt: succeed, fail, or hang (until it is cancelled)."""


def new_id() -> str:
    return uuid7(time.time_ns() // 1_000_000, os.urandom(UUID_RANDOM_BYTES))


def stamp() -> dict[str, str]:
    return {"event_id": new_id(), "time": rfc3339(time.time_ns())}


@dataclass(kw_only=True)
class Node:
    """Takes work, claims it, and tells what the plan says. It renews its lease while `beats`."""

    client: LogClient
    plan: Plan
    lease_ms: int = 15_000
    pool: str = "default"
    beats: bool = True
    life: str = field(default_factory=new_id)
    ran: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Attempts by member and number."""
    hanging: dict[str, asyncio.Event] = field(default_factory=dict)
    """By formation: set when it is to end."""
    _runs: set[asyncio.Task[None]] = field(default_factory=set)
    _revision: int = 0

    async def live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            tasks.create_task(self._follow())
            tasks.create_task(self._work())

    @property
    def key(self) -> str:
        return NODES + self.life

    def _lease(self) -> bytes:
        return msgspec.json.encode(
            NodeLease(
                node="n",
                life=self.life,
                host="h",
                pid=1,
                pool=self.pool,
                classes=("base",),
                slots=1,
                slots_free=1,
                memory_bytes=1,
                memory_free=1,
                cpu_micros=1,
                cpu_free=1,
                lease_ms=self.lease_ms,
                started_at="",
            )
        )

    async def begin(self) -> None:
        self._revision = await Leases(self.client).put(self.key, self._lease(), 0)

    async def die(self) -> None:
        """It renews its lease no more, and the last one was a short one."""
        self.beats, self.lease_ms = False, 100
        self._revision = await Leases(self.client).put(self.key, self._lease(), self._revision)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.lease_ms / 3000)
            if self.beats:
                with contextlib.suppress(EventLogError):
                    self._revision = await Leases(self.client).put(self.key, self._lease(), self._revision)

    async def _follow(self) -> None:
        while True:
            async with Reader(self.client) as reader:
                with contextlib.suppress(Rebuild):
                    async for stored in reader:  # a plain subscription would hear writes that were refused, too
                        if stored.subject.endswith(".cancelling"):
                            self.hanging.setdefault(stored.subject.split(".")[3], asyncio.Event()).set()

    async def _work(self) -> None:
        async with WorkQueue(self.client, self.pool, ["base"]) as queue:
            while True:
                for item in await queue.take(50, 5.0):
                    task = asyncio.create_task(self._run(item))
                    self._runs.add(task)
                    task.add_done_callback(self._runs.discard)

    async def _run(self, item: WorkItem) -> None:
        event = parse_event(item.payload)
        attempt = attempt_of(item.subject)
        assert attempt is not None
        run = RunIdentity(
            cell_id=event.members["cellId"],
            spec_id=event.members["cellId"],
            run_id=new_id(),
            spec_hash="0" * 64,
            correlation={"formationId": attempt.formation_id, "memberId": attempt.member_id},
        )
        chain = Chain.first(run.run_id, run.spec_hash, "1" * 64)
        publisher = RunPublisher(EventLog(self.client), run_subject(attempt), last_sequence=0)

        async def tell(*drafts: Draft) -> None:
            for draft in drafts:
                told = finished(Draft(draft.type, chain.link(draft.data, final=draft.type == events.DESTROYED)), **stamp())
                line = canonical_bytes(told)
                chain.advance(line)
                publisher.add(told.id, line)
            await publisher.drained()

        try:
            await tell(claimed(run, attempt, node="n", life=self.life, pool=self.pool))
        except EventLogError:
            await item.ack()
            return
        await item.ack()
        self.ran[attempt.member_id, attempt.number] += 1
        outcome = self.plan(attempt.member_id, attempt.number)
        reason = None if outcome == "succeed" else "exit code 1"
        code = 0 if outcome == "succeed" else 1
        spawned = events.process_spawned(run, program="true", argc=1)
        started = events.started(run, ttl_seconds=600, isolation={})
        with contextlib.suppress(EventLogError):
            await tell(started, spawned)
            if outcome == "hang":
                await self.hanging.setdefault(attempt.formation_id, asyncio.Event()).wait()
                reason = CANCELLED
            else:
                await tell(events.command_completed(run, argv=["true"], exit_code=code, duration_ms=1))
            word = "succeeded" if reason is None else "failed"
            await tell(events.destroyed(run, ttl_seconds=600, outcome=word, reason=reason, residue_class="none"))


@dataclass(kw_only=True)
class Site:
    """A NATS server, a connection, and what tests do there."""

    url: str
    client: LogClient
    log: EventLog
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    clients: list[LogClient] = field(default_factory=list)
    begins: dict[str, int] = field(default_factory=dict)
    """Formation to the sequence of its first event."""

    async def connect(self, name: str = "test") -> LogClient:
        client = await connect(Settings(url=self.url), name=name)
        self.clients.append(client)
        return client

    def start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self.tasks.append(task)
        return task

    async def stop(self, task: asyncio.Task[None]) -> None:
        self.tasks.remove(task)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def controller(self, name: str = "c", **options: Any) -> asyncio.Task[None]:
        """One more, with a connection of its own."""
        config = Config(id=name, host="h", **{key: options.pop(key) for key in ("in_flight", "lease_ms") if key in options})
        return self.start(Controller(config, await self.connect(name), **options).run())

    async def node(self, plan: Plan | None = None, **options: Any) -> Node:
        node = Node(client=await self.connect("node"), plan=plan or (lambda member, attempt: "succeed"), **options)
        await node.begin()
        self.start(node.live())
        return node

    async def create(self, entries: list[dict[str, Any]], **document: Any) -> str:
        formation_id = str(uuid.uuid4())
        raw = msgspec.json.encode({"name": formation_id, "coordinator": entries[0]["id"], "members": entries, **document})
        event = created(formation_id, parse_formation(raw), **stamp())
        ack = await self.log.publish(subject_of(formation_id, "created"), canonical_bytes(event), message_id=event.id, expected_last=0)
        self.begins[formation_id] = ack.sequence
        return formation_id

    async def delete(self, formation_id: str) -> None:
        """As the server does it."""
        while True:
            state = await self.state(formation_id)
            if state.terminal or state.cancelling is not None:
                return
            event = phase_event(formation_id, "cancelling", name="", cell_count=0, reason=DELETED, **stamp())
            with contextlib.suppress(WrongSequence):
                await self.log.publish(
                    subject_of(formation_id, "cancelling"),
                    canonical_bytes(event),
                    message_id=event.id,
                    expected_last=state.last_sequence,
                    expected_filter=subjects_of(formation_id),
                )

    async def stored(self, formation_id: str = "") -> list[Stored]:
        """Everything about a formation."""
        found: list[Stored] = []
        after = self.begins.get(formation_id, 1) - 1
        while page := await self.log.read(after, 1000):
            found += [stored for stored in page if formation_id in stored.subject]
            after = page[-1].sequence
        return found

    async def state(self, formation_id: str) -> FormationState:
        state = FormationState(formation_id)
        for stored in await self.stored(formation_id):
            state.apply(stored.sequence, stored.subject, parse_event(stored.data), stored_ns=stored.time)
        return state

    async def until(self, question: Callable[[], Awaitable[Any]]) -> Any:
        """Ask again until the answer is true; NATS may be away meanwhile. A task that failed fails the test."""
        while True:
            for task in self.tasks:
                if task.done():
                    task.result()
            with contextlib.suppress(EventLogError):
                if answer := await question():
                    return answer
            await asyncio.sleep(0.02)

    async def ended(self, formation_id: str) -> FormationState:
        """When it is terminal; checks that everything went by the rules."""

        async def is_over() -> FormationState | None:
            state = await self.state(formation_id)
            return state if state.status in TERMINAL else None

        state: FormationState = await self.until(is_over)
        check(await self.stored(formation_id))
        return state

    async def phases(self, formation_id: str) -> list[str]:
        """Of the formation's own events, each word once where it comes again and again."""
        words = [each.subject.rpartition(".")[2] for each in await self.stored(formation_id) if ".formations." in each.subject]
        return [word for before, word in zip(["", *words], words, strict=False) if word != before]


def check(stored: list[Stored]) -> None:
    """What holds of every formation that ended."""
    lines: list[bytes] = []
    begun: Counter[Attempt] = Counter()
    named: set[Attempt] = set()
    asked: set[Attempt] = set()
    is_ending = False
    for each in stored:
        event = parse_event(each.data)
        attempt = attempt_of(each.subject)
        if each.subject.startswith(WORK_PREFIX):
            assert attempt in named - asked
            asked.add(attempt)
        elif each.subject.startswith(RUN_PREFIX):
            assert attempt in named
            if event.type.endswith((".claimed", ".void")):
                begun[attempt] += 1
            if not event.type.endswith(".void"):
                lines.append(each.data)
        else:
            new = {Attempt(event.source, told["memberId"], told["attempt"]) for told in event.members.get("dispatched", ())}
            assert not (new and is_ending), "an attempt began after the end was decided"
            assert not new & named
            named |= new
            is_ending |= each.subject.endswith((".cancelling", ".completed", ".failed", ".cancelled"))
    assert all(count == 1 for count in begun.values())
    assert set(begun) == named, "the end came while attempts were open"
    if lines:
        report = verify(lines)
        assert report.verified, report


@pytest.fixture
def site() -> Callable[[str], contextlib.AbstractAsyncContextManager[Site]]:
    return _site


@contextlib.asynccontextmanager
async def _site(url: str) -> AsyncIterator[Site]:
    client = await connect(Settings(url=url), name="test")
    await ensure_stream(client, max_bytes=64 << 20)
    found = Site(url=url, client=client, log=EventLog(client))
    try:
        yield found
    finally:
        for task in found.tasks:
            task.cancel()
        await asyncio.gather(*found.tasks, return_exceptions=True)
        for each in (*found.clients, client):
            await each.close()


@pytest.fixture
def run() -> Callable[[Awaitable[None]], None]:
    """Runs a test's coroutine, for a bounded time."""

    def go(test: Awaitable[None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SECONDS):
                await test

        asyncio.run(bounded())

    return go
