"""The house keeps what it says about itself: locks, reasons of dependencies, links and commands of the pages."""

from __future__ import annotations

import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest

from cellos.core import events
from cellos.core.documents import parse_execution_cell
from cellos.sandbox.cures import CURES
from cellos.sandbox.probe import OUTSIDE, REQUIRED
from cellos.supervisor.compose import VARIABLES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}


def pins(lock: Path) -> dict[str, str]:
    """Name to the text of its entry."""
    entries = re.findall(r"^([a-z0-9._-]+)==((?:.*\\\n)*.*)", lock.read_text(), re.MULTILINE)
    return dict(entries)


def reasons(heading: str) -> dict[str, str]:
    """Package to reason, from a table of the dependencies page."""
    section = (ROOT / "docs/reference/dependencies.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z0-9._-]+) \| (.+) \|$", section, re.MULTILINE)
    return {name: reason for name, reason in rows if name != "package"}


@pytest.mark.parametrize(
    ("heading", "requirements"),
    [("Run time", PROJECT["dependencies"]), ("Development", PROJECT["optional-dependencies"]["dev"])],
)
def test_every_dependency_has_its_reason_and_no_other_has(heading: str, requirements: list[str]) -> None:
    assert reasons(heading).keys() == names(requirements)


def test_the_run_time_stays_small() -> None:
    assert len(PROJECT["dependencies"]) <= 20


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_are_hashed_and_name_no_place(lock: Path) -> None:
    entries = pins(lock)
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries.values())
    assert not re.search(r"https?://|file://|--index|--find-links|--trusted|(^|\s)/", lock.read_text())


def test_locks_cover_what_the_project_asks_for() -> None:
    runtime, development = pins(ROOT / "requirements/runtime.txt"), pins(ROOT / "requirements/dev.txt")
    assert names(PROJECT["dependencies"]) <= runtime.keys()
    assert names(PROJECT["optional-dependencies"]["dev"]) <= development.keys()
    assert {name: development.get(name, "").split()[0] for name in runtime} == {name: pin.split()[0] for name, pin in runtime.items()}


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_console_scripts_point_to_a_function(command: str) -> None:
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@by_name
def test_scripts_that_a_page_names_can_be_run(page: Path) -> None:
    for script in set(re.findall(r"\bscripts/[a-z]+\b(?!\.)", page.read_text())):
        assert os.access(ROOT / script, os.X_OK), script


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:] if f"({page.relative_to(ROOT / 'docs')})" not in index] == [
        "index.md"
    ]


def test_the_variables_of_the_supervisor_are_documented() -> None:
    rows = [f"| `{variable.name}` | {variable.default} | {variable.effect} |" for variable in VARIABLES]
    page = (ROOT / "docs/reference/supervisor.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


def test_what_the_doctor_tries_is_documented() -> None:
    tried = REQUIRED | {primitive: what for primitive, (what, _) in OUTSIDE.items()}
    rows = [f"| {primitive} | {what} | {CURES[primitive]} |" for primitive, what in tried.items()]
    page = (ROOT / "docs/reference/doctor.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == rows


def test_the_events_are_documented() -> None:
    types = {
        value.removeprefix(events.PREFIX) for name, value in vars(events).items() if name.isupper() and str(value).startswith(events.PREFIX)
    }
    page = (ROOT / "docs/reference/events.md").read_text()
    assert {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")} == types - {""}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.json")), ids=lambda path: path.stem)
def test_example_documents_are_valid(path: Path) -> None:
    assert parse_execution_cell(path.read_bytes()).spec.id == path.stem
