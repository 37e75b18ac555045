"""The commands that a user types, run from this checkout, with a state directory of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_SECONDS = 60
PYTHON = "/usr/bin/python3"
ATTACKS = Path(__file__).parent / "attacks"


def command_line(name: str) -> list[str]:
    """The console script `cellos` or `cellos-supervisor` as it stands in this checkout or environment."""
    module = {"cellos": "main", "cellos-supervisor": "supervisor"}[name]
    return [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; from cellos.cli.{module} import main; main()"]


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Starts our commands. Each sees `environment` and nothing else of ours."""

    environment: dict[str, str]
    state: Path

    @staticmethod
    def line(name: str) -> list[str]:
        """The command line of `name`, to start it by other means."""
        return command_line(name)

    def start(self, name: str, *arguments: str, variables: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        defaults: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [*command_line(name), *arguments], env=self.environment | (variables or {}), text=True, **(defaults | options)
        )

    def run(self, name: str, *arguments: str, variables: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        with self.start(name, *arguments, variables=variables, **options) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def cell(self, argv: Sequence[str], *options: str, **how: Any) -> dict[str, Any]:
        """`cellos run --json OPTIONS -- ARGV`: its report, with its standard error as "our stderr"."""
        done = self.run("cellos", "run", "--json", *options, "--", *argv, **how)
        assert done.stdout, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        assert report["code"] == done.returncode
        return report | {"our stderr": done.stderr}


def base_environment(state: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path)
    return {name: value for name, value in kept.items() if value} | {"CELLOS_STATE_DIR": str(state)}


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    state = tmp_path / "state"
    return Commands(environment=base_environment(state), state=state)


Reaper = Callable[[subprocess.Popen[Any]], None]


@pytest.fixture
def ends() -> Iterator[Reaper]:
    """Processes given to it are killed and reaped at the end of the test."""
    started: list[subprocess.Popen[Any]] = []
    yield started.append
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


# ---------------------------------------------------------------- attacks


def attack_program(theme: str) -> list[str]:
    """The command line that runs attacks/<theme>.py; it needs no file of this checkout. The attack's name and arguments follow it."""
    shared = (ATTACKS / "attempt.py").read_text()
    load = f"import sys, types; m = sys.modules['attempt'] = types.ModuleType('attempt'); exec({shared!r}, m.__dict__)"
    text = (ATTACKS / f"{theme}.py").read_text()
    return [PYTHON, "-I", "-c", f"{load}; exec(compile({text!r}, {theme!r}, 'exec'))"]


@pytest.fixture(scope="session")
def attack() -> Callable[[str], list[str]]:
    return attack_program


Attempt = Callable[..., Any]


@pytest.fixture(scope="session")
def outside() -> Attempt:
    """The control: what comes of an attack in a plain process of ours. `before` starts it in its place."""

    def run(theme: str, name: str, *arguments: str, before: Sequence[str] = (), **options: Any) -> Any:
        argv = [*before, *attack_program(theme), name, *arguments]
        done = subprocess.run(
            argv, **({"stdin": subprocess.DEVNULL} | options), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def inside(commands: Commands) -> Attempt:
    """What comes of the same attack in a cell, of which nothing may stay. `options` are those of `cellos run`."""

    def run(theme: str, name: str, *arguments: str, options: Sequence[str] = (), **how: Any) -> Any:
        report = commands.cell([*attack_program(theme), name, *arguments], *options, **how)
        assert (report["code"], report["residue"]) == (0, []), report
        return json.loads(report["stdout"])

    return run
