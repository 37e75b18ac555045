"""How a spec is claimed, held, ended and taken over: the protocol, over any store.

Nothing in here knows of processes or networks. What must be true whatever agents, stores and networks do, short of breaking the promises
of `core.objects`:

- An attempt ends by the one receipt that is created for it. All else (results, removals) can be done again from the receipt, by anybody.
- A cell is started only by who holds the highest epoch after it has written, and been answered, that it starts it. Who takes over creates
  the next epoch first and looks at the former ones then. So one of both sees the other, and an attempt that may have been started never is
  again: it ends as `agent_lost`.
- Who cannot renew a lease in time stops, and writes nothing more, before anybody else may think that the lease has ended: own time is
  counted from before a renewal was sent, the store's time from when it was applied.
- A write whose answer was lost is settled by reading it back: the token in it says whose it is.
- A request that was given up is done within the time of a lease, or never. (Only `retry` by people needs this.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeVar

from msgspec import Struct

from cellos.core.ids import rfc3339
from cellos.core.objects import Entry, ObjectStore, Stored
from cellos.errors import LeaseLost, StoreError, StoreUnreachable
from cellos.fleet.layout import Layout, Outcome, numbers
from cellos.fleet.progress import InFlight, Progress, ended_attempts
from cellos.fleet.records import MOST_BYTES, Claim, EventDigest, Lease, Receipt, decode, encode, token_of

AGENT_LOST = "agent_lost"
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

T = TypeVar("T")
R = TypeVar("R", Claim, Lease)


class Ending(Struct, frozen=True, kw_only=True):
    """How a cell ended, for its receipt."""

    outcome: Outcome
    reason: str | None = None
    detail: str | None = None
    exit_code: int | None = None
    started_at: str | None = None
    ended_at: str | None = None
    events: EventDigest | None = None


class Held:
    """A claim of ours. `deadline` is by our clock: after it, nothing may be done for the claim."""

    def __init__(self, id: str, token: str, deadline: float, *, spec: bytes | None, fault: str | None) -> None:
        self.id = id
        self.token = token
        self.deadline = deadline
        self.spec = spec
        self.fault = fault
        self.attempt = 1
        self.epoch = 0
        self.epochs: list[int] = []
        """Of all lease objects that are known, to be removed at the end."""
        self.leased = False
        """There is a lease object of ours."""
        self.run_id: str | None = None
        self.lost = False


class Claims:
    """Claims of one agent. Every method raises StoreError, LeaseLost among them, and leaves the claim to be taken over by anybody then."""

    def __init__(
        self,
        store: ObjectStore,
        layout: Layout,
        *,
        node: str,
        life: str,
        lease_ms: int,
        retries: int,
        clock: Callable[[], float],
        wall_ns: Callable[[], int],
        pause: Callable[[float], Awaitable[None]],
        new_token: Callable[[], str],
    ) -> None:
        """`clock` goes on while the machine sleeps; `retries` is how often an attempt may be repeated whose agent was lost."""
        self.store = store
        self.layout = layout
        self.node, self.life = node, life
        self.lease_ms = lease_ms
        self.retries = retries
        self.clock = clock
        self._wall_ns = wall_ns
        self._pause = pause
        self._new_token = new_token

    # -- taking

    async def claim(self, id: str, found: Stored, fault: str | None) -> Held | None:
        """Take what was found under `pending`. None: somebody else has it, or had it, or it is gone. `fault`: it cannot be run."""
        held = self._hold(id, None if found.too_large else found.body, fault)
        body = Claim(
            token=held.token,
            node=self.node,
            life=self.life,
            lease_ms=self.lease_ms,
            claimed_at=self.now(),
            spec=held.spec,
            fault=held.fault,
        )
        if not await self._create(self.layout.claimed(id), encode(body), held):
            return None
        progress = await self._progress(held)
        held.attempt, held.epoch = progress.attempt, progress.next_epoch
        if not progress.is_open and progress.last is not None:
            await self.finish(held, progress.last)  # it was found in an old listing, or submitted twice
            return None
        if await self._sure(lambda: self.store.look(self.layout.pending(id)), held) is None:
            await self._remove(held, self.layout.claimed(id))  # withdrawn
            return None
        return held

    async def take_over(self, seen: InFlight, claim: Claim) -> Held | None:
        """Go on with a claim whose holder lost its lease. What is held afterwards is to be started; None: nothing is, any more."""
        id = seen.id
        held = self._hold(id, claim.spec, claim.fault)
        progress = await self._progress(held)
        # The epoch after the one that was seen to have ended, or the first one of an attempt, which its holder has to create, too: in both
        # cases the key is new, and if somebody else came first, what was seen is no longer so.
        held.epoch = max(max(seen.leases, default=-1) + 1, progress.next_epoch)
        lease = Lease(token=held.token, node=self.node, life=self.life, lease_ms=self.lease_ms, attempt=progress.attempt)
        if not await self._create(self.layout.lease(id, held.epoch), encode(lease), held):
            return None
        held.leased = True
        progress = await self._progress(held)
        held.attempt = progress.attempt
        others = await self._other_epochs(held)
        if any(epoch > held.epoch for epoch in others) or (progress.is_open and progress.next_epoch > held.epoch):
            raise LeaseLost(f"the claim of {id} was taken over by somebody else")
        held.epochs = [*others, held.epoch]
        if not progress.is_open and progress.last is not None:
            await self.finish(held, progress.last)
            return None
        lost = await self._started_by(held, others)
        if lost is not None:
            held.run_id = lost.run_id
            ending = Ending(outcome="failed", reason=AGENT_LOST, detail=f"its agent ({lost.node}) ended or was cut off while it ran")
            receipt = await self.commit(held, ending, again=held.attempt <= self.retries)
            if not receipt.again:
                await self.finish(held, receipt)
                return None
            # As after a claim: the next epoch is ours before there is an object for it.
            held.attempt, held.epoch, held.leased, held.run_id = receipt.attempt + 1, receipt.epoch + 1, False, None
            return held
        if await self._sure(lambda: self.store.look(self.layout.pending(id)), held) is None:
            await self._clear(held)
            return None
        return held

    # -- holding

    async def start(self, held: Held, run_id: str) -> bool:
        """Say that the cell is being started. Only after True may it be. False: another one holds the first lease of this claim."""
        held.run_id = run_id
        key, body = self.layout.lease(held.id, held.epoch), self._lease(held)
        if held.leased:
            await self._extend(held, lambda: self.store.write(key, body))
        elif not await self._create(key, body, held, extend=True):
            return False
        else:
            held.leased = True
            held.epochs.append(held.epoch)
        held.lost = await self._sure(lambda: self._is_over(held), held)
        self._guard(held)
        return True

    async def renew(self, held: Held) -> None:
        """One more lease. Raises LeaseLost where somebody took the claim over."""
        self._guard(held)
        asked = self.clock()
        await self.store.write(self.layout.lease(held.id, held.epoch), self._lease(held))
        held.lost = await self._is_over(held)
        self._begin_anew(held, asked)

    async def _is_over(self, held: Held) -> bool:
        """Whether somebody took the claim over. Our own clock should have told before that; that of a machine that was frozen does not."""
        next_one, receipt = self.layout.lease(held.id, held.epoch + 1), self.layout.receipt(held.id, held.attempt)
        return await self.store.look(next_one) is not None or await self.store.look(receipt) is not None

    # -- ending

    async def commit(self, held: Held, ending: Ending, *, again: bool = False) -> Receipt:
        """Write the receipt of the attempt. Raises LeaseLost where another one is there."""
        receipt = Receipt(
            token=held.token,
            node=self.node,
            life=self.life,
            id=held.id,
            attempt=held.attempt,
            epoch=held.epoch,
            outcome=ending.outcome,
            written_at=self.now(),
            reason=ending.reason,
            detail=ending.detail,
            again=again,
            exit_code=ending.exit_code,
            run_id=held.run_id,
            started_at=ending.started_at,
            ended_at=ending.ended_at,
            spec_sha256=hashlib.sha256(held.spec).hexdigest() if held.spec is not None else None,
            events=ending.events,
        )
        if not await self._create(self.layout.receipt(held.id, held.attempt), encode(receipt), held):
            held.lost = True
        self._guard(held)
        return receipt

    async def finish(self, held: Held, receipt: Receipt) -> None:
        """What a receipt asks for: the result, and nothing else left. It may be done by several agents, and any number of times."""
        result, pending = self.layout.result(held.id, receipt.outcome), self.layout.pending(held.id)
        if held.spec is not None:
            await self._settled(held, result, held.spec)
        else:
            await self._sure(lambda: self.store.copy(pending, result), held)
        if receipt.attempt > 1:  # what an earlier one left may still be there
            await self._remove(held, self.layout.result(held.id, "failed" if receipt.outcome == "completed" else "completed"))
        await self._remove(held, pending)
        await self._clear(held)

    async def _clear(self, held: Held) -> None:
        """The claim is removed before its leases: without them it would look like one that nobody holds."""
        await self._remove(held, self.layout.claimed(held.id))
        for epoch in held.epochs:
            await self._remove(held, self.layout.lease(held.id, epoch))

    # -- looking

    async def progress(self, id: str) -> Progress:
        keys = [entry.key async for page in self.store.pages(self.layout.receipts(id)) for entry in page]
        ended, asked = ended_attempts(keys)
        if not ended:
            return Progress()
        key = self.layout.receipt(id, ended)
        found = await self.store.read(key, MOST_BYTES)
        if found is None:
            raise StoreError(f"{key} was listed and is not there")
        return Progress(ended=ended, last=decode(Receipt, found.body, key), asked=asked)

    async def clean(self, seen: InFlight) -> None:
        """Remove leases that stand for no claim; they have ended."""
        if await self.store.look(self.layout.claimed(seen.id)) is None:
            for entry in seen.leases.values():
                await self.store.remove(entry.key)

    async def read(self, kind: type[R], key: str) -> R | None:
        found = await self.store.read(key, MOST_BYTES)
        return None if found is None else decode(kind, found.body, key)

    async def lease_ms_of(self, seen: InFlight) -> int:
        """For how long its holder said that it holds it. 0 where there is nothing any more."""
        newest: Entry | None = seen.newest
        if newest is None:
            return 0
        found = await self.read(Lease, newest.key) if seen.leases else await self.read(Claim, newest.key)
        return found.lease_ms if found is not None else 0

    async def _progress(self, held: Held) -> Progress:
        return await self._sure(lambda: self.progress(held.id), held)

    async def _other_epochs(self, held: Held) -> list[int]:
        async def keys() -> list[str]:
            return [entry.key async for page in self.store.pages(self.layout.leases(held.id)) for entry in page]

        return sorted(numbers(await self._sure(keys, held)) - {held.epoch})

    async def _started_by(self, held: Held, epochs: list[int]) -> Lease | None:
        """The lease under which the open attempt was started, or may have been."""
        for epoch in epochs:
            found = await self._sure(partial(self.read, Lease, self.layout.lease(held.id, epoch)), held)
            if found is not None and found.attempt == held.attempt and found.started:
                return found
        return None

    # -- writing

    def now(self) -> str:
        return rfc3339(self._wall_ns())

    def _hold(self, id: str, spec: bytes | None, fault: str | None) -> Held:
        return Held(id, self._new_token(), self.clock() + self.lease_ms / 1000, spec=spec, fault=fault)

    def _lease(self, held: Held) -> bytes:
        lease = Lease(
            token=held.token,
            node=self.node,
            life=self.life,
            lease_ms=self.lease_ms,
            attempt=held.attempt,
            started=True,
            run_id=held.run_id,
        )
        return encode(lease)

    def _guard(self, held: Held) -> None:
        if held.lost or self.clock() >= held.deadline:
            held.lost = True
            raise LeaseLost(f"the lease of {held.id} has ended")

    def _pauses(self) -> Iterator[float]:
        pause = FIRST_PAUSE
        while True:
            yield pause
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _sure(self, call: Callable[[], Awaitable[T]], held: Held) -> T:
        """What may be asked or done twice, until it is answered or the lease has ended."""
        for pause in self._pauses():
            self._guard(held)
            try:
                return await call()
            except StoreUnreachable:
                await self._pause(pause)
        raise AssertionError

    async def _extend(self, held: Held, write: Callable[[], Awaitable[None]]) -> None:
        """A write that begins a lease anew."""
        asked = 0.0

        async def attempt() -> None:
            nonlocal asked
            asked = self.clock()
            await write()

        await self._sure(attempt, held)
        self._begin_anew(held, asked)

    def _begin_anew(self, held: Held, asked: float) -> None:
        """A write was answered that was sent at `asked`. An answer after the end of the old lease is worth nothing: the write may have been
        done when others had taken the claim over, ended it and cleared all traces away."""
        self._guard(held)
        held.deadline = asked + self.lease_ms / 1000

    async def _create(self, key: str, body: bytes, held: Held, *, extend: bool = False) -> bool:
        """Whether the object is ours now. `extend`: it begins a lease anew."""
        for pause in self._pauses():
            self._guard(held)
            asked = self.clock()
            try:
                created = await self.store.create(key, body)
            except StoreUnreachable:
                created = False
            if not created:
                found = await self._sure(lambda: self.store.read(key, MOST_BYTES), held)
                if found is None:  # it was refused for another reason (409), or did not arrive
                    await self._pause(pause)
                    continue
                if token_of(found.body) != held.token:
                    return False
            if extend and created:
                self._begin_anew(held, asked)
            return True
        raise AssertionError

    async def _settled(self, held: Held, key: str, body: bytes) -> None:
        """Create it, unless it is there: whoever wrote it wrote the same."""
        for pause in self._pauses():
            self._guard(held)
            try:
                if await self.store.create(key, body) or await self.store.look(key) is not None:
                    return
            except StoreUnreachable:
                pass
            await self._pause(pause)

    async def _remove(self, held: Held, key: str) -> None:
        await self._sure(lambda: self.store.remove(key), held)
