"""Secrets at run time in real cells: the one that they are for gets them, and nobody else reaches the socket."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from cellos.backends.linux import LinuxBackend
from cellos.backends.stub import StubBackend
from cellos.cli import secret
from cellos.ports import CellBackend, CommandResult, LiveCell
from cellos.sandbox.launcher import Launcher
from cellos.supervisor import secrets
from cellos.supervisor.secrets import MAX_CONNECTIONS, SecretSession
from cellos.testing.conformance import ENVIRONMENT, command, nothing, spec

PYTHON = "/usr/bin/python3"
CLIENT = [PYTHON, "-I", "-c", Path(secret.__file__).read_text()]
VALUE = "s3cret-value"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


@pytest.fixture(params=["stub", pytest.param("linux", marks=pytest.mark.linux_backend)])
def backend(request: pytest.FixtureRequest) -> CellBackend:
    return StubBackend() if request.param == "stub" else LinuxBackend(launcher=request.getfixturevalue("launcher"))


Cells = Callable[[], LiveCell]


@pytest.fixture
def cells(backend: CellBackend) -> Iterator[Cells]:
    """Makes cells, of which nothing may stay."""
    made: list[LiveCell] = []

    def make() -> LiveCell:
        made.append(backend.create(spec(), key=os.urandom(8).hex()))
        return made[-1]

    yield make
    assert [cell.destroy() for cell in made] == [()] * len(made)


def session_of(cell: LiveCell) -> SecretSession:
    return SecretSession(cell.listen(), {"API_TOKEN": VALUE}, ttl_seconds=60, mode="runtimeBroker", monotonic=time.monotonic)


def run(cell: LiveCell, argv: list[str], variables: Mapping[str, str]) -> CommandResult:
    return cell.run(command(argv, environment=ENVIRONMENT | dict(variables)), on_started=nothing)


def test_the_cell_gets_its_secret(cells: Cells) -> None:
    cell = cells()
    with session_of(cell) as session:
        result = run(cell, [*CLIENT, "get", "API_TOKEN"], session.environment)
    assert (result.exit_code, result.stdout, result.stderr) == (0, VALUE.encode(), b"")
    assert session.fetched == {"API_TOKEN"}


def test_and_no_other(cells: Cells) -> None:
    cell = cells()
    with session_of(cell) as session:
        result = run(cell, [*CLIENT, "get", "OTHER"], session.environment)
    assert (result.exit_code, result.stdout, result.stderr) == (1, b"", b'Error: unknown secret key "OTHER"\n')
    assert session.fetched == frozenset()


def test_its_value_is_no_variable(cells: Cells) -> None:
    cell = cells()
    with session_of(cell) as session:
        result = run(cell, ["cat", "/proc/self/environ"], session.environment)
    found = dict(entry.split("=", 1) for entry in result.stdout.decode().split("\0") if entry)
    assert found.items() >= session.environment.items()
    assert VALUE not in result.stdout.decode()


def test_what_a_hostile_command_does_to_the_socket_ends_with_it(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cells()
    hold = "import os, socket; p = os.environ['CELLOS_RUNTIME_SECRET_SOCKET']; "
    hold += f"held = [socket.socket(socket.AF_UNIX) for _ in range({MAX_CONNECTIONS + 4})]; [s.connect(p) for s in held]"
    monkeypatch.setattr(secrets, "CONNECTION_SECONDS", 1000.0)
    with session_of(cell) as session:
        result = run(cell, [PYTHON, "-I", "-c", hold], session.environment)
        began = time.monotonic()
    assert result.exit_code == 0, result
    assert time.monotonic() - began < 60, "nobody waits for connections that nobody uses"


@pytest.mark.linux_backend
class TestReach:
    """Only the Linux backend has an inside."""

    @pytest.fixture
    def backend(self, launcher: Launcher) -> CellBackend:
        return LinuxBackend(launcher=launcher)

    def test_another_cell_with_the_same_token_gets_nothing(self, cells: Cells) -> None:
        one, other = cells(), cells()
        with session_of(one) as session:
            result = run(other, [*CLIENT, "get", "API_TOKEN"], session.environment)
            assert (result.exit_code, result.stdout) == (1, b""), result
            assert result.stderr.startswith(b"Error: connect runtime secret socket ")
            assert run(one, [*CLIENT, "get", "API_TOKEN"], session.environment).stdout == VALUE.encode()

    def test_another_cell_with_a_session_of_its_own_does_not_take_the_token(self, cells: Cells) -> None:
        one, other = cells(), cells()
        with ExitStack() as stack:
            first, second = stack.enter_context(session_of(one)), stack.enter_context(session_of(other))
            result = run(other, [*CLIENT, "get", "API_TOKEN"], first.environment)
            assert (result.exit_code, result.stderr) == (1, b"Error: unauthorized\n")
        assert first.fetched | second.fetched == frozenset()

    def test_the_host_has_no_such_socket(self, cells: Cells) -> None:
        cell = cells()
        with session_of(cell) as session:
            path = session.environment["CELLOS_RUNTIME_SECRET_SOCKET"]
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
                client.connect(path)
            assert path.lstrip("/") not in Path("/proc/net/unix").read_text()

    def test_a_program_of_the_cell_has_nothing_but_the_path(self, cells: Cells) -> None:
        """Neither the listener nor anything else of the session is inherited."""
        cell = cells()
        look = "import json, os; print(json.dumps(sorted(os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in (0, 1, 2))));"
        look += "print(json.dumps([n for n in range(3, 1024) if os.path.exists(f'/proc/self/fd/{n}')]))"
        with session_of(cell) as session:
            result = run(cell, [PYTHON, "-I", "-c", look], session.environment)
        streams, others = map(json.loads, result.stdout.splitlines())
        assert "socket" not in streams
        assert others == []
