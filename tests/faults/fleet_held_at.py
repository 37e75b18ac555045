"""`cellos-fleet` that stops itself (SIGSTOP) at a named step, so that a test can kill it there; its leases may be as short as a test likes.

    python fleet_held_at.py STEP

The steps are calls of the store and of the cell; nothing in the product knows of them: `before create claimed`, `after create leases`,
`running`, `ended`, `after remove pending`, … `SKEW_SECONDS` says how wrong the clock on the wall is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cellos.fleet import agent, config
from cellos.fleet.cell import Cell
from cellos.fleet.main import main
from cellos.fleet.store import _Store

STEP = sys.argv.pop(1)
PREFIX = "fleet/"


def reached(step: str) -> None:
    """Stop if this is the step; whoever waits for us goes on."""
    if step == STEP:
        os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()  # the signal may take another thread first: this one must not come any further


def around(owner: Any, name: str, step: Callable[..., str]) -> None:
    """Make an asynchronous call of `owner` two steps, which are named from its arguments."""
    original = getattr(owner, name)

    async def call(*arguments: Any, **named: Any) -> Any:
        reached(f"before {step(*arguments)}")
        result = await original(*arguments, **named)
        reached(f"after {step(*arguments)}")
        return result

    setattr(owner, name, call)


def part_of(key: str) -> str:
    return key.removeprefix(PREFIX).partition("/")[0]


for method in ("create", "write", "remove"):
    around(_Store, method, lambda _store, key, *_, method=method: f"{method} {part_of(key)}")
around(Cell, "start", lambda *_: "start")
around(Cell, "wait", lambda *_: "wait")
config.SHORTEST_LEASE_MS = agent.SHORTEST_LEASE_MS = 1000
agent.Agent._sweep_seconds = lambda _: 0.5  # type: ignore[method-assign]
skew_ns = int(os.environ.get("SKEW_SECONDS", "0")) * 1_000_000_000
right_time = time.time_ns
time.time_ns = lambda: right_time() + skew_ns
sys.argv[0] = "cellos-fleet"
main()
