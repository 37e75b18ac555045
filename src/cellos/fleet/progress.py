"""How far a spec is, from what lies in the bucket about it: pure rules over listings and records.

An attempt is open until its receipt is there. Epochs of leases go on through all attempts of an id and are never used twice: the first of
an attempt is one more than the epoch of the last receipt. That one is held by the claim itself, until there is a lease object for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from cellos.core.objects import Entry
from cellos.fleet.layout import Layout, numbers
from cellos.fleet.records import Receipt

MARGIN_MS = 2_000
"""Stores tell times in whole seconds, and two of them are compared."""


class Progress(Struct, frozen=True, kw_only=True):
    """What the receipts of an id say. `asked`: another attempt was asked for after the last one."""

    ended: int = 0
    last: Receipt | None = None
    asked: bool = False

    @property
    def is_open(self) -> bool:
        """There is an attempt to be run, or that runs."""
        return self.last is None or self.last.again or self.asked

    @property
    def attempt(self) -> int:
        """The number of the attempt that is open, or would be the next one."""
        return self.ended + 1

    @property
    def next_epoch(self) -> int:
        return self.last.epoch + 1 if self.last is not None else 0


def ended_attempts(keys: Iterable[str]) -> tuple[int, bool]:
    """The number of the last attempt that ended, and whether another one was asked for after it, from the keys of an id's receipts."""
    keys = tuple(keys)
    last = max(numbers(keys), default=0)
    return last, last in numbers(keys, again=True)


class InFlight(Struct, frozen=True, kw_only=True):
    """What two listings say about an id that is or was claimed."""

    id: str
    claimed: Entry | None
    leases: Mapping[int, Entry]

    @property
    def newest(self) -> Entry | None:
        """The object whose owner holds the claim: the lease of the highest epoch, else the claim."""
        return self.leases[max(self.leases)] if self.leases else self.claimed

    @property
    def last_sign(self) -> int:
        """When any holder showed that it lives, by the clock of the store."""
        entries = [*self.leases.values(), *([self.claimed] if self.claimed else [])]
        return max(entry.modified_ns for entry in entries)


def in_flight(layout: Layout, claimed: Iterable[Entry], leases: Iterable[Entry]) -> dict[str, InFlight]:
    """By id. Keys that no agent of ours makes are left out."""
    claims = {id: entry for entry in claimed if (id := layout.id_in("claimed", entry.key)) is not None}
    held: dict[str, dict[int, Entry]] = {}
    for entry in leases:
        id = layout.id_in("leases", entry.key)
        epoch = next(iter(numbers([entry.key])), None)
        if id is not None and epoch is not None and entry.key == layout.lease(id, epoch):
            held.setdefault(id, {})[epoch] = entry
    return {id: InFlight(id=id, claimed=claims.get(id), leases=held.get(id, {})) for id in sorted(claims.keys() | held.keys())}


def expired(now_ns: int, last_sign_ns: int, lease_ms: int) -> bool:
    """Whether a holder has lost its lease. Both times are by the store's clock, `now` not later than the listing `last_sign` is from."""
    return now_ns - last_sign_ns >= (lease_ms + MARGIN_MS) * 1_000_000
