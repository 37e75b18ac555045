from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cellos.cli import words
from cellos.cli.run import exit_code
from cellos.client.local import Options
from cellos.core.deadline import Deadline
from cellos.ports import CommandResult, Isolation, Residue
from cellos.supervisor.run import OUTPUT_LOST, CellOutcome

HELD = Isolation(
    backend="linux",
    enforced=("user-namespace", "pid-namespace", "no-network", "landlock", "seccomp"),
    limits={"memoryBytes": 512 << 20},
)


def outcome(command: CommandResult | None, reason: str | None = None, **members: Any) -> CellOutcome:
    given: dict[str, Any] = {
        "run_id": "run-1",
        "cell_id": "cell-1",
        "outcome": "failed" if reason else "succeeded",
        "reason": reason,
        "command": command,
        "timed_out": None,
        "interrupted": False,
        "isolation": HELD,
        "residue": (),
        "events": 4,
        "head": "0" * 64,
        "receipts": (),
        "duration_ms": 50,
    }
    return CellOutcome(**{**given, **members})


def ended(**members: Any) -> CommandResult:
    return CommandResult(**{"ended": "exited", "duration_ms": 34, **members})


LIMIT = Deadline(milliseconds=2000, source="spec", ttl_seconds=2)
CASES = [
    (outcome(ended(exit_code=0)), 0, "exit 0 in 34 ms"),
    (outcome(ended(exit_code=7), "r"), 7, "exit 7 in 34 ms"),
    (outcome(ended(exit_code=0), "export sink: x"), 125, "exit 0 in 34 ms, but export sink: x"),
    (outcome(ended(exit_code=0, output_lost=True), "output was lost"), 125, "exit 0 in 34 ms, but output was lost"),
    (outcome(ended(signal=11), "r"), 139, "ended by signal 11 (SIGSEGV) after 34 ms"),
    (outcome(ended(signal=64), "r"), 192, "ended by signal 64 (SIGRTMAX) after 34 ms"),
    (outcome(ended(signal=9, oom_killed=True), "r"), 137, "out of memory after 34 ms (512 MiB)"),
    (outcome(ended(exit_code=1, oom_killed=True), "r"), 1, "out of memory after 34 ms (512 MiB)"),
    (outcome(ended(exit_code=0, oom_killed=True)), 0, "exit 0 in 34 ms"),
    (outcome(ended(spawn_error="No such", spawn_errno=errno.ENOENT), "r"), 127, "cannot start prog: No such"),
    (outcome(ended(spawn_error="Denied", spawn_errno=errno.EACCES), "r"), 126, "cannot start prog: Denied"),
    (outcome(ended(spawn_error="Format", spawn_errno=errno.ENOEXEC), "r"), 126, "cannot start prog: Format"),
    (
        outcome(ended(spawn_error="spec.run.workingDirectory: No such", spawn_errno=errno.ENOENT), "r"),
        125,
        "cannot start prog: spec.run.workingDirectory: No such",
    ),
    (outcome(ended(ended="deadline", signal=9), "r", timed_out=LIMIT), 124, "time-out after 2 s"),
    (outcome(ended(ended="deadline", exit_code=0), "r", timed_out=LIMIT), 124, "time-out after 2 s"),
    (outcome(ended(ended="interrupted", signal=9), "r", interrupted=True), 143, "stopped after 34 ms"),
    (outcome(ended(ended="lost"), "gone"), 125, "failed: gone"),
    (outcome(None, "event sink: full"), 125, "failed: event sink: full"),
]


@pytest.mark.parametrize(("given", "code", "text"), CASES)
def test_how_it_ended(given: CellOutcome, code: int, text: str) -> None:
    assert exit_code(given, stopped_by=15) == code
    assert words.how_it_ended("prog", given, code) == text


def test_the_closing_line() -> None:
    line = words.closing_line("prog", outcome(ended(exit_code=0)), "/evidence/run-1.jsonl", 0)
    assert line == (
        "cellos: exit 0 in 34 ms · linux: 2 namespaces, seccomp, landlock, no network, memory 512 MiB · events /evidence/run-1.jsonl"
    )


def test_what_stayed_is_said() -> None:
    residue = (Residue(kind="cgroup", detail="x: busy"), Residue(kind="process", detail="pid 7"))
    assert " · left behind: cgroup x: busy, process pid 7" in words.closing_line(
        "prog", outcome(ended(exit_code=0), residue=residue), None, 0
    )


def test_lost_output_is_said_once() -> None:
    said = "output was lost: it was not read in time · "
    for members in ({"exit_code": 3}, {"signal": 9}, {"ended": "deadline", "exit_code": 0}):
        timed_out = LIMIT if "ended" in members else None
        line = words.closing_line("prog", outcome(ended(output_lost=True, **members), "r", timed_out=timed_out), "/e", 3)
        assert f" · {said}" in line
    line = words.closing_line("prog", outcome(ended(output_lost=True, exit_code=0), OUTPUT_LOST), "/e", 125)
    assert line.count(OUTPUT_LOST) == 1


@pytest.mark.parametrize(
    ("isolation", "text"),
    [
        (Isolation(backend="stub"), "stub: not isolated"),
        (Isolation(backend="linux", enforced=("seccomp",), unbounded=("memory",)), "linux: seccomp, memory unbounded"),
        (Isolation(backend="linux", enforced=("seccomp",), limits={"memoryBytes": 1000}), "linux: seccomp, memory 1000 bytes"),
    ],
)
def test_what_held_it(isolation: Isolation, text: str) -> None:
    assert words.what_held_it(isolation) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0 s"), (7, "7 ms"), (1000, "1 s"), (1234, "1234 ms"), (10_000, "10 s"), (12_345, "12.35 s"), (3_600_000, "3600 s")],
)
def test_durations(milliseconds: int, text: str) -> None:
    assert words.duration(milliseconds) == text


class TestHints:
    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        tmp_path.chmod(0o755)
        (tmp_path / "x.py").write_text("")
        (tmp_path / "dir").mkdir()
        return tmp_path

    @staticmethod
    def of(*argv: str, command: CommandResult | None = None, **members: Any) -> list[str]:
        found = outcome(command or ended(exit_code=1), "failed")
        return list(words.hints(Options(argv=argv, cell_id="c", **members), found))

    def test_a_file_here(self, place: Path) -> None:
        assert self.of("python3", "x.py") == ["x.py exists here: add --here"]
        assert self.of("python3", "x.py", here=str(place)) == []

    def test_a_file_elsewhere(self, place: Path) -> None:
        path = str(place / "x.py")
        assert self.of("cat", path) == [f"{path} is not visible in the cell: add --ro {place}"]
        assert self.of("ls", str(place / "dir")) == [f"{place}/dir is not visible in the cell: add --ro {place}/dir"]
        assert self.of("cat", path, read_only=(str(place),)) == []
        assert self.of("cat", path, here=str(place)) == []

    def test_a_file_in_a_directory_that_cells_have_themselves(self) -> None:
        assert self.of("ls", "/tmp") == []
        with tempfile.NamedTemporaryFile(dir="/tmp") as file:
            assert self.of("cat", file.name) == [f"{file.name} is not visible in the cell: add --ro {file.name}"]

    def test_the_system_needs_none(self, place: Path) -> None:
        assert self.of("/usr/bin/env", "/etc/passwd", "-x", "", "none") == []

    def test_a_program_outside_the_system(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (place / "dir/tool").write_text("#!/bin/sh\n")
        (place / "dir/tool").chmod(0o755)
        monkeypatch.setenv("PATH", f"{place}/dir")
        missing = ended(spawn_error="No such", spawn_errno=errno.ENOENT)
        assert self.of("tool", command=missing) == [
            f"tool lies outside the cell, at {place}/dir/tool: add --ro {place}/dir, and run it as {place}/dir/tool"
        ]
        assert self.of("nothing", command=missing) == []

    def test_links_between_the_cell_and_what_it_has_not(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a virtual environment's python, which is a link to that of the system."""
        missing = ended(spawn_error="No such", spawn_errno=errno.ENOENT)
        (place / "venv/bin").mkdir(parents=True)
        (place / "venv/lib").mkdir()
        python = place / "venv/bin/python9"
        python.symlink_to("/usr/bin/env")
        (place / "dir/led").symlink_to(place / "x.py")
        monkeypatch.setenv("PATH", str(python.parent))
        assert self.of(str(python), command=missing) == [f"{python} is not visible in the cell: add --ro {place}/venv"]
        assert self.of("python9", command=missing) == [
            f"python9 lies outside the cell, at {python}: add --ro {place}/venv, and run it as {python}"
        ]
        assert self.of(str(python), command=missing, read_only=(f"{place}/venv",)) == []
        assert self.of("cat", f"{place}/dir/led", read_only=(f"{place}/dir",)) == [
            f"{place}/x.py is not visible in the cell: add --ro {place}"
        ]
        assert self.of("grep", "x", "/dev/stdin") == []

    def test_a_program_that_is_not_on_the_path_of_cells(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = ended(spawn_error="No such", spawn_errno=errno.ENOENT)
        for directory, told in (("/usr/sbin", ["tool is in no directory of the cell's PATH, {}: run it as /usr/sbin/tool"]), ("/bin", [])):
            monkeypatch.setattr("shutil.which", lambda name, directory=directory: f"{directory}/{name}")
            assert self.of("tool", command=missing) == [text.format("/usr/bin:/bin:/usr/local/bin") for text in told]

    def test_an_interpreter_comes_with_its_libraries(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (place / "python/bin").mkdir(parents=True)
        (place / "python/bin/python9").write_text("")
        (place / "python/bin/python9").chmod(0o755)
        monkeypatch.setenv("PATH", f"{place}/python/bin")
        missing = ended(spawn_error="No such", spawn_errno=errno.ENOENT)
        assert f"add --ro {place}/python/bin," in self.of("python9", command=missing)[0]
        (place / "python/lib").mkdir()
        assert f"add --ro {place}/python," in self.of("python9", command=missing)[0]

    @pytest.mark.parametrize(("mode", "told"), [(0o700, True), (0o711, True), (0o755, False)])
    def test_what_not_every_user_may_read(self, place: Path, monkeypatch: pytest.MonkeyPatch, mode: int, told: bool) -> None:
        (place / "dir").chmod(mode)
        monkeypatch.setattr("os.geteuid", lambda: 0)
        refused = ended(spawn_error="spec.run.workingDirectory: Permission denied", spawn_errno=errno.EACCES)
        for how in ({"here": f"{place}/dir"}, {"read_only": (f"{place}/dir",)}):
            hints = self.of("true", command=refused, **how)
            assert len(hints) == told
            assert not told or f"{place}/dir is closed to others: chmod o+rx {place}/dir, or copy" in hints[0]
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        assert self.of("true", command=refused, here=f"{place}/dir") == []

    def test_only_failures_have_any(self, place: Path) -> None:
        given = Options(argv=("cat", "x.py"), cell_id="c")
        for found in (
            outcome(ended(exit_code=0)),
            outcome(None, "r"),
            outcome(ended(ended="interrupted"), "r", interrupted=True),
            outcome(ended(ended="deadline"), "r", timed_out=LIMIT),
        ):
            assert list(words.hints(given, found)) == []
