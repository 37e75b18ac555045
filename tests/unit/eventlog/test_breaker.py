from __future__ import annotations

import pytest

from cellos.errors import EventSinkError
from cellos.eventlog.breaker import Breaker, Connected, Reconnecting, after_failure, breaker_pause, retry_pause


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_breaker_opens_for_twice_as_long_each_time_up_to_three_minutes() -> None:
    assert [breaker_pause(attempt) for attempt in range(13)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 180, 180]
    )
    assert breaker_pause(100_000) == 180


def test_tries_within_a_publish_are_100_and_400_ms_apart() -> None:
    assert [retry_pause(attempt) for attempt in (1, 2)] == pytest.approx([0.1, 0.4])


def test_the_first_failure_is_attempt_0_and_each_failed_probe_one_more() -> None:
    state = after_failure(Connected(), probe=False, now=10.0)
    assert state == Reconnecting(attempt=0, next_after=10.1)
    assert after_failure(state, probe=True, now=20.0) == Reconnecting(attempt=1, next_after=20.2)


def test_a_call_that_began_before_says_nothing_new_when_it_fails() -> None:
    state = Reconnecting(attempt=3, next_after=50.0)
    assert after_failure(state, probe=False, now=20.0) is state


def test_open_is_an_error_that_names_the_next_probe() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed(probe=breaker.admit())
    clock.now += 0.04
    with pytest.raises(EventSinkError) as caught:
        breaker.admit()
    assert caught.value.text == "jetstream sink in reconnecting state (attempt=0, next probe in 60ms)"


def test_one_probe_when_it_is_due_and_no_second_one_before_its_end() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed(probe=breaker.admit())
    clock.now += 0.2
    assert breaker.admit() is True
    with pytest.raises(EventSinkError, match=r"attempt=0, next probe in 0ms"):
        breaker.admit()
    breaker.failed(probe=True)
    assert breaker.state == Reconnecting(attempt=1, next_after=clock.now + 0.2)
    clock.now += 0.3
    assert breaker.admit() is True
    breaker.succeeded(probe=True)
    assert breaker.state == Connected()
    assert breaker.admit() is False


def test_a_probe_that_came_to_nothing_leaves_room_for_another() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed(probe=breaker.admit())
    clock.now += 0.2
    breaker.withdrawn(probe=breaker.admit())
    assert breaker.admit() is True


def test_success_begins_the_schedule_anew() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(4):
        clock.now += 200
        breaker.failed(probe=breaker.admit())
    clock.now += 200
    breaker.succeeded(probe=breaker.admit())
    breaker.failed(probe=breaker.admit())
    assert breaker.state == Reconnecting(attempt=0, next_after=clock.now + 0.1)
