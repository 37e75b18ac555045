"""How long a key may be silent."""

from __future__ import annotations

import msgspec
import pytest

from cellos.controller.lives import DEFAULT_LEASE_MS, LONGEST_PAUSE, SHORTEST_PAUSE, Silence, lease_seconds
from cellos.eventlog.leases import ControllerLease, Lease


def lease(revision: int, *, key: str = "controllers.c", lease_ms: int = 3_000) -> Lease:
    value = ControllerLease(controller="c", host="h", pid=1, lease_ms=lease_ms, started_at="")
    return Lease(key, msgspec.json.encode(value), revision, 0)


def looks(silence: Silence, found: Lease, begin: float, end: float, step: float = 0.25) -> list[Lease]:
    """Looks from one time to another, all of the same revision: what the last one finds."""
    expired: list[Lease] = []
    for number in range(round((end - begin) / step) + 1):
        expired = silence.heard([found], begin + number * step)
    return expired


def test_a_key_that_does_not_change_runs_out_after_its_lease_and_a_third() -> None:
    silence = Silence()
    assert looks(silence, lease(1), 100.0, 103.75) == []
    assert silence.heard([lease(1)], 104.0) == [lease(1)]


def test_a_change_begins_the_time_anew() -> None:
    silence = Silence()
    looks(silence, lease(1), 0.0, 3.75)
    assert silence.heard([lease(2)], 4.0) == []
    assert looks(silence, lease(2), 4.25, 7.75) == []
    assert silence.heard([lease(2)], 8.0) == [lease(2)]


def test_time_without_connection_does_not_count() -> None:
    silence = Silence()
    looks(silence, lease(1), 0.0, 2.0)
    silence.deaf()
    assert silence.heard([lease(1)], 1000.0) == []
    assert looks(silence, lease(1), 1000.25, 1001.75) == []
    assert silence.heard([lease(1)], 1002.0) == [lease(1)]


def test_time_in_which_we_stood_still_hardly_counts() -> None:
    silence = Silence()
    silence.heard([lease(1)], 0.0)
    assert silence.heard([lease(1)], 1000.0) == []


def test_a_key_that_is_gone_is_forgotten() -> None:
    silence = Silence()
    looks(silence, lease(1), 0.0, 3.0)
    silence.heard([], 3.25)
    assert looks(silence, lease(1), 3.5, 7.0) == []


def test_looks_come_several_times_per_lease_and_neither_too_often_nor_too_seldom() -> None:
    silence = Silence()
    assert silence.pause == LONGEST_PAUSE
    for lease_ms, pause in ((8_000, 1.0), (100, SHORTEST_PAUSE), (10**6, LONGEST_PAUSE)):
        silence.heard([lease(lease_ms, lease_ms=lease_ms)], 0.0)
        assert silence.pause == pytest.approx(pause)


@pytest.mark.parametrize("value", [b"", b"{}", b'{"leaseMs":0}'])
def test_who_says_nothing_of_a_lease_has_the_usual_one(value: bytes) -> None:
    assert lease_seconds(Lease("nodes.l", value, 1, 0)) == DEFAULT_LEASE_MS / 1000
