from __future__ import annotations

import pytest

from cellos.core.objects import Entry
from cellos.fleet.layout import PARTS, Layout, numbers
from cellos.fleet.progress import InFlight, Progress, ended_attempts, expired, in_flight
from cellos.fleet.records import Receipt

PLAIN, LANE = Layout("fleet"), Layout("fleet/nightly")


def entry(key: str, modified_ns: int = 0) -> Entry:
    return Entry(key=key, size=1, modified_ns=modified_ns, etag="e")


def test_keys_with_and_without_a_lane() -> None:
    assert PLAIN.pending("a") == "fleet/pending/a.json"
    assert LANE.claimed("a") == "fleet/nightly/claimed/a.json"
    assert [LANE.result("a", "completed"), LANE.result("a", "failed")] == ["fleet/nightly/completed/a.json", "fleet/nightly/failed/a.json"]
    assert PLAIN.receipt("a", 1) == "fleet/receipts/a/1.json"
    assert PLAIN.again("a", 1) == "fleet/receipts/a/1.again.json"
    assert PLAIN.lease("a", 0) == "fleet/leases/a/0.json"
    assert PLAIN.agent("x") == "fleet/agents/x.json"
    assert Layout("").pending("a") == "pending/a.json"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_lies_below_its_prefix(part: str) -> None:
    assert LANE.within(part) == f"fleet/nightly/{part}/"


@pytest.mark.parametrize(
    ("key", "id"),
    [
        ("fleet/pending/a.json", "a"),
        ("fleet/pending/a.json.json", "a.json"),
        ("fleet/pending/a.b-c_d.json", "a.b-c_d"),
        ("fleet/pending/a", None),
        ("fleet/pending/.json", None),
        ("fleet/pending/a/b.json", None),
        ("fleet/pending/a b.json", None),
        ("fleet/pending/..json", None),
        ("fleet/pending/é.json", None),
        ("fleet/pending/" + "a" * 129 + ".json", None),
        ("fleet/nightly/pending/a.json", None),
        ("other/pending/a.json", None),
    ],
)
def test_the_id_in_a_key(key: str, id: str | None) -> None:
    assert PLAIN.id_in("pending", key) == id


def test_numbers_are_those_that_we_would_write() -> None:
    keys = [
        f"fleet/leases/a/{name}"
        for name in ("0.json", "1.json", "10.json", "01.json", "-1.json", "x.json", "2", "3.again.json", "\u0661.json")
    ]
    assert numbers(keys) == {0, 1, 10}
    assert numbers(keys, again=True) == {3}


def test_how_far_attempts_are() -> None:
    assert ended_attempts([]) == (0, False)
    assert ended_attempts(["r/a/1.json", "r/a/1.again.json", "r/a/2.json"]) == (2, False)
    assert ended_attempts(["r/a/10.json", "r/a/9.json", "r/a/10.again.json"]) == (10, True)


def receipt(**more: object) -> Receipt:
    return Receipt(token="t", node="n", life="l", id="a", attempt=2, epoch=7, outcome="failed", written_at="now", **more)  # type: ignore[arg-type]


def test_an_attempt_is_open_until_there_is_a_last_word() -> None:
    assert Progress().is_open
    assert (Progress().attempt, Progress().next_epoch) == (1, 0)
    done = Progress(ended=2, last=receipt())
    assert not done.is_open
    assert (done.attempt, done.next_epoch) == (3, 8)
    assert Progress(ended=2, last=receipt(again=True)).is_open
    assert Progress(ended=2, last=receipt(), asked=True).is_open


def test_what_two_listings_say() -> None:
    claimed = [entry("fleet/claimed/a.json", 5), entry("fleet/claimed/b.json", 6), entry("fleet/claimed/no id.json")]
    leases = [
        entry("fleet/leases/a/0.json", 7),
        entry("fleet/leases/a/2.json", 6),
        entry("fleet/leases/c/1.json", 9),
        entry("fleet/leases/c/x.json"),
    ]
    found = in_flight(PLAIN, claimed, leases)
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == InFlight(id="a", claimed=claimed[0], leases={0: leases[0], 2: leases[1]})
    assert [found[id].last_sign for id in found] == [7, 6, 9]
    assert [found[id].newest for id in found] == [leases[1], claimed[1], leases[2]]
    assert found["c"].claimed is None


def test_a_lease_ends_when_both_clocks_cannot_be_wrong_about_it() -> None:
    second = 10**9
    assert not expired(100 * second, 90 * second, 10_000)
    assert not expired(101 * second, 90 * second, 10_000)
    assert expired(102 * second, 90 * second, 10_000)
    assert not expired(90 * second, 200 * second, 10_000)
