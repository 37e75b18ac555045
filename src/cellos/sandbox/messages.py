"""The shapes of what a backend says to a cell's init. Types only: the launcher never imports this (typing costs 12 ms)."""

from typing import TypedDict


class InitRequest(TypedDict):
    """What one cell has of its own."""

    last_cap: int
    limits: dict[str, int]
    """Resource limit (without RLIMIT_) to value, soft and hard."""
    mounts: list[tuple[str, str]]
    """(source, target) of read-only mounts."""


class CommandRequest(TypedDict):
    """What init needs to start the command."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    seconds: float
    """After which init ends the cell by itself; 0 for never."""
    filter: bytes
    """A seccomp filter for the command alone, on top of the cell's; empty for none."""
