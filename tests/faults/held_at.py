"""`cellos-supervisor` that stops itself (SIGSTOP) at a named step, so that a test can look at it there and kill it.

    python held_at.py STEP ARGUMENT…

The steps are calls of ports, sinks and of what a teardown looks at; nothing in the product knows of them:

    recorded        the run has its record, the cell does not exist
    created         the cell exists
    listening       it has a socket
    running         the command is about to be started
    started         it runs, and no event says so yet
    delivering      half of an artifact is copied
    destroying      everything of the cell is dead, its groups and ids are there
    group removed   one of its groups is gone
    destroyed       nothing of it is left, and no event says so yet
    spooled TYPE    an event is in the spool and in no sink
    emitted TYPE    it is in every sink
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import telling

from cellos.artifacts.files import DirectoryStore
from cellos.backends.linux import LinuxBackend
from cellos.backends.linux_cell import LinuxCell
from cellos.cli.supervisor import main
from cellos.eventlog.jsonl import JsonlSink
from cellos.sandbox import cgroups, residue
from cellos.supervisor.emitter import Emitter

STEP = sys.argv.pop(1)
PREFIX = "dev.cellos.events.cell."


def reached(step: str) -> None:
    """Stop if this is the step; whoever waits for us goes on."""
    if step == STEP:
        os.kill(os.getpid(), signal.SIGSTOP)


def around(
    owner: Any, name: str, *, before: Callable[..., str] = lambda *_, **__: "", after: Callable[..., str] = lambda *_, **__: ""
) -> None:
    """Make a call of `owner` two steps, which are named from its arguments."""
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        reached(before(*arguments, **named))
        result = original(*arguments, **named)
        reached(after(*arguments, **named))
        return result

    setattr(owner, name, call)


def always(step: str) -> Callable[..., str]:
    return lambda *_, **__: step


class HalfRead:
    """A file of which the reader has got a part."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._reads = 0

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        if self._reads == 2:
            reached("delivering")
        return self._source.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def put_from_a_half_read_file(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda store, cell_id, name, source, **named: original(store, cell_id, name, HalfRead(source), **named)


around(LinuxBackend, "create", before=always("recorded"), after=always("created"))
around(LinuxCell, "listen", after=always("listening"))
LinuxCell.run = telling.of_the_start(LinuxCell.run, reached)  # type: ignore[method-assign]
around(LinuxCell, "run", before=always("running"))
DirectoryStore.put = put_from_a_half_read_file(DirectoryStore.put)  # type: ignore[method-assign]
around(residue, "look", before=always("destroying"))
around(cgroups, "remove", after=always("group removed"))
around(LinuxCell, "destroy", after=always("destroyed"))
around(JsonlSink, "emit", before=lambda _sink, _id, line: f"spooled {json.loads(line)['type'].removeprefix(PREFIX)}")
around(Emitter, "emit", after=lambda _emitter, draft: f"emitted {draft.type.removeprefix(PREFIX)}")
sys.argv[0] = "cellos-supervisor"
main()
