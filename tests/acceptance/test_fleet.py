"""`cellos-fleet` and `cellos fleet` as people use them: a bucket, two agents, a queue of all sorts."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.testing.daemon_process import hears

SECONDS = 120.0
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'cellos-fleet'; from cellos.fleet.main import main; main()"]
Start = Callable[..., "subprocess.Popen[str]"]


def document(id: str, *argv: str, **spec: Any) -> dict[str, Any]:
    run = {"argv": list(argv), **spec.pop("run", {})}
    body = {"id": id, "authority": {}, "lifetime": {"ttlSeconds": 600}, "run": run, **spec}
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for {what}"
        time.sleep(0.05)
    return answer


class Queue:
    """A directory as a bucket, and the commands on it."""

    def __init__(self, commands: Any, place: Path, ends: Any) -> None:
        self.commands = commands
        self.place = place
        self.fleet = place / "bucket/fleet"
        self.variables = {"CELLOS_FLEET_BUCKET": f"file://{place}/bucket"}
        self._ends = ends
        supervisor = place / "supervisor"
        line = commands.line("cellos-supervisor")
        found = [each for each in commands.environment.get("PYTHONPATH", "").split(os.pathsep) if each]
        supervisor.write_text(f"#!{line[0]}\nimport sys; sys.path[:0] = {found}\n{line[2]}\n")
        supervisor.chmod(0o755)

    def agent(self, node: str, **variables: str) -> subprocess.Popen[str]:
        ours = {
            "CELLOS_FLEET_NODE_ID": node,
            "CELLOS_FLEET_SUPERVISOR": str(self.place / "supervisor"),
            "CELLOS_FLEET_POLL_INTERVAL_MS": "200",
            "CELLOS_FLEET_LEASE_MS": "14000",
            "CELLOS_FLEET_SLOTS": "1",
            "RUST_LOG": "info",
        }
        with (self.place / f"{node}.out").open("w") as out, (self.place / f"{node}.err").open("w") as err:
            environment = self.commands.environment | self.variables | ours | variables
            process = subprocess.Popen(COMMAND, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self._ends(process)
        return process

    def log(self, node: str) -> list[dict[str, Any]]:
        """Its records; every line has to be one, but for the last, which it may be writing."""
        return [json.loads(line)["fields"] for line in (self.place / f"{node}.out").read_text().split("\n")[:-1]]

    def messages(self, node: str) -> list[str]:
        return [each["message"] for each in self.log(node)]

    def written(self, *documents: dict[str, Any]) -> list[str]:
        paths = []
        for each in documents:
            path = self.place / f"{each['spec']['id']}.json"
            path.write_text(json.dumps(each))
            paths.append(str(path))
        return paths

    def submit(self, *documents: dict[str, Any]) -> None:
        done = self("submit", *self.written(*documents))
        assert (done.returncode, done.stderr) == (0, "")

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self.commands.run("cellos", "fleet", *arguments, variables=self.variables, **options)
        return done

    def names(self, part: str) -> list[str]:
        place = self.fleet / part
        return sorted(path.name for path in place.iterdir()) if place.exists() else []

    def receipt(self, id: str, attempt: int = 1) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.fleet / f"receipts/{id}/{attempt}.json").read_text())
        return found


@pytest.fixture
def queue(commands: Any, tmp_path: Path, ends: Any) -> Queue:
    return Queue(commands, tmp_path, ends)


@pytest.mark.linux_backend
def test_two_agents_drain_a_mixed_queue_although_one_is_killed(queue: Queue, tmp_path: Path, doctor: Any) -> None:
    good = [document(f"good-{number}", "/bin/sh", "-c", "echo out; echo err >&2") for number in range(4)]
    limits = {"limits": {"memoryMaxBytes": 1 << 26}} if doctor.rows["limit memory"]["ok"] else {}
    limited = document("limited", "/bin/true", run=limits)
    failing = document("failing", "/bin/sh", "-c", "exit 3")
    for_others = document("for-others", "/bin/true", placement={"poolId": "gpu"})
    too_big = document("too-big", "/bin/true", run={"limits": {"memoryMaxBytes": 1 << 50}})
    long = document("long", "/bin/sleep", "600")
    queue.submit(long)
    doomed = queue.agent("doomed")
    wait_for(lambda: "running cell" in queue.messages("doomed"), "the cell that will be lost")
    queue.submit(*good, limited, failing, for_others, too_big)
    pending = queue.fleet / "pending"
    (pending / "malformed.json").write_bytes(b'{"apiVersion": \xff')
    (pending / "huge.json").write_bytes(b" " * (1 << 20) + b"{}")
    (tmp_path / "secret").write_text("password")
    (pending / "link.json").symlink_to(tmp_path / "secret")
    (pending / "no id.json").write_text("{}")
    heir = queue.agent("heir", CELLOS_FLEET_POOL_ID="cpu")
    wait_for(lambda: "spec completed successfully" in queue.messages("heir"), "work of the other agent")
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    for path in (queue.fleet / "claimed/long.json", *(queue.fleet / "leases/long").iterdir()):
        os.utime(path, (0, 0))  # its lease has ended
    again = queue.agent("again", CELLOS_FLEET_POOL_ID="cpu")
    ids = [*(each["spec"]["id"] for each in good), "limited", "failing", "long", "malformed", "huge", "link"]
    done = queue("wait", "--timeout", f"{SECONDS:.0f}s", *ids)
    assert (done.returncode, done.stderr) == (1, "")
    assert set(done.stdout.split("\n")) == {
        *(f"spec/{each['spec']['id']} completed" for each in (*good, limited)),
        "spec/failing failed: command exited with status 3",
        "spec/long failed: agent_lost",
        *(f"spec/{name} failed: invalid_spec" for name in ("malformed", "huge", "link")),
        "",
    }
    wait_for(lambda: not queue.names("claimed"), "that all is cleared away")
    for agent in (heir, again):
        wait_for(lambda agent=agent: hears(agent.pid, signal.SIGTERM), "its start")
        agent.send_signal(signal.SIGTERM)
    assert [agent.wait(SECONDS) for agent in (heir, again)] == [0, 0]
    # What lies where.
    assert queue.names("pending") == ["for-others.json", "no id.json", "too-big.json"]
    assert queue.names("completed") == sorted(f"{each['spec']['id']}.json" for each in (*good, limited))
    assert queue.names("failed") == ["failing.json", "huge.json", "link.json", "long.json", "malformed.json"]
    for each in (*good, limited, failing, long):
        part = "failed" if each in (failing, long) else "completed"
        assert (queue.fleet / part / f"{each['spec']['id']}.json").read_bytes() == json.dumps(each).encode()
    assert (queue.fleet / "failed/malformed.json").read_bytes() == b'{"apiVersion": \xff'
    assert (queue.fleet / "failed/huge.json").stat().st_size == (1 << 20) + 2
    assert (queue.fleet / "failed/link.json").read_bytes() == b""
    assert (tmp_path / "secret").read_text() == "password"
    # And why.
    assert queue.receipt("long") | {"reason": "agent_lost", "outcome": "failed"} == queue.receipt("long")
    assert queue.receipt("failing") | {"reason": "command exited with status 3", "exitCode": 1} == queue.receipt("failing")
    for name, detail in (("malformed", "is not UTF-8"), ("huge", "at most 1048576 are read"), ("link", "not a regular file")):
        assert queue.receipt(name)["reason"] == "invalid_spec"
        assert detail in queue.receipt(name)["detail"]
        assert "exitCode" not in queue.receipt(name)
    receipt = queue.receipt("good-0")
    evidence = queue.commands.state / f"evidence/{receipt['runId']}.jsonl"

    assert receipt["events"] == {
        "count": len(evidence.read_bytes().splitlines()),
        "sha256": hashlib.sha256(evidence.read_bytes()).hexdigest(),
    }
    # What cells write is not mixed into the log.
    assert (queue.place / "heir.err").read_text().count("out\n") >= 1
    messages = queue.messages("heir")
    assert messages[0] == "cellos-fleet agent starting"
    assert messages[-2:] == ["SIGTERM received — draining (no new work accepted)", "cellos-fleet agent stopped (drain complete)"]
    skipped = [each for each in messages if each.startswith("skipping spec")]
    assert sorted(skipped) == sorted(set(skipped))
    assert "skipping spec for-others: placement.poolId=gpu != runner poolId=cpu" in skipped


@pytest.mark.linux_backend
def test_a_drain_lets_its_cell_end_and_what_failed_can_be_tried_again(queue: Queue, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.mkdir()
    spec = document(
        "again",
        "/bin/sh",
        "-c",
        "until test -e /flag/end; do sleep 0.1; done; test -e /flag/it",
        run={},
        authority={"filesystem": {"mounts": [{"source": str(flag), "target": "/flag"}]}},
    )
    queue.submit(spec)
    first = queue.agent("first", CELLOS_FLEET_HEARTBEAT_INTERVAL_MS="100")

    def heartbeats() -> list[dict[str, Any]]:
        return [each for each in queue.log("first") if each["message"] == "heartbeat"]

    wait_for(lambda: heartbeats()[-1:] and heartbeats()[-1]["running"] == 1, "a heartbeat while the cell runs")
    queue.submit(document("later", "/bin/true"))
    first.send_signal(signal.SIGTERM)
    wait_for(lambda: heartbeats()[-1:] and heartbeats()[-1]["draining"], "a heartbeat while it drains")
    [agent] = json.loads(queue("ls").stdout)["agents"]
    assert (agent["node"], agent["state"], agent["runs"]) == ("first", "draining", 1)
    (flag / "end").touch()
    assert first.wait(SECONDS) == 0
    assert any(each["running"] == 1 and not each["draining"] for each in heartbeats())
    assert any(each["running"] == 1 and each["draining"] for each in heartbeats())
    assert heartbeats()[0]["event_type"] == "dev.cellos.events.fleet.v1.heartbeat"
    assert (queue.names("failed"), queue.names("pending")) == (["again.json"], ["later.json"])
    listed = json.loads(queue("ls", "--json").stdout)
    assert [(each["id"], each["state"]) for each in listed["specs"]] == [("again", "failed"), ("later", "pending")]
    assert listed["agents"] == []

    refused = queue("submit", *queue.written(spec))
    assert refused.returncode == 1
    assert "cellos fleet retry again" in refused.stderr
    (flag / "it").touch()
    assert queue("retry", "again").stdout == "spec/again waits for attempt 2\n"
    assert (queue.names("failed"), queue.names("pending")) == ([], ["again.json", "later.json"])
    second = queue.agent("second")
    done = queue("wait", "spec/again", "later", "--timeout", f"{SECONDS:.0f}s")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["spec/again completed", "spec/later completed"])
    story = json.loads(queue("show", "again", "--json").stdout)
    assert [(each["attempt"], each["outcome"], each["node"]) for each in story["receipts"]] == [
        (1, "failed", "first"),
        (2, "completed", "second"),
    ]
    assert story["state"] == "completed"
    again = queue("retry", "again", "later", "never")
    assert (again.returncode, again.stdout) == (1, "")
    assert re.findall("cellos: (again is completed|later is completed|never has not been run)", again.stderr) == [
        "again is completed",
        "later is completed",
        "never has not been run",
    ]
    second.send_signal(signal.SIGTERM)
    assert second.wait(SECONDS) == 0


def test_the_environment_of_a_cell_opens_no_bucket(queue: Queue) -> None:
    """The supervisor is one that writes down what it is given: the real one does not."""
    seen = queue.place / "seen"
    (queue.place / "supervisor").write_text(
        f'#!/bin/sh\necho "$@" > {seen}\ncat >> {seen}\nenv > {seen}.env\nls -l /proc/self/fd > {seen}.fd\n'
    )
    given = {
        "AWS_SECRET_ACCESS_KEY": "s3cr3t", "GOOGLE_APPLICATION_CREDENTIALS": "/x", "SSH_AUTH_SOCK": "/y", "TZ": "UTC", "LANG": "C.UTF-8",
        "NATS_CA_FILE": "/ca.pem", "CELLOS_EXPORT_DIR": "/out", "CELL_OS_USE_NOOP_SINK": "1", "CELLOS_RUN_ID": "not-mine",
        "CELLOS_CELL_BACKEND": "stub",
    }  # fmt: skip
    spec = document("one", "/bin/true")
    queue.submit(spec)
    agent = queue.agent("n1", **given)
    assert queue("wait", "one", "--timeout", f"{SECONDS:.0f}s").returncode == 0
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(SECONDS) == 0
    assert seen.read_text() == "-\n" + json.dumps(spec)
    variables = dict(line.split("=", 1) for line in Path(f"{seen}.env").read_text().splitlines() if "=" in line)
    allowed = {"PATH", "HOME", "LANG", "TZ", "NATS_URL", "NATS_CA_FILE", "RUST_LOG", "PWD", "SHLVL", "_", "OLDPWD"}
    assert not [name for name in variables if name not in allowed and not name.startswith(("CELLOS_", "CELL_OS_"))]
    assert not [name for name in variables if name.startswith("CELLOS_FLEET_")]
    assert variables["CELLOS_RUN_ID"] == queue.receipt("one")["runId"] != "not-mine"
    assert (variables["CELLOS_EXPORT_DIR"], variables["NATS_CA_FILE"], variables["TZ"]) == ("/out", "/ca.pem", "UTC")
    assert "bucket" not in Path(f"{seen}.fd").read_text()


def test_a_cell_that_cannot_be_made_is_told_with_its_error(queue: Queue) -> None:
    """The agent's own look was before that: its supervisor finds other settings."""
    variables = {"CELLOS_CELL_BACKEND": "stub", "CELLOS_POLICY_PACK_PATH": str(queue.place / "away")}
    program = queue.place / "supervisor"
    program.write_text(program.read_text().replace("import sys;", f"import sys, os; os.environ.update({variables});", 1))
    queue.submit(document("one", "/bin/true"))
    agent = queue.agent("n1", CELLOS_CELL_BACKEND="stub")
    done = queue("wait", "one", "--timeout", f"{SECONDS:.0f}s")
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(SECONDS) == 0
    receipt = queue.receipt("one")
    assert (receipt["reason"], receipt["exitCode"]) == ("cannot_start", 1)
    assert str(queue.place / "away") in receipt["detail"]
    assert (done.returncode, done.stdout) == (1, f"spec/one failed: cannot_start: {receipt['detail']}\n")
    assert json.loads(queue("show", "one").stdout)["receipts"][0]["detail"] == receipt["detail"]


# ---------------------------------------------------------------- the command line


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CELLOS_FLEET_") and name != "CELLOS_GIT_SHA"}
    return subprocess.run(
        [*COMMAND, *arguments],
        env=kept | (environment or {}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_the_version_is_told_before_anything_is_read() -> None:
    told = run("--version")
    assert re.fullmatch(r"cellos-fleet 0\.[0-9]+\.[0-9]+ \(unknown\)\n", told.stdout)
    assert (told.returncode, told.stderr) == (0, "")
    assert run("-V", environment={"CELLOS_GIT_SHA": "0123456789abcdef"}).stdout.endswith(" (0123456)\n")


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_is_help(argument: str) -> None:
    told = run(argument)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("Usage: cellos-fleet")
    assert "status" not in told.stdout.lower()


@pytest.mark.parametrize("arguments", [[], ["status"], ["frobnicate"], ["--bucket=foo"]])
def test_without_a_bucket_nothing_goes(arguments: list[str]) -> None:
    told = run(*arguments)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith("Error: failed to read configuration: CELLOS_FLEET_BUCKET is required: environment variable not found")
    assert "status" not in told.stderr.lower()
    assert "Traceback" not in told.stderr


def test_a_queue_has_to_be_named(commands: Any) -> None:
    told = commands.run("cellos", "fleet", "ls")
    assert (told.returncode, told.stdout) == (1, "")
    assert "set CELLOS_FLEET_BUCKET, or give --bucket" in told.stderr


def test_people_at_a_terminal_are_told_what_to_do_next(queue: Queue) -> None:
    def on_a_terminal(*arguments: str) -> str:
        ours, theirs = pty.openpty()
        environment = queue.commands.environment | queue.variables
        process = subprocess.Popen([*queue.commands.line("cellos"), "fleet", *arguments], env=environment, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        try:
            while more := os.read(ours, 65536):
                shown += more
        except OSError:  # nobody has the other end any more
            pass
        os.close(ours)
        process.wait(SECONDS)
        return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")

    assert on_a_terminal("ls") == f"cellos: no such directory: {queue.place}/bucket; cellos-fleet and cellos fleet submit make it\n"
    (queue.place / "bucket").mkdir()
    alone = "no agent of this queue is there: start one with cellos-fleet\n"
    assert on_a_terminal("ls") == f"no specs here: hand one in with cellos fleet submit FILE\n{alone}"
    [path] = queue.written(document("one", "/bin/true", placement={"poolId": "gpu"}))
    assert on_a_terminal("submit", path) == f"spec/one submitted\n{alone}"
    assert re.fullmatch(rf"SPEC +STATE +SINCE +NODE\none +PENDING +\S+ +-\n\n{alone}", on_a_terminal("ls"))
    assert re.fullmatch(r"one: PENDING since \S+, for an agent of pool gpu\n", on_a_terminal("show", "one"))
    assert on_a_terminal("show", "two") == "cellos: there is no spec two in fleet (all of them: cellos fleet ls)\n"
    told = f"{alone}not ended: one (how one stands: cellos fleet show one)\n"
    assert on_a_terminal("wait", "one", "--timeout", "1ms") == told
    # Nothing of that in a pipe.
    piped = queue("ls")
    assert (json.loads(piped.stdout)["agents"], piped.stderr) == ([], "")


def test_reading_makes_no_directory(queue: Queue) -> None:
    for arguments in (["ls"], ["show", "a"], ["retry", "a"], ["wait", "a"]):
        told = queue(*arguments)
        assert (told.returncode, told.stdout) == (1, "")
        assert f"no such directory: {queue.place}/bucket" in told.stderr
    assert not (queue.place / "bucket").exists()


def test_what_no_agent_can_take_is_told(queue: Queue) -> None:
    (queue.fleet / "pending").mkdir(parents=True)
    os.mkfifo(queue.fleet / "pending/pipe.json")
    (queue.fleet / "claimed").mkdir()
    (queue.fleet / "claimed/bad.json").touch()
    story = json.loads(queue("show", "pipe").stdout)
    assert (story["state"], story["fault"]) == ("pending", "not a regular file")
    [row] = json.loads(queue("ls").stdout)["specs"]
    assert (row["id"], row["state"]) == ("bad", "claimed")
    assert "fleet/claimed/bad.json is no claim of ours" in row["damaged"]
    told = queue("show", "bad")
    assert (told.returncode, "remove this object" in told.stderr) == (1, True)


def test_one_document_that_is_refused_does_not_keep_the_others_out(queue: Queue) -> None:
    good, other = queue.written(document("good", "/bin/true"), document("other", "/bin/true"))
    bad = queue.place / "bad.json"
    bad.write_text("{}")
    told = queue("submit", good, str(bad), str(queue.place / "none.json"), other)
    assert (told.returncode, told.stdout) == (1, "spec/good submitted\nspec/other submitted\n")
    assert [line.split(": ")[0] for line in told.stderr.splitlines()] == ["cellos", "cellos"]
    assert (str(bad) in told.stderr, "cannot read" in told.stderr) == (True, True)
    assert queue.names("pending") == ["good.json", "other.json"]


def test_an_argument_is_refused_where_there_is_a_bucket(tmp_path: Path) -> None:
    told = run("status", environment={"CELLOS_FLEET_BUCKET": f"file://{tmp_path}/bucket"})
    assert (told.returncode, told.stderr) == (1, "Error: cellos-fleet takes no argument status (see: cellos-fleet --help)\n")


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CELLOS_FLEET_SUPERVISOR": "no-such-program"}, "CELLOS_FLEET_SUPERVISOR=no-such-program: no such program"),
        ({"CELLOS_FLEET_BUCKET": "ftp://bucket"}, "no store of this kind"),
        ({"CELLOS_CELL_BACKEND": "none"}, "CELLOS_CELL_BACKEND"),
        ({"CELL_OS_REQUIRE_JETSTREAM": "1", "NATS_URL": "nats://127.0.0.1:1"}, "JetStream connect failed"),
        ({"CELLOS_POLICY_PACK_PATH": "/missing"}, "/missing"),
        ({"CELLOS_EVENT_SIGNING": "bogus"}, "CELLOS_EVENT_SIGNING"),
        ({"CELL_OS_JSONL_EVENTS": "/nodir/x"}, "/nodir/x"),
        ({"CELLOS_TEST_FORCE_MISSING_ISOLATION_PRIMITIVES": "all"}, "host is missing isolation primitives"),
        ({"CELLOS_BROKER": "vault-approle"}, "CELLOS_VAULT_ADDR"),
    ],
)
def test_what_would_fail_every_cell_is_told_at_the_start(variables: dict[str, str], why: str, tmp_path: Path) -> None:
    given = {
        "CELLOS_FLEET_BUCKET": f"file://{tmp_path}/bucket",
        "CELLOS_FLEET_SUPERVISOR": "/bin/true",
        "CELLOS_STATE_DIR": str(tmp_path / "state"),
        "CELLOS_CELL_BACKEND": "stub",
    }
    told = run(environment=given | variables)
    assert told.returncode == 1
    assert why in json.loads(told.stdout.splitlines()[-1])["fields"]["error"]
