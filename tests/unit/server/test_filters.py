from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.server.filters import is_filter, matcher, meets


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b", ">.a", "a.>.b", "a b", "a\tb", "a\x00", "x" * 1025])
def test_what_is_no_filter(text: str) -> None:
    assert not is_filter(text)


@pytest.mark.parametrize(
    ("text", "selects"),
    [
        (">", True),
        ("cellos.>", True),
        ("*.events.>", True),
        ("cellos.*.>", True),
        ("cellos.events.>", True),
        ("cellos.events.*", True),
        ("cellos.events.a.*.c", True),
        ("cellos.events", False),
        ("cellos.*", False),
        ("cellos.*.a", False),
        ("*.events.a", False),
        ("other.>", False),
        ("*", False),
    ],
)
def test_what_selects_among_events(text: str, selects: bool) -> None:
    assert meets(text) is selects


TOKENS = st.sampled_from(["a", "b", "c"])


@given(st.lists(TOKENS | st.just("*"), max_size=3), st.booleans(), st.lists(TOKENS, min_size=1, max_size=4))
def test_matching_is_as_nats_has_it(pattern: list[str], tail: bool, subject: list[str]) -> None:
    text = ".".join(["cellos.events", *pattern, *[">"] * tail])
    if not meets(text):
        assert text == "cellos.events"
        return
    fits = all(want in {"*", got} for want, got in zip(pattern, subject, strict=False))
    long_enough = len(subject) > len(pattern) if tail else len(subject) == len(pattern)
    assert matcher(text)(".".join(["cellos.events", *subject])) is (fits and long_enough)
