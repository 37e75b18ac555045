"""A supervisor and a real server: what is in the stream in the end, and what the user is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.testing.nats_server import NatsServer

BARE = {"CELLOS_CELL_BACKEND": "stub", "CELLOS_DEPLOYMENT_PROFILE": "portable"}


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., str]:
    """The path of a document that runs a command."""

    def write(*argv: str) -> str:
        document = {
            "apiVersion": "cellos.io/v1",
            "kind": "ExecutionCell",
            "spec": {
                "id": "job",
                "authority": {"secretRefs": []},
                "correlation": {"tenantId": "acme"},
                "lifetime": {"ttlSeconds": 60},
                "run": {"argv": list(argv), "secretDelivery": "env"},
            },
        }
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(document))
        return str(path)

    return write


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def test_the_stream_has_the_bytes_of_the_jsonl_file_in_their_order(
    commands: Any, server: NatsServer, stream: Any, spec: Any, jsonl: Path, tmp_path: Path
) -> None:
    variables = BARE | {"NATS_URL": server.url, "CELL_OS_JSONL_EVENTS": str(jsonl), "CELL_OS_REQUIRE_JETSTREAM": "1"}
    variables["CELLOS_EVENTS_SUBJECT_TEMPLATE"] = "cellos.events.{tenantId}.{spec_id}.{run_id}"
    variables["CELLOS_RUN_ID"] = "run.7"
    done = commands.run("cellos-supervisor", spec("true"), variables=variables)
    assert done.returncode == 0, done.stderr
    stored = stream.messages()
    assert [message.data for message in stored] == lines(jsonl)
    assert [message.id for message in stored] == [json.loads(line)["id"] for line in lines(jsonl)]
    assert {message.subject for message in stored} == {"cellos.events.acme.job.run%2E7"}
    assert os.listdir(commands.state / "spool") == []
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(b"".join(message.data + b"\n" for message in stored))
    assert commands.run("cellos", "events", str(copy)).returncode == 0


def test_a_server_that_is_down_changes_no_exit_code_and_a_replay_sends_it_all(
    commands: Any, server: NatsServer, stream: Any, spec: Any, jsonl: Path
) -> None:
    server.stop()
    variables = BARE | {"NATS_URL": server.url.replace("//", "//user:s3cret@"), "CELL_OS_JSONL_EVENTS": str(jsonl)}
    done = commands.run("cellos-supervisor", spec("sh", "-c", "exit 3"), variables=variables)
    assert done.returncode == 1
    [name] = os.listdir(commands.state / "spool")
    count = len(lines(jsonl))
    assert f"{count} events were not acknowledged by NATS" in done.stderr
    assert f"{commands.state}/spool/{name}" in done.stderr
    assert "cellos spool replay" in done.stderr
    assert "s3cret" not in done.stderr + jsonl.read_text()
    assert lines(commands.state / "spool" / name) == lines(jsonl)
    server.start()
    again = commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url})
    assert (again.returncode, again.stdout) == (0, f"{count} events acknowledged by {server.url}\n")
    assert [message.data for message in stream.messages()] == lines(jsonl)
    assert os.listdir(commands.state / "spool") == []


@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_cellos_run_says_what_was_not_published_and_its_record_can_be_sent(
    json_: list[str], commands: Any, server: NatsServer, stream: Any
) -> None:
    server.stop()
    done = commands.run(
        "cellos", "run", *json_, "--", "sh", "-c", "exit 3", variables={"NATS_URL": server.url.replace("//", "//user:s3cret@")}
    )
    assert done.returncode == 3
    [name] = os.listdir(commands.state / "evidence")
    record = commands.state / "evidence" / name
    count = len(lines(record))
    assert f"\ncellos: {count} events were not acknowledged by NATS (" in f"\n{done.stderr}"
    assert done.stderr.endswith(f" and wait in {record}; send them with: cellos spool replay {record}\n")
    assert "s3cret" not in done.stderr
    server.start()
    again = commands.run("cellos", "spool", "replay", str(record), variables={"NATS_URL": server.url})
    assert (again.returncode, again.stdout) == (0, f"{count} events acknowledged by {server.url}\n")
    assert [message.data for message in stream.messages()] == lines(record)


def test_a_run_that_needs_nats_does_not_begin_without_it(commands: Any, server: NatsServer, spec: Any, tmp_path: Path) -> None:
    server.stop()
    variables = BARE | {"NATS_URL": server.url.replace("//", "//user:s3cret@"), "CELL_OS_REQUIRE_JETSTREAM": "1"}
    done = commands.run("cellos-supervisor", spec("touch", str(tmp_path / "ran")), variables=variables)
    assert done.returncode == 1
    assert "CELL_OS_REQUIRE_JETSTREAM is set but JetStream connect failed (broker nats://" in done.stderr
    assert f"nats connect: {server.url}: Connection refused (os error 111)" in done.stderr
    assert "s3cret" not in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("required", "code"), [("1", 1), (None, 0)])
def test_a_missing_stream_is_told_with_its_command(commands: Any, server: NatsServer, spec: Any, required: str | None, code: int) -> None:
    variables = BARE | {"NATS_URL": server.url} | ({"CELL_OS_REQUIRE_JETSTREAM": required} if required else {})
    done = commands.run("cellos-supervisor", spec("true"), variables=variables)
    assert done.returncode == code, done.stderr
    assert "nats stream add CELLOS_EVENTS --subjects 'cellos.events.>'" in done.stderr
    assert len(os.listdir(commands.state / "spool")) == 1

    run = commands.run("cellos", "run", "--json", "--", "true", variables=variables)
    report = json.loads(run.stdout)
    assert run.returncode == report["code"] == (125 if required else 0)
    assert report["unacknowledged"] == len(lines(Path(report["events"])))
    assert ("CELL_OS_REQUIRE_JETSTREAM is set and" in (report["reason"] or "")) == bool(required)


def test_what_nats_does_not_take_becomes_dead_letters(
    commands: Any, server: NatsServer, full: Any, spec: Any, jsonl: Path, tmp_path: Path
) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    variables = BARE | {"NATS_URL": server.url, "CELL_OS_JSONL_EVENTS": str(jsonl), "CELLOS_DLQ_DIR": str(letters)}
    done = commands.run("cellos-supervisor", spec("true"), variables=variables)
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(letters)) == len(lines(jsonl)) - 2
    assert os.listdir(commands.state / "spool") == []
    full.update_stream(max_msgs=1000)
    assert commands.run("cellos", "spool", "replay", str(letters), variables={"NATS_URL": server.url}).returncode == 0
    assert [message.data for message in full.messages()] == lines(jsonl)
    assert os.listdir(letters) == []


class Held:
    """A supervisor whose command waits until it is let go."""

    def __init__(self, commands: Any, spec: Any, tmp_path: Path, variables: dict[str, str]) -> None:
        self.begun, self.go = tmp_path / "begun", tmp_path / "go"
        os.mkfifo(self.begun)
        os.mkfifo(self.go)
        script = f"echo > {self.begun}; read line < {self.go}"
        self.process: subprocess.Popen[str] = commands.start("cellos-supervisor", spec("sh", "-c", script), variables=variables)
        self.begun.read_text()

    def until_spawned(self, jsonl: Path) -> None:
        """Until the last event is there that comes before the end of the command."""
        deadline = time.monotonic() + 60
        while b"process_spawned" not in jsonl.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def let_go(self) -> None:
        self.go.write_text("\n")


def test_a_server_that_is_killed_during_the_run_and_comes_back(
    commands: Any, server: NatsServer, stream: Any, spec: Any, jsonl: Path, tmp_path: Path, ends: Any
) -> None:
    variables = BARE | {"NATS_URL": server.url, "CELL_OS_JSONL_EVENTS": str(jsonl), "CELL_OS_REQUIRE_JETSTREAM": "1"}
    held = Held(commands, spec, tmp_path, variables)
    ends(held.process)
    server.kill()
    server.start()
    held.let_go()
    _, stderr = held.process.communicate(timeout=60)
    assert held.process.returncode == 0, stderr
    assert [message.data for message in stream.messages()] == lines(jsonl)


def test_only_what_was_not_acknowledged_waits(
    commands: Any, server: NatsServer, stream: Any, spec: Any, jsonl: Path, tmp_path: Path, ends: Any
) -> None:
    """However long after the stream's window for duplicates it is sent, it is there once."""
    held = Held(commands, spec, tmp_path, BARE | {"NATS_URL": server.url, "CELL_OS_JSONL_EVENTS": str(jsonl)})
    ends(held.process)
    held.until_spawned(jsonl)
    stream.wait_for(len(lines(jsonl)))
    server.kill()
    held.let_go()
    _, stderr = held.process.communicate(timeout=60)
    assert held.process.returncode == 0
    [spool] = (commands.state / "spool").iterdir()
    server.start()
    before = [message.data for message in stream.messages()]
    assert before
    assert [*before, *lines(spool)] == lines(jsonl)
    assert f"{len(lines(spool))} events were not acknowledged by NATS" in stderr
    assert commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url}).returncode == 0
    assert [message.data for message in stream.messages()] == lines(jsonl)


def test_a_supervisor_that_is_killed_leaves_events_that_a_replay_completes(
    commands: Any, server: NatsServer, stream: Any, spec: Any, jsonl: Path, tmp_path: Path, ends: Any
) -> None:
    variables = BARE | {"NATS_URL": server.url, "CELL_OS_JSONL_EVENTS": str(jsonl)}
    held = Held(commands, spec, tmp_path, variables)
    ends(held.process)
    held.process.send_signal(signal.SIGKILL)
    held.process.wait()
    held.let_go()  # the stub holds nothing: its command lives on
    waiting = commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url})
    assert "its run is not over" in waiting.stderr
    sweep = commands.run("cellos-supervisor", spec("true"), variables=BARE | {"CELL_OS_USE_NOOP_SINK": "1"})
    assert sweep.returncode == 0, sweep.stderr
    assert commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url}).returncode == 0
    stored = [message.data for message in stream.messages()]
    assert stored == lines(jsonl)
    assert json.loads(stored[-1])["data"]["reason"] == "supervisor_lost"
    assert len({json.loads(line)["id"] for line in stored}) == len(stored)
    assert os.listdir(commands.state / "spool") == []


def test_a_full_spool_takes_no_new_run(commands: Any, server: NatsServer, spec: Any, tmp_path: Path) -> None:
    spool = commands.state / "spool"
    spool.mkdir(mode=0o700, parents=True)
    with open(spool / f"{'0' * 16}.jsonl", "wb") as file:
        file.truncate(256 << 20)
    done = commands.run("cellos-supervisor", spec("touch", str(tmp_path / "ran")), variables=BARE | {"NATS_URL": server.url})
    assert done.returncode == 1
    assert "spool full: " in done.stderr
    assert "cellos spool replay" in done.stderr
    assert not (tmp_path / "ran").exists()
