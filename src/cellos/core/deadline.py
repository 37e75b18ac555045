"""How long a command may run, and who said so.

The smaller of `spec.run.timeoutMs` and CELLOS_RUN_TIMEOUT_MS, the spec where they are equal,
holds if it is not longer than the cell's time to live; otherwise the time to live does. So a command always has a deadline.
A ttl or timeout of 0 is a deadline of 0: the command gets no time and is killed at once.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from cellos.errors import ConfigError

Source = Literal["ttl", "spec", "environment"]
VARIABLE = "CELLOS_RUN_TIMEOUT_MS"
_MAX_U64 = (1 << 64) - 1


class Deadline(Struct, frozen=True, kw_only=True):
    """A time limit from the start of the program, with its `source`."""

    milliseconds: int
    source: Source
    ttl_seconds: int

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000

    @property
    def text(self) -> str:
        """The `spawnError` of a command that ran into this deadline."""
        if self.source == "ttl":
            return f"cell killed by TTL watchdog after {self.milliseconds} ms (ttl_seconds={self.ttl_seconds})"
        name = "spec.run.timeoutMs" if self.source == "spec" else VARIABLE
        return f"command timed out after {self.milliseconds} ms ({name})"


def choose(ttl_seconds: int, timeout_ms: int | None = None, env_ms: int | None = None) -> Deadline:
    """The deadline of a command: `timeout_ms` from the spec, `env_ms` from the environment, None where not set."""
    candidates: list[tuple[int, int, Source]] = [(ttl_seconds * 1000, 2, "ttl")]
    if timeout_ms is not None:
        candidates.append((timeout_ms, 0, "spec"))
    if env_ms is not None:
        candidates.append((env_ms, 1, "environment"))
    milliseconds, _, source = min(candidates)
    return Deadline(milliseconds=milliseconds, source=source, ttl_seconds=ttl_seconds)


def parse_run_timeout(text: str) -> int:
    """The value of CELLOS_RUN_TIMEOUT_MS in milliseconds. Raises ConfigError."""
    digits = text.strip()
    number = digits.lstrip("+0")
    # Past 20 digits no unsigned 64-bit number is left, and the interpreter refuses to convert thousands of them.
    if not (digits.removeprefix("+").isdecimal() and digits.isascii()) or len(number) > 20 or int(number or "0") > _MAX_U64:
        raise ConfigError(f'invalid {VARIABLE}: "{text}"')
    if not number:
        raise ConfigError(f"{VARIABLE} must be > 0")
    return int(number)
