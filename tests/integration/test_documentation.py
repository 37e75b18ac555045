"""What the pages tell a user to type does what they say.

A `console` block holds lines `$ command`; `# exits N` at the end of one promises that exit code, else 0. The blocks of a page are run in
order in one directory that holds nothing but the examples. Lines that set the project up (`scripts/…`) are left out.

Where the host has no control group for us, the commands run as docs/how-to/migrate.md says: in the profile `portable`. A page that says
`<!-- while: cellos up -->` has its commands run while there is one, with two slots. What a page leaves running and names in a file `*.pid`
is killed in the end.

A `python` block that a `text` block follows is a program, and prints that text.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

ROOT = Path(__file__).parents[2]
ISOLATING = re.compile(r"\bcellos run\b(?!.*--print-spec)|\bcellos-supervisor\b|\bcellos doctor\b")
CONTROL_PLANE = "<!-- while: cellos up -->"


def commands(page: Path) -> list[tuple[str, int]]:
    """Each command of the page and the exit code that is promised."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^\$ (.+)$", block, re.MULTILINE):
            if not line.startswith("scripts/"):
                command, _, code = line.partition("   # exits ")
                found.append((command, int(code or 0)))
    return found


def pages() -> list[ParameterSet]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        lines = commands(page)
        if lines:
            isolating = CONTROL_PLANE in page.read_text() or any(ISOLATING.search(command) for command, _ in lines)
            found.append(pytest.param(page, marks=[pytest.mark.linux_backend] * isolating, id=str(page.relative_to(ROOT))))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with the examples; our commands, which run this checkout's code, and the Python that does."""
    (tmp_path / "bin").mkdir()
    # Set in the scripts themselves: an agent of the fleet hands no such variable on.
    found = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, _, function = target.partition(":")
        script = tmp_path / "bin" / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path[:0] = {found}\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)
    python = tmp_path / "bin/python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "examples").symlink_to(ROOT / "examples")
    return work


@contextmanager
def control_plane(page: Path, place: Path, environment: dict[str, str]) -> Iterator[None]:
    """`cellos up`, if the page needs it."""
    if CONTROL_PLANE not in page.read_text():
        yield
        return
    call = [place.parent / "bin/cellos", "up", "--json", "--bind", "127.0.0.1:0"]
    with subprocess.Popen(call, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["server"]
            yield
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture
def environment(place: Path, doctor: Any) -> dict[str, str]:
    """What the examples run with."""
    found = {
        "PATH": f"{place.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HOME": str(place),
        "CELLOS_STATE_DIR": str(place.parent / "state"),
        "LC_ALL": "C.UTF-8",
        "CELLOS_NODE_SLOTS": "2",
    }
    if not doctor.rows["limit memory"]["ok"]:
        found["CELLOS_DEPLOYMENT_PROFILE"] = "portable"
    return found


@pytest.mark.parametrize("page", pages())
def test_commands_of_a_page_do_what_it_says(page: Path, place: Path, environment: dict[str, str]) -> None:
    with control_plane(page, place, environment):
        try:
            for command, promised in commands(page):
                run(command, promised, place, environment)
        finally:
            for left in place.glob("*.pid"):
                with suppress(ProcessLookupError):
                    os.kill(int(left.read_text()), signal.SIGKILL)


def programs() -> list[ParameterSet]:
    """Each Python program of the pages, and what it prints."""
    found = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        blocks = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        for number, (program, prints) in enumerate(blocks, 1):
            found.append(pytest.param(program, prints, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.linux_backend
@pytest.mark.parametrize(("program", "prints"), programs())
def test_programs_of_a_page_print_what_it_says(program: str, prints: str, place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, prints, "")


def run(command: str, promised: int, place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == promised, f"$ {command}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
