"""The agent: looks for specs, claims as many as it can hold, runs them, and goes on with what other agents left behind.

Three loops and a task per claim. All that is decided about a claim is in claims.py; here are time, processes and what is said about it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

from cellos import __version__
from cellos.core.documents import MAX_DOCUMENT_BYTES
from cellos.core.ids import rfc3339
from cellos.core.need import Need
from cellos.core.objects import Entry, ObjectStore, Stored
from cellos.daemon.capacity import Capacity
from cellos.errors import ConfigError, LeaseLost, RecordDamaged, StoreError, StoreUnreachable
from cellos.fleet.claims import Claims
from cellos.fleet.config import SHORTEST_LEASE_MS, Config
from cellos.fleet.layout import PARTS
from cellos.fleet.picks import Memory, Picks, Plan, may_take, plan_of, plan_of_bytes
from cellos.fleet.progress import InFlight, expired, in_flight
from cellos.fleet.records import AgentState, Claim, Lease, encode
from cellos.fleet.runner import LONGEST_BACKOFF, Health, Runner, boottime, new_id
from cellos.fleet.store import prove

HEARTBEAT = "dev.cellos.events.fleet.v1.heartbeat"
FRESH_SECONDS = 1.0
"""A listing that turned out to be old is asked for again, but not more often than this."""
ABANDONED_NS = 24 * 3600 * 1_000_000_000
_log = logging.getLogger("cellos_fleet")


class Agent:
    """One life of `cellos-fleet`."""

    def __init__(self, config: Config, store: ObjectStore, supervisor: str, environment: Mapping[str, str], *, lenient: bool) -> None:
        """`supervisor` is its path; `lenient`: members that a document does not have are dropped, as the supervisor will."""
        self.config = config
        self.store = store
        self.layout = config.layout
        self.life = new_id()
        self.claims = Claims(
            store,
            self.layout,
            node=config.node,
            life=self.life,
            lease_ms=config.lease_ms,
            retries=config.retries,
            clock=boottime,
            wall_ns=time.time_ns,
            pause=asyncio.sleep,
            new_token=lambda: os.urandom(16).hex(),
        )
        self.capacity = Capacity(slots=config.slots, memory_bytes=config.memory_bytes, cpu_micros=config.cpu_micros)
        self._lenient = lenient
        self._started_at = rfc3339(time.time_ns())
        self.health = Health(config.node)
        self._runner = Runner(config, self.claims, supervisor, environment, self.health)
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        """A slot or some memory has become free."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._mine: set[str] = set()
        self._waiting = False
        """Something was left because it does not fit now."""
        self._memory = Memory()
        self._picks = Picks(random.randrange)
        self._stream: AsyncIterator[Sequence[Entry]] | None = None
        self._began = self._loaded = 0.0
        self._got_some = False
        self._stale = False
        self._lease_ms: dict[str, int] = {}
        self._told: set[str] = set()

    # -- from start to end

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set and every cell that runs then has ended. Raises StoreError where the store cannot be used at all."""
        await self._prove(stop)
        loops = [asyncio.create_task(loop) for loop in (self._work(), self._every(self._sweep_seconds, self._sweep), self._heartbeats())]
        asked = asyncio.create_task(stop.wait())
        await asyncio.wait({asked, *loops}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        self._stop.set()
        self._changed.set()
        if stop.is_set():
            _log.info("SIGTERM received — draining (no new work accepted)", extra=self._fields(running=len(self._mine)))
        told = asyncio.create_task(self._say_state())
        work, sweep, heartbeats = loops
        await asyncio.gather(work, sweep)
        while self._tasks:
            await asyncio.wait(self._tasks)
        heartbeats.cancel()
        await asyncio.wait({told, heartbeats})
        try:
            await self.store.remove(self.layout.agent(self.life))
        except StoreError as error:
            _log.debug("the agent's object stays", extra=self._fields(error=str(error)))
        _log.info("cellos-fleet agent stopped (drain complete)", extra=self._fields())

    async def _prove(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            key = self.layout.agent(self.life)
            try:
                entry = await prove(self.store, key, (self._state(), self._state()))
                await self._forget_the_dead(entry.modified_ns)
                self.health.went_well()
                return
            except StoreUnreachable as error:
                self.health.went_wrong(error)
                self.life = self.claims.life = new_id()  # nobody knows whether the first create was done
                await self._pause_or_stop(self.health.backoff(), stop)

    async def _forget_the_dead(self, now_ns: int) -> None:
        async for page in self.store.pages(self.layout.within("agents")):
            for entry in page:
                if now_ns - entry.modified_ns > ABANDONED_NS:
                    await self.store.remove(entry.key)

    # -- looking for work

    async def _work(self) -> None:
        await self._rest(random.random() * min(1.0, self.config.poll_ms / 1000))  # agents that start together do not stay together
        while not self._stop.is_set():
            if len(self._tasks) >= self.config.slots:
                await self._until_changed()
                continue
            try:
                entry = await self._next()
                self.health.went_well()
            except StoreError as error:
                self._forget_listing()
                self.health.went_wrong(error)
                await self._rest(self.health.backoff())
                continue
            if entry is None:
                if not self._got_some:
                    await self._rest(self.config.poll_ms / 1000 * random.uniform(0.8, 1.2), early=self._waiting)
                self._got_some = self._waiting = False
            else:
                self._spawn(self._try(entry))

    async def _next(self) -> Entry | None:
        """What to try next. None: a whole pass over what is pending has ended."""
        while True:
            if self._stale and boottime() - self._loaded > max(FRESH_SECONDS, 10 * (self._loaded - self._began)):
                self._forget_listing()
            entry = self._picks.take()
            if entry is None:
                if not await self._load():
                    return None
            elif self._is_for_us(entry):
                return entry

    async def _load(self) -> bool:
        if self._stream is None:
            self._stream = aiter(self.store.pages(self.layout.within("pending")))
            self._began = boottime()
        page = await anext(self._stream, None)
        self._loaded = boottime()
        if page is None:
            self._forget_listing()
            return False
        claimed = [entry.key async for more in self.store.pages(self.layout.within("claimed")) for entry in more]
        ids = (self.layout.id_in("claimed", key) for key in claimed)
        self._picks.load(page, {self.layout.pending(id) for id in ids if id is not None})
        return True

    def _forget_listing(self) -> None:
        self._stream, self._stale = None, False
        self._picks.load([], ())

    def _is_for_us(self, entry: Entry) -> bool:
        id = self.layout.id_in("pending", entry.key)
        if id is None:
            self._tell_once(entry.key, "left alone: its name is no id", key=entry.key)
            return False
        plan = self._memory[entry]
        return id not in self._mine and (plan is None or self._fits(id, plan))

    def _fits(self, id: str, plan: Plan) -> bool:
        """Whether it may be taken now."""
        if not may_take(plan, self.config.pool):
            text = f"skipping spec {id}: placement.poolId={plan.pool} != runner poolId={self.config.pool}"
            self._tell_once(f"pool {id}", text, spec_id=id)
            return False
        if plan.fault is None and not self.capacity.could_hold(plan.need):
            need, have = f"{plan.need.memory_bytes} bytes", f"{self.capacity.memory_bytes} bytes"
            text = f"skipping spec {id}: it needs {need} and {plan.need.cpu_micros} us/s, more than this agent has at all"
            self._tell_once(f"need {id}", text, spec_id=id, memory=have, cpu_micros=self.capacity.cpu_micros)
            return False
        if plan.need.memory_bytes > self.capacity.memory_free or plan.need.cpu_micros > self.capacity.cpu_free:
            self._waiting = True
            return False
        return True

    async def _try(self, entry: Entry) -> None:
        """Claim one, and run it."""
        id = self.layout.id_in("pending", entry.key)
        if id is None or id in self._mine:
            return
        self._mine.add(id)
        try:
            found = await self.store.read(entry.key, MAX_DOCUMENT_BYTES)
            if found is None:
                self._missed()
                return
            plan = plan_of(found, allow_unknown_fields=self._lenient)
            if not self._fits(id, plan) or not self.capacity.take(plan.need):
                self._memory.keep(found.entry, plan)
                return
            try:
                await self._claim(id, found, plan)
            finally:
                self.capacity.give_back(plan.need)
        finally:
            self._mine.discard(id)

    async def _claim(self, id: str, found: Stored, plan: Plan) -> None:
        _log.info("claiming spec", extra=self._fields(spec_id=id))
        held = await self.claims.claim(id, found, plan.fault)
        if held is None:
            _log.info("spec already claimed by another node, skipping", extra=self._fields(spec_id=id))
            self._missed()
            return
        self._got_some = True
        await self._runner.carry_out(held)

    def _missed(self) -> None:
        self._stale = True
        self._picks.missed()

    # -- what others left behind

    def _sweep_seconds(self) -> float:
        return self.config.lease_ms / 2000 * random.uniform(0.8, 1.2)

    async def _sweep(self) -> None:
        claimed = await self._all("claimed")
        leases = await self._all("leases")
        if not any(id not in self._mine for id in in_flight(self.layout, claimed, leases)):
            self._lease_ms.clear()
            return
        # The time is asked for before the listing that it is compared with: a lease that was renewed in between looks younger, never older.
        now_ns = await self._store_now()
        seen = in_flight(self.layout, claimed, await self._all("leases"))
        self._lease_ms = {key: value for key, value in self._lease_ms.items() if key.startswith(self.layout.within("leases"))}
        for each in random.sample(list(seen.values()), len(seen)):
            if self._stop.is_set():
                return
            if each.id not in self._mine and expired(now_ns, each.last_sign, SHORTEST_LEASE_MS):
                try:
                    await self._look_after(each, now_ns)
                except StoreUnreachable:
                    raise
                except StoreError as error:  # that one only: what others wrote, or took over
                    self._tell_once(f"sweep {each.id} {error.code}", "cannot go on with a claim", spec_id=each.id, error=str(error))

    async def _look_after(self, seen: InFlight, now_ns: int) -> None:
        if seen.newest is None:
            return
        key = seen.newest.key
        if key not in self._lease_ms:
            self._lease_ms[key] = await self.claims.lease_ms_of(seen)
        if not expired(now_ns, seen.last_sign, self._lease_ms[key]):
            return
        if seen.claimed is None:
            await self.claims.clean(seen)
            return
        claim = await self.claims.read(Claim, seen.claimed.key)
        if claim is None:
            return
        plan = (
            Plan(fault=claim.fault) if claim.spec is None or claim.fault else plan_of_bytes(claim.spec, allow_unknown_fields=self._lenient)
        )
        if not may_take(plan, self.config.pool):
            return
        if not await self._has_to_run(seen):
            await self._take_over(seen, claim, Need())
        elif len(self._tasks) < self.config.slots and self._fits(seen.id, plan) and self.capacity.take(plan.need):
            self._spawn(self._take_over(seen, claim, plan.need, has_room=True))

    async def _has_to_run(self, seen: InFlight) -> bool:
        """Whether a slot is needed: the last word has `take_over`, which looks again."""
        progress = await self.claims.progress(seen.id)
        if not progress.is_open:
            return False
        newest = await self.claims.read(Lease, self.layout.lease(seen.id, max(seen.leases))) if seen.leases else None
        was_started = newest is not None and newest.started and newest.attempt == progress.attempt
        return not was_started or progress.attempt <= self.config.retries

    async def _take_over(self, seen: InFlight, claim: Claim, need: Need, *, has_room: bool = False) -> None:
        """`has_room`: what a cell needs was set aside, and is given back here."""
        try:
            if seen.id in self._mine:
                return
            self._mine.add(seen.id)
            try:
                _log.warning("going on with the claim of an agent that is lost", extra=self._fields(spec_id=seen.id, lost_node=claim.node))
                held = await self.claims.take_over(seen, claim)
                if held is not None and (has_room or held.fault is not None):
                    await self._runner.carry_out(held)
            finally:
                self._mine.discard(seen.id)
        finally:
            if has_room:
                self.capacity.give_back(need)

    async def _all(self, part: str) -> list[Entry]:
        assert part in PARTS
        return [entry async for page in self.store.pages(self.layout.within(part)) for entry in page]

    async def _store_now(self) -> int:
        """The store's own time, a little ago."""
        key = self.layout.agent(self.life)
        await self.store.write(key, self._state())
        entry = await self.store.look(key)
        if entry is None:
            raise StoreError(f"what was written ({key}) is not there when it is looked at")
        return entry.modified_ns

    # -- signs of life

    async def _heartbeats(self) -> None:
        """Also while draining."""
        while True:
            await asyncio.sleep(self.config.heartbeat_ms / 1000)
            fields = {
                "event_type": HEARTBEAT,
                "bucket": self.config.bucket,
                "prefix": self.config.prefix,
                "queue_name": self.config.queue,
                "pool_id": self.config.pool,
                "running": len(self._mine),
                "slots": self.config.slots,
                "store": self.health.state,
                "draining": self._stop.is_set(),
            }
            _log.info("heartbeat", extra=self._fields(**fields))
            await self._say_state()

    async def _say_state(self) -> None:
        try:
            await self.store.write(self.layout.agent(self.life), self._state())
        except StoreError as error:
            self.health.went_wrong(error)

    def _state(self) -> bytes:
        state = AgentState(
            token=os.urandom(16).hex(),
            node=self.config.node,
            life=self.life,
            pool=self.config.pool,
            slots=self.config.slots,
            slots_free=self.capacity.slots_free,
            heartbeat_ms=self.config.heartbeat_ms,
            draining=self._stop.is_set(),
            started_at=self._started_at,
            store=self.health.state,
            version=__version__,
        )
        return encode(state)

    def _fields(self, **more: object) -> dict[str, Any]:
        return {"fields": {"node": self.config.node, **more}}

    def _tell_once(self, what: str, text: str, **fields: object) -> None:
        if what not in self._told:
            if len(self._told) >= 10_000:
                self._told.clear()
            self._told.add(what)
            _log.warning(text, extra=self._fields(**fields))

    # -- time and tasks

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("a claim was left because of a defect of ours", exc_info=error, extra=self._fields())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """What goes wrong with one claim is the matter of that claim; others will go on with it."""
        try:
            await work
        except LeaseLost as error:
            _log.warning("a claim is no longer ours", extra=self._fields(error=error.text))
        except RecordDamaged as error:  # the store is well, and so are all others
            self._tell_once(f"damaged {error.text}", "cannot go on with a document: one of its records is damaged", error=error.text)
        except StoreError as error:
            self.health.went_wrong(error)
            self._stale = True
            await self._rest(self.health.backoff())
        except ConfigError as error:
            _log.error("cannot run cells", extra=self._fields(error=str(error)))  # its text says all
            await self._rest(LONGEST_BACKOFF)

    async def _every(self, seconds: Callable[[], float], work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self._rest(random.random() * min(seconds(), self.config.poll_ms / 1000))  # what a former life of ours left is seen soon
        while not self._stop.is_set():
            try:
                await work()
            except StoreError as error:
                self.health.went_wrong(error)
            await self._rest(seconds())

    async def _until_changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _rest(self, seconds: float, *, early: bool = False) -> None:
        """`early`: also until something has become free."""
        if not early:
            await self._pause_or_stop(seconds, self._stop)
            return
        self._changed.clear()
        await self._pause_or_stop(seconds, self._changed)

    @staticmethod
    async def _pause_or_stop(seconds: float, event: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return
