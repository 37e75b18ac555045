"""Which spec an agent tries next, so that many agents seldom try the same: pure, but for the dice it is given.

Each agent begins at a random place of a page and goes on from there. Where it finds a spec taken, it has come upon the track of another
agent, who has worked off what follows: so it goes on at another random place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from msgspec import Struct

from cellos.core.documents import parse_execution_cell
from cellos.core.need import Need, need_of
from cellos.core.objects import Entry, Stored
from cellos.errors import CellosError

_LONGEST_FAULT = 500


class Plan(Struct, frozen=True, kw_only=True):
    """What the document of a spec asks for. `fault`: it can never be run, and why."""

    pool: str | None = None
    need: Need = Need()
    fault: str | None = None


def plan_of(found: Stored, *, allow_unknown_fields: bool = False) -> Plan:
    if found.fault is not None:
        return Plan(fault=found.fault)
    return plan_of_bytes(found.body, allow_unknown_fields=allow_unknown_fields)


def plan_of_bytes(raw: bytes, *, allow_unknown_fields: bool = False) -> Plan:
    try:
        spec = parse_execution_cell(raw, allow_unknown_fields=allow_unknown_fields).spec
    except CellosError as error:
        return Plan(fault=str(error)[:_LONGEST_FAULT])
    return Plan(pool=spec.placement.pool_id if spec.placement else None, need=need_of(spec))


def may_take(plan: Plan, pool: str) -> bool:
    """The gate: without a pool of its own an agent takes all; a spec that names none, or cannot be read, is for everybody."""
    return not pool or plan.pool is None or plan.pool == pool


class Memory:
    """The plans of specs that were looked at and left, by their etag, so that they are not read again. The oldest are forgotten."""

    def __init__(self, most: int = 200_000) -> None:
        self._plans: OrderedDict[tuple[str, str], Plan] = OrderedDict()
        self._most = most

    def __getitem__(self, entry: Entry) -> Plan | None:
        return self._plans.get((entry.key, entry.etag))

    def keep(self, entry: Entry, plan: Plan) -> None:
        self._plans[entry.key, entry.etag] = plan
        if len(self._plans) > self._most:
            self._plans.popitem(last=False)


class Picks:
    """The entries of one page. `below(n)` draws a number from 0 to n - 1."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self._below = below
        self._entries: list[Entry] = []
        self._next = 0

    def load(self, entries: Sequence[Entry], without: Collection[str]) -> None:
        """Another page, `without` these keys."""
        self._entries = [entry for entry in entries if entry.key not in without]
        self._jump()

    def take(self) -> Entry | None:
        """Each entry once."""
        if not self._entries:
            return None
        if self._next >= len(self._entries):
            self._next = 0
        return self._entries.pop(self._next)

    def missed(self) -> None:
        """The last one was taken by somebody else."""
        self._jump()

    def _jump(self) -> None:
        self._next = self._below(len(self._entries)) if self._entries else 0
