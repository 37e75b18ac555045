from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cellos.errors import ConfigError
from cellos.fleet.cell import Cell
from cellos.fleet.claims import Ending

PROGRAM = """#!/bin/sh
read -r line
printf '%s\\n no good' "$line" >"/proc/self/fd/$CELLOS_ERROR_FD"
exit 3
"""


@pytest.fixture
def ending(tmp_path: Path) -> Callable[[], Ending]:
    """How a cell of one document ends, whose supervisor is PROGRAM."""
    program = tmp_path / "supervisor"
    program.write_text(PROGRAM)
    program.chmod(0o700)
    environment = {"PATH": os.environ["PATH"], "CELLOS_STATE_DIR": str(tmp_path / "state")}

    async def run() -> Ending:
        until = time.clock_gettime(time.CLOCK_BOOTTIME) + 60
        cell = await Cell.start(str(program), b"the document", "run-1", environment, until)
        return await cell.wait()

    return lambda: asyncio.run(run())


def test_it_hears_why_no_cell_was_made(ending: Callable[[], Ending]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    ended = ending()
    assert (ended.outcome, ended.exit_code, ended.reason, ended.detail) == ("failed", 3, "cannot_start", "the document no good")
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("room", [0, 1])
def test_without_room_for_more_descriptors_it_cannot_start(
    ending: Callable[[], Ending], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    made: list[int] = []
    create = os.memfd_create

    def memfd_create(name: str, flags: int) -> int:
        if len(made) == room:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(create(name, flags))
        return made[-1]

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "memfd_create", memfd_create)
    with pytest.raises(ConfigError, match=r"cannot start a cell: Too many open files \(os error 24\)"):
        ending()
    assert set(os.listdir("/proc/self/fd")) <= before
