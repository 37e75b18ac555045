"""What people ask of a queue, over a bucket in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from cellos.errors import FleetError, StoreError, StoreUnreachable
from cellos.fleet.layout import Layout
from cellos.fleet.queue import Queue
from cellos.fleet.records import AgentState, Claim, Lease, Receipt, encode
from cellos.testing.object_store import MemoryStore

LAYOUT = Layout("fleet")
T = TypeVar("T")


async def at_once(_: float) -> None:
    return


class Deaf(MemoryStore):
    """Does what it is asked for, and does not always answer."""

    def __init__(self, *, does: bool) -> None:
        super().__init__()
        self.deaf = 2
        self.does = does

    async def create(self, key: str, body: bytes) -> bool:
        self.deaf -= 1
        if self.deaf >= 0:
            if self.does:
                await super().create(key, body)
            raise StoreUnreachable("no answer")
        return await super().create(key, body)


def queue(store: MemoryStore) -> Queue:
    return Queue(store, LAYOUT, who="me", wall_ns=lambda: 0, token="mine", pause=at_once)


def do(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def receipt(attempt: int, outcome: Any = "failed", **more: Any) -> bytes:
    return encode(
        Receipt(token="t", node="n1", life="l", id="a", attempt=attempt, epoch=attempt, outcome=outcome, written_at="now", **more)
    )


def test_a_document_is_handed_in_once() -> None:
    store = MemoryStore()
    assert do(queue(store).submit("a", b"{}"))
    assert not do(queue(store).submit("a", b"{}"))
    with pytest.raises(FleetError, match="another document waits as a"):
        do(queue(store).submit("a", b"{ }"))
    store.put(LAYOUT.receipt("b", 1), receipt(1, "completed"))
    with pytest.raises(FleetError, match="ended in completed/: choose another id"):
        do(queue(store).submit("b", b"{}"))


@pytest.mark.parametrize("does", [True, False])
def test_a_lost_answer_is_no_lost_document(does: bool) -> None:
    store = Deaf(does=does)
    assert do(queue(store).submit("a", b"{}"))
    assert store.objects[LAYOUT.pending("a")][0] == b"{}"


def test_lists_say_where_a_spec_is() -> None:
    store = MemoryStore(lambda: 0)
    for id in ("waits", "runs"):
        store.put(LAYOUT.pending(id), b"{}")
    claim = Claim(token="t", node="n1", life="l", lease_ms=1, claimed_at="now", spec=b"{}")
    store.put(LAYOUT.claimed("runs"), encode(claim))
    store.put(LAYOUT.result("good", "completed"), b"{}")
    store.put(LAYOUT.result("bad", "failed"), b"{}")
    store.put(LAYOUT.result("again", "failed"), b"{}")
    store.put(LAYOUT.pending("again"), b"{}")
    store.put(LAYOUT.within("pending") + "no id.json", b"{}")
    rows = do(queue(store).rows())
    assert [(row.id, row.state, row.node) for row in rows] == [
        ("again", "pending", None),
        ("bad", "failed", None),
        ("good", "completed", None),
        ("runs", "claimed", "n1"),
        ("waits", "pending", None),
    ]


def test_agents_that_said_nothing_for_long_are_lost() -> None:
    second, now = 1_000_000_000, 1_000_000_000_000
    for age, draining, shown in ((12, False, "here"), (12, True, "draining"), (14, False, "lost"), (14, True, "lost")):
        store = MemoryStore(lambda age=age: now - age * second)  # type: ignore[misc]
        state = AgentState(
            token="t",
            node="n1",
            life="l",
            pool="",
            slots=2,
            slots_free=1,
            heartbeat_ms=1000,
            draining=draining,
            started_at="x",
            store="ok",
            version="0",
        )
        store.put(LAYOUT.agent("l"), encode(state))
        for id, life in (("a", "l"), ("b", "l"), ("c", "another")):
            store.put(LAYOUT.claimed(id), encode(Claim(token="t", node="n1", life=life, lease_ms=1, claimed_at="now", spec=b"{}")))
        found = Queue(store, LAYOUT, who="me", wall_ns=lambda: now, token="mine", pause=at_once)
        [row] = do(found.agents(do(found.rows())))
        assert (row.node, row.state, row.runs, row.slots) == ("n1", shown, 2, 2)


def test_all_of_one_spec() -> None:
    store = MemoryStore(lambda: 0)
    store.put(LAYOUT.pending("a"), b"{}")
    store.put(LAYOUT.receipt("a", 1), receipt(1, reason="agent_lost", again=True))
    claim = Claim(token="t", node="n1", life="l", lease_ms=1, claimed_at="now", spec=b"{}")
    store.put(LAYOUT.claimed("a"), encode(claim))
    store.put(LAYOUT.lease("a", 2), encode(Lease(token="t", node="n2", life="l", lease_ms=1, attempt=2, started=True, run_id="r")))
    story = do(queue(store).show("a"))
    assert (story.state, story.asked_again) == ("claimed", False)
    assert [each.reason for each in story.receipts] == ["agent_lost"]
    assert story.claim is not None
    assert (story.claim["node"], story.claim["spec"]) == ("n1", None)
    assert story.leases["2"].started
    assert story.held_until == "1970-01-01T00:00:00.001000000+00:00"
    with pytest.raises(FleetError, match="there is no spec b"):
        do(queue(store).show("b"))
    store.put(LAYOUT.claimed("c"), b"{}")
    with pytest.raises(StoreError, match="does another program use this prefix"):
        do(queue(store).show("c"))


def test_one_damaged_record_hides_no_other() -> None:
    store = MemoryStore(lambda: 0)
    store.put(LAYOUT.claimed("bad"), b"")
    store.put(LAYOUT.agent("bad"), b"")
    store.put(LAYOUT.claimed("good"), encode(Claim(token="t", node="n1", life="l", lease_ms=1, claimed_at="now", spec=b"{}")))
    bad, good = do(queue(store).rows())
    assert (good.node, good.damaged) == ("n1", None)
    assert bad.damaged is not None
    assert bad.damaged.startswith("fleet/claimed/bad.json is no claim of ours")
    assert bad.damaged.endswith("remove this object")
    assert do(queue(store).agents()) == []


def test_what_waits_says_what_it_needs_or_why_it_cannot_be_run() -> None:
    store = MemoryStore(lambda: 0)
    run = {"argv": ["x"], "limits": {"memoryMaxBytes": 1 << 50}}
    body = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 1}, "run": run}
    store.put(LAYOUT.pending("a"), json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode())
    story = do(queue(store).show("a"))
    assert (story.memory_bytes, story.fault) == (1 << 50, None)
    store.put(LAYOUT.pending("large"), b" " * ((1 << 20) + 1))
    assert "at most 1048576 are read" in str(do(queue(store).show("large")).fault)


def test_what_waits_says_for_which_pool() -> None:
    store = MemoryStore(lambda: 0)
    body = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 1}, "run": {"argv": ["x"]}, "placement": {"poolId": "gpu"}}
    store.put(LAYOUT.pending("a"), json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode())
    story = do(queue(store).show("a"))
    assert (story.state, story.pool, story.since, story.held_until) == ("pending", "gpu", "1970-01-01T00:00:00.000000000+00:00", None)
    store.put(LAYOUT.pending("broken"), b"{")
    assert do(queue(store).show("broken")).pool is None


def test_what_failed_is_asked_for_again() -> None:
    store = MemoryStore()
    with pytest.raises(FleetError, match="has not been run"):
        do(queue(store).retry("a"))
    store.put(LAYOUT.receipt("a", 1), receipt(1))
    store.put(LAYOUT.result("a", "failed"), b"{}")
    assert do(queue(store).retry("a")) == 2
    assert sorted(store.objects) == ["fleet/pending/a.json", "fleet/receipts/a/1.again.json", "fleet/receipts/a/1.json"]
    assert do(queue(store).retry("a")) == 2
    store.put(LAYOUT.receipt("a", 2), receipt(2, "completed"))
    with pytest.raises(FleetError, match="is completed"):
        do(queue(store).retry("a"))


@pytest.mark.parametrize("place", ["pending", "failed"])
def test_what_can_never_be_run_is_not_marked_to_be_tried_again(place: str) -> None:
    store = MemoryStore()
    store.put(LAYOUT.receipt("a", 1), receipt(1))
    store.put(LAYOUT.pending("a") if place == "pending" else LAYOUT.result("a", "failed"), b" " * ((1 << 20) + 1))
    before = set(store.objects)
    with pytest.raises(FleetError, match="a cannot be run"):
        do(queue(store).retry("a"))
    assert set(store.objects) == before


def test_what_is_not_cleared_away_cannot_be_asked_for_again_yet() -> None:
    store = MemoryStore()
    store.put(LAYOUT.receipt("a", 1), receipt(1))
    store.put(LAYOUT.result("a", "failed"), b"{}")
    store.put(LAYOUT.lease("a", 1), encode(Lease(token="t", node="n2", life="l", lease_ms=1, attempt=1, started=True)))
    with pytest.raises(FleetError, match="is not cleared away yet"):
        do(queue(store).retry("a"))
    assert LAYOUT.result("a", "failed") in store.objects
    assert LAYOUT.pending("a") not in store.objects


def test_what_is_gone_cannot_be_asked_for_again() -> None:
    store = MemoryStore()
    store.put(LAYOUT.receipt("a", 1), receipt(1))
    with pytest.raises(FleetError, match="is gone: submit the document again"):
        do(queue(store).retry("a"))
