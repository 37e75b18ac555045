from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from cellos.core.need import Need
from cellos.core.objects import Entry, Stored
from cellos.fleet.picks import Memory, Picks, Plan, may_take, plan_of, plan_of_bytes


def entry(name: str, etag: str = "e") -> Entry:
    return Entry(key=name, size=1, modified_ns=0, etag=etag)


def document(**spec: Any) -> bytes:
    body = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["x"]}, **spec}
    return json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()


@pytest.mark.parametrize(
    ("ours", "theirs", "taken"),
    [("", None, True), ("", "gpu", True), ("gpu", None, True), ("gpu", "gpu", True), ("gpu", "cpu", False), ("gpu", "GPU", False)],
)
def test_the_gate(ours: str, theirs: str | None, taken: bool) -> None:
    assert may_take(Plan(pool=theirs), ours) is taken


def test_what_a_document_asks_for() -> None:
    limits = {"memoryMaxBytes": 1 << 30, "cpuMax": {"quotaMicros": 50_000}}
    plan = plan_of_bytes(document(placement={"poolId": "gpu"}, run={"argv": ["x"], "limits": limits}))
    assert plan == Plan(pool="gpu", need=Need(memory_bytes=1 << 30, cpu_micros=500_000))
    assert plan_of_bytes(document()) == Plan()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "empty"),
        (b"{", "parse ExecutionCellDocument"),
        (b"\xff", "not UTF-8"),
        (b'{"kind": "Formation"}', "unsupported kind"),
        (document(placement={"poolId": 7}), "poolId"),
        (document(unknown=1), "unknown"),
    ],
)
def test_what_cannot_be_read_is_no_document_of_any_pool(raw: bytes, why: str) -> None:
    plan = plan_of_bytes(raw)
    assert plan.fault is not None
    assert why in plan.fault
    assert may_take(plan, "gpu")


def test_what_was_not_read_is_told_as_it_is() -> None:
    assert plan_of(Stored(body=b"", entry=entry("a"), fault="not a regular file")) == Plan(fault="not a regular file")
    assert plan_of(Stored(body=document(unknown=1), entry=entry("a")), allow_unknown_fields=True) == Plan()


def test_plans_are_remembered_by_etag_and_the_oldest_forgotten() -> None:
    memory = Memory(2)
    memory.keep(entry("a"), Plan(pool="x"))
    assert memory[entry("a")] == Plan(pool="x")
    assert memory[entry("a", "changed")] is None
    memory.keep(entry("b"), Plan())
    memory.keep(entry("c"), Plan())
    assert (memory[entry("a")], memory[entry("c")]) == (None, Plan())


def test_each_entry_is_picked_once_from_a_place_that_is_drawn() -> None:
    picks = Picks(lambda most: most - 2)
    assert picks.take() is None
    picks.load([entry(name) for name in "abcd"], ())
    taken = [picks.take() for _ in range(5)]
    assert [each.key for each in taken if each] == ["c", "d", "a", "b"]
    assert taken[-1] is None


def test_on_the_track_of_another_one_it_goes_elsewhere() -> None:
    places = iter([0, 3])
    picks = Picks(lambda _: next(places))
    picks.load([entry(name) for name in "abcdef"], ())
    first = picks.take()
    picks.missed()
    second = picks.take()
    assert first is not None
    assert second is not None
    assert (first.key, second.key) == ("a", "e")


def test_many_agents_on_one_page_seldom_meet() -> None:
    """Each looks at the page anew after it met somebody, as agents do."""
    dice = random.Random(5)
    left = {f"{number:04}" for number in range(1000)}
    agents = [Picks(dice.randrange) for _ in range(8)]
    for each in agents:
        each.load([entry(name) for name in sorted(left)], ())
    tried: Counter[bool] = Counter()
    while left:
        each = dice.choice(agents)
        found = each.take()
        hit = found is not None and found.key in left
        tried[hit] += found is not None
        if hit and found is not None:
            left.discard(found.key)
        else:
            each.load([entry(name) for name in sorted(left)], ())
    assert tried[True] == 1000
    assert tried[False] / tried[True] < 0.3
