"""Which lives of nodes are gone: those whose lease ran out, and those whose key is no longer there.

A key that has not changed for its lease and a third more is deleted; a node that renewed in that moment wins. Time counts only between two
looks at the bucket that both succeeded: while NATS is away from us, nobody is declared dead. A life that has runs but is not among the keys
that were seen last is looked up with the leader of the bucket before it counts as gone: the keys may be older than its claim.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

from cellos.errors import EventLogError, WrongSequence
from cellos.eventlog.leases import CONTROLLERS, NODES, Lease, Leases, read_controller, read_node

MARGIN = 4 / 3
"""Of a lease, until it has run out for others."""
LOOKS = 8
"""In the time of the shortest lease."""
SHORTEST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
DEFAULT_LEASE_MS = 15_000
_log = logging.getLogger("cellos.controller.leases")


class Silence:
    """How long each key has not changed. Pure; times are seconds of a clock that only goes on."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._longest = LONGEST_PAUSE
        self._silent: dict[str, tuple[int, float, float]] = {}
        """Revision, lease in seconds, silence in seconds."""

    @property
    def pause(self) -> float:
        """How long until the next look."""
        shortest = min((lease for _, lease, _ in self._silent.values()), default=LONGEST_PAUSE * LOOKS)
        return min(LONGEST_PAUSE, max(SHORTEST_PAUSE, shortest / LOOKS))

    def deaf(self) -> None:
        """A look failed: the time until the next one does not count."""
        self._last = None

    def heard(self, entries: Iterable[Lease], now: float) -> list[Lease]:
        """Another look: whose lease has run out."""
        # A process that was stopped may find itself much later: others then had no chance to be heard by it.
        passed = 0.0 if self._last is None else min(now - self._last, 2 * self.pause)
        self._last = now
        before, self._silent = self._silent, {}
        expired = []
        for lease in entries:
            revision, seconds, silent = before.get(lease.key, (0, 0.0, 0.0))
            if revision != lease.revision:
                seconds, silent = lease_seconds(lease), 0.0
            else:
                silent += passed
            self._silent[lease.key] = (lease.revision, seconds, silent)
            if silent >= seconds * MARGIN:
                expired.append(lease)
        return expired


def lease_seconds(lease: Lease) -> float:
    """What its owner promised."""
    owner = read_node(lease) or read_controller(lease)
    return (owner.lease_ms if owner is not None and owner.lease_ms > 0 else DEFAULT_LEASE_MS) / 1000


class Lives:
    """`run` it as a task. `gone` only grows: a life that ended does not come back. `on_gone` is told of each."""

    def __init__(self, leases: Leases, *, monotonic: Callable[[], float], on_gone: Callable[[str], None]) -> None:
        self.gone: set[str] = set()
        self._leases = leases
        self._monotonic = monotonic
        self._on_gone = on_gone
        self._there: set[str] = set()
        self._asked: set[str] = set()
        self._silence = Silence()
        self._wanted = asyncio.Event()

    def look_at(self, lives: Iterable[str | None]) -> None:
        """Lives that have runs: those that nobody knows are looked up."""
        for life in lives:
            if life is not None and life not in self._there and life not in self.gone:
                self._asked.add(life)
                self._wanted.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self._look()
                await self._look_up()
            except EventLogError as error:  # who reads the log says so, too
                _log.debug("no leases", extra={"fields": {"error": error.text}})
                self._silence.deaf()
                await asyncio.sleep(self._silence.pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._silence.pause):
                    await self._wanted.wait()

    async def _look(self) -> None:
        entries = await self._leases.entries()
        expired = self._silence.heard(entries, self._monotonic())
        there = {life for lease in entries if (life := _life(lease))}
        self._asked |= self._there - there
        self._there = there
        for lease in expired:
            with contextlib.suppress(WrongSequence):  # it lives
                await self._leases.delete(lease.key, lease.revision)
                self._tell_expired(lease)

    async def _look_up(self) -> None:
        self._wanted.clear()
        for life in list(self._asked):
            if await self._leases.get(NODES + life) is None:
                self._ended(life)
            else:
                self._there.add(life)
            self._asked.discard(life)

    def _tell_expired(self, lease: Lease) -> None:
        life = _life(lease)
        if life is None:
            if lease.key.startswith(CONTROLLERS):
                _log.info("a controller is gone", extra={"fields": {"controller": lease.key.removeprefix(CONTROLLERS)}})
            return
        node = read_node(lease)
        fields = {"life": life, "node": node.node if node is not None else None, "host": node.host if node is not None else None}
        _log.warning("a node's lease ran out", extra={"fields": fields})
        self._there.discard(life)
        self._ended(life)

    def _ended(self, life: str) -> None:
        if life not in self.gone:
            self.gone.add(life)
            self._on_gone(life)


def _life(lease: Lease) -> str | None:
    return lease.key.removeprefix(NODES) if lease.key.startswith(NODES) else None
