"""Single cases of claims, which chance seldom comes upon."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from cellos.errors import LeaseLost, StoreError
from cellos.fleet.claims import AGENT_LOST, Claims, Ending, Held
from cellos.fleet.layout import Layout
from cellos.fleet.progress import InFlight, in_flight
from cellos.fleet.queue import Queue
from cellos.fleet.records import Claim, Receipt, decode
from cellos.testing.object_store import MemoryStore

LAYOUT = Layout("fleet")
GOOD, BAD = Ending(outcome="completed", exit_code=0), Ending(outcome="failed", exit_code=1)
T = TypeVar("T")


class Agent(Claims):
    """Its clock stands still, as on a machine that was frozen, unless a test moves it."""

    def __init__(self, store: MemoryStore, name: str, *, retries: int = 0) -> None:
        self.time = 0.0
        self.number = 0
        super().__init__(
            store, LAYOUT, node=name, life=name, lease_ms=10_000, retries=retries,
            clock=lambda: self.time, wall_ns=lambda: 0, pause=self.wait, new_token=self.draw,
        )  # fmt: skip

    async def wait(self, seconds: float) -> None:
        self.time += seconds

    def draw(self) -> str:
        self.number += 1
        return f"{self.node}-{self.number}"

    async def got(self, id: str) -> Held:
        found = await self.store.read(LAYOUT.pending(id), 1000)
        assert found is not None
        held = await self.claim(id, found, None)
        assert held is not None
        return held

    async def seen(self, id: str) -> tuple[InFlight, Claim]:
        claimed = [entry async for page in self.store.pages(LAYOUT.within("claimed")) for entry in page]
        leases = [entry async for page in self.store.pages(LAYOUT.within("leases")) for entry in page]
        claim = await self.read(Claim, LAYOUT.claimed(id))
        assert claim is not None
        return in_flight(LAYOUT, claimed, leases)[id], claim

    async def took(self, id: str) -> Held | None:
        """The claim of somebody whose lease has ended."""
        return await self.take_over(*await self.seen(id))

    async def ended(self, held: Held, ending: Ending) -> None:
        await self.finish(held, await self.commit(held, ending))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.put(LAYOUT.pending("a"), b"spec")
    return store


def do(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def receipt(store: MemoryStore, attempt: int = 1) -> Receipt:
    key = LAYOUT.receipt("a", attempt)
    return decode(Receipt, store.objects[key][0], key)


def names(store: MemoryStore) -> list[str]:
    return sorted(key.removeprefix("fleet/") for key in store.objects)


def test_a_spec_from_its_claim_to_its_end(store: MemoryStore) -> None:
    async def play() -> None:
        agent = Agent(store, "n1")
        held = await agent.got("a")
        assert names(store) == ["claimed/a.json", "pending/a.json"]
        assert await agent.start(held, "run")
        await agent.renew(held)
        assert names(store) == ["claimed/a.json", "leases/a/0.json", "pending/a.json"]
        await agent.ended(held, GOOD)

    do(play())
    assert names(store) == ["completed/a.json", "receipts/a/1.json"]
    assert (receipt(store).epoch, receipt(store).run_id, receipt(store).exit_code) == (0, "run", 0)


def test_who_was_frozen_before_its_start_finds_that_all_is_over(store: MemoryStore) -> None:
    async def play() -> None:
        frozen, heir = Agent(store, "frozen"), Agent(store, "heir")
        held = await frozen.got("a")
        taken = await heir.took("a")
        assert taken is not None
        assert await heir.start(taken, "run")
        await heir.ended(taken, GOOD)
        assert names(store) == ["completed/a.json", "receipts/a/1.json"]
        with pytest.raises(LeaseLost):
            await frozen.start(held, "another run")

    do(play())
    assert receipt(store).run_id == "run"


def test_who_was_frozen_before_its_start_finds_another_one_at_work(store: MemoryStore) -> None:
    async def play() -> None:
        frozen, heir = Agent(store, "frozen"), Agent(store, "heir")
        held = await frozen.got("a")
        taken = await heir.took("a")
        assert taken is not None
        assert not await frozen.start(held, "another run")
        assert await heir.start(taken, "run")

    do(play())


def test_who_was_frozen_while_its_cell_ran_finds_the_next_lease(store: MemoryStore) -> None:
    async def play() -> None:
        frozen, heir = Agent(store, "frozen"), Agent(store, "heir", retries=1)
        held = await frozen.got("a")
        assert await frozen.start(held, "run")
        taken = await heir.took("a")
        assert taken is not None
        assert (taken.attempt, receipt(store).reason, receipt(store).run_id) == (2, AGENT_LOST, "run")
        with pytest.raises(LeaseLost):
            await frozen.renew(held)
        with pytest.raises(LeaseLost):
            await frozen.commit(held, GOOD)
        assert await heir.start(taken, "run 2")
        await heir.ended(taken, GOOD)

    do(play())
    assert [(receipt(store, attempt).outcome, receipt(store, attempt).again) for attempt in (1, 2)] == [
        ("failed", True),
        ("completed", False),
    ]


def test_who_was_frozen_while_its_cell_ran_finds_that_it_was_cleared_away(store: MemoryStore) -> None:
    async def play() -> None:
        frozen, heir = Agent(store, "frozen"), Agent(store, "heir")
        held = await frozen.got("a")
        assert await frozen.start(held, "run")
        assert await heir.took("a") is None
        assert names(store) == ["failed/a.json", "receipts/a/1.json"]
        with pytest.raises(LeaseLost):
            await frozen.renew(held)

    do(play())


def test_an_answer_after_the_end_of_the_lease_is_worth_nothing(store: MemoryStore) -> None:
    class Slow(MemoryStore):
        async def create(self, key: str, body: bytes) -> bool:
            agent.time += 4
            return await super().create(key, body)

    slow = Slow()
    slow.objects = store.objects
    agent = Agent(slow, "n1")

    async def play() -> None:
        held = await agent.got("a")
        agent.time = 9.0
        with pytest.raises(LeaseLost):
            await agent.start(held, "run")
        with pytest.raises(LeaseLost):
            await agent.commit(held, GOOD)

    do(play())
    assert "receipts/a/1.json" not in names(store)


def test_what_was_not_started_is_run_and_what_may_have_been_is_not(store: MemoryStore) -> None:
    async def play() -> None:
        await Agent(store, "first").got("a")
        second = Agent(store, "second")
        held = await second.took("a")
        assert held is not None
        third = await Agent(store, "third").took("a")
        assert third is not None
        assert (third.attempt, third.epoch) == (1, 1)
        assert await Agent(store, "third").start(third, "run")
        assert await Agent(store, "fourth").took("a") is None

    do(play())
    assert (receipt(store).reason, receipt(store).detail) == (AGENT_LOST, "its agent (third) ended or was cut off while it ran")


def test_who_was_frozen_before_its_start_finds_the_next_lease(store: MemoryStore) -> None:
    """There is no receipt yet: the two leases are all that tells."""

    async def play() -> None:
        await Agent(store, "first").got("a")
        frozen, heir = Agent(store, "frozen"), Agent(store, "heir")
        held = await frozen.took("a")
        taken = await heir.took("a")
        assert held is not None
        assert taken is not None
        assert await heir.start(taken, "run")
        with pytest.raises(LeaseLost):
            await frozen.start(held, "another run")

    do(play())


def test_a_lease_is_counted_from_before_it_was_asked_for(store: MemoryStore) -> None:
    class Slow(MemoryStore):
        async def create(self, key: str, body: bytes) -> bool:
            agent.time += 2
            return await super().create(key, body)

        async def write(self, key: str, body: bytes) -> None:
            agent.time += 3
            await super().write(key, body)

    slow = Slow()
    slow.objects = store.objects
    agent = Agent(slow, "n1")

    async def play() -> None:
        held = await agent.got("a")
        assert (held.deadline, agent.time) == (10, 2)
        assert await agent.start(held, "run")
        assert (held.deadline, agent.time) == (12, 4)
        await agent.renew(held)
        assert (held.deadline, agent.time) == (14, 7)

    do(play())


def test_two_cannot_take_the_same_claim_over(store: MemoryStore) -> None:
    async def play() -> None:
        await Agent(store, "first").got("a")
        one, other = Agent(store, "one"), Agent(store, "other")
        seen = await other.seen("a")
        assert await one.took("a") is not None
        assert await other.take_over(*seen) is None

    do(play())


def test_what_was_withdrawn_is_dropped(store: MemoryStore) -> None:
    async def play() -> None:
        first = Agent(store, "first")
        found = await store.read(LAYOUT.pending("a"), 1000)
        assert found is not None
        await store.remove(LAYOUT.pending("a"))
        assert await first.claim("a", found, None) is None
        assert names(store) == []
        store.put(LAYOUT.pending("a"), b"spec")
        await first.got("a")
        await store.remove(LAYOUT.pending("a"))
        assert await Agent(store, "second").took("a") is None
        assert names(store) == []

    do(play())


def test_what_has_ended_and_is_put_there_again_is_cleared_away(store: MemoryStore) -> None:
    async def play() -> None:
        agent = Agent(store, "n1")
        held = await agent.got("a")
        assert await agent.start(held, "run")
        await agent.ended(held, GOOD)
        store.put(LAYOUT.pending("a"), b"other bytes")
        found = await store.read(LAYOUT.pending("a"), 1000)
        assert found is not None
        assert await agent.claim("a", found, None) is None

    do(play())
    assert names(store) == ["completed/a.json", "receipts/a/1.json"]
    assert store.objects[LAYOUT.result("a", "completed")][0] == b"spec"


def test_a_large_spec_is_moved_unread(store: MemoryStore) -> None:
    store.put(LAYOUT.pending("a"), b"x" * 2000)

    async def play() -> None:
        agent = Agent(store, "n1")
        found = await store.read(LAYOUT.pending("a"), 1000)
        assert found is not None
        held = await agent.claim("a", found, found.fault)
        assert held is not None
        assert held.spec is None
        receipt = await agent.commit(held, Ending(outcome="failed", reason="invalid_spec", detail=held.fault))
        await agent.finish(held, receipt)
        await agent.finish(held, receipt)

    do(play())
    assert names(store) == ["failed/a.json", "receipts/a/1.json"]
    assert store.objects[LAYOUT.result("a", "failed")][0] == b"x" * 2000


def test_another_attempt_waits_until_the_last_one_is_cleared_away(store: MemoryStore) -> None:
    """Its agent has looked at the receipts before the mark was there, and is about to remove what is pending."""

    async def play() -> None:
        agent = Agent(store, "n1")
        held = await agent.got("a")
        assert await agent.start(held, "run")
        ended = await agent.commit(held, BAD)

        async def meanwhile(_: float) -> None:
            await agent.finish(held, ended)

        queue = Queue(store, LAYOUT, who="me", wall_ns=lambda: 0, token="mine", pause=meanwhile)
        assert await queue.retry("a") == 2
        assert names(store) == ["pending/a.json", "receipts/a/1.again.json", "receipts/a/1.json"]
        second = await agent.got("a")
        assert (second.attempt, second.epoch) == (2, 1)
        assert await agent.start(second, "run 2")
        await agent.ended(second, GOOD)

    do(play())
    assert names(store) == ["completed/a.json", "receipts/a/1.again.json", "receipts/a/1.json", "receipts/a/2.json"]


def test_a_claim_that_no_agent_of_ours_wrote_is_an_error_that_says_so(store: MemoryStore) -> None:
    store.put(LAYOUT.claimed("a"), b"spec")

    async def play() -> None:
        with pytest.raises(StoreError, match=r"fleet/claimed/a\.json is no claim of ours .*; does another program use this prefix\?"):
            await Agent(store, "n1").seen("a")

    do(play())
