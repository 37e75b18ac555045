"""Cells made ahead: which of them there are, who gets which, and that none is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.sandbox.workshop import Made, Shelf


class Workshop:
    """Makes cells of nothing, and remembers which are there."""

    def __init__(self) -> None:
        self.there: list[int] = []

    def make(self, serial: int) -> Made:
        assert serial not in self.there
        self.there.append(serial)
        return Made(serial)

    def undo(self, made: Made) -> None:
        self.there.remove(made.serial)


def fill(shelf: Shelf) -> int:
    made = 0
    while shelf.has_room():
        shelf.add()
        made += 1
    return made


def shelf_of(workshop: Workshop, *, ahead: int, refill: bool) -> Shelf:
    return Shelf(workshop, ahead=ahead, refill=refill)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_time", [True, False])
def test_a_one_shot_run_gets_one_cell_whether_it_was_made_in_time_or_not(in_time: bool) -> None:
    workshop = Workshop()
    shelf = shelf_of(workshop, ahead=1, refill=False)
    if in_time:
        assert fill(shelf) == 1
    assert shelf.take(0).serial == 0
    assert fill(shelf) == 0
    assert workshop.there == [0]


def test_what_was_made_to_try_the_host_is_the_next_one() -> None:
    workshop = Workshop()
    shelf = shelf_of(workshop, ahead=0, refill=False)
    tried = shelf.any()
    assert shelf.any() is tried
    assert shelf.take(0) is tried


def test_a_cell_that_nobody_comes_for_does_not_take_the_place_of_others() -> None:
    workshop = Workshop()
    shelf = shelf_of(workshop, ahead=2, refill=True)
    fill(shelf)
    for serial in range(1, 20):  # 0 was reserved by a run that was refused
        assert shelf.take(serial).serial == serial
        workshop.there.remove(serial)
        assert fill(shelf) <= 2
    assert workshop.there == [20, 21]


@given(
    ahead=st.integers(0, 4), refill=st.booleans(), order=st.permutations(range(8)), pauses=st.lists(st.booleans(), min_size=8, max_size=8)
)
def test_everybody_gets_their_own_and_nothing_is_left(ahead: int, refill: bool, order: list[int], pauses: list[bool]) -> None:
    workshop = Workshop()
    shelf = shelf_of(workshop, ahead=ahead, refill=refill)
    for serial, pause in zip(order, pauses, strict=True):
        if pause:
            fill(shelf)
        assert shelf.take(serial).serial == serial
        workshop.there.remove(serial)
        assert len(workshop.there) <= ahead
    shelf.clear()
    assert workshop.there == []
