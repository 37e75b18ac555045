"""Run pytest and count by suite: what passed, what was skipped and why. A suite is a directory of tests/.

    suites.py [-j N] [ARGUMENT OF PYTEST]…

With `-j` up to N processes run beside each other, each of them a suite, or half of a directory with many files; then those tests of all of
them that carry the marker `alone`.
Other options than -q, -v, --durations=N and --ignore=PATH are for one process, in which everything runs.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePath

import pytest

SUITES = ("unit", "contract", "integration", "acceptance", "faults")
LONGEST_FIRST = ("integration", "faults", "acceptance", "unit", "contract")
"""By what one process is given of them."""
MANY_FILES = 12
ALONE = "alone"
REPORT = "--report="
"""Of a process of ours: where to leave its tally."""


@dataclass(kw_only=True)
class Suite:
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason to number of tests."""


class Tally:
    """A pytest plugin that counts each test once: failed where any of its phases failed, else skipped, else passed."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.ran: dict[str, float] = {}
        """Seconds of every test that was begun, or module that could not be collected."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran[report.nodeid] = self.ran.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped[report.nodeid] = _reason(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.ran[report.nodeid] = 0.0
            self.failed.add(report.nodeid)

    def save(self, path: str) -> None:
        with open(path, "w") as file:
            json.dump([sorted(self.failed), self.skipped, self.ran], file)

    def add(self, path: str) -> None:
        """What another one has saved."""
        with open(path) as file:
            failed, skipped, ran = json.load(file)
        self.failed.update(failed)
        self.skipped.update(skipped)
        self.ran.update(ran)

    def suites(self) -> dict[str, Suite]:
        found: defaultdict[str, Suite] = defaultdict(Suite)
        for nodeid, seconds in self.ran.items():
            suite = found[_suite(nodeid)]
            suite.seconds += seconds
            if nodeid in self.failed:
                suite.failed += 1
            elif nodeid in self.skipped:
                suite.skipped[self.skipped[nodeid]] += 1
            else:
                suite.passed += 1
        return found


def _suite(nodeid: str) -> str:
    parts = PurePath(nodeid.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def summary(suites: dict[str, Suite]) -> list[str]:
    lines = []
    for name in [*SUITES, *sorted(set(suites) - set(SUITES))]:
        suite = suites.get(name, Suite())
        skipped = suite.skipped.total()
        lines.append(f"{name:12} {suite.passed:5} passed  {suite.failed:3} failed  {skipped:3} skipped  {suite.seconds:6.1f} s")
        lines += [f"    skipped {count}: {reason}" for reason, count in sorted(suite.skipped.items())]
    total = suites.values()
    passed, failed, skipped = (sum(s.passed for s in total), sum(s.failed for s in total), sum(s.skipped.total() for s in total))
    return [*lines, f"{passed} passed, {failed} failed, {skipped} skipped"]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The places of tests and the options; None where the options ask for one process."""
    places = [each for each in arguments if os.path.exists(each.partition("::")[0])]
    options = [each for each in arguments if each not in places]
    if not all(each in {"-q", "-v"} or each.startswith(("--durations=", "--ignore=")) for each in options):
        return None
    return places or [place for place in (f"tests/{suite}" for suite in LONGEST_FIRST) if os.path.isdir(place)], options


def shares(places: Sequence[str], options: Sequence[str]) -> Iterator[list[str]]:
    """What each process is given."""
    for place in places:
        files = [path for path in sorted(glob.glob(f"{glob.escape(place)}/test_*.py")) if f"--ignore={path}" not in options]
        yield from (files[::2], files[1::2]) if len(files) >= MANY_FILES else ([place],)


def with_some_alone(places: Sequence[str], options: Sequence[str]) -> list[str]:
    """Those test files that have the marker: to look through all the others would take half a minute, in which nothing runs."""
    ignored = [PurePath(each.removeprefix("--ignore=")) for each in options if each.startswith("--ignore=")]
    found = []
    for place in places:
        path, node, name = place.partition("::")
        for file in [path] if os.path.isfile(path) else sorted(glob.glob(f"{glob.escape(path)}/**/test_*.py", recursive=True)):
            with open(file) as text:
                if f"mark.{ALONE}" in text.read() and not any(PurePath(file).is_relative_to(each) for each in ignored):
                    found.append(f"{file}{node}{name}")
    return found


def beside_each_other(tally: Tally, places: Sequence[str], options: Sequence[str], count: int) -> int:
    """The exit code: the first that is not 0."""
    with tempfile.TemporaryDirectory(prefix="cellos-suites-") as directory:

        def run(number: int, *arguments: str) -> int:
            report = f"{directory}/{number}"
            command = [sys.executable, __file__, REPORT + report, "-o", f"cache_dir={report}.cache", *options, *arguments]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            sys.stdout.write(f"\n== {' '.join(arguments[1:])}\n{done.stdout.decode(errors='replace')}")
            sys.stdout.flush()
            if os.path.exists(report):
                tally.add(report)
                return 0 if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED else done.returncode
            return done.returncode or 1

        with ThreadPoolExecutor(count) as pool:
            codes = list(pool.map(lambda pair: run(pair[0], "-m", f"not {ALONE}", *pair[1]), enumerate(shares(places, options), 1)))
        if some := with_some_alone(places, options):
            codes.append(run(0, "-m", ALONE, *some))
    return next((code for code in codes if code), 0 if tally.ran else int(pytest.ExitCode.NO_TESTS_COLLECTED))


def main(arguments: list[str]) -> int:
    tally = Tally()
    if arguments[:1] and arguments[0].startswith(REPORT):
        code = int(pytest.main(arguments[1:], plugins=[tally]))
        tally.save(arguments[0].removeprefix(REPORT))
        return code
    count = 1
    if arguments[:1] == ["-j"]:
        count, arguments = int(arguments[1]), arguments[2:]
    given = split(arguments) if count > 1 else None
    code = beside_each_other(tally, *given, count) if given else int(pytest.main(arguments, plugins=[tally]))
    print("", *summary(tally.suites()), sep="\n", flush=True)
    return code or int(bool(tally.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
