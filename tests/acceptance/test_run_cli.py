"""`cellos run` and `cellos.run` as a user meets them."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest

import cellos
from cellos.client import local
from cellos.core.evidence.verify import verify
from cellos.errors import CellosError, ConfigError, HostBackendError, InvalidSpec, Unenforceable

pytestmark = pytest.mark.linux_backend
NO_UTF8 = os.fsdecode(b"\xff")


class Runner:
    """`cellos run` in a directory of its own."""

    def __init__(self, commands: Any, place: Path) -> None:
        self.commands = commands
        self.place = place

    def __call__(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self.commands.run("cellos", "run", *arguments, **({"cwd": self.place} | how))
        return done

    @property
    def records(self) -> list[Path]:
        return sorted((self.commands.state / "evidence").glob("*"))

    @property
    def left(self) -> list[str]:
        """Files of the state directory beside the records."""
        found = [os.path.join(where, name) for where, _, names in os.walk(self.commands.state) for name in names]
        return [path for path in found if "/evidence/" not in path]

    def refused(self, done: subprocess.CompletedProcess[str], text: str) -> None:
        assert done.returncode == 125
        assert done.stdout == ""
        assert text in done.stderr
        assert done.stderr.startswith("cellos: ")
        assert done.stderr.count("\n") == 1
        assert self.records == []
        assert self.left == []


@pytest.fixture
def run(commands: Any, tmp_path: Path) -> Runner:
    place = tmp_path / "place"
    place.mkdir()
    return Runner(commands, place)


class TestExitCodes:
    @pytest.mark.parametrize(
        ("options", "argv", "code", "says"),
        [
            ([], ["true"], 0, "exit 0 in "),
            ([], ["sh", "-c", "exit 3"], 3, "exit 3 in "),
            ([], ["sh", "-c", "kill -9 $$"], 137, "ended by signal 9 (SIGKILL) after "),
            ([], ["sh", "-c", "kill -15 $$"], 143, "ended by signal 15 (SIGTERM) after "),
            (["--timeout", "200ms"], ["sleep", "1000"], 124, "time-out after 200 ms"),
            ([], ["/etc/passwd"], 126, "cannot start /etc/passwd: Permission denied (os error 13)"),
            ([], ["no-such-program"], 127, "cannot start no-such-program: No such file or directory (os error 2)"),
            ([], ["sh", "-c", "exit 125"], 125, "exit 125 in "),
        ],
    )
    def test_how_the_command_ended(self, run: Runner, options: list[str], argv: list[str], code: int, says: str) -> None:
        done = run(*options, "--", *argv)
        assert done.returncode == code
        assert done.stderr.startswith(f"cellos: {says}")
        assert done.stderr.count("\n") == 1
        assert run.left == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_to_us(self, run: Runner, ends: Callable[[Any], None], number: int) -> None:
        process = run.commands.start("cellos", "run", "--", "sh", "-c", "echo up; sleep 1000")
        ends(process)
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert error.startswith("cellos: stopped after ")
        assert run.left == []
        assert verify(run.records[0].read_bytes().splitlines()).verified

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("nothing", "no such file in the work directory"),
            ("link", "symbolic links are not followed"),
        ],
    )
    def test_a_command_that_succeeds_and_an_export_that_does_not(self, run: Runner, path: str, reason: str) -> None:
        done = run("--out", f"{path}:copied", "--", "ln", "-s", "/etc/passwd", "link")
        assert done.returncode == 125
        assert "exit 0 in " in done.stderr
        assert f", but export sink: {path}: {reason}" in done.stderr
        assert list(run.place.iterdir()) == []

    @pytest.mark.needs("limit memory")
    def test_too_much_memory(self, run: Runner) -> None:
        done = run("--mem", "40M", "--", "/usr/bin/python3", "-c", "x = b'x' * 10**9")
        assert done.returncode == 137
        assert done.stderr.startswith("cellos: out of memory after ")
        assert "(40 MiB)" in done.stderr


class TestOptions:
    def test_streams_are_the_commands_own(self, run: Runner) -> None:
        done = run("--", "sh", "-c", "echo out; echo error >&2")
        assert done.stdout == "out\n"
        assert done.stderr.startswith("error\ncellos: exit 0 in ")

    def test_the_line_says_what_held_it_and_where_the_record_is(self, run: Runner) -> None:
        done = run("--", "true")
        [record] = run.records
        assert " · linux: 7 namespaces, seccomp, landlock, no network, memory " in done.stderr
        assert done.stderr.endswith(f" · events {record}\n")
        assert verify(record.read_bytes().splitlines()).verified

    def test_options_of_the_command_are_the_commands(self, run: Runner) -> None:
        assert run("echo", "-i", "--json", "--", "-x").stdout == "-i --json -- -x\n"

    def test_nothing_of_the_host_is_in_the_environment(self, run: Runner) -> None:
        done = run("--", "env", variables={"OF_THE_HOST": "1"})
        assert sorted(done.stdout.splitlines()) == ["HOME=/work", "PATH=/usr/bin:/bin:/usr/local/bin", "TMPDIR=/tmp"]

    def test_stdin_only_with_i(self, run: Runner) -> None:
        for options, expected in (([], ""), (["-i"], "sent\n")):
            process = run.commands.start("cellos", "run", *options, "--", "cat", stdin=subprocess.PIPE)
            assert process.communicate("sent\n", timeout=60)[0] == expected

    def test_here(self, run: Runner) -> None:
        (run.place / "data.txt").write_text("of the host\n")
        done = run("--here", "--", "sh", "-c", "pwd; cat data.txt; touch new 2>/dev/null || echo read-only")
        assert done.stdout == f"{run.place}\nof the host\nread-only\n"

    def test_ro(self, run: Runner, tmp_path: Path) -> None:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/data").write_text("lib\n")
        done = run("--ro", "../lib", "--", "sh", "-c", f"pwd; cat {tmp_path}/lib/data; touch {tmp_path}/lib/new || echo read-only")
        assert done.stdout == "/work\nlib\nread-only\n"

    def test_out(self, run: Runner, tmp_path: Path) -> None:
        (run.place / "first").write_text("old")
        script = "mkdir d; echo 1 > first; echo 2 > d/second; echo 3 > 'third file'"
        out = ["--out", "first", "--out", f"d/second:{tmp_path}/elsewhere", "--out", "/work/third file"]
        assert run(*out, "--", "sh", "-c", script).returncode == 0
        assert (run.place / "first").read_text() == "1\n"
        assert (tmp_path / "elsewhere").read_text() == "2\n"
        assert (run.place / "third file").read_text() == "3\n"
        assert sorted(os.listdir(run.place)) == ["first", "third file"]

    def test_out_over_a_link_keeps_it_and_the_permissions(self, run: Runner) -> None:
        (run.place / "first").write_text("old")
        (run.place / "first").chmod(0o600)
        (run.place / "latest").symlink_to("first")
        assert run("--out", "f:latest", "--", "sh", "-c", "echo new > f").returncode == 0
        assert (run.place / "latest").is_symlink()
        assert (run.place / "first").read_text() == "new\n"
        assert (run.place / "first").stat().st_mode & 0o777 == 0o600

    def test_out_over_what_came_during_the_run(self, run: Runner) -> None:
        process = run.commands.start(
            "cellos", "run", "-i", "--out", "f", "--", "sh", "-c", "echo up; read line; echo new > f", cwd=run.place, stdin=subprocess.PIPE
        )
        assert process.stdout.readline() == "up\n"
        os.mkfifo(run.place / "f")
        _, error = process.communicate("go on\n", timeout=60)
        assert process.returncode == 125
        assert f", but export sink: export copy -> {run.place}/f: it is a FIFO, and only a regular file is replaced; name a file" in error
        assert (run.place / "f").is_fifo()

    def test_secret(self, run: Runner) -> None:
        done = run("--secret", "TOKEN", "--", "sh", "-c", "echo $TOKEN", variables={"TOKEN": "hunter2"})
        assert done.stdout == "hunter2\n"
        assert "hunter2" not in run.records[0].read_text()

    def test_json(self, run: Runner) -> None:
        done = run("--json", "--out", "f", "--", "sh", "-c", "echo out; echo error >&2; echo x > f")
        report = json.loads(done.stdout)
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        assert {name: report[name] for name in ("code", "exitCode", "signal", "timedOut", "stdout", "stderr", "truncated", "residue")} == {
            "code": 0,
            "exitCode": 0,
            "signal": None,
            "timedOut": False,
            "stdout": "out\n",
            "stderr": "error\n",
            "truncated": False,
            "residue": [],
        }
        assert report["events"] == str(run.records[0])
        assert report["head"] == hashlib.sha256(run.records[0].read_bytes().splitlines()[-1]).hexdigest()
        assert report["runId"] == run.records[0].stem
        assert report["artifacts"] == [{"destination": str(run.place / "f"), "bytesWritten": 2}]
        assert report["isolation"]["backend"] == "linux"
        page = (Path(__file__).parents[2] / "docs/reference/commands.md").read_text().partition("\n## `cellos events")[0]
        assert report.keys() - set(re.findall(r"`(\w+)`", page)) == set()

    def test_json_of_what_is_no_text(self, run: Runner) -> None:
        report = json.loads(run("--json", "--", "printf", r"\377").stdout)
        assert (report["stdout"], report["stdoutEncoding"]) == ("/w==", "base64")

    def test_json_of_a_refusal(self, run: Runner) -> None:
        done = run("--json", "--secret", "NOT_SET", "--", "true")
        assert done.returncode == 125
        assert json.loads(done.stdout) == {
            "code": 125,
            "error": {"code": "config", "text": "secret NOT_SET is not set in the environment"},
        }

    def test_json_waits_for_its_reader(self, run: Runner) -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        process = run.commands.start("cellos", "run", "--json", "--", "head", "-c", "1000000", "/dev/zero", stdout=writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            report = json.load(pipe)
        assert process.communicate(timeout=60)[1] == ""
        assert (process.returncode, report["code"], len(report["stdout"])) == (0, 0, 1_000_000)

    def test_print_spec_is_what_would_run_and_runs_nothing(self, run: Runner) -> None:
        done = run("--print-spec", "--here", "--timeout", "1.5s", "--out", "f", "--secret", "TOKEN", "--", "touch", "f")
        assert (done.returncode, done.stderr) == (0, "")
        assert run.records == []
        spec = json.loads(done.stdout)["spec"]
        assert spec["run"]["argv"] == ["touch", "f"]
        assert (spec["run"]["timeoutMs"], spec["lifetime"]["ttlSeconds"]) == (1500, 2)
        assert spec["authority"]["filesystem"]["mounts"] == [{"source": str(run.place), "target": str(run.place), "mode": "ro"}]
        assert spec["authority"]["secretRefs"] == ["TOKEN"]
        plain = run.place / "spec.json"
        plain.write_text(run("--print-spec", "--", "echo", "as printed").stdout)
        assert run.commands.run("cellos-supervisor", str(plain)).stdout == "as printed\n"

    def test_a_terminal_is_not_written_to_raw(self, run: Runner) -> None:
        ours, theirs = pty.openpty()
        process = run.commands.start("cellos", "run", "--", "printf", r"\033]0;owned\007plain", stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        process.communicate(timeout=60)
        shown = os.read(ours, 1000)
        os.close(ours)
        assert shown == rb"\x1b]0;owned\x07plain"

    def test_a_reader_that_goes_away_ends_the_command(self, run: Runner) -> None:
        line = [*run.commands.line("cellos"), "run", "--", "yes"]
        done = subprocess.run(
            ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash", *line],
            env=run.commands.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (128 + signal.SIGPIPE, "y\n")


MANY = """
import cellos, os, threading
from concurrent.futures import ThreadPoolExecutor
from cellos.client.local import _shared

def there():
    launcher = _shared.launcher.pid
    open_to_us = [os.getpid(), *([launcher] if os.geteuid() == 0 else [])]
    children = [open(f"/proc/{pid}/task/{pid}/children").read().split() for pid in (os.getpid(), launcher)]
    groups = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names if name.startswith(f"cellos-{launcher}-")]
    descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in open_to_us]
    return {"children": children, "groups": groups, "descriptors": descriptors, "threads": threading.active_count()}

def run(number):
    return cellos.run(["sh", "-c", f"echo {number}"]).stdout == b"%d\\n" % number

assert run(0)
before = there()
at_once = ThreadPoolExecutor(20)
several = sum(at_once.map(run, range(100)))
at_once.shutdown()
one = sum(map(run, range(20)))
after = there()
print(f"{several} of 100, {one} of 20, left: {[name for name in before if before[name] != after[name]]}")
"""


@pytest.mark.needs("limit memory")
def test_the_examples_of_the_help_can_be_typed(run: Runner) -> None:
    """In the directory of somebody who has a script and a program."""
    (run.place / "test.py").write_text("")
    (run.place / "job").write_text("#!/bin/sh\n")
    (run.place / "job").chmod(0o755)
    examples = re.findall(r"^ +cellos run (.+?)  ", run.commands.run("cellos", "--help").stdout, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        done = run(*shlex.split(example))
        assert done.returncode == 0, (example, done.stderr)


class TestHints:
    def test_a_file_that_is_here(self, run: Runner) -> None:
        (run.place / "x.py").write_text("print('ran')")
        done = run("--", "/usr/bin/python3", "x.py")
        assert done.returncode == 2
        assert done.stderr.endswith("\ncellos: x.py exists here: add --here\n")
        assert run("--here", "--", "/usr/bin/python3", "x.py").stdout == "ran\n"

    def test_a_program_that_is_here(self, run: Runner) -> None:
        (run.place / "job").write_text("#!/bin/sh\necho ran\n")
        (run.place / "job").chmod(0o755)
        done = run("--", "./job")
        assert done.returncode == 127
        assert done.stderr.endswith("\ncellos: ./job exists here: add --here\n")
        assert run("--here", "--", "./job").stdout == "ran\n"

    def test_a_program_elsewhere(self, run: Runner, tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/tool").write_text("#!/bin/sh\necho ran\n")
        (tmp_path / "bin/tool").chmod(0o755)
        done = run("--", "tool", variables={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
        assert done.returncode == 127
        assert (
            f"cellos: tool lies outside the cell, at {tmp_path}/bin/tool: add --ro {tmp_path}/bin, and run it as {tmp_path}/bin/tool\n"
            in done.stderr
        )
        assert run("--ro", f"{tmp_path}/bin", "--", f"{tmp_path}/bin/tool").stdout == "ran\n"

    def test_a_file_elsewhere(self, run: Runner, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("x")
        done = run("--", "cat", f"{tmp_path}/data")
        assert f"cellos: {tmp_path}/data is not visible in the cell: add --ro {tmp_path}\n" in done.stderr

    def test_none_where_nothing_is_wrong(self, run: Runner) -> None:
        (run.place / "x").write_text("")
        assert run("--", "echo", "x").stderr.count("\n") == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ([], "missing argument"),
            (["--"], "missing argument"),
            (["--bad", "--", "true"], "no such option '--bad'"),
            (["--timeout", "soon", "--", "true"], "'soon' is not a time above 0, like 30s, 1500ms, 5m or 1h"),
            (["--timeout", "0s", "--", "true"], "'0s' is not a time above 0"),
            (["--mem", "much", "--", "true"], "'much' is not a size above 0, like 512M or 1G"),
            (["--out", ":x", "--", "true"], "':x' is not FILE or FILE:DEST"),
            (["--ro", "/no/such/directory", "--", "true"], "--ro /no/such/directory: No such file or directory"),
            (["--ro", "/" + "x" * 300, "--", "true"], "x: File name too long"),
            (["--secret", "NOT_SET", "--", "true"], "secret NOT_SET is not set in the environment"),
            (["--", "true", *["x" * 100_000] * 11], "the command is too long: with its options it makes 1100"),
            (["--secret", "PATH", "--", "true"], "a secret named PATH would decide what the command executes"),
            (["--allow", "example.com", "--", "true"], "egress is not built yet"),
        ],
    )
    def test_one_line_and_125(self, run: Runner, arguments: list[str], text: str) -> None:
        run.refused(run(*arguments), text)

    @pytest.mark.parametrize(
        ("out", "text"),
        [
            (["../a"], "out: '../a' lies outside the work directory: name a file below /work, without '..'"),
            (["/etc/passwd:a"], "out: '/etc/passwd' lies outside the work directory"),
            (["d/../a"], "out: 'd/../a' lies outside the work directory"),
            (["a:none/b"], "out: cannot copy to {place}/none/b: its directory: No such file or directory (os error 2)"),
            (
                ["a:directory"],
                "out: cannot copy to {place}/directory: it is a directory, and only a regular file is replaced; name a file in it",
            ),
            (["a:new/"], "out: cannot copy to 'new/', a directory: name the file, too, as new/a"),
            (
                ["a:fifo"],
                "out: cannot copy to {place}/fifo: it is a FIFO, and only a regular file is replaced; name a file, or let the command",
            ),
            (
                ["a:/dev/stdout"],
                "out: cannot copy to /dev/stdout: it stands for an open file of a process; name a file, or let the command",
            ),
            (["a", "d/a"], "out: two files would go to one place, {place}/a; give each a destination of its own"),
            ([f"a:{NO_UTF8}"], r"the destination to copy to is not UTF-8, and a document is: {place}/\xff"),
        ],
    )
    def test_destinations_are_looked_at_before_the_command_starts(self, run: Runner, out: list[str], text: str) -> None:
        (run.place / "directory").mkdir()
        os.mkfifo(run.place / "fifo")
        before = sorted(os.listdir(run.place))
        run.refused(run(*[word for each in out for word in ("--out", each)], "--", "true"), text.format(place=run.place))
        assert sorted(os.listdir(run.place)) == before

    def test_out_in_a_directory_that_is_no_text(self, run: Runner) -> None:
        place = run.place / NO_UTF8
        place.mkdir()
        run.refused(run("--out", "a", "--", "true", cwd=place), "the destination to copy to is not UTF-8")

    def test_here_in_the_root(self, run: Runner) -> None:
        run.refused(run("--here", "--", "true", cwd="/"), "cannot show / to the cell, which has its own there")

    def test_a_state_directory_that_cannot_be_used(self, run: Runner) -> None:
        run.refused(run("--", "true", variables={"CELLOS_STATE_DIR": "/dev/null/x"}), "CELLOS_STATE_DIR: cannot use /dev/null/x")

    def test_bytes_that_are_no_text(self, run: Runner) -> None:
        run.refused(run("--", "echo", os.fsdecode(b"\xff")), r"argument 1 is not UTF-8, and a document is: \xff")

    def test_an_argument_that_the_locale_does_not_know(self, run: Runner) -> None:
        variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        run.refused(run("--", "echo", "ü", variables=variables), "argument 1 is no text in this locale: ü; set LC_ALL=C.UTF-8")

    @pytest.mark.parametrize("options", [["--here"], ["--ro", "."], ["--out", "f"]])
    def test_a_directory_that_is_gone(self, run: Runner, options: list[str]) -> None:
        line = [*run.commands.line("cellos"), "run", *options, "--", "true"]
        done = subprocess.run(
            ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *line],
            cwd=run.place, env=run.commands.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        run.refused(done, "the current directory no longer exists")

    def test_a_secret_without_a_value(self, run: Runner) -> None:
        run.refused(run("--secret", "EMPTY", "--", "true", variables={"EMPTY": ""}), "secret EMPTY is empty in the environment")

    @pytest.mark.parametrize("arguments", [["--bad", "--", "true"], ["--timeout", "soon", "--", "true"], []])
    def test_json_of_a_line_that_cannot_be_understood(self, run: Runner, arguments: list[str]) -> None:
        done = run("--json", *arguments)
        answer = json.loads(done.stdout)
        assert done.returncode == answer["code"] == 125
        assert answer["error"]["code"] == "usage"
        assert done.stderr == f"cellos: {answer['error']['text']}\n"

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_an_output_that_nobody_can_write_to(self, run: Runner, options: list[str]) -> None:
        with open("/dev/null", "rb") as closed:
            done = run(*options, "--", "echo", "lost", stdout=closed)
        assert done.returncode == 125
        assert "standard output" in done.stderr

    def test_no_isolation_never_goes_unsaid(self, run: Runner) -> None:
        done = run("--", "true", variables={"CELLOS_CELL_BACKEND": "stub"})
        assert done.returncode == 0
        assert "nothing is isolated" in done.stderr
        assert " · stub: not isolated · " in done.stderr


class TestFromPython:
    @pytest.fixture(autouse=True)
    def state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("CELLOS_STATE_DIR", str(tmp_path / "state"))
        return tmp_path / "state"

    def test_a_result_says_everything(self) -> None:
        result = cellos.run(["sh", "-c", "cat; echo error >&2; exit 4"], stdin=b"given")
        assert (result.exit_code, result.signal, result.spawn_error) == (4, None, None)
        assert (result.stdout, result.stderr, result.truncated) == (b"given", b"error\n", False)
        assert (result.outcome, result.reason) == ("failed", "command exited with status 4")
        assert (result.timed_out, result.interrupted, result.residue) == (False, False, ())
        assert result.isolation.backend == "linux"
        assert verify(Path(result.events).read_bytes().splitlines()).verified
        assert Path(result.events).stem == result.run_id

    def test_a_result_does_not_change(self) -> None:
        result = cellos.run(["true"])
        with pytest.raises(AttributeError):
            result.exit_code = 1  # type: ignore[misc]

    def test_a_time_out(self) -> None:
        result = cellos.run(["sleep", "1000"], timeout=0.1)
        assert result.timed_out
        assert (result.exit_code, result.signal) == (None, 9)
        assert result.deadline is not None
        assert result.deadline.milliseconds == 100

    def test_programs_that_are_not_there(self) -> None:
        result = cellos.run(["no-such-program"])
        assert (result.exit_code, result.spawn_errno) == (None, 2)

    def test_secrets_by_value_and_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NAMED", "one")
        assert cellos.run(["sh", "-c", "echo $NAMED"], secrets=["NAMED"]).stdout == b"one\n"
        assert cellos.run(["sh", "-c", "echo $GIVEN"], secrets={"GIVEN": "two"}).stdout == b"two\n"

    def test_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "place"
        place.mkdir()
        (place / "in").write_text("in")
        monkeypatch.chdir(place)
        result = cellos.run(["sh", "-c", 'cp in "$HOME/result"'], here=True, out={"result": "copied"})
        assert result.outcome == "succeeded", result.reason
        assert (place / "copied").read_text() == "in"
        assert [receipt.bytes_written for receipt in result.receipts] == [2]

    def test_a_cap_on_what_is_captured(self) -> None:
        result = cellos.run(["echo", "0123456789"], capture=4)
        assert (result.stdout, result.truncated) == (b"0123", True)

    def test_without_capture_streams_are_ours(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert cellos.run(["sh", "-c", "echo out; echo error >&2"], capture=None).stdout == b""
        assert capfd.readouterr() == ("out\n", "error\n")

    @pytest.mark.parametrize(
        ("given", "error", "text"),
        [
            ({"argv": []}, InvalidSpec, "spec.run.argv must be non-empty"),
            ({"argv": ["a\0b"]}, InvalidSpec, "NUL byte"),
            ({"argv": ["\udcff"]}, ConfigError, "not UTF-8"),
            ({"argv": ["true"], "timeout": 0}, ConfigError, "timeout is above 0"),
            ({"argv": ["true"], "memory": 0}, ConfigError, "memory is above 0"),
            ({"argv": ["true"], "out": {"a": "/dev/stdout"}}, ConfigError, "^out: cannot copy to /dev/stdout: it stands for an open file"),
            ({"argv": ["true"], "out": {"a": NO_UTF8}}, ConfigError, "the destination to copy to is not UTF-8"),
            ({"argv": ["true"], "secrets": ["NOT_SET"]}, ConfigError, "NOT_SET is not set"),
            ({"argv": ["true"], "secrets": {"LD_PRELOAD": "x"}}, Unenforceable, "LD_PRELOAD"),
            ({"argv": ["true"], "allow": ["example.com"]}, Unenforceable, "egress is not built yet"),
        ],
    )
    def test_what_cannot_be_run_is_an_error_of_ours(self, given: dict[str, Any], error: type[CellosError], text: str, state: Path) -> None:
        with pytest.raises(error, match=text):
            cellos.run(**given)
        assert not state.exists() or list((state / "evidence").iterdir()) == []

    @pytest.mark.parametrize("given", [{"argv": "ls"}, {"argv": ["true"], "out": "result"}])
    def test_a_wrong_type_is_a_type_error(self, given: dict[str, Any], state: Path) -> None:
        with pytest.raises(TypeError, match=r"^(argv|out) must be .*a sequence of str or os\.PathLike, not str"):
            cellos.run(**given)
        assert not state.exists()

    def test_paths_are_taken_as_such(self, tmp_path: Path) -> None:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/data").write_text("lib")
        argv: list[str | Path] = ["cp", tmp_path / "lib/data", "copied"]
        result = cellos.run(argv, read_only=[tmp_path / "lib"], out={PurePath("copied"): tmp_path / "out"})
        assert (result.exit_code, (tmp_path / "out").read_text()) == (0, "lib")

    def test_a_current_directory_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        for given in ({"here": True}, {"out": ["a"]}):
            with pytest.raises(ConfigError, match="the current directory no longer exists"):
                cellos.run(["true"], **given)

    def test_a_python_that_does_not_know_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", None)
        monkeypatch.setattr(local, "_shared", local._Shared())
        with pytest.raises(HostBackendError, match=r"this Python does not know its own program; set sys\.executable"):
            cellos.run(["true"])

    def test_the_stub_warns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELLOS_CELL_BACKEND", "stub")
        with pytest.warns(RuntimeWarning, match="nothing is isolated"):
            assert cellos.run(["true"]).isolation.enforced == ()

    def test_ctrl_c_in_the_calling_program_ends_the_cell(self, ends: Callable[[Any], None], state: Path) -> None:
        code = (
            "import cellos\n"
            "try: cellos.run(['sh', '-c', 'echo up; sleep 1000'], capture=None)\n"
            "except KeyboardInterrupt: print('interrupted')\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ends(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("interrupted\n", "")
        [record] = (state / "evidence").iterdir()
        assert verify(record.read_bytes().splitlines()).verified
        assert '"reason":"supervisor_terminated"' in record.read_text()
        assert list((state / "runs").iterdir()) == []

    @pytest.mark.parametrize("variables", [{}, {"MALLOC_ARENA_MAX": "1"}])
    def test_many_runs_one_after_the_other_and_at_once_leave_nothing(self, variables: dict[str, str]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", MANY], env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.stdout, done.stderr) == ("100 of 100, 20 of 20, left: []\n", "")

    def test_a_forked_child_has_a_launcher_of_its_own_and_ends_no_other(self) -> None:
        code = (
            "import cellos, os, sys\n"
            "cellos.run(['true'])\n"
            "if os.fork() == 0: sys.exit(cellos.run(['sh', '-c', 'exit 3']).exit_code)\n"
            "_, status = os.wait()\n"
            "print(os.waitstatus_to_exitcode(status), cellos.run(['sh', '-c', 'exit 4']).exit_code)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == ("3 4\n", "")

    def test_and_does_not_keep_that_of_a_parent_who_was_killed(self) -> None:
        code = (
            "import cellos, os, sys\n"
            "from cellos.client.local import _shared\n"
            "cellos.run(['true'])\n"
            "if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"
            "print(_shared.launcher.pid, flush=True)\n"
            "os.wait()\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            launcher = os.pidfd_open(int(parent.stdout.readline()))
            parent.kill()
            ended = select.select([launcher], [], [], 60)[0]
            os.close(launcher)
        assert ended, "though the child lives, and holds what it inherited"

    def test_the_names_are_those_that_are_documented(self) -> None:
        assert dir(cellos) == ["RunResult", "__version__", "run"]
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = cellos.nothing
