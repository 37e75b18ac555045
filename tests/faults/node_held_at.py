"""`cellos-node` that stops itself (SIGSTOP) at a named step, so that a test can kill it there.

    python node_held_at.py STEP

Nothing in the product knows of the steps:

    spooled claim       the claim is in the spool, the log knows nothing of it
    claimed             the log took it, the queue still has the work
    answered            the queue has been answered, nothing was made
    recorded            the run has its record, the cell does not exist
    created             the cell exists
    started             the program runs, and no event says so yet
    destroying          everything of the cell is dead, its groups and ids are there
    destroyed           nothing of it is left, and no event says so yet
    spooled end         `destroyed` is in the spool, the log does not have it
    told                the log has everything, the spool is still there
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import telling

from cellos.backends.linux import LinuxBackend
from cellos.backends.linux_cell import LinuxCell
from cellos.eventlog.spool import Spool
from cellos.node.main import main
from cellos.node.node import Node
from cellos.node.run import MemberRun
from cellos.sandbox import residue

STEP = sys.argv.pop(1)


def reached(step: str) -> None:
    """Stop if this is the step; whoever waits for us kills us."""
    if step == STEP:
        os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()  # the signal may take another thread first: this one must not come any further


def around(owner: Any, name: str, *, before: str = "", after: str = "") -> None:
    """Make the beginning and the end of a call steps."""
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        reached(before)
        result = original(*arguments, **named)
        reached(after)
        return result

    setattr(owner, name, call)


def awaited(owner: Any, name: str, step: Callable[..., str]) -> None:
    """Make the end of a coroutine a step."""
    original = getattr(owner, name)

    async def call(self: Any, *arguments: Any, **named: Any) -> Any:
        result = await original(self, *arguments, **named)
        reached(step(self, result))
        return result

    setattr(owner, name, call)


def spool(original: Callable[..., None]) -> Callable[..., None]:
    steps = {"claimed": "spooled claim", "destroyed": "spooled end"}

    def emit(self: Spool, event_id: str, line: bytes) -> None:
        original(self, event_id, line)
        reached(steps.get(json.loads(line)["type"].rpartition(".")[2], ""))

    return emit


Spool.emit = spool(Spool.emit)  # type: ignore[method-assign]
awaited(MemberRun, "claim", lambda _run, won: "claimed" if won else "")
awaited(Node, "_claimed", lambda _node, run: "answered" if run is not None else "")
around(LinuxBackend, "create", before="recorded", after="created")
LinuxCell.run = telling.of_the_start(LinuxCell.run, reached)  # type: ignore[method-assign]
around(residue, "look", before="destroying")
around(LinuxCell, "destroy", after="destroyed")
unlink = os.unlink


def remove(path: Any, **named: Any) -> None:
    if "/spool/" in str(path):
        reached("told")
    unlink(path, **named)


os.unlink = remove
sys.argv[0] = "cellos-node"
main()
