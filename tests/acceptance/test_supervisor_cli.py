"""`cellos-supervisor` as a user meets it: documents in, a cell, events, exit code, one line per error."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cellos.core.evidence.verify import verify
from cellos.supervisor.run import NO_LEASES

pytestmark = pytest.mark.linux_backend

PREFIX = "dev.cellos.events.cell."
BEGIN = [
    "observability.v1.network_scope", "observability.v1.dns_target_set",
    "lifecycle.v1.started", "observability.v1.container_security", "observability.v1.network_policy",
]  # fmt: skip
SPAWNED = "observability.v1.process_spawned"
ENDED = ["observability.v1.network_enforcement", "command.v1.completed"]
DESTROYED = "lifecycle.v1.destroyed"
CLOSING = ["compliance.v1.summary", "authority.v1.homeostasis", DESTROYED]
COMMON = [*BEGIN, SPAWNED, *ENDED, *CLOSING]


def document(*argv: str, **spec: Any) -> str:
    run = {"run": {"argv": list(argv), "secretDelivery": "env", **spec.pop("run", {})}} if argv else {}
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, **run, **spec}
    return json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body})


class Supervisor:
    """Runs documents and reads what came of them."""

    def __init__(self, commands: Any, place: Path) -> None:
        self.commands = commands
        self.place = place
        self.jsonl = place / "events.jsonl"
        self.spec = place / "spec.json"

    def __call__(self, text: str | bytes, **variables: str) -> subprocess.CompletedProcess[str]:
        self.spec.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.on(str(self.spec), variables=variables)

    def on(self, *arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        given = {"CELL_OS_JSONL_EVENTS": str(self.jsonl), **(variables or {})}
        done: subprocess.CompletedProcess[str] = self.commands.run("cellos-supervisor", *arguments, variables=given)
        return done

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.jsonl.read_text().splitlines()]

    @property
    def types(self) -> list[str]:
        assert verify(self.jsonl.read_bytes().splitlines()).verified
        return [event["type"].removeprefix(PREFIX) for event in self.events]

    def data(self, kind: str) -> dict[str, Any]:
        [found] = [event["data"] for event in self.events if event["type"] == PREFIX + kind]
        return dict(found)

    @property
    def left(self) -> list[str]:
        """Files of the state directory."""
        return [os.path.join(where, name) for where, _, names in os.walk(self.commands.state) for name in names]

    def refused(self, done: subprocess.CompletedProcess[str], text: str) -> None:
        """One line, exit code 1, no cell and nothing left."""
        assert done.returncode == 1
        assert done.stdout == ""
        assert text in done.stderr
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert not self.jsonl.exists() or self.jsonl.read_text() == ""
        assert self.left == []


@pytest.fixture
def supervisor(commands: Any, tmp_path: Path) -> Supervisor:
    return Supervisor(commands, tmp_path)


class TestRuns:
    def test_a_good_one(self, supervisor: Supervisor) -> None:
        done = supervisor(document("sh", "-c", "echo out; echo error >&2"), CELLOS_RUN_ID="run-local-001")
        assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "error\n")
        assert supervisor.types == COMMON
        assert {event["data"]["runId"] for event in supervisor.events} == {"run-local-001"}
        assert supervisor.data("lifecycle.v1.started")["backend"] == "linux"
        assert supervisor.data("lifecycle.v1.destroyed")["residueClass"] == "none"
        assert supervisor.left == []

    def test_from_standard_input(self, supervisor: Supervisor) -> None:
        process = supervisor.commands.start("cellos-supervisor", "-", stdin=subprocess.PIPE)
        out, _ = process.communicate(document("sh", "-c", "cat; echo read"), timeout=60)
        assert (process.returncode, out) == (0, "read\n")

    def test_the_commands_code_is_in_the_record_not_ours(self, supervisor: Supervisor) -> None:
        done = supervisor(document("sh", "-c", "exit 3"))
        assert (done.returncode, done.stderr) == (1, "Error: command exited with status 3\n")
        assert supervisor.data("command.v1.completed")["exitCode"] == 3
        assert supervisor.data("lifecycle.v1.destroyed")["reason"] == "command exited with status 3"

    def test_the_digest_is_that_of_the_bytes(self, supervisor: Supervisor) -> None:
        import hashlib

        text = document("true") + "\n  \n"
        supervisor(text)
        assert supervisor.data("lifecycle.v1.started")["specHash"] == hashlib.sha256(text.encode()).hexdigest()

    def test_without_a_sink_it_says_where_the_events_are(self, supervisor: Supervisor) -> None:
        supervisor.spec.write_text(document("true"))
        done = supervisor.commands.run("cellos-supervisor", str(supervisor.spec), variables={"RUST_LOG": "info"})
        [path] = supervisor.left
        assert f"\ncellos-supervisor: events are in {path}; " in done.stderr
        assert verify(Path(path).read_bytes().splitlines()).verified

    def test_several_runs_share_a_file(self, supervisor: Supervisor) -> None:
        supervisor.spec.write_text(document("true"))
        variables = {"CELL_OS_JSONL_EVENTS": str(supervisor.jsonl)}
        started = [supervisor.commands.start("cellos-supervisor", str(supervisor.spec), variables=variables) for _ in range(6)]
        for process in started:
            process.communicate(timeout=60)
        assert [process.returncode for process in started] == [0] * 6
        assert sorted(supervisor.types) == sorted(COMMON * 6)

    def test_artifacts_are_exported(self, supervisor: Supervisor) -> None:
        export = {"artifacts": [{"name": "report", "path": "report.txt"}]}
        done = supervisor(document("sh", "-c", "echo built > report.txt", export=export), CELLOS_EXPORT_DIR=str(supervisor.place / "out"))
        assert done.returncode == 0
        assert (supervisor.place / "out/cell-1/report").read_text() == "built\n"
        assert supervisor.types == [*BEGIN, SPAWNED, *ENDED, "observability.v1.fs_touch", "export.v2.completed", *CLOSING]
        assert supervisor.data("export.v2.completed")["receipt"]["destination"] == "cell-1/report"

    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            (
                {"authority": {"secretRefs": ["TOKEN"]}, "run": {"secretDelivery": "runtimeLeasedBroker"}},
                f"runtime leased broker prepare: secret broker: {NO_LEASES}",
            ),
            (
                {"authority": {"secretRefs": ["TOKEN"]}},
                'secret TOKEN unresolvable via memory broker: secret broker: no value was handed over for secret key "TOKEN"',
            ),
        ],
    )
    def test_secrets_that_cannot_be_had_end_the_run_before_it_is_announced(
        self, supervisor: Supervisor, spec: dict[str, Any], text: str
    ) -> None:
        done = supervisor(document("true", **spec))
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {text}\n")
        assert supervisor.types == [*BEGIN[:2], *CLOSING]
        assert supervisor.data(DESTROYED)["reason"] == text
        assert supervisor.left == []

    def test_redaction(self, supervisor: Supervisor) -> None:
        supervisor(document("true", "--password=hunter2"), CELLOS_REDACT_EVENT_FIELDS="argv")
        assert "hunter2" not in supervisor.jsonl.read_text()
        assert supervisor.data("command.v1.completed")["argv"] == ["[redacted]"]
        assert supervisor.types == COMMON

    def test_the_stub_says_what_it_is(self, supervisor: Supervisor) -> None:
        done = supervisor(document("sh", "-c", "echo $PPID"), CELLOS_CELL_BACKEND="stub")
        assert done.returncode == 0
        assert done.stderr == (
            "cellos-supervisor: CELLOS_CELL_BACKEND=stub: nothing is isolated, the command runs as an ordinary process of this host\n"
        )
        assert supervisor.data("lifecycle.v1.started")["enforced"] == []

    @pytest.mark.parametrize("flag", ["--version", "-V"])
    def test_version(self, supervisor: Supervisor, flag: str) -> None:
        from cellos import __version__

        done = supervisor.on(flag)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"cellos-supervisor {__version__}\n", "")

    def test_help(self, supervisor: Supervisor) -> None:
        done = supervisor.on("--help")
        assert done.returncode == 0
        assert "CELL_OS_JSONL_EVENTS" in done.stdout


class TestTime:
    @pytest.mark.parametrize(
        ("spec", "variables", "text"),
        [
            ({"run": {"timeoutMs": 100}}, {}, "command timed out after 100 ms (spec.run.timeoutMs)"),
            ({}, {"CELLOS_RUN_TIMEOUT_MS": "100"}, "command timed out after 100 ms (CELLOS_RUN_TIMEOUT_MS)"),
            ({"lifetime": {"ttlSeconds": 1}}, {}, "cell killed by TTL watchdog after 1000 ms (ttl_seconds=1)"),
        ],
    )
    def test_the_exact_texts(self, supervisor: Supervisor, spec: dict[str, Any], variables: dict[str, str], text: str) -> None:
        began = time.monotonic()
        done = supervisor(document("sleep", "1000", **spec), **variables)
        assert time.monotonic() - began < 50
        assert (done.returncode, done.stderr) == (1, f"Error: command spawn: {text}\n")
        completed = supervisor.data("command.v1.completed")
        assert (completed["exitCode"], completed["spawnError"]) == (-1, text)
        assert supervisor.data("lifecycle.v1.destroyed")["reason"] == f"command spawn: {text}"


class Stream:
    """The events of a run as they come, by a FIFO: nothing has to be waited for by time."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        # Open for both: so that reading waits for a writer, and the writer for nobody.
        self.descriptor = os.open(path, os.O_RDWR)
        self.lines: list[bytes] = []

    def until(self, kind: str) -> dict[str, Any]:
        """Read until that event has come; its data."""
        data = b""
        while True:
            assert select.select([self.descriptor], [], [], 60)[0], f"no {kind}"
            data += os.read(self.descriptor, 1)
            if not data.endswith(b"\n"):
                continue
            event = json.loads(data)
            self.lines.append(data[:-1])
            data = b""
            if event["type"] == PREFIX + kind:
                return dict(event["data"])

    @property
    def types(self) -> list[str]:
        return [json.loads(line)["type"].removeprefix(PREFIX) for line in self.lines]


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_tears_the_cell_down(self, supervisor: Supervisor, ends: Callable[[Any], None], number: int) -> None:
        stream = Stream(supervisor.jsonl)
        supervisor.spec.write_text(document("sleep", "1000"))
        variables = {"CELL_OS_JSONL_EVENTS": str(supervisor.jsonl)}
        process = supervisor.commands.start("cellos-supervisor", str(supervisor.spec), variables=variables)
        ends(process)
        stream.until("observability.v1.process_spawned")
        process.send_signal(number)
        assert stream.until("command.v1.completed")["spawnError"] == "supervisor terminated"
        destroyed = stream.until("lifecycle.v1.destroyed")
        assert (destroyed["outcome"], destroyed["reason"]) == ("failed", "supervisor_terminated")
        _, error = process.communicate(timeout=60)
        os.close(stream.descriptor)
        assert (process.returncode, error) == (128 + number, "Error: supervisor_terminated\n")
        assert stream.types == COMMON
        assert verify(stream.lines).verified
        assert supervisor.left == []

    def test_after_kill_the_next_start_completes_the_record(self, supervisor: Supervisor, ends: Callable[[Any], None]) -> None:
        supervisor.spec.write_text(document("sh", "-c", "echo up; sleep 1000"))
        variables = {"CELL_OS_JSONL_EVENTS": str(supervisor.jsonl)}
        process = supervisor.commands.start("cellos-supervisor", str(supervisor.spec), variables=variables)
        ends(process)
        assert process.stdout.readline() == "up\n"
        process.kill()
        process.communicate(timeout=60)
        before = supervisor.events
        assert len(supervisor.left) == 2, "the record and the spool"
        done = supervisor(document("true", id="cell-2"))
        assert done.returncode == 0
        assert "was left unfinished by its supervisor" in done.stderr
        assert supervisor.events[: len(before)] == before
        lost, *second = supervisor.events[len(before) :]
        assert lost["type"] == PREFIX + DESTROYED
        assert {name: lost["data"][name] for name in ("cellId", "outcome", "reason", "terminalState", "residueClass")} == {
            "cellId": "cell-1",
            "outcome": "failed",
            "reason": "supervisor_lost",
            "terminalState": "forced",
            "residueClass": "none",
        }
        assert [event["type"].removeprefix(PREFIX) for event in second] == COMMON
        assert verify(supervisor.jsonl.read_bytes().splitlines()).verified
        assert supervisor.left == []


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", "parse ExecutionCellDocument: "),
            ('{"apiVersion":\n "cellos.io/v1",,}', "line 2 column"),
            ('{"kind":"ExecutionCell","kind":"ExecutionCell"}', "kind is given more than once"),
            (b'{"a":"\xff"}', "UTF-8"),
            ('{"a":NaN}', "NaN is not a JSON value"),
            ("[" * 100_000, "parse ExecutionCellDocument: "),
            (document("true").replace("argv", "argb"), "spec.run.argb"),
            (document("true", lifetime={"ttlSeconds": "60"}), "spec.lifetime.ttlSeconds"),
            (document("true", lifetime={}), "ttlSeconds"),
            (document("a\0b"), "spec.run.argv[0] contains NUL byte"),
            (document("true", id="../x"), "spec.id must match"),
            (
                document("true", authority={"egressRules": [{"host": "example.com", "port": 443}]}),
                "cannot enforce: spec.authority.egressRules: ",
            ),
            (document("true", authority={"network": {}}), "authority.network is opaque"),
            (document("true", export={"artifacts": [{"name": "a", "path": "a"}]}), "no export sink is configured"),
        ],
    )
    def test_a_document_that_cannot_be_run(self, supervisor: Supervisor, text: str | bytes, error: str) -> None:
        supervisor.refused(supervisor(text), error)

    def test_a_hundred_megabytes(self, supervisor: Supervisor) -> None:
        with supervisor.spec.open("wb") as file:
            file.truncate(100 * 1024 * 1024)
        supervisor.refused(supervisor.on(str(supervisor.spec)), "parse ExecutionCellDocument: ")

    def test_no_document(self, supervisor: Supervisor) -> None:
        missing = str(supervisor.place / "missing.json")
        supervisor.refused(supervisor.on(missing), f"Error: read cell spec {missing}: No such file or directory (os error 2)\n")

    def test_a_link_is_not_followed(self, supervisor: Supervisor) -> None:
        supervisor.spec.write_text(document("true"))
        (supervisor.place / "link").symlink_to(supervisor.spec)
        supervisor.refused(supervisor.on(str(supervisor.place / "link")), "Too many levels of symbolic links (os error 40)")

    def test_a_directory(self, supervisor: Supervisor) -> None:
        supervisor.refused(supervisor.on(str(supervisor.place)), "Is a directory (os error 21)")

    def test_no_argument(self, supervisor: Supervisor) -> None:
        supervisor.refused(supervisor.on(), "no SPEC was given; see --help")

    def test_escapes_in_a_name_do_not_reach_the_terminal(self, supervisor: Supervisor) -> None:
        done = supervisor.on("\x1b]0;owned\x07")
        assert "\x1b" not in done.stderr
        supervisor.refused(done, r"\x1b]0;owned\x07")

    @pytest.mark.parametrize(
        ("variables", "error"),
        [
            ({"CELLOS_CELL_BACKEND": "firecracker"}, "CELLOS_FIRECRACKER_BINARY must be set"),
            ({"CELLOS_CELL_BACKEND": "lunix"}, "CELLOS_CELL_BACKEND: value 'lunix' is none of linux, stub, firecracker, gvisor"),
            ({"CELLOS_RUN_TIMEOUT_MS": "0"}, "CELLOS_RUN_TIMEOUT_MS must be > 0"),
            (
                {"CELL_OS_JSONL_EVENTS": "/no/such/directory/events"},
                "jsonl open /no/such/directory/events: No such file",
            ),
            ({"CELLOS_STATE_DIR": "/dev/null"}, "state directory /dev/null: not a directory"),
        ],
    )
    def test_a_variable_that_cannot_be_used(self, supervisor: Supervisor, variables: dict[str, str], error: str) -> None:
        supervisor.refused(supervisor(document("true"), **variables), error)

    @pytest.mark.parametrize(
        ("argv", "reason"),
        [
            (["/no/such/program"], "command spawn: No such file or directory (os error 2)"),
            (["/etc/passwd"], "command spawn: Permission denied (os error 13)"),
        ],
    )
    def test_a_program_that_cannot_be_started(self, supervisor: Supervisor, argv: list[str], reason: str) -> None:
        done = supervisor(document(*argv))
        assert (done.returncode, done.stderr) == (1, f"Error: {reason}\n")
        assert supervisor.types == [*BEGIN, *ENDED, *CLOSING]
        assert supervisor.left == []

    def test_a_disk_that_is_full(self, supervisor: Supervisor) -> None:
        done = supervisor(document("sh", "-c", "echo ran"), CELL_OS_JSONL_EVENTS="/dev/full")
        assert done.returncode == 1
        assert done.stdout == "", "the command was not run"
        assert "Error: event sink: sink full: /dev/full (No space left on device (os error 28))" in done.stderr
        assert len(supervisor.left) == 2, "the record of what could not be delivered"

    def test_closed_descriptors(self, supervisor: Supervisor) -> None:
        supervisor.spec.write_text(document("sh", "-c", "echo out; echo error >&2"))
        line = supervisor.commands.line("cellos-supervisor")
        environment = supervisor.commands.environment | {"CELL_OS_JSONL_EVENTS": str(supervisor.jsonl)}
        done = subprocess.run(
            ["/bin/sh", "-c", '"$@" 0<&- 1>&- 2>&-', "sh", *line, str(supervisor.spec)], env=environment, timeout=60, check=False
        )
        assert done.returncode == 0
        assert supervisor.types == COMMON


@pytest.mark.linux_backend(may_skip="mounting a small tmpfs is for root")
def test_a_disk_that_fills_up_leaves_whole_events_only(supervisor: Supervisor) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small tmpfs is for root")
    small = supervisor.place / "small"
    small.mkdir()
    supervisor.spec.write_text(document("sh", "-c", "echo ran", correlation={"labels": {"filler": "x" * 1500}}))
    line = supervisor.commands.line("cellos-supervisor")
    script = 'mount -t tmpfs -o size=4k none "$1" && shift && "$@"; code=$?; cp small/events.jsonl copy.jsonl; exit $code'
    environment = supervisor.commands.environment | {"CELL_OS_JSONL_EVENTS": str(small / "events.jsonl"), "CELLOS_CELL_BACKEND": "stub"}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(small), *line, str(supervisor.spec)],
        cwd=supervisor.place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"Error: event sink: sink full: {small}/events.jsonl (No space left on device (os error 28))" in done.stderr
    written = (supervisor.place / "copy.jsonl").read_bytes()
    assert written.endswith(b"\n")
    assert 0 < written.count(b"\n") < 4
    assert all(json.loads(line) for line in written.splitlines())


def test_importing_the_package_costs_next_to_nothing() -> None:
    code = "import sys; before = set(sys.modules); import cellos; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "['cellos']\n"
