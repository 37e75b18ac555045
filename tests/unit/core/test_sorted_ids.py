from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cellos.core import sorted_ids
from cellos.core.sorted_ids import SortedIds

IDS = st.text(st.sampled_from("ab\x00é\U0001f600"), max_size=6)


class Machine(RuleBasedStateMachine):
    """Against a set that is sorted whenever it is read. Lists are split at four ids, so that there are several."""

    @initialize(ids=st.sets(IDS))
    def begin(self, ids: set[str]) -> None:
        self.model = set(ids)
        self.ids = SortedIds(sorted(ids))

    @rule(id=IDS)
    def add(self, id: str) -> None:
        if id not in self.model:
            self.model.add(id)
            self.ids.add(id)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.model)))
        self.model.remove(id)
        self.ids.remove(id)

    @rule(after=st.none() | IDS, limit=st.none() | st.integers(0, 12))
    def read(self, after: str | None, limit: int | None) -> None:
        ids = sorted(self.model)
        ids = ids if after is None else ids[bisect_right(ids, after) :]
        assert self.ids.after(after, limit) == (ids if limit is None else ids[:limit])

    @invariant()
    def whole(self) -> None:
        assert list(self.ids) == sorted(self.model)
        assert len(self.ids) == len(self.model)
        assert all(0 < len(chunk) <= 2 * sorted_ids._HALF for chunk in self.ids._chunks)
        assert [chunk[-1] for chunk in self.ids._chunks] == self.ids._lasts


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_ids, "_HALF", 2)


TestSortedIds = Machine.TestCase


@given(st.permutations([f"{number:04}" for number in range(200)]))
def test_any_order_of_insertion_is_ascending(order: list[str]) -> None:
    ids = SortedIds()
    for id in order:
        ids.add(id)
    assert list(ids) == sorted(order)


def test_a_page_is_not_the_list_itself() -> None:
    ids = SortedIds(["a", "b"])
    ids.after(None, None).clear()
    assert list(ids) == ["a", "b"]


def test_order_is_that_of_utf8() -> None:
    texts = ["\uffff", "\U00010000", "z", "Z", "~", "", "é"]
    ids = SortedIds()
    for text in texts:
        ids.add(text)
    assert list(ids) == sorted(texts, key=str.encode)
