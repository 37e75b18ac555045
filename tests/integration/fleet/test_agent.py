"""One agent in this process, on a bucket in memory.

Its supervisor is a program that does nothing: these tests count what an agent asks of a store, and look at what it takes and leaves. What
cells do is the matter of the acceptance and fault tests.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from cellos.core.objects import Entry, Stored
from cellos.errors import StoreError, StoreUnfit, StoreUnreachable
from cellos.fleet import agent as module
from cellos.fleet.agent import Agent
from cellos.fleet.config import Config
from cellos.fleet.layout import Layout
from cellos.fleet.records import AgentState, Claim, Receipt, decode, encode
from cellos.testing.object_store import MemoryStore

LAYOUT = Layout("fleet")
SECONDS = 60.0


def document(id: str, **spec: Any) -> bytes:
    body = {"id": id, "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["x"]}, **spec}
    return json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()


class Counting(MemoryStore):
    """Counts what it is asked for. While `broken` is set it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.broken: StoreError | None = None

    def note(self, what: str, key: str) -> None:
        self.calls[f"{what} {key.removeprefix('fleet/').partition('/')[0]}"] += 1
        if self.broken is not None:
            raise self.broken

    async def read(self, key: str, most: int) -> Stored | None:
        self.note("read", key)
        return await super().read(key, most)

    async def create(self, key: str, body: bytes) -> bool:
        self.note("create", key)
        return await super().create(key, body)

    async def pages(self, prefix: str) -> AsyncIterator[Sequence[Entry]]:
        self.note("list", prefix)
        async for page in super().pages(prefix):
            yield page

    def receipts(self) -> dict[str, Receipt]:
        keys = [key for key in self.objects if key.startswith(LAYOUT.within("receipts"))]
        return {(found := decode(Receipt, self.objects[key][0], key)).id: found for key in keys}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run an agent as long as the test's own part goes on; then it is drained."""
    program = tmp_path / "supervisor"
    program.write_text("#!/bin/sh\nexec cat > /dev/null\n")
    program.chmod(0o755)

    def with_agent(store: MemoryStore, work: Callable[[Agent], Coroutine[Any, Any, None]], **config: Any) -> None:
        given = {"poll_ms": 10, "heartbeat_ms": 10, "slots": 1, "memory_bytes": 1 << 30, "cpu_micros": 1_000_000, **config}
        environment = {"PATH": "/bin:/usr/bin", "CELLOS_STATE_DIR": str(tmp_path / "state")}

        async def play() -> None:
            agent = Agent(Config(bucket="b", node="n1", **given), store, str(program), environment, lenient=False)
            stop = asyncio.Event()
            running = asyncio.create_task(agent.run(stop))
            try:
                async with asyncio.timeout(SECONDS):
                    await work(agent)
            finally:
                stop.set()
                async with asyncio.timeout(SECONDS):
                    await running

        asyncio.run(play())

    return with_agent


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  # what it looks at is no event
        await asyncio.sleep(0.005)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cellos_fleet"]


def test_without_work_a_poll_is_one_listing(run: Any) -> None:
    store = Counting()

    async def work(_: Agent) -> None:
        await until(lambda: store.calls["list pending"] and store.calls["list leases"])
        store.calls.clear()
        await until(lambda: store.calls["list pending"] == 20)

    run(store, work, heartbeat_ms=60_000)
    assert set(store.calls) == {"list pending"}


def test_what_is_for_other_pools_is_read_once_and_told_once(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = Counting()
    for number in range(5):
        store.put(LAYOUT.pending(f"other-{number}"), document("x", placement={"poolId": "gpu"}))
    store.put(LAYOUT.pending("ours"), document("x", placement={"poolId": "cpu"}))
    store.put(LAYOUT.within("pending") + "no id.json", b"{}")

    async def work(_: Agent) -> None:
        await until(lambda: store.calls["list pending"] > 10 and store.receipts())

    run(store, work, pool="cpu")
    assert store.receipts().keys() == {"ours"}
    assert store.calls["read pending"] == 6
    assert messages(caplog).count("skipping spec other-1: placement.poolId=gpu != runner poolId=cpu") == 1
    assert messages(caplog).count("left alone: its name is no id") == 1


def test_what_does_not_fit_waits_and_what_never_will_is_told(run: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "supervisor").write_text(
        "#!/bin/sh\ncat > /dev/null\nwhile ! test -e go; do sleep 0.01; done\n".replace("go;", f"{tmp_path}/go;")
    )
    store = Counting()
    for id in ("one", "two"):
        store.put(LAYOUT.pending(id), document(id, run={"argv": ["x"], "limits": {"memoryMaxBytes": 600 << 20}}))
    store.put(LAYOUT.pending("never"), document("never", run={"argv": ["x"], "limits": {"memoryMaxBytes": 2 << 30}}))
    most = []

    async def work(agent: Agent) -> None:
        await until(lambda: agent.capacity.slots_free < 4)
        store.calls.clear()
        await until(lambda: store.calls["list pending"] > 10)
        most.append(agent.capacity.slots_free)
        (tmp_path / "go").touch()
        await until(lambda: len(store.receipts()) == 2)
        await until(lambda: agent.capacity.slots_free == 4)
        assert agent.capacity.memory_free == agent.capacity.memory_bytes

    run(store, work, slots=4)
    assert most == [3]
    assert store.receipts().keys() == {"one", "two"}
    assert len([each for each in messages(caplog) if each.startswith("skipping spec never: it needs 2147483648 bytes")]) == 1


def test_an_outage_is_told_once_at_each_end_and_can_be_seen(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    from cellos.fleet import runner

    monkeypatch.setattr(runner, "FIRST_BACKOFF", 0.005)
    store = Counting()

    async def work(agent: Agent) -> None:
        await until(lambda: store.calls["list pending"])
        store.broken = StoreUnreachable("nobody answers")
        await until(lambda: "heartbeat" in messages(caplog) and agent.health.state == "nobody answers")
        caplog.clear()
        await until(lambda: "heartbeat" in messages(caplog))
        [heartbeat] = [record for record in caplog.records if record.getMessage() == "heartbeat"][:1]
        assert heartbeat.fields["store"] == "nobody answers"  # type: ignore[attr-defined]
        assert "the object store cannot be used; trying again" not in messages(caplog)
        store.put(LAYOUT.pending("one"), document("one"))
        store.broken = None
        await until(store.receipts)
        assert agent.health.state == "ok"
        assert messages(caplog).count("the object store can be used again") == 1

    run(store, work)


def test_a_store_that_is_away_at_the_start_is_waited_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellos.fleet import runner

    monkeypatch.setattr(runner, "FIRST_BACKOFF", 0.005)
    store = Counting()
    store.broken = StoreUnreachable("nobody answers")
    store.put(LAYOUT.pending("one"), document("one"))

    async def work(_: Agent) -> None:
        await until(lambda: store.calls["create agents"] > 3)
        store.broken = None
        await until(store.receipts)

    run(store, work)


class Careless(MemoryStore):
    async def create(self, key: str, body: bytes) -> bool:
        self.put(key, body)
        return True


def test_a_store_without_conditions_is_refused_at_the_start(run: Any) -> None:
    async def work(_: Agent) -> None:
        await asyncio.sleep(0)

    with pytest.raises(StoreUnfit, match="If-None-Match"):
        run(Careless(), work)


def test_agents_tell_of_themselves_and_the_dead_are_forgotten(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABANDONED_NS", 0)
    store = MemoryStore()
    store.put(LAYOUT.agent("dead"), b"")

    async def work(agent: Agent) -> None:
        await until(lambda: LAYOUT.agent("dead") not in store.objects and LAYOUT.agent(agent.life) in store.objects)
        state = decode(AgentState, store.objects[LAYOUT.agent(agent.life)][0], "")
        assert (state.node, state.slots, state.slots_free, state.store, state.draining) == ("n1", 3, 3, "ok", False)

    run(store, work, slots=3)
    assert not store.objects


def test_that_it_drains_is_told_at_once(run: Any) -> None:
    class Keeping(MemoryStore):
        said: list[AgentState] = []  # noqa: RUF012  # one store, one list

        async def write(self, key: str, body: bytes) -> None:
            self.said.append(decode(AgentState, body, key))
            await super().write(key, body)

    store = Keeping()

    async def work(agent: Agent) -> None:
        await until(lambda: LAYOUT.agent(agent.life) in store.objects)

    run(store, work, heartbeat_ms=60_000)
    assert [state.draining for state in store.said] == [True]
    assert not store.objects


def test_what_another_program_wrote_is_left_and_told_once(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent of CellOS 0.5 moves documents to `claimed`."""
    monkeypatch.setattr(module, "SHORTEST_LEASE_MS", -2000)
    store = Counting()
    store.put(LAYOUT.claimed("theirs"), document("theirs"))
    store.put(LAYOUT.pending("ours"), document("ours"))

    async def work(_: Agent) -> None:
        await until(lambda: store.calls["list leases"] > 5 and store.receipts())

    run(store, work, lease_ms=40)
    assert messages(caplog).count("cannot go on with a claim") == 1
    assert store.objects[LAYOUT.claimed("theirs")][0] == document("theirs")


@pytest.mark.parametrize("part", ["receipt", "lease", "claimed"])
def test_a_damaged_record_blocks_its_document_alone(run: Any, caplog: pytest.LogCaptureFixture, part: str) -> None:
    """And until it is removed; the store is well."""
    store, old = Counting(), MemoryStore(lambda: 0)
    key = {"receipt": LAYOUT.receipt("a", 1), "lease": LAYOUT.lease("a", 0), "claimed": LAYOUT.claimed("a")}[part]
    if part == "lease":
        claim = Claim(token="t", node="n", life="l", lease_ms=10_000, claimed_at="now", spec=document("a"))
        old.put(LAYOUT.claimed("a"), encode(claim))
    old.put(key, b"")
    store.objects |= old.objects
    store.put(LAYOUT.pending("a"), document("a"))
    store.put(LAYOUT.pending("b"), document("b"))

    async def work(agent: Agent) -> None:
        await until(lambda: LAYOUT.result("b", "completed") in store.objects)
        await until(lambda: any(key in str(getattr(record, "fields", "")) for record in caplog.records))
        assert agent.health.state == "ok"

    run(store, work)
    assert not [each for each in messages(caplog) if "object store" in each]
