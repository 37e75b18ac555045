"""When to try again: the schedule of attempts, and a circuit breaker that keeps a dead server from holding up every caller.

Connected: every call goes through. After a failure the breaker is open (`Reconnecting`): calls fail at once until `next_after`; then
exactly one of them is let through as a probe. A failed probe opens it for twice as long, 0.1, 0.2 … 102.4, at most 180 s; any success
closes it.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable

from msgspec import Struct

from cellos.errors import EventSinkError

ATTEMPTS = 3
"""Tries within one publish."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 180.0


class Connected(Struct, frozen=True):
    """The last publish succeeded, or there was none yet."""


class Reconnecting(Struct, frozen=True, kw_only=True):
    """The last publish failed. `attempt` counts failed probes; the next probe is due at `next_after`, on the caller's monotonic clock."""

    attempt: int
    next_after: float


State = Connected | Reconnecting


def retry_pause(attempt: int) -> float:
    """Seconds between try `attempt` (from 1) of one publish and the next: 0.1, 0.4, …"""
    return FIRST_PAUSE_SECONDS * 4.0 ** (attempt - 1)


def breaker_pause(attempt: int) -> float:
    """Seconds for which the breaker stays open after `attempt` failed probes."""
    return LONGEST_PAUSE_SECONDS if attempt > 10 else min(FIRST_PAUSE_SECONDS * 2.0**attempt, LONGEST_PAUSE_SECONDS)


def after_failure(state: State, *, probe: bool, now: float) -> State:
    """The state after a failed publish. One that began before the breaker opened says nothing new."""
    match state:
        case Connected():
            attempt = 0
        case Reconnecting() if probe:
            attempt = state.attempt + 1
        case _:
            return state
    return Reconnecting(attempt=attempt, next_after=now + breaker_pause(attempt))


class Breaker:
    """Thread-safe. `monotonic` gives seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.state: State = Connected()
        self._monotonic = monotonic
        self._lock = _thread.allocate_lock()
        self._probing = False

    def admit(self) -> bool:
        """Let a call through, and say whether it is the probe. Raises EventSinkError while the breaker is open.

        Whoever was let through calls `succeeded`, `failed` or `withdrawn` once.
        """
        with self._lock:
            state = self.state
            if isinstance(state, Connected):
                return False
            left = state.next_after - self._monotonic()
            if left > 0 or self._probing:
                raise EventSinkError(
                    f"jetstream sink in reconnecting state (attempt={state.attempt}, next probe in {max(0, round(left * 1000))}ms)"
                )
            self._probing = True
            return True

    def succeeded(self, *, probe: bool) -> None:
        """The call that was let through did what it should."""
        with self._lock:
            self.state = Connected()
            self._probing = self._probing and not probe

    def failed(self, *, probe: bool) -> None:
        """The call that was let through failed."""
        with self._lock:
            self.state = after_failure(self.state, probe=probe, now=self._monotonic())
            self._probing = self._probing and not probe

    def withdrawn(self, *, probe: bool) -> None:
        """The call that was let through came to no result."""
        with self._lock:
            self._probing = self._probing and not probe

    def close(self) -> None:
        """Forget earlier failures: the next call goes through."""
        with self._lock:
            self.state = Connected()
