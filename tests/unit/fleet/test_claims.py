"""The protocol of claims in a world where everything can go wrong between any two requests.

Several agents share a bucket. One coroutine at a time is resumed, which one is drawn. A request may be answered, lost before or after it
was applied, applied when nobody waits for it any more, or refused although nothing is there; agents are stopped, go on, are killed and
start anew; their clocks are hours apart. Cells are what a real one is to its agent: something that runs until it is killed, until its
agent is killed, or until the time that its lifeline knows.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cellos.core.objects import Entry, Stored
from cellos.errors import FleetError, StoreError, StoreUnreachable
from cellos.fleet.claims import AGENT_LOST, Claims, Ending, Held
from cellos.fleet.layout import AGAIN, Layout
from cellos.fleet.progress import expired, in_flight
from cellos.fleet.queue import Queue
from cellos.fleet.records import Claim, Lease, Receipt, decode
from cellos.testing.object_store import MemoryStore

LAYOUT = Layout("fleet/lane")
LEASE_MS = 10_000
LEASE = LEASE_MS / 1000
SECOND = 1_000_000_000


class Turn:
    """Control goes to the world, which gives it back when it likes, but not before `at`."""

    def __init__(self, at: float, *, may_fail: bool = False) -> None:
        self.at = at
        self.may_fail = may_fail

    def __await__(self) -> Generator[Turn, str, str]:
        return (yield self)


class Cell:
    def __init__(self, id: str, attempt: int, agent: Agent, until: float) -> None:
        self.id, self.attempt, self.agent, self.until = id, attempt, agent, until
        self.over = False

    @property
    def is_live(self) -> bool:
        return not self.over and self.agent.clock() < self.until


class World:
    def __init__(self, dice: random.Random, *, agents: int, retries: int, trouble: float, people: bool) -> None:
        """`people` ask for other attempts now and then. Their worlds have no requests that are done hours later, and no frozen machines."""
        self.dice = dice
        self.people = people
        self.trouble = trouble
        self.calm = False
        """Time goes on only while everybody waits."""
        """How likely a request is not simply answered."""
        self.now = 1000.0
        self.skew_ns = dice.randrange(-7200, 7200) * SECOND
        # Whole seconds, as S3 has them.
        self.store = MemoryStore(lambda: (int(self.now) + 10_000) * SECOND + self.skew_ns, page=2)
        self.late: list[Callable[[], Any]] = []
        self.cells: list[Cell] = []
        self.submitted: dict[str, bytes] = {}
        self.retries = retries
        self.agents = [Agent(self, f"n{number}") for number in range(agents)]
        self.marked: set[tuple[str, int]] = set()
        """Attempts that the bucket was told to have been started."""

    def begin(self, held: Held, agent: Agent) -> Cell:
        live = [cell for cell in self.cells if cell.id == held.id and cell.is_live and not (cell.agent.was_frozen or agent.was_frozen)]
        assert not live, f"two cells of {held.id} at once"
        begun = [cell.attempt for cell in self.cells if cell.id == held.id]
        assert held.attempt not in begun, f"attempt {held.attempt} of {held.id} runs twice"
        assert len(begun) < 1 + self.retries + len([id for id, _ in self.wanted if id == held.id]), (
            f"{held.id} runs again, and nobody asked for it"
        )
        assert (held.id, held.attempt) in self.marked
        cell = Cell(held.id, held.attempt, agent, held.deadline)
        self.cells.append(cell)
        return cell

    def step(self) -> None:
        """Something happens."""
        chance = self.dice.random()
        if self.late and chance < 0.05:
            self.late.pop(self.dice.randrange(len(self.late)))()
            return
        if chance < 0.01 * self.trouble:
            self.dice.choice(self.agents).kill()
            return
        if chance < 0.03 * self.trouble:
            agent = self.dice.choice(self.agents)
            agent.stop(self.dice.choice([1.0, LEASE, 3 * LEASE]), frozen=not self.people and self.dice.random() < 0.3)
            return
        if chance < 0.032:
            self.act_as_people()
        if chance < 0.10 and not self.calm:
            self.now += self.dice.choice([0.1, 1.0, LEASE / 2, LEASE - 1, LEASE])
        ready = [agent for agent in self.agents if agent.at <= self.now]
        if ready:
            self.dice.choice(ready).resume(self.decide())
        else:
            self.now = min(agent.at for agent in self.agents)

    def decide(self) -> str:
        """What comes of a request, if it is one."""
        if self.dice.random() >= self.trouble:
            return "answered"
        return self.dice.choice(["lost", "dropped", "refused", "slow", "slow" if self.people else "late"])

    def act_as_people(self) -> None:
        """Hand in again what was run, and ask for another attempt of what failed."""
        if not self.trouble:
            return
        id = self.dice.choice(sorted(self.submitted))
        body = self.submitted[id]
        if self.dice.random() < 0.5 and LAYOUT.receipt(id, 1) in self.store.objects:
            at_once(self.store.create(LAYOUT.pending(id), body))
        elif self.people:
            self.ask_again(id)

    def ask_again(self, id: str) -> None:
        queue = Queue(self.store, LAYOUT, who="somebody", wall_ns=lambda: 0, token="t", pause=no_pause)
        try:
            at_once(queue.retry(id))
        except FleetError:
            return

    @property
    def wanted(self) -> set[tuple[str, int]]:
        """Attempts that people asked for."""
        return {(id, number + 1) for id in self.submitted for number in range(1, 100) if LAYOUT.again(id, number) in self.store.objects}

    def run(self, most: int, until: Callable[[], bool] = lambda: False) -> None:
        for _ in range(most):
            if until():
                return
            self.step()


class Agent:
    """An agent as `cellos.fleet.agent` is one, with one slot. It lives from `start` to `kill`."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.lives = 0
        self.stopped_until = 0.0
        self.skew_ns = world.dice.randrange(-3600, 3600) * SECOND
        self.lag = 0.0
        """How long its machine was frozen, as a virtual one can be: its clock stood still."""
        self.was_frozen = False
        self._frozen_at: float | None = None
        self.start()

    def clock(self) -> float:
        if self._frozen_at is not None and self.world.now < self.stopped_until:
            return self._frozen_at - self.lag
        return self.world.now - self.lag - (self.stopped_until - self._frozen_at if self._frozen_at is not None else 0.0)

    def stop(self, seconds: float, *, frozen: bool) -> None:
        if self.world.now < self.stopped_until:
            return
        if self._frozen_at is not None:
            self.lag += self.stopped_until - self._frozen_at
            self._frozen_at = None
        self.stopped_until = self.world.now + seconds
        if frozen:
            self.was_frozen, self._frozen_at = True, self.world.now

    def start(self) -> None:
        self.lives += 1
        world = self.world

        async def pause(seconds: float) -> None:
            await Turn(world.now + seconds)

        self.claims = Claims(
            Wire(world),
            LAYOUT,
            node=self.name,
            life=f"{self.name}.{self.lives}",
            lease_ms=LEASE_MS,
            retries=world.retries,
            clock=self.clock,
            wall_ns=lambda: int(world.now * SECOND) + 10**18 + self.skew_ns,
            pause=pause,
            new_token=lambda: f"{world.dice.getrandbits(64):x}",
        )
        self.life: Coroutine[Turn, str, None] | None = self.live()
        self._turn = Turn(0.0)
        self._begun = False

    @property
    def at(self) -> float:
        """When it can go on."""
        return max(self._turn.at, self.stopped_until)

    def kill(self) -> None:
        """With kill -9. What was on its way to the store may arrive. Something starts it again."""
        if self.life is not None:
            self.life.close()
        self.life = None
        for cell in self.world.cells:
            cell.over = cell.over or cell.agent is self
        self.stop(1.0, frozen=False)
        self.start()

    def resume(self, decision: str) -> None:
        assert self.life is not None
        self._turn = self.life.send(decision if self._begun else None)  # type: ignore[arg-type]  # how a coroutine begins
        self._begun = True

    async def live(self) -> None:
        dice, world = self.world.dice, self.world
        while True:
            try:
                await (self.sweep() if dice.random() < 0.3 else self.look())
            except StoreError:
                await Turn(world.now + 0.5)
            await Turn(world.now + 0.2)

    async def look(self) -> None:
        entries = [entry async for page in self.claims.store.pages(LAYOUT.within("pending")) for entry in page]
        if entries:
            entry = self.world.dice.choice(entries)
            await Turn(self.world.now)
            id = LAYOUT.id_in("pending", entry.key)
            found = await self.claims.store.read(entry.key, 1000)
            if found is not None and id is not None:
                held = await self.claims.claim(id, found, "cannot be read" if found.body == b"poison" else None)
                if held is not None:
                    await self.carry_out(held)

    async def sweep(self) -> None:
        store = self.claims.store
        await store.write(LAYOUT.agent(self.name), b"")
        entry = await store.look(LAYOUT.agent(self.name))
        assert entry is not None
        claimed = [each async for page in store.pages(LAYOUT.within("claimed")) for each in page]
        leases = [each async for page in store.pages(LAYOUT.within("leases")) for each in page]
        for seen in in_flight(LAYOUT, claimed, leases).values():
            if not expired(entry.modified_ns, seen.last_sign, LEASE_MS):
                continue
            if seen.claimed is None:
                await self.claims.clean(seen)
                continue
            claim = await self.claims.read(Claim, seen.claimed.key)
            if claim is not None:
                held = await self.claims.take_over(seen, claim)
                if held is not None:
                    await self.carry_out(held)

    async def carry_out(self, held: Held) -> None:
        world = self.world
        if held.fault is not None:
            receipt = await self.claims.commit(held, Ending(outcome="failed", reason="invalid_spec", detail=held.fault))
            await self.claims.finish(held, receipt)
            return
        if not await self.claims.start(held, f"run-{world.dice.getrandbits(32):x}"):
            return
        cell = world.begin(held, self)
        try:
            for _ in range(world.dice.randrange(6)):
                await Turn(world.now + LEASE / 3)
                try:
                    await self.claims.renew(held)
                    cell.until = held.deadline if cell.is_live else cell.until
                except StoreUnreachable:
                    await Turn(world.now + 0.5)
        finally:
            was_live = cell.is_live
            cell.over = True
        receipt = await self.claims.commit(held, Ending(outcome="completed" if world.dice.random() < 0.7 else "failed"))
        assert was_live, "a cell that did not run to its end has a receipt of its own"
        await self.claims.finish(held, receipt)


class Wire:
    """The store, as it is seen from an agent."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def _request(self, apply: Callable[[], Awaitable[Any]], *, is_create: bool = False, key: str = "", body: bytes = b"") -> Any:
        world = self._world

        def done() -> Any:
            if key.startswith(LAYOUT.within("leases")):
                lease = decode(Lease, body, key)
                before = world.store.objects.get(key)
                if lease.started and not (is_create and before is not None):
                    id = LAYOUT.id_in("leases", key)
                    assert id is not None
                    world.marked.add((id, lease.attempt))
            return at_once(apply())

        match await Turn(world.now):
            case "answered":
                return done()
            case "slow":
                answer = done()
                await Turn(world.now + world.dice.choice([0.5, LEASE / 3, 2 * LEASE]))
                return answer
            case "lost":
                done()
            case "late":
                world.late.append(done)
            case "refused" if is_create:
                return False
        raise StoreUnreachable("no answer")

    async def create(self, key: str, body: bytes) -> bool:
        created: bool = await self._request(lambda: self._world.store.create(key, body), is_create=True, key=key, body=body)
        return created

    async def write(self, key: str, body: bytes) -> None:
        await self._request(lambda: self._world.store.write(key, body), key=key, body=body)

    async def read(self, key: str, most: int) -> Stored | None:
        found: Stored | None = await self._request(lambda: self._world.store.read(key, most))
        return found

    async def look(self, key: str) -> Entry | None:
        found: Entry | None = await self._request(lambda: self._world.store.look(key))
        return found

    async def copy(self, source: str, target: str) -> None:
        await self._request(lambda: self._world.store.copy(source, target))

    async def remove(self, key: str) -> None:
        await self._request(lambda: self._world.store.remove(key))

    async def pages(self, prefix: str) -> AsyncIterator[Sequence[Entry]]:
        last = ""
        while True:

            async def page(last: str = last) -> list[Entry]:
                return self._world.store.page_after(prefix, last)

            found: list[Entry] = await self._request(page)
            if not found:
                return
            yield found
            last = found[-1].key


def at_once(call: Awaitable[Any]) -> Any:
    """The result of something that waits for nothing."""
    try:
        call.__await__().send(None)  # type: ignore[union-attr]
    except StopIteration as end:
        return end.value
    raise AssertionError


async def no_pause(_: float) -> None:
    return


def receipts_of(store: MemoryStore, id: str) -> list[Receipt]:
    keys = [key for key in store.objects if key.startswith(LAYOUT.receipts(id)) and AGAIN not in key]
    return sorted((decode(Receipt, store.objects[key][0], key) for key in keys), key=lambda receipt: receipt.attempt)


def play(seed: int, *, agents: int, retries: int, trouble: float, specs: int, steps: int, people: bool = False) -> World:
    dice = random.Random(seed)
    world = World(dice, agents=agents, retries=retries, trouble=trouble, people=people)
    submitted = {f"s{number}": b"poison" if dice.random() < 0.1 else f"spec {number}".encode() for number in range(specs)}
    world.submitted = submitted
    for id, body in submitted.items():
        world.store.put(LAYOUT.pending(id), body)
    world.run(steps)
    # Then all is well again, and whatever was begun comes to its end.
    world.trouble, world.calm = 0.0, True
    world.now = max(world.now, *(agent.stopped_until for agent in world.agents))

    def is_quiet() -> bool:
        parts = [LAYOUT.within(part) for part in ("pending", "claimed", "leases")]
        return not world.late and not any(key.startswith(tuple(parts)) for key in world.store.objects)

    world.run(20_000, is_quiet)
    for id, attempt in sorted(world.wanted):
        if LAYOUT.receipt(id, attempt) not in world.store.objects:
            world.ask_again(id)  # they were told to do so a little later
    world.run(20_000, is_quiet)
    assert is_quiet(), f"never settled: {sorted(world.store.objects)}"
    for id, body in submitted.items():
        receipts = receipts_of(world.store, id)
        assert [receipt.attempt for receipt in receipts] == list(range(1, len(receipts) + 1))
        assert [receipt.again or (id, receipt.attempt + 1) in world.wanted for receipt in receipts] == [True] * (len(receipts) - 1) + [
            False
        ]
        results = [outcome for outcome in ("completed", "failed") if LAYOUT.result(id, outcome) in world.store.objects]  # type: ignore[arg-type]
        assert results == [receipts[-1].outcome]
        assert world.store.objects[LAYOUT.result(id, receipts[-1].outcome)][0] == body
        begun = {cell.attempt for cell in world.cells if cell.id == id}
        for receipt in receipts:
            if receipt.reason == AGENT_LOST:
                assert (id, receipt.attempt) in world.marked, "it was never started: it should have been run"
                assert receipt.again is (receipt.attempt <= retries)
            elif body == b"poison":
                assert receipt.reason == "invalid_spec"
            else:
                assert receipt.attempt in begun, "an end that nobody saw"
        assert begun <= {receipt.attempt for receipt in receipts}
        assert not (body == b"poison" and begun)
    return world


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    agents=st.integers(1, 4),
    retries=st.integers(0, 2),
    trouble=st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    specs=st.integers(1, 4),
    people=st.booleans(),
)
def test_each_spec_ends_once_whatever_happens(seed: int, agents: int, retries: int, trouble: float, specs: int, people: bool) -> None:
    play(seed, agents=agents, retries=retries, trouble=trouble, specs=specs, people=people, steps=1500)


def test_without_trouble_each_spec_is_run_by_the_first_who_claims_it() -> None:
    world = play(1, agents=4, retries=0, trouble=0.0, specs=12, steps=0)
    assert not [
        id for id in (f"s{number}" for number in range(12)) if any(each.reason == AGENT_LOST for each in receipts_of(world.store, id))
    ]
