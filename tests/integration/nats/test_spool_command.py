"""`cellos spool` as a user types it, against a real server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cellos.core.events import Event, canonical_bytes
from cellos.eventlog.dead_letters import DeadLetters
from cellos.testing.nats_server import NatsServer

KEY = "0123456789abcdef"


def event(run_id: str, sequence: int, **data: Any) -> tuple[str, bytes]:
    members = {"specId": "build", "runId": run_id, "chain": {"seq": sequence, "prev": "00"}, **data}
    event_id = f"{run_id}-{sequence}"
    return event_id, canonical_bytes(Event(id=event_id, source="cellos-supervisor", type="t", data=members))


@pytest.fixture
def spool(commands: Any) -> Path:
    """The spool directory of the commands' state, made as a supervisor makes it. To look into it makes nothing."""
    assert commands.run("cellos", "spool", "ls").stdout == "nothing waits\n"
    path = Path(commands.state) / "spool"
    assert not path.exists()
    path.mkdir(mode=0o700, parents=True)
    return path


def fill(path: Path, *events: tuple[str, bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for _, line in events))
    return path


def test_what_waits_is_sent_unchanged_and_removed(commands: Any, spool: Path, server: NatsServer, stream: Any, tmp_path: Path) -> None:
    first = [event("run-a", number) for number in range(12)]
    second = [event("run-b", number) for number in range(12)]
    fill(spool / f"{KEY}.jsonl", *first)
    letters = DeadLetters(str(tmp_path))
    kept = [letters.store(*each, error="event sink: jetstream publish: broken") for each in reversed(second)]
    done = commands.run("cellos", "spool", "replay", str(spool), *kept, variables={"NATS_URL": server.url})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"24 events acknowledged by {server.url}\n"
    stored = stream.messages()
    for run in (first, second):
        assert [(message.id, message.data) for message in stored if message.id.startswith(run[0][0][:5])] == run
    assert os.listdir(spool) == []
    assert not any(os.path.exists(path) for path in kept)


def test_a_replay_that_is_repeated_adds_nothing(commands: Any, spool: Path, server: NatsServer, stream: Any, tmp_path: Path) -> None:
    audit = fill(tmp_path / "audit.jsonl", *(event("run", number) for number in range(3)))
    before = audit.read_bytes()
    for again in ("", " (3 of them it had already)"):
        done = commands.run("cellos", "spool", "replay", str(audit), "--nats-url", server.url)
        assert (done.returncode, done.stdout) == (0, f"3 events acknowledged by {server.url}{again}\n")
    assert stream.ids() == ["run-0", "run-1", "run-2"]
    assert audit.read_bytes() == before


def test_what_cannot_be_sent_stays_and_is_told(commands: Any, spool: Path, server: NatsServer, full: Any) -> None:
    events = [event("run", number) for number in range(5)]
    path = fill(spool / f"{KEY}.jsonl", *events)
    done = commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url})
    assert done.returncode == 1
    assert done.stdout == f"2 events acknowledged by {server.url}; 3 still wait\n"
    assert done.stderr.startswith(f"{path}: stream CELLOS_EVENTS is full: maximum messages exceeded")
    assert path.read_bytes() == b"".join(line + b"\n" for _, line in events[2:])
    full.update_stream(max_msgs=100)
    assert commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url}).returncode == 0
    assert full.ids() == [event_id for event_id, _ in events]
    assert not path.exists()


def test_a_server_that_is_down(commands: Any, spool: Path, server: NatsServer) -> None:
    server.stop()
    path = fill(spool / f"{KEY}.jsonl", event("run", 0))
    url = server.url.replace("//", "//user:s3cret@")
    done = commands.run("cellos", "spool", "replay", "--json", variables={"NATS_URL": url})
    assert done.returncode == 1
    assert "s3cret" not in done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["acknowledged"], report["waiting"], report["server"]) == (0, 1, server.url)
    assert report["error"] == f"nats connect: {server.url}: Connection refused (os error 111)"
    assert report["files"] == [
        {
            "file": str(path),
            "kind": "spool",
            "runs": ["run"],
            "events": 1,
            "acknowledged": 0,
            "removed": False,
            "reason": report["error"],
        }
    ]
    assert path.exists()


def test_a_missing_stream_is_told_with_the_command_that_makes_it(commands: Any, spool: Path, server: NatsServer) -> None:
    fill(spool / f"{KEY}.jsonl", event("run", 0))
    done = commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url})
    assert done.returncode == 1
    assert "nats stream add CELLOS_EVENTS --subjects 'cellos.events.>'" in done.stderr


def test_a_run_that_is_not_over_keeps_its_spool(commands: Any, spool: Path, server: NatsServer, stream: Any) -> None:
    path = fill(spool / f"{KEY}.jsonl", event("run", 0))
    (spool.parent / "runs").mkdir()
    record = spool.parent / "runs" / f"{KEY}.json"
    record.touch()
    done = commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url})
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing else waits\n", f"{path}: its run is not over\n")
    assert stream.messages() == []
    assert "its run is not over" in commands.run("cellos", "spool", "ls").stdout
    record.unlink()
    assert commands.run("cellos", "spool", "replay", variables={"NATS_URL": server.url}).returncode == 0
    assert stream.ids() == ["run-0"]


def test_subjects_are_those_of_the_run(commands: Any, spool: Path, server: NatsServer, stream: Any) -> None:
    fill(spool / f"{KEY}.jsonl", event("run.1", 0, correlation={"tenantId": "acme"}), event("run.1", 1))
    variables = {"NATS_URL": server.url, "CELLOS_EVENTS_SUBJECT_TEMPLATE": "cellos.events.{tenantId}.{spec_id}.{run_id}"}
    plan = commands.run("cellos", "spool", "replay", "--dry-run", "--json", variables=variables)
    assert json.loads(plan.stdout)["runs"] == [{"runId": "run.1", "events": 2, "subject": "cellos.events.acme.build.run%2E1"}]
    assert stream.messages() == []
    assert commands.run("cellos", "spool", "replay", variables=variables).returncode == 0
    assert {message.subject for message in stream.messages()} == {"cellos.events.acme.build.run%2E1"}
    fill(spool / f"{KEY}.jsonl", event("run-2", 0))
    assert commands.run("cellos", "spool", "replay", "--subject", "cellos.events.chosen", variables=variables).returncode == 0
    assert stream.messages()[-1].subject == "cellos.events.chosen"


def test_a_file_that_holds_no_events_is_left_alone(commands: Any, spool: Path, server: NatsServer, stream: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("{}\n")
    done = commands.run("cellos", "spool", "replay", str(path), variables={"NATS_URL": server.url})
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: line 1: ")
    assert path.exists()


def test_what_waits_is_listed(commands: Any, spool: Path) -> None:
    path = fill(spool / f"{KEY}.jsonl", event("run-a", 0), event("run-a", 1))
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    head, row = commands.run("cellos", "spool", "ls").stdout.splitlines()
    assert head.split() == ["RUN", "EVENTS", "BYTES", "AGE", "STATE", "FILE"]
    assert row.split()[:3] == ["run-a", "2", str(path.stat().st_size)]
    assert row.endswith(f"waits  {path}")
    [listed] = [json.loads(line) for line in commands.run("cellos", "spool", "ls", "--json").stdout.splitlines()]
    assert 3600 <= listed.pop("ageSeconds") < 7200
    assert listed == {"file": str(path), "kind": "spool", "runs": ["run-a"], "events": 2, "bytes": path.stat().st_size, "state": "waits"}


def test_a_wrong_url_or_place_is_an_error(commands: Any, spool: Path) -> None:
    done = commands.run("cellos", "spool", "replay", "--nats-url", "ftp://u:s3cret@h")
    assert (done.returncode, done.stderr) == (1, "cellos: NATS_URL: the scheme 'ftp' is not known; known: nats://, tls://\n")
    done = commands.run("cellos", "spool", "replay", "/nowhere")
    assert (done.returncode, done.stderr) == (1, "cellos: cannot read /nowhere: No such file or directory (os error 2)\n")
