import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.deadline import Source, choose, parse_run_timeout
from cellos.errors import ConfigError


@pytest.mark.parametrize(
    ("ttl", "spec", "env", "milliseconds", "source"),
    [
        (60, None, None, 60_000, "ttl"),
        (60, 500, None, 500, "spec"),
        (60, None, 500, 500, "environment"),
        (60, 500, 400, 400, "environment"),
        (60, 400, 500, 400, "spec"),
        (60, 400, 400, 400, "spec"),
        (60, 60_000, None, 60_000, "spec"),
        (60, None, 60_000, 60_000, "environment"),
        (60, 60_000, 60_000, 60_000, "spec"),
        (60, None, 60_001, 60_000, "ttl"),
        (60, 90_000, 70_000, 60_000, "ttl"),
        (0, None, None, 0, "ttl"),
        (0, 0, None, 0, "spec"),
        (60, 0, 5, 0, "spec"),
        (0, None, 5, 0, "ttl"),
    ],
)
def test_the_shortest_holds_and_ties_go_to_the_most_specific(
    ttl: int, spec: int | None, env: int | None, milliseconds: int, source: Source
) -> None:
    deadline = choose(ttl, spec, env)
    assert (deadline.milliseconds, deadline.source, deadline.ttl_seconds) == (milliseconds, source, ttl)
    assert deadline.seconds == milliseconds / 1000


@given(st.integers(0, 2**64), st.none() | st.integers(0, 2**64), st.none() | st.integers(0, 2**64))
def test_it_is_never_longer_than_anything_declared(ttl: int, spec: int | None, env: int | None) -> None:
    declared = [ttl * 1000, *(value for value in (spec, env) if value is not None)]
    assert choose(ttl, spec, env).milliseconds == min(declared)


@pytest.mark.parametrize(
    ("ttl", "spec", "env", "text"),
    [
        (2, None, None, "cell killed by TTL watchdog after 2000 ms (ttl_seconds=2)"),
        (2, 100, None, "command timed out after 100 ms (spec.run.timeoutMs)"),
        (2, None, 100, "command timed out after 100 ms (CELLOS_RUN_TIMEOUT_MS)"),
        (0, None, None, "cell killed by TTL watchdog after 0 ms (ttl_seconds=0)"),
    ],
)
def test_texts(ttl: int, spec: int | None, env: int | None, text: str) -> None:
    assert choose(ttl, spec, env).text == text


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("+5", 5), (" 250 ", 250), ("007", 7), (str(2**64 - 1), 2**64 - 1), ("0" * 9000 + "9", 9)]
)
def test_run_timeout(text: str, value: int) -> None:
    assert parse_run_timeout(text) == value


@pytest.mark.parametrize("text", ["", " ", "x", "-1", "1.5", "1e3", "1_000", "0x10", "٣", "1 2", "++1", str(2**64), "9" * 5000])
def test_unusable_run_timeout(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_run_timeout(text)
    assert str(raised.value) == f'invalid CELLOS_RUN_TIMEOUT_MS: "{text}"'


@pytest.mark.parametrize("text", ["0", "00", "+0", "0" * 9000])
def test_run_timeout_of_nothing(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_run_timeout(text)
    assert str(raised.value) == "CELLOS_RUN_TIMEOUT_MS must be > 0"
