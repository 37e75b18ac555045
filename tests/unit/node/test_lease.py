from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cellos.errors import EventLogError, LogUnreachable, WrongSequence
from cellos.eventlog.leases import NODES, Lease, NodeLease
from cellos.node.lease import LeaseKeeper

LEASE = 15.0
SECONDS = 30.0


class Bucket:
    """What the keeper uses of `Leases`."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.failures: list[EventLogError] = []
        """Of the next writes."""
        self.lost_answers = 0
        """That many of the next writes are done, and nobody hears of them."""

    async def put(self, key: str, value: bytes, expected: int | None) -> int:
        if self.failures:
            raise self.failures.pop(0)
        if expected is not None and expected != self.keys.get(key, (b"", 0))[1]:
            raise WrongSequence(key)
        self.revision += 1
        self.keys[key] = (value, self.revision)
        if self.lost_answers:
            self.lost_answers -= 1
            raise LogUnreachable("the answer was lost")
        return self.revision

    async def delete(self, key: str, expected: int | None) -> None:
        if self.keys.get(key, (b"", 0))[1] != expected:
            raise WrongSequence(key)
        del self.keys[key]

    async def entries(self, prefix: str = "") -> list[Lease]:
        return [Lease(key, value, revision, 0) for key, (value, revision) in self.keys.items()]


class Bench:
    def __init__(self) -> None:
        self.bucket = Bucket()
        self.now = 1000.0
        self.lives: list[str] = []
        self.losses: list[bool] = []
        leases: Any = self.bucket
        self.keeper = LeaseKeeper(
            leases,
            LEASE,
            describe=describe,
            on_new_life=self.lives.append,
            on_lost=self.losses.append,
            clock=lambda: self.now,
        )

    async def until(self, question: Callable[[], object]) -> None:
        """Let the keeper look again until it is so."""
        while not question():
            self.keeper.tell_now()
            await asyncio.sleep(0)


def describe(life: str) -> NodeLease:
    numbers: dict[str, Any] = dict.fromkeys(("pid", "slots", "slots_free", "memory_bytes", "memory_free", "cpu_micros", "cpu_free"), 1)
    return NodeLease(node="n", life=life, host="h", pool="p", classes=("base",), lease_ms=int(LEASE * 1000), started_at="", **numbers)


def play(script: Callable[[Bench], Awaitable[None]]) -> None:
    async def test() -> None:
        bench = Bench()
        keeping = asyncio.create_task(bench.keeper.run())
        try:
            async with asyncio.timeout(SECONDS):
                await bench.keeper.sure.wait()
                await script(bench)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(test())


def test_a_life_is_known_here_before_others_know_it() -> None:
    async def script(bench: Bench) -> None:
        assert bench.lives == [bench.keeper.life]
        assert list(bench.bucket.keys) == [NODES + bench.keeper.life]
        assert bench.keeper.is_sure

    play(script)


def test_it_is_renewed_and_taken_away_at_the_end() -> None:
    async def script(bench: Bench) -> None:
        for _ in range(3):
            bench.now += LEASE / 3
            before = bench.bucket.revision
            await bench.until(lambda before=before: bench.bucket.revision > before)  # type: ignore[misc]
        assert bench.keeper.is_sure
        assert bench.losses == []
        await bench.keeper.end()
        assert bench.bucket.keys == {}

    play(script)


def test_without_the_log_the_runs_end_once_and_the_life_goes_on_afterwards() -> None:
    async def script(bench: Bench) -> None:
        life = bench.keeper.life
        bench.bucket.failures = [LogUnreachable("away")] * 1_000_000
        bench.now += LEASE - 0.1
        await bench.until(lambda: len(bench.bucket.failures) < 999_990)
        assert bench.losses == []
        bench.now += 0.1
        await bench.until(lambda: bench.losses)
        await bench.until(lambda: len(bench.bucket.failures) < 999_980)
        assert not bench.keeper.sure.is_set()
        assert bench.losses == [False], "told once"
        bench.bucket.failures = []
        await bench.until(bench.keeper.sure.is_set)
        assert (bench.keeper.life, bench.lives) == (life, [life])
        bench.now += LEASE
        bench.bucket.failures = [LogUnreachable("away")] * 1_000_000
        await bench.until(lambda: len(bench.losses) == 2)

    play(script)


def test_a_life_that_was_declared_over_is_followed_by_another() -> None:
    async def script(bench: Bench) -> None:
        first = bench.keeper.life
        bench.bucket.keys.clear()
        await bench.until(lambda: bench.keeper.life != first and bench.keeper.is_sure)
        assert bench.losses == [True]
        assert bench.lives == [first, bench.keeper.life]
        assert list(bench.bucket.keys) == [NODES + bench.keeper.life]

    play(script)


def test_a_write_of_ours_that_we_did_not_hear_of_is_no_loss() -> None:
    async def script(bench: Bench) -> None:
        life = bench.keeper.life
        bench.bucket.lost_answers = 1
        before = bench.bucket.revision
        await bench.until(lambda: bench.bucket.revision >= before + 2)
        assert (bench.keeper.life, bench.losses) == (life, [])
        await bench.keeper.end()
        assert bench.bucket.keys == {}

    play(script)


def test_after_a_long_sleep_the_runs_end_before_anything_is_written() -> None:
    async def script(bench: Bench) -> None:
        revision = bench.bucket.revision
        seen: list[int] = []
        bench.keeper._on_lost = lambda _: seen.append(bench.bucket.revision)
        bench.now += 3600.0
        await bench.until(lambda: seen)
        assert seen == [revision]

    play(script)
