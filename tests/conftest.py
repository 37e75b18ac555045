"""What all suites share: the question whether this host can isolate, the markers that ask it, and the commands that a user types.

    @pytest.mark.linux_backend                      skipped, with the doctor's reason, where the host cannot isolate
    @pytest.mark.linux_backend(may_skip="…")        the test may skip itself on a capable host, and says here why
    @pytest.mark.linux_backend(user_may_skip="…")   the same, but not as root
    @pytest.mark.needs("limit memory")              skipped where that row of the doctor is not ok

A test that carries `linux_backend`, or lies in tests/acceptance or tests/faults, fails when it was skipped for any other reason on a
host that can. So does a module that skips itself as a whole: nobody could tell what it would have tested.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
GUARDED = frozenset({"acceptance", "faults"})
"""The suites that are about real isolation as a whole."""

ACCOUNTED = pytest.StashKey[bool]()
"""Set on an item that was skipped here, for a reason the doctor gave."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What `cellos doctor --json` says of this host. `fault` is set where it gave no usable answer, which is a failure, not a skip."""

    ok: bool
    rows: dict[str, dict[str, object]]
    fault: str = ""

    @property
    def reason(self) -> str:
        """The rows without which no cell runs, in the doctor's words."""
        return "; ".join(self.complaint(name) for name, row in self.rows.items() if row.get("required", True) and not row["ok"])

    def complaint(self, name: str) -> str:
        row = self.rows[name]
        return f"{name}: {row['detail']} ({row['cure']})"


@functools.cache
def ask_doctor() -> Doctor:
    call = [sys.executable, "-c", "from cellos.cli.main import main; main()", "doctor", "--json"]
    done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    try:
        answer = json.loads(done.stdout)
        return Doctor(ok=answer["ok"], rows={row["primitive"]: row for row in answer["rows"]})
    except (ValueError, KeyError, TypeError) as error:
        fault = (
            f"`cellos doctor --json` gave no usable answer ({error!r}), exit {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"
        )
        return Doctor(ok=False, rows={}, fault=fault)


@pytest.fixture(scope="session")
def doctor() -> Doctor:
    """What the doctor says of this host."""
    return ask_doctor()


def pytest_configure(config: pytest.Config) -> None:
    """Let nothing depend on where tests run.

    A shell's background job, or nohup, ignores some signals, and so would all that we start: what signals do is tested here.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if config.pluginmanager.hasplugin("hypothesispytest") and not config.getoption("--hypothesis-profile"):
        from hypothesis import settings

        settings.load_profile("ci")  # no time limit for an example, which a busy machine would break, and the same ones every time


def pytest_runtest_setup(item: pytest.Item) -> None:
    backend = item.get_closest_marker("linux_backend")
    needs = [name for marker in item.iter_markers("needs") for name in marker.args]
    if backend is None and not needs:
        return
    answer = ask_doctor()
    if answer.fault:
        pytest.fail(answer.fault, pytrace=False)
    if backend is not None and not answer.ok:
        item.stash[ACCOUNTED] = True
        pytest.skip(f"this host cannot isolate: {answer.reason}")
    for name in needs:
        if name not in answer.rows:
            pytest.fail(f"needs({name!r}): the doctor has no such row; it has {', '.join(answer.rows)}", pytrace=False)
        if not answer.rows[name]["ok"]:
            item.stash[ACCOUNTED] = True
            pytest.skip(answer.complaint(name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.skipped or hasattr(report, "wasxfail") or item.stash.get(ACCOUNTED, False):
        return report
    backend = item.get_closest_marker("linux_backend")
    if backend is None and item.path.relative_to(TESTS).parts[0] not in GUARDED:
        return report
    accepted = backend is not None and (backend.kwargs.get("may_skip") or (os.geteuid() != 0 and backend.kwargs.get("user_may_skip")))
    if not accepted and (ask_doctor().ok or ask_doctor().fault):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped although `cellos doctor` says that this host can isolate: {reason}{ask_doctor().fault}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skips itself as a whole: mark its tests instead, so that each skip has its reason"
    return report


# ---------------------------------------------------------------- the commands that a user types

TIMEOUT_SECONDS = 60


def command_line(name: str) -> list[str]:
    """A console script as it stands in this checkout or environment."""
    short = {"cellos": "cli.main", "cellos-supervisor": "cli.supervisor"}
    module = short.get(name) or f"{name.removeprefix('cellos-')}.main"
    return [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; from cellos.{module} import main; main()"]


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
    ours = {
        "CELLOS_STATE_DIR": str(state),
        "RUST_LOG": "warn",  # without the line that every start begins with
        "CELLOS_TEST_FORCE_MISSING_ISOLATION_PRIMITIVES": "",  # the check of the host has tests of its own
    }
    return {name: value for name, value in kept.items() if value} | ours


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


# ---------------------------------------------------------------- a bucket


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """An S3 API, see cellos.testing.s3_server; one for all tests, which keep apart by the keys that they use."""
    from cellos.testing.s3_server import s3_server as serve

    with serve() as server:
        yield server
