from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.formation import options
from cellos.core.formation.options import MEMBER_OPTIONS, Backoff, read_backoff, refuse_misspelt
from cellos.errors import SpecSyntaxError

PAGE = Path(__file__).parents[4] / "docs/reference/formation.md"


def test_defaults() -> None:
    for entry in ({}, dict.fromkeys((*MEMBER_OPTIONS, *options.FORMATION_OPTIONS))):
        assert options.read_after(entry) == ()
        assert options.read_critical(entry) is True
        assert options.read_retries(entry) == 0
        assert options.read_on_node_lost(entry) == "fail"
        assert options.read_backoff(entry) == Backoff(initial_ms=1000, max_ms=60_000, factor=2)
        assert options.read_deadline_seconds(entry) == 30 * 24 * 3600
        assert options.read_on_disconnect(entry) == "kill"


def test_what_is_given() -> None:
    assert options.read_after({"after": ["a", "b"]}) == ("a", "b")
    assert options.read_critical({"critical": False}) is False
    assert [options.read_retries({"retries": count}) for count in (0, 100)] == [0, 100]
    assert options.read_on_node_lost({"onNodeLost": "retry"}) == "retry"
    assert [options.read_deadline_seconds({"deadlineSeconds": count}) for count in (1, 2592000)] == [1, 2592000]
    assert options.read_on_disconnect({"onDisconnect": "finish"}) == "finish"
    assert read_backoff({"backoff": {"initialMs": 0, "maxMs": 0, "factor": 1}}) == Backoff(initial_ms=0, max_ms=0, factor=1)


def test_a_long_first_wait_lengthens_the_longest() -> None:
    assert read_backoff({"backoff": {"initialMs": 100_000}}) == Backoff(initial_ms=100_000, max_ms=100_000)


@pytest.mark.parametrize(
    ("backoff", "waits"),
    [
        (Backoff(), [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]),
        (Backoff(initial_ms=100, factor=1), [100, 100]),
        (Backoff(initial_ms=100, factor=1.5), [100, 150, 225]),
        (Backoff(initial_ms=0), [0, 0]),
    ],
)
def test_waits(backoff: Backoff, waits: list[int]) -> None:
    assert [backoff.delay_ms(ended) for ended in range(1, len(waits) + 1)] == waits


@given(st.integers(0, options.MOST_BACKOFF_MS), st.floats(1, options.MOST_FACTOR), st.integers(1, 111))
def test_no_wait_is_too_long_to_count(initial: int, factor: float, ended: int) -> None:
    backoff = Backoff(initial_ms=initial, max_ms=options.MOST_BACKOFF_MS, factor=factor)
    assert initial <= backoff.delay_ms(ended) <= backoff.max_ms


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("afters", "after"),
        ("After", "after"),
        ("atfer", "after"),
        ("critcal", "critical"),
        ("retry", "retries"),
        ("retires", "retries"),
        ("retrys", "retries"),
        ("on_node_lost", "onNodeLost"),
        ("onNodeLoss", "onNodeLost"),
        ("backOff", "backoff"),
        ("back-off", "backoff"),
        ("pools", "pool"),
        ("specs", "spec"),
        ("Use", "use"),
        ("authorisedBy", "authorizedBy"),
    ],
)
def test_misspelt(written: str, meant: str) -> None:
    with pytest.raises(SpecSyntaxError) as caught:
        refuse_misspelt({written: 1}, MEMBER_OPTIONS)
    assert (caught.value.path, caught.value.text) == (written, f"{written} is not known; did you mean {meant}?")


@pytest.mark.parametrize(
    "name", ["tool", "tools", "user", "role", "image", "labels", "notes", "entries", "uses", "ids", "x" * 5000, "", "è"]
)
def test_names_of_others(name: str) -> None:
    refuse_misspelt({name: 1}, MEMBER_OPTIONS)


@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(MEMBER_OPTIONS),
        st.none() | st.text(max_size=3) | st.integers() | st.lists(st.integers(), max_size=2),
    )
)
def test_whatever_is_written_is_read_or_refused(entry: dict[str, Any]) -> None:
    for read in (options.read_after, options.read_critical, options.read_retries, options.read_on_node_lost, options.read_backoff):
        refused: SpecSyntaxError | None = None
        try:
            read(entry)
        except SpecSyntaxError as error:
            refused = error
        assert refused is None or (refused.text.startswith(refused.path) and refused.text.isprintable())
