"""`scripts/suites.py` and tests/conftest.py: what is counted, and which skips are failures.

Tried on a small tree with a doctor of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GOOD = {"primitive": "user-namespace", "ok": True, "detail": "", "cure": ""}
NO_CGROUP = {"primitive": "memory-cgroup", "ok": False, "detail": "not writable", "cure": "run as root"}
NO_NAMESPACE = {"primitive": "user-namespace", "ok": False, "detail": "refused", "cure": "set a sysctl"}

Run = Callable[..., tuple[int, list[str]]]

CAN = {"ok": True, "rows": [GOOD, NO_CGROUP]}
CANNOT = {"ok": False, "rows": [NO_NAMESPACE, NO_CGROUP]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs one test file as `tests/<suite>/test_it.py`; returns the exit code and the lines of the summary."""
    package = tmp_path / "package" / "cellos" / "cli"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")

    def run(suite: str, text: str, doctor: object, *options: str) -> tuple[int, list[str]]:
        (package / "main.py").write_text(f"def main():\n    print({json.dumps(doctor)!r})\n")
        (tmp_path / "tests" / suite).mkdir()
        (tmp_path / "tests" / suite / "test_it.py").write_text("import os, pytest\n\n\n" + text)
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts/suites.py"), *(options or ("-q",))],
            cwd=tmp_path,
            env={
                "PYTHONPATH": str(tmp_path / "package"),
                "PATH": "/usr/bin:/bin",
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTEST_ADDOPTS": f"-o 'cache_dir={tmp_path}/cache'",  # as scripts/test has it
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # half of the time would go there
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()

    return run


def test_counts_by_suite_and_closes_with_one_plain_line(run: Run) -> None:
    code, lines = run("unit", "def test_a(): pass\n\n\ndef test_b(): assert not 1\n\n\ndef test_c(): pytest.skip('moon')\n", CAN)
    assert code != 0
    assert lines[-1] == "1 passed, 1 failed, 1 skipped"
    assert "    skipped 1: moon" in lines
    assert any(line.split()[:7] == ["unit", "1", "passed", "1", "failed", "1", "skipped"] for line in lines)


def test_suites_beside_each_other_are_counted_as_one_run(run: Run, tmp_path: Path) -> None:
    """What is to be alone comes after everything else, in a process of its own."""
    log = tmp_path / "log"
    note = f"def note(name):\n    with open({str(log)!r}, 'a') as file:\n        print(name, os.getpid(), file=file)\n\n\n"
    alone = "@pytest.mark.alone\ndef test_a(): note('alone')\n\n\n"
    (tmp_path / "tests/acceptance").mkdir()
    (tmp_path / "tests/acceptance/test_other.py").write_text(
        f"import os, pytest\n\n\n{note}{alone}def test_b(): pytest.skip('moon')\n\n\ndef test_c(): assert not 1\n"
    )
    code, lines = run("unit", note + alone + "def test_b(): note('unit')\n", CAN, "-j", "2", "-q")
    assert code == 1
    assert lines[-1] == "3 passed, 2 failed, 0 skipped"
    assert any("says that this host can isolate" in line and "moon" in line for line in lines)
    for words in ("unit 2 passed 0 failed 0 skipped", "acceptance 1 passed 2 failed 0 skipped"):
        assert any(line.split()[:7] == words.split() for line in lines), words
    (first, one), (second, other), (third, again) = (line.split() for line in log.read_text().splitlines())
    assert ([first, second, third], one != other, other == again) == (["unit", "alone", "alone"], True, True)


def test_a_directory_of_many_files_is_shared_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tests/contract").mkdir()
    for number in range(13):
        (tmp_path / f"tests/contract/test_{number:02}.py").write_text("def test_a(): pass\n")
    (tmp_path / "tests/contract/test_05.py").write_text("import pytest\n\n\n@pytest.mark.alone\ndef test_a(): assert not 1\n")
    code, lines = run("unit", "def test_a(): pass\n", CAN, "-j", "2", "-q", "--ignore=tests/contract/test_05.py")
    assert (code, lines[-1]) == (0, "13 passed, 0 failed, 0 skipped")
    shares = sorted(line.split()[3:] for line in lines if line.startswith("== not alone tests/contract/"))
    assert shares == [[f"tests/contract/test_{number:02}.py" for number in each] for each in ((0, 2, 4, 7, 9, 11), (1, 3, 6, 8, 10, 12))]


def test_a_process_that_dies_is_a_failure(run: Run) -> None:
    code, lines = run("unit", "def test_a(): os._exit(0)\n", CAN, "-j", "2")
    assert (code, lines[-1]) == (1, "0 passed, 0 failed, 0 skipped")


def test_a_failing_teardown_is_one_failed_test(run: Run) -> None:
    text = "@pytest.fixture\ndef f():\n    yield\n    assert not 1\n\n\ndef test_a(f): pass\n"
    assert run("unit", text, CAN)[1][-1] == "0 passed, 1 failed, 0 skipped"


def test_the_backend_suite_is_skipped_with_the_doctors_reason(run: Run) -> None:
    code, lines = run("acceptance", "@pytest.mark.linux_backend\ndef test_a(): assert not 1\n", CANNOT)
    assert code == 0
    assert lines[-1] == "0 passed, 0 failed, 1 skipped"
    assert any("user-namespace: refused (set a sysctl)" in line for line in lines)


@pytest.mark.parametrize(
    ("suite", "marker"),
    [("integration", "@pytest.mark.linux_backend\n"), ("acceptance", ""), ("faults", ""), ("acceptance", "@pytest.mark.linux_backend\n")],
)
def test_a_skip_on_a_capable_host_is_a_failure(run: Run, suite: str, marker: str) -> None:
    code, lines = run(suite, marker + "def test_a(): pytest.skip('tired')\n", CAN)
    assert code != 0
    assert lines[-1] == "0 passed, 1 failed, 0 skipped"
    assert any("says that this host can isolate" in line and "tired" in line for line in lines)


@pytest.mark.parametrize("marker", ["@pytest.mark.needs('memory-cgroup')", "@pytest.mark.linux_backend(may_skip='other cgroup version')"])
def test_a_skip_with_an_accepted_reason_is_none(run: Run, marker: str) -> None:
    code, lines = run("acceptance", f"{marker}\ndef test_a(): pytest.skip('not here')\n", CAN)
    assert (code, lines[-1]) == (0, "0 passed, 0 failed, 1 skipped")


def test_a_primitive_that_the_doctor_does_not_know_is_a_failure(run: Run) -> None:
    code, lines = run("unit", "@pytest.mark.needs('memry')\ndef test_a(): pass\n", CAN)
    assert code != 0
    assert any("the doctor has no such row" in line for line in lines)


def test_a_doctor_without_an_answer_is_a_failure(run: Run) -> None:
    code, lines = run("acceptance", "@pytest.mark.linux_backend\ndef test_a(): pass\n", "no idea")
    assert code != 0
    assert lines[-1] == "0 passed, 1 failed, 0 skipped"


def test_a_module_that_skips_itself_is_a_failure(run: Run) -> None:
    code, lines = run("integration", "pytest.skip('as a whole', allow_module_level=True)\n", CAN)
    assert code != 0
    assert lines[-1] == "0 passed, 1 failed, 0 skipped"


def test_what_an_ordinary_user_may_skip_root_may_not(run: Run) -> None:
    code, lines = run("acceptance", "@pytest.mark.linux_backend(user_may_skip='no right to')\ndef test_a(): pytest.skip('not here')\n", CAN)
    root = os.geteuid() == 0
    assert (code != 0, lines[-1]) == (root, f"0 passed, {int(root)} failed, {int(not root)} skipped")
