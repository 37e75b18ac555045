"""Cells for the tests of what they are made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest

from cellos.backends.linux import LinuxBackend
from cellos.backends.linux_cell import LinuxCell
from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.ports import Command, CommandResult, Output
from cellos.sandbox.launcher import Launcher

DOCUMENT = {
    "apiVersion": "cellos.io/v1",
    "kind": "ExecutionCell",
    "spec": {
        "id": "x",
        "authority": {"secretRefs": []},
        "lifetime": {"ttlSeconds": 60},
        "run": {"argv": ["true"], "secretDelivery": "env"},
    },
}


@pytest.fixture(scope="session")
def plain() -> CellSpec:
    """A document that asks for nothing."""
    return parse_execution_cell(json.dumps(DOCUMENT).encode()).spec


@pytest.fixture(scope="session")
def order() -> Callable[..., Command]:
    def make(*argv: str) -> Command:
        keep = Output(capture_bytes=1 << 20)
        return Command(argv=argv, environment={"PATH": "/usr/bin:/bin", "HOME": "/work"}, stdout=keep, stderr=keep, deadline_seconds=60)

    return make


@pytest.fixture(scope="session")
def run_in(order: Callable[..., Command], plain: CellSpec) -> Callable[..., CommandResult]:
    """Run one command in a new cell of a backend; nothing stays of it."""

    def run(backend: LinuxBackend, *argv: str) -> CommandResult:
        cell = backend.create(plain, key=os.urandom(8).hex())
        try:
            return cell.run(order(*argv), on_started=lambda: None)
        finally:
            assert cell.destroy() == ()

    return run


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


@pytest.fixture(scope="module")
def backend(launcher: Launcher) -> LinuxBackend:
    return LinuxBackend(launcher=launcher)


@pytest.fixture
def said(backend: LinuxBackend, run_in: Callable[..., CommandResult]) -> Callable[[str], str]:
    """What a shell script prints in a cell."""

    def said(script: str) -> str:
        result = run_in(backend, "sh", "-c", script)
        assert (result.exit_code, result.stderr) == (0, b""), result
        return result.stdout.decode()

    return said


@pytest.fixture
def waiting(backend: LinuxBackend, plain: CellSpec) -> Iterator[LinuxCell]:
    """A cell that waits for its command."""
    cell = backend.create(plain, key=os.urandom(8).hex())
    yield cell
    cell.destroy()
