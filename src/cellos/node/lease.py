"""The sign of life of a node in the bucket CELLOS_LEASES: written, renewed, and what follows where that is not possible.

A key stands for one life. A renewal that is refused means that somebody declared this life dead: its runs end, and another life begins.
Where NATS is away for the time of a lease, the runs end too (but for those that may finish without it); the life goes on if its key is
still there afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from cellos.errors import ConfigError, EventLogError, WrongSequence
from cellos.eventlog.api import ask
from cellos.eventlog.connect import LogClient, pause
from cellos.eventlog.leases import NODES, STREAM, Lease, Leases, NodeLease, read_node
from cellos.eventlog.stored import nanoseconds
from cellos.node.life import Life
from cellos.supervisor.compose import new_run_id

TICK_SECONDS = 0.5
"""How long it may take to notice that the host has slept."""
_log = logging.getLogger("cellos.node.lease")


def boottime() -> float:
    """Seconds, also of those in which the host slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """`run` it as a task. `describe` gives what the node says of itself; `on_new_life` is told of each life before it is known to others.

    `on_lost` is told that runs must end: True where the life is over, False where only the connection is missing.
    """

    def __init__(
        self,
        leases: Leases,
        lease_seconds: float,
        *,
        describe: Callable[[str], NodeLease],
        on_new_life: Callable[[str], None],
        on_lost: Callable[[bool], None],
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._leases = leases
        self._seconds = lease_seconds
        self._describe = describe
        self._on_new_life = on_new_life
        self._on_lost = on_lost
        self._clock = clock
        self._life = Life("", lease_seconds)
        self._changed = asyncio.Event()
        self._told = ""
        self._lost = False
        self.sure = asyncio.Event()
        """Set while the life is sure: nothing may be claimed otherwise."""

    @property
    def life(self) -> str:
        """Its id."""
        return self._life.id

    @property
    def is_sure(self) -> bool:
        """Whether nobody can have declared it dead."""
        return self._life.is_sure(self._clock())

    def tell_now(self) -> None:
        """What the node says of itself has changed in a way that others should know soon."""
        self._changed.set()

    async def run(self) -> None:
        """For ever."""
        self._begin()
        attempt = 0
        while True:
            self._watch()
            if self._changed.is_set() or self._life.until_next(self._clock()) == 0:
                self._changed.clear()
                attempt = 0 if await self._renew() else attempt + 1
            self._watch()
            wait = min(TICK_SECONDS, pause(attempt) if attempt else self._life.until_next(self._clock()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):  # wait_for of Python 3.11 forgets that it was cancelled where both come at once
                    await self._changed.wait()

    async def end(self) -> None:
        """Take the sign away. Raises EventLogError."""
        life, self._life = self._life, Life("", self._seconds)
        self.sure.clear()
        if life.revision:
            await self._leases.delete(NODES + life.id, life.revision)

    def _begin(self) -> None:
        self._life = Life(new_run_id(), self._seconds)
        self._lost = False
        self._on_new_life(self._life.id)

    def _watch(self) -> None:
        """Say it once where the life is not sure any more."""
        if self.is_sure:
            self._lost = False
            self.sure.set()
            return
        self.sure.clear()
        if self._life.revision and not self._lost:
            self._lost = True
            _log.warning("no sign of life was taken for the time of the lease", extra={"fields": {"life": self.life}})
            self._on_lost(False)

    async def _renew(self) -> bool:
        life, sent = self._life, self._clock()
        value = msgspec.json.encode(self._describe(life.id))
        try:
            async with asyncio.timeout(max(1.0, self._seconds / 3)):
                life.renewed(await self._put(life, value), sent)
        except WrongSequence:
            self._over()
            return True
        except (EventLogError, TimeoutError) as error:
            text = error.text if isinstance(error, EventLogError) else "no answer in time"
            if text != self._told:
                _log.warning("cannot renew the lease", extra={"fields": {"life": life.id, "error": text}})
            self._told = text
            return False
        self._told = ""
        return True

    async def _put(self, life: Life, value: bytes) -> int:
        """The new revision. A refusal may be that of a write that is ours, too, of which we never heard."""
        try:
            return await self._leases.put(NODES + life.id, value, life.revision)
        except WrongSequence:
            found = next((lease for lease in await self._leases.entries(NODES) if lease.key == NODES + life.id), None)
            if found is None:
                raise
            return await self._leases.put(found.key, value, found.revision)

    def _over(self) -> None:
        _log.warning("this life of the node was declared dead; another begins", extra={"fields": {"life": self.life}})
        self.sure.clear()
        self._on_lost(True)
        self._begin()


async def refuse_namesake(client: LogClient, node: str, *, own: str | None) -> None:
    """Make sure that no other node of this id is alive: wait, for the rest of its lease, whether it gives another sign of life.

    `own` is a life whose process is known to be gone. Raises ConfigError; EventLogError where nobody can tell.
    """
    leases = Leases(client)
    seen: dict[str, Lease] = {}
    deadlines: dict[str, float] = {}
    while True:
        waiting: list[NodeLease] = []
        for lease in await leases.entries(NODES):
            found = read_node(lease)
            if found is None or found.node != node or found.life == own:
                continue
            if lease.key not in seen:
                seen[lease.key] = lease
                age = (await _server_time_ns(client) - lease.created_ns) / 1e9
                deadlines[lease.key] = boottime() + found.lease_ms / 1000 - age
                fields = {"node": node, "host": found.host, "pid": found.pid}
                _log.info("another node of this id was alive a moment ago; waiting whether it still is", extra={"fields": fields})
            if seen[lease.key].revision != lease.revision:
                raise ConfigError(
                    f"CELLOS_NODE_ID: a node {node} runs already, on host {found.host} as process {found.pid}; "
                    "stop it, or give this one another id"
                )
            if deadlines[lease.key] > boottime():
                waiting.append(found)
        if not waiting:
            return
        await asyncio.sleep(min(TICK_SECONDS, waiting[0].lease_ms / 3000))


class _Info(msgspec.Struct):
    ts: str


async def _server_time_ns(client: LogClient) -> int:
    """What NATS, whose clock is on the leases, says that the time is."""
    return nanoseconds(msgspec.json.decode(await ask(client, f"STREAM.INFO.{STREAM}"), type=_Info).ts)
