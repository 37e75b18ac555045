from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cellos.node.life import Life


def test_it_begins_unsure_and_its_first_sign_is_due() -> None:
    life = Life("a", 15.0)
    assert not life.is_sure(0.0)
    assert life.until_next(0.0) == 0.0
    assert life.left(0.0) == 0.0


def test_it_counts_from_when_the_sign_was_sent() -> None:
    life = Life("a", 15.0)
    life.renewed(7, sent=100.0)
    assert life.revision == 7
    assert life.is_sure(114.9)
    assert not life.is_sure(115.0)
    assert life.left(110.0) == 5.0
    assert life.until_next(102.0) == 3.0
    assert life.until_next(105.1) == 0.0


def test_it_is_unsure_after_the_host_has_slept_and_sure_again_after_a_sign() -> None:
    life = Life("a", 2.0)
    life.renewed(1, sent=0.0)
    assert not life.is_sure(3600.0)
    assert life.until_next(3600.0) == 0.0
    life.renewed(2, sent=3600.0)
    assert life.is_sure(3601.9)


@given(lease=st.floats(1.0, 3600.0), travel=st.floats(0.0, 10.0), now=st.floats(0.0, 10_000.0))
def test_it_gives_up_before_anybody_declares_it_dead(lease: float, travel: float, now: float) -> None:
    """A controller sees the sign after it was sent, and waits for a lease and a third of it."""
    life = Life("a", lease)
    life.renewed(1, sent=0.0)
    declared_dead = now >= travel + lease * 4 / 3
    assert not (declared_dead and life.is_sure(now))
