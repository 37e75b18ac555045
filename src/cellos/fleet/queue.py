"""What people do with a queue: hand in, list, look at, ask for another attempt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from cellos.core.documents import MAX_DOCUMENT_BYTES
from cellos.core.ids import rfc3339
from cellos.core.objects import Entry, ObjectStore
from cellos.errors import FleetError, RecordDamaged, StoreUnreachable
from cellos.fleet.layout import Layout, numbers
from cellos.fleet.picks import Plan, plan_of
from cellos.fleet.progress import Progress, ended_attempts
from cellos.fleet.records import MOST_BYTES, Again, AgentState, Claim, Lease, Receipt, decode, encode

State = Literal["pending", "claimed", "completed", "failed"]
STATES: tuple[State, ...] = ("failed", "completed", "pending", "claimed")
"""Where an id is found in several places, the last one of these says how it stands."""
TRIES, PAUSE_SECONDS = 20, 0.5
MISSED_HEARTBEATS, GRACE_NS = 3, 10_000_000_000
"""An agent that said nothing for so long is shown as lost. It is only shown: what counts are leases."""


class Row(Struct, frozen=True, kw_only=True, rename="camel"):
    """A spec in a list. `since`: when it came there, by the store's clock. `damaged`: why nothing more is known of it."""

    id: str
    state: State
    since: str
    node: str | None = None
    life: str | None = None
    damaged: str | None = None


class AgentRow(Struct, frozen=True, kw_only=True, rename="camel"):
    """An agent in a list. `seen`: when it said last that it is there."""

    node: str
    life: str
    state: Literal["here", "draining", "lost"]
    pool: str
    slots: int
    runs: int
    """Claims of its own."""
    started_at: str
    seen: str
    store: str
    version: str


class Story(Struct, frozen=True, kw_only=True, rename="camel"):
    """All that is known of one spec."""

    id: str
    state: State
    asked_again: bool
    receipts: tuple[Receipt, ...]
    since: str | None = None
    """When it came where it is."""
    pool: str | None = None
    memory_bytes: int = 0
    cpu_micros: int = 0
    """What an agent has to have for it, in microseconds per second."""
    fault: str | None = None
    """Why what waits can never be run."""
    claim: Mapping[str, Any] | None = None
    leases: Mapping[str, Lease] = {}
    held_until: str | None = None
    """When the last lease ends, if it is not renewed; others wait a little longer."""


class Queue:
    """A queue as people see it. Methods raise StoreError, and FleetError for what makes no sense as things stand."""

    def __init__(
        self,
        store: ObjectStore,
        layout: Layout,
        *,
        who: str,
        wall_ns: Callable[[], int],
        token: str,
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        """`token` is drawn for this queue: it marks what is written through it."""
        self.store = store
        self.layout = layout
        self._who = who
        self._wall_ns = wall_ns
        self._token = token
        self._pause = pause

    async def submit(self, id: str, raw: bytes) -> bool:
        """Hand in a document. False: exactly this one waits there already."""
        progress = await self.progress(id)
        if progress.last is not None and not progress.is_open:
            raise FleetError(
                f"{id} was run already and ended in {progress.last.outcome}/: choose another id (--id), or: cellos fleet retry {id}"
            )
        key = self.layout.pending(id)
        for _ in range(TRIES):
            try:
                if await self.store.create(key, raw):
                    return True
                sure = True
            except StoreUnreachable:
                sure = False
            found = await self.store.read(key, MAX_DOCUMENT_BYTES)
            if found is not None:
                if found.body != raw:
                    raise FleetError(f"another document waits as {id} already: choose another id (--id)")
                return not sure
            await self._pause(PAUSE_SECONDS)
        raise StoreUnreachable(f"{key} cannot be created")

    async def progress(self, id: str) -> Progress:
        """How far its attempts are."""
        ended, asked = ended_attempts([entry.key for entry in await self._entries(self.layout.receipts(id))])
        return Progress(ended=ended, asked=asked, last=await self._receipt(id, ended) if ended else None)

    async def rows(self) -> list[Row]:
        """All specs by id."""
        found: dict[str, tuple[State, Entry]] = {}
        for state in STATES:
            for entry in await self._entries(self.layout.within(state)):
                id = self.layout.id_in(state, entry.key)
                if id is not None:
                    found[id] = (state, entry)
        return [await self._row(id, state, entry) for id, (state, entry) in sorted(found.items())]

    async def _row(self, id: str, state: State, entry: Entry) -> Row:
        claim, damaged = None, None
        if state == "claimed":
            try:
                claim = await self._read(Claim, entry.key)
            except RecordDamaged as error:
                damaged = error.text
        node, life = (claim.node, claim.life) if claim is not None else (None, None)
        return Row(id=id, state=state, since=rfc3339(entry.modified_ns), node=node, life=life, damaged=damaged)

    async def agents(self, rows: Iterable[Row] = ()) -> list[AgentRow]:
        """The agents of the last day; `rows` say what they run. Those that ended in order are not among them."""
        runs, told = Counter(row.life for row in rows), []
        for entry in await self._entries(self.layout.within("agents")):
            try:
                state: AgentState | None = await self._read(AgentState, entry.key)
            except RecordDamaged:
                continue  # its agent writes it anew, or is forgotten after a day
            if state is None:
                continue
            is_lost = self._wall_ns() - entry.modified_ns > MISSED_HEARTBEATS * state.heartbeat_ms * 1_000_000 + GRACE_NS
            row = AgentRow(
                node=state.node,
                life=state.life,
                state="lost" if is_lost else "draining" if state.draining else "here",
                pool=state.pool,
                slots=state.slots,
                runs=runs[state.life],
                started_at=state.started_at,
                seen=rfc3339(entry.modified_ns),
                store=state.store,
                version=state.version,
            )
            told.append(row)
        return sorted(told, key=lambda row: (row.state == "lost", row.node, row.started_at))

    async def show(self, id: str) -> Story:
        keys = [entry.key for entry in await self._entries(self.layout.receipts(id))]
        receipts = [await self._receipt(id, number) for number in sorted(numbers(keys))]
        claim: Claim | None = await self._read(Claim, self.layout.claimed(id))
        places = {state: entry for state in STATES if (entry := await self.store.look(self._key(state, id))) is not None}
        if not places and not receipts:
            raise FleetError(f"there is no spec {id} in {self.layout.base or 'this queue'} (all of them: cellos fleet ls)")
        state = list(places)[-1] if places else receipts[-1].outcome
        leases, held_until = {}, None
        if claim is not None and "claimed" in places:
            held_until = rfc3339(places["claimed"].modified_ns + claim.lease_ms * 1_000_000)
        for epoch, entry in sorted((min(numbers([entry.key]), default=-1), entry) for entry in await self._entries(self.layout.leases(id))):
            lease: Lease | None = await self._read(Lease, entry.key)
            if lease is not None:
                leases[str(epoch)] = lease
                held_until = rfc3339(entry.modified_ns + lease.lease_ms * 1_000_000)
        waiting = await self.store.read(self.layout.pending(id), MAX_DOCUMENT_BYTES) if state == "pending" else None
        plan = plan_of(waiting, allow_unknown_fields=True) if waiting is not None else Plan()
        return Story(
            id=id,
            state=state,
            asked_again=ended_attempts(keys)[1],
            receipts=tuple(receipts),
            since=rfc3339(places[state].modified_ns) if state in places else None,
            pool=plan.pool,
            memory_bytes=plan.need.memory_bytes,
            cpu_micros=plan.need.cpu_micros,
            fault=plan.fault,
            claim=None if claim is None else {**msgspec.to_builtins(claim), "spec": None},
            leases=leases,
            held_until=held_until if claim is not None else None,
        )

    async def retry(self, id: str) -> int:
        """Ask for another attempt of what failed; its number. May be repeated until it has been done."""
        progress = await self.progress(id)
        if progress.last is None:
            raise FleetError(f"{id} has not been run: there is nothing to be tried again (how it stands: cellos fleet show {id})")
        if progress.last.outcome == "completed":
            raise FleetError(f"{id} is completed: submit it under another id to run it again (--id)")
        if progress.last.again:
            raise FleetError(f"{id} is tried again by itself: attempt {progress.attempt} follows")
        # In this order: what is removed from the first is in the second by then.
        for key in (self.layout.pending(id), self.layout.result(id, "failed")):
            found = await self.store.read(key, MAX_DOCUMENT_BYTES)
            if found is not None and found.fault is not None:
                raise FleetError(f"{id} cannot be run: {found.fault}")
        mark = self.layout.again(id, progress.ended)
        again = Again(token=self._token, node=self._who, life="", asked_at=rfc3339(self._wall_ns()))
        # From here on nobody removes what is pending: who looked at the receipts before that has a claim or a lease. We wait for those.
        await self._create(mark, encode(again))
        for _ in range(TRIES):
            if await self.store.look(self.layout.claimed(id)) is None and not await self._entries(self.layout.leases(id)):
                break
            if await self._is_underway(id, progress.attempt):
                return progress.attempt
            await self._pause(PAUSE_SECONDS)
        else:
            raise FleetError(f"attempt {progress.ended} of {id} is not cleared away yet by its agent: repeat this a little later")
        failed = await self.store.read(self.layout.result(id, "failed"), MAX_DOCUMENT_BYTES)
        if failed is None:
            if await self.store.look(self.layout.pending(id)) is None and not await self._is_underway(id, progress.attempt):
                raise FleetError(f"{self.layout.result(id, 'failed')} is gone: submit the document again")
            return progress.attempt
        if failed.fault is not None:
            raise FleetError(f"{id} cannot be run: {failed.fault}")
        await self._create(self.layout.pending(id), failed.body)
        await self.store.remove(self.layout.result(id, "failed"))
        return progress.attempt

    async def _is_underway(self, id: str, attempt: int) -> bool:
        """Whether an attempt has begun, or ended."""
        if (await self.progress(id)).ended >= attempt:
            return True
        leases = [await self._read(Lease, entry.key) for entry in await self._entries(self.layout.leases(id))]
        return any(lease is not None and lease.attempt == attempt for lease in leases)

    async def _create(self, key: str, body: bytes) -> None:
        """Make sure that it exists."""
        for _ in range(TRIES):
            try:
                if await self.store.create(key, body) or await self.store.look(key) is not None:
                    return
            except StoreUnreachable:
                pass
            await self._pause(PAUSE_SECONDS)
        raise StoreUnreachable(f"{key} cannot be created")

    def _key(self, state: State, id: str) -> str:
        match state:
            case "pending":
                return self.layout.pending(id)
            case "claimed":
                return self.layout.claimed(id)
        return self.layout.result(id, state)

    async def _receipt(self, id: str, attempt: int) -> Receipt:
        key = self.layout.receipt(id, attempt)
        receipt: Receipt | None = await self._read(Receipt, key)
        if receipt is None:
            raise FleetError(f"{key} was listed and is not there: is somebody clearing the queue?")
        return receipt

    async def _read(self, kind: type[Any], key: str) -> Any:
        found = await self.store.read(key, MOST_BYTES)
        return None if found is None else decode(kind, found.body, key)

    async def _entries(self, prefix: str) -> list[Entry]:
        return [entry async for page in self.store.pages(prefix) for entry in page]
