"""Run pytest and count by suite: what passed, what was skipped and why. A suite is a directory of tests/."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath

import pytest

SUITES = ("unit", "contract", "integration", "acceptance", "faults")


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


def main(arguments: list[str]) -> int:
    tally = Tally()
    code = int(pytest.main(arguments, plugins=[tally]))
    print("", *summary(tally.suites()), sep="\n", flush=True)
    return code or int(bool(tally.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
