"""A cell as a child process: the supervisor with a spec on its standard input, on a lifeline that ends with us and with the lease.

What the supervisor and the command write goes to our standard error; standard output is our log.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import FileIO

import msgspec

from cellos.core.events import DESTROYED, parse_signed
from cellos.core.ids import rfc3339
from cellos.errors import ConfigError, EvidenceError, os_error_text
from cellos.eventlog import lifeline
from cellos.fleet.claims import Ending
from cellos.fleet.records import CANNOT_START, EventDigest
from cellos.supervisor.state import evidence_directory

PASSED = frozenset({"PATH", "HOME", "LANG", "TZ", "NATS_URL", "NATS_CA_FILE", "RUST_LOG"})
PREFIXES = ("CELLOS_", "CELL_OS_")
OURS = "CELLOS_FLEET_"
JSONL = "CELL_OS_JSONL_EVENTS"
SINKS = (JSONL, "NATS_URL", "CELL_OS_REQUIRE_JETSTREAM", "CELL_OS_USE_NOOP_SINK")
ERROR_FD = "CELLOS_ERROR_FD"
NOT_STARTED = 127
"""Of the lifeline, and of shells."""
LONGEST_DETAIL = 1000


def supervisor_environment(environment: Mapping[str, str], run_id: str) -> dict[str, str]:
    """What a supervisor gets of ours: nothing that opens a bucket."""
    kept = {
        name: value for name, value in environment.items() if name in PASSED or (name.startswith(PREFIXES) and not name.startswith(OURS))
    }
    return kept | {"CELLOS_RUN_ID": run_id}


class Cell:
    """One attempt. `until` and `extend` are times of CLOCK_BOOTTIME, after which the cell does not run."""

    def __init__(self, process: asyncio.subprocess.Process, told: FileIO, run_id: str, record: str | None, offset: int) -> None:
        """`told`: where the supervisor writes why it could not make a cell."""
        self._process = process
        self._told = told
        self._run_id = run_id
        self._record = record
        self._offset = offset
        self._started_ns = time.time_ns()

    @classmethod
    async def start(cls, supervisor: str, spec: bytes, run_id: str, environment: Mapping[str, str], until: float) -> Cell:
        """Raises ConfigError where nothing can be started, or kept about it."""
        given = supervisor_environment(environment, run_id)
        if not any(given.get(name) for name in SINKS):
            # The supervisor would choose a name of its own.
            given[JSONL] = f"{evidence_directory(given)}/{run_id}.jsonl"
        record = given.get(JSONL) or None
        offset = _size(record)
        with ExitStack() as closing:
            try:
                document = closing.enter_context(_in_memory(spec))
                told = closing.enter_context(_in_memory(b""))
                given[ERROR_FD] = str(told.fileno())
                options = (f"--stdin={document.fileno()}", f"--until={until}")
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", lifeline.__file__, *options, supervisor, "-",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=2,
                    env=given,
                    pass_fds=(document.fileno(), told.fileno()),
                    start_new_session=True,  # a key press meant for us is not for the cells
                )  # fmt: skip
            except OSError as error:
                raise ConfigError(f"cannot start a cell: {os_error_text(error)}") from error
            document.close()
            closing.pop_all()
        return cls(process, told, run_id, record, offset)

    def extend(self, until: float) -> None:
        """The lease was renewed."""
        self._say(until)

    def kill(self) -> None:
        """At once, with all that it started."""
        self._say(-1.0)

    def _say(self, until: float) -> None:
        stdin = self._process.stdin
        if stdin is not None and not stdin.is_closing():
            stdin.write(f"{until}\n".encode())

    async def wait(self) -> Ending:
        """How it ended."""
        code = await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        events, reason = await asyncio.to_thread(_evidence, self._record, self._offset, self._run_id)
        with self._told as told:
            told.seek(0)  # it is one open file, written by the supervisor
            detail = " ".join(told.read(4 * LONGEST_DETAIL).decode(errors="replace").split())[:LONGEST_DETAIL] or None
        if reason is None and code != 0 and (detail is not None or (code == NOT_STARTED and events is None)):
            reason = CANNOT_START
        return Ending(
            outcome="completed" if code == 0 else "failed",
            reason=reason,
            detail=detail if code != 0 else None,
            exit_code=code,
            started_at=rfc3339(self._started_ns),
            ended_at=rfc3339(time.time_ns()),
            events=events,
        )


def _in_memory(content: bytes) -> FileIO:
    """A file to read it from. Raises OSError."""
    file = FileIO(os.memfd_create("cellos-fleet", os.MFD_CLOEXEC), "r+")
    file.write(content)
    file.seek(0)
    return file


def _size(path: str | None) -> int:
    return os.path.getsize(path) if path is not None and os.path.isfile(path) else 0


def _evidence(path: str | None, offset: int, run_id: str) -> tuple[EventDigest | None, str | None]:
    """What the run's record says: a digest of its events, and why it failed."""
    digest, count, reason = hashlib.sha256(), 0, None
    for line in _lines(path, offset, run_id):
        count += 1
        digest.update(line)
        try:
            event, _ = parse_signed(line)
        except EvidenceError:
            continue
        if event.type == DESTROYED and isinstance(event.data, dict):
            told = event.data.get("reason")
            reason = told if isinstance(told, str) else reason
    return (EventDigest(count=count, sha256=digest.hexdigest()), reason) if count else (None, None)


def _lines(path: str | None, offset: int, run_id: str) -> Iterator[bytes]:
    """The lines of a run, of a file that it may share with others."""
    if path is None or not os.path.isfile(path):
        return
    mark = msgspec.json.encode(run_id)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            yield from (line for line in file if mark in line)
    except OSError:
        return
