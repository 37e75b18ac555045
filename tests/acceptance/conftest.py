"""Programs that attack, and the two places where the tests run them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_SECONDS = 60
PYTHON = "/usr/bin/python3"
ATTACKS = Path(__file__).parent / "attacks"


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
def inside(commands: Any) -> Attempt:
    """What comes of the same attack in a cell, of which nothing may stay. `options` are those of `cellos run`."""

    def run(theme: str, name: str, *arguments: str, options: Sequence[str] = (), **how: Any) -> Any:
        report = commands.cell([*attack_program(theme), name, *arguments], *options, **how)
        assert (report["code"], report["residue"]) == (0, []), report
        return json.loads(report["stdout"])

    return run
