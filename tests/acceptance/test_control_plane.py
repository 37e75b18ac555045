"""`cellos up` from nothing, what is done with it, and what becomes of it when its parts or it itself die."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.client.address import find_server
from cellos.client.server import Server
from cellos.errors import CursorExpired, ServerError, ServerProblem

SECONDS = 60
DOCUMENT = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}]}
EXAMPLES = Path(__file__).parents[2] / "examples"


def until(what: Callable[[], Any], why: str = "") -> Any:
    """What `what` gives as soon as it gives something."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    pytest.fail(f"not within {SECONDS} s: {why or what}")


class Plane:
    """A `cellos up` of its own, in the state directory of the test."""

    def __init__(self, commands: Any, ends: Callable[[Any], None]) -> None:
        self.commands = commands
        self.directory = commands.state / "up"
        self._ends = ends
        self.process: Any = None
        self.facts: dict[str, Any] = {}

    def start(self, *options: str) -> None:
        """Without a node, unless `options` say more: most of what is tested here runs no cell of its own."""
        self.launch("--bind", "127.0.0.1:0", *(options or ("--no-node",)))
        self.wait()

    def launch(self, *options: str) -> None:
        self.process = self.commands.start("cellos", "up", "--json", *options, variables={"RUST_LOG": "info"})
        self._ends(self.process)

    def wait(self) -> None:
        """Until it is up."""
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.facts = json.loads(line)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return int(self.process.wait(SECONDS))

    def call(self, *arguments: str, **how: Any) -> Any:
        """`cellos ARGUMENTS`: what it prints."""
        done = self.commands.run("cellos", *arguments, **how)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.call("get", *arguments))

    def run_cell(self, cell_id: str) -> None:
        """A cell of somebody who only knows the URL of NATS."""
        body = {"id": cell_id, "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"]}}
        path = self.commands.state / f"{cell_id}.json"
        path.write_text(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}))
        variables = {"NATS_URL": Path(self.facts["natsUrl"]).read_text().strip(), "CELLOS_CELL_BACKEND": "stub"}
        done = self.commands.run("cellos-supervisor", str(path), variables=variables | {"CELL_OS_REQUIRE_JETSTREAM": "1"})
        assert done.returncode == 0, done.stderr

    def parts(self) -> dict[int, str]:
        """Everything that runs for it: id to command line."""
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                about = line + Path(f"/proc/{name}/environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.directory) in about and line and int(name) != self.process.pid:
                found[int(name)] = line
        return found

    def kill(self, word: str) -> None:
        """A part, itself and not what holds it; and wait for the next one."""

        def others(*dead: int) -> list[int]:
            return [pid for pid, line in self.parts().items() if word in line and "lifeline" not in line and pid not in dead]

        (part,) = others()
        os.kill(part, signal.SIGKILL)
        until(lambda: others(part), f"{word} is started again")
        if word == "nats-server":
            until(self._nats_listens)

    def _nats_listens(self) -> bool:
        host, port = self.facts["nats"].removeprefix("nats://").split(":")
        try:
            socket.create_connection((host, int(port)), SECONDS).close()
        except OSError:
            return False
        return True


@pytest.fixture
def down(commands: Any, ends: Callable[[Any], None]) -> Iterator[Plane]:
    """One that is yet to be started."""
    plane = Plane(commands, ends)
    yield plane
    if plane.process is not None and plane.process.poll() is None:
        plane.stop()


@pytest.fixture
def plane(down: Plane) -> Plane:
    down.start()
    return down


class TestUp:
    def test_the_whole_way(self, plane: Plane, tmp_path: Path) -> None:
        formation = EXAMPLES / "formations" / "external.yaml"
        made = json.loads(plane.call("apply", "-f", str(formation), "--json"))
        assert made["status"] == "PENDING"
        assert [record["id"] for record in plane.get("formations")] == [made["id"]]
        assert plane.get("formation", made["name"]) == plane.get("formation", made["id"])
        again = plane.commands.run("cellos", "apply", "-f", str(formation))
        assert (again.returncode, f"already in use by {made['id']}" in again.stderr) == (1, True)
        plane.run_cell("cell-1")
        cell = until(lambda: [each for each in plane.get("cells") if each["state"] == "destroyed"])[0]
        assert (cell["id"], cell["outcome"], cell["exit_code"]) == ("cell-1", "succeeded", 0)
        assert plane.call("delete", "formation", made["name"], "--yes") == f"formation/{made['name']} deleted\n"
        assert plane.get("formation", made["id"])["status"] == "CANCELLED"
        plane.call("apply", "-f", str(formation))  # the name is free

    def test_a_key_makes_a_repetition_harmless(self, plane: Plane) -> None:
        formation = str(EXAMPLES / "formations" / "external.json")
        first, second = (json.loads(plane.call("apply", "-f", formation, "--key", "k", "--json")) for _ in range(2))
        assert first == second
        assert len(plane.get("formations")) == 1

    def test_secrets_are_for_the_user_alone(self, plane: Plane) -> None:
        for name in ("token", "nats-url", "address", "server.log"):
            assert stat.S_IMODE((plane.directory / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(plane.directory.stat().st_mode) == 0o700
        token = (plane.directory / "token").read_text().strip()
        password = re.search(":([^:@/]+)@", (plane.directory / "nats-url").read_text())
        assert password
        told = json.dumps(plane.facts) + (plane.directory / "server.log").read_text() + "".join(plane.parts().values())
        assert token not in told
        assert password[1] not in told
        assert plane.commands.run("cellos", "get", "cells", "--server", plane.facts["server"] + "0").returncode == 1

    def test_a_second_one_is_refused(self, plane: Plane) -> None:
        done = plane.commands.run("cellos", "up")
        assert done.returncode == 1
        assert f"runs already for {plane.directory}, as process {plane.process.pid}" in done.stderr

    def test_on_a_terminal(self, commands: Any, ends: Callable[[Any], None]) -> None:
        ours, theirs = pty.openpty()
        process = commands.start("cellos", "up", "--bind", "127.0.0.1:0", "--no-node", stdout=theirs)
        ends(process)
        os.close(theirs)
        shown = ""
        while "Next, in another terminal:  cellos apply -f FORMATION --wait" not in shown:
            assert select.select([ours], [], [], SECONDS)[0]
            shown += os.read(ours, 65536).decode()
        assert re.search(r"server   http://127\.0\.0\.1:\d+\r\n", shown)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        assert process.stderr.read() == ""
        os.close(ours)


class TestStart:
    def test_what_cannot_start_says_why_and_leaves_nothing(self, commands: Any, ends: Callable[[Any], None]) -> None:
        done = commands.run("cellos", "up", "--bind", "127.0.0.1:0", variables={"CELLOS_SERVER_READ_TOKEN": " "})
        assert (done.returncode, done.stdout) == (1, "")
        assert "cellos-server did not start: CELLOS_SERVER_READ_TOKEN must not be empty" in done.stderr
        plane = Plane(commands, ends)
        plane.process = subprocess.Popen(["true"])
        plane.process.wait()
        assert plane.parts() == {}

    def test_nobody_reads_what_it_says(self, commands: Any, ends: Callable[[Any], None]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        plane = Plane(commands, ends)
        plane.process = commands.start("cellos", "up", "--bind", "127.0.0.1:0", stdout=writing)
        ends(plane.process)
        os.close(writing)
        assert (plane.process.wait(SECONDS), plane.process.stderr.read(), plane.parts()) == (141, "", {})

    def test_without_it_the_next_step_is_said(self, commands: Any) -> None:
        done = commands.run("cellos", "get", "cells", variables={"CELLOS_SERVER": "http://127.0.0.1:1"})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.endswith("start one: cellos up\n")

    def test_a_control_plane_that_nobody_named(self, commands: Any) -> None:
        why = f"no `cellos up` runs for {commands.state} (CELLOS_STATE_DIR)"
        for words in (["apply", "-f", str(EXAMPLES / "formations" / "external.json")], ["delete", "formation", "x", "--yes"]):
            done = commands.run("cellos", *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"{why}; start one, or name the control plane that is meant: --server http://127.0.0.1:8080\n" in done.stderr

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (["up", "--dir", ""], "--dir takes a directory, and is empty"),
            (["events", "--formation", ""], "--formation takes the name or the id of a formation, and is empty"),
        ],
    )
    def test_an_empty_word_is_wrong_usage(self, commands: Any, words: list[str], why: str) -> None:
        done = commands.run("cellos", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert why in done.stderr


class TestEnd:
    def test_in_order_and_everything_is_there_at_the_next_start(self, plane: Plane) -> None:
        plane.call("apply", "-f", str(EXAMPLES / "formations" / "external.json"))
        plane.run_cell("cell-1")
        until(lambda: [each for each in plane.get("cells") if each["state"] == "destroyed"])
        before, token = (plane.get("cells"), plane.get("formations")), (plane.directory / "token").read_text()
        nats = plane.facts["nats"]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert plane.stop(number) == 0
            assert plane.process.stderr.read() == ""
            assert plane.parts() == {}
            assert not (plane.directory / "address").exists()
            for part in ("server", "controller"):
                assert f"cellos-{part} ended" in (plane.directory / f"{part}.log").read_text()  # that of the latest start
            plane.start()
            assert (plane.get("cells"), plane.get("formations")) == before
            assert ((plane.directory / "token").read_text(), plane.facts["nats"]) == (token, nats)

    def test_after_a_kill_the_next_one_waits_until_the_port_is_free(self, plane: Plane) -> None:
        address = plane.facts["server"].removeprefix("http://")
        holders = [pid for pid, line in plane.parts().items() if "lifeline" in line and "cellos.server.main" in line]
        for pid in holders:
            os.kill(pid, signal.SIGSTOP)
        plane.stop(signal.SIGKILL)
        plane.launch("--bind", address, "--no-node")
        until(lambda: (plane.directory / "lock").read_text() == f"{plane.process.pid}\n")
        assert not (plane.directory / "address").exists(), "the token would go to whoever listens there now"
        for pid in holders:
            os.kill(pid, signal.SIGCONT)
        plane.wait()
        assert plane.facts["server"] == f"http://{address}"

    def test_kill_leaves_nothing_running(self, plane: Plane) -> None:
        plane.call("apply", "-f", str(EXAMPLES / "formations" / "external.json"))
        before = plane.get("formations")
        assert len(plane.parts()) == 6  # NATS, server, controller, and what holds them
        plane.stop(signal.SIGKILL)
        until(lambda: not plane.parts(), "everything is gone")
        assert "cellos up" in plane.commands.run("cellos", "get", "cells", variables={"CELLOS_SERVER": plane.facts["server"]}).stderr
        plane.start()
        assert plane.get("formations") == before


class TestDeathOfAPart:
    def test_clients_wait_while_the_server_is_started_again(self, plane: Plane) -> None:
        host, port = plane.facts["server"].removeprefix("http://").split(":")
        token = (plane.directory / "token").read_text().strip()
        request = f"GET /v1/version HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n".encode()
        for _ in range(3):
            (server,) = [pid for pid, line in plane.parts().items() if "cellos.server.main" in line and "lifeline" not in line]
            ended = os.pidfd_open(server)
            os.kill(server, signal.SIGKILL)
            assert select.select([ended], [], [], SECONDS)[0]
            os.close(ended)
            with socket.create_connection((host, int(port)), SECONDS) as connection:  # at a time when there is no server
                connection.sendall(request)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize("word", ["cellos.server.main", "cellos.controller.main", "nats-server"])
    def test_it_is_started_again_and_no_event_is_missed(self, plane: Plane, word: str, ends: Callable[[Any], None]) -> None:
        follower = plane.commands.start("cellos", "events", "--follow", "--since", "0")
        ends(follower)
        for number in range(3):
            plane.run_cell(f"cell-{number}")
            if number < 2:
                plane.kill(word)
        count = until(lambda: plane.get("cells")[2:] and _last(plane))
        lines = [follower.stdout.readline() for _ in range(count)]
        assert all(lines), follower.stderr.read()
        events = [json.loads(line) for line in lines]
        assert [each["seq"] for each in events] == list(range(1, count + 1))
        assert {each["event"]["data"].get("cellId") for each in events} >= {"cell-0", "cell-1", "cell-2"}
        follower.send_signal(signal.SIGINT)
        assert follower.wait(SECONDS) == 130
        assert plane.stop() == 0
        assert re.findall("ended (.*) and is started again", plane.process.stderr.read()) == ["by signal 9 (SIGKILL)"] * 2


@pytest.mark.linux_backend
class TestFormations:
    def test_a_pipeline_runs_to_its_end(self, down: Plane) -> None:
        plane = down
        plane.start("--slots", "2")
        assert [(node["slots"], node["classes"][0]) for node in plane.facts["nodes"]] == [(2, "base")]
        shown = plane.call("apply", "-f", str(EXAMPLES / "formations" / "pipeline.yaml"), "--wait")
        assert re.search(r"pipeline COMPLETED in .* 7 members: 6 succeeded, 1 failed", shown)
        assert plane.call("logs", "pipeline/test-flaky") == "attempt 2\n"
        lint = plane.commands.run("cellos", "logs", "pipeline/lint")
        assert (lint.stdout, lint.stderr) == ("", "line 7 is too long\n")
        runs = [json.loads(line) for line in plane.call("events", "--formation", "pipeline", "--json").splitlines()]
        assert [run["verdict"]["state"] for run in runs] == ["verified"] * 8

    def test_a_node_that_is_killed_and_one_that_joins(self, down: Plane, ends: Callable[[Any], None], tmp_path: Path) -> None:
        plane = down
        plane.start("--slots", "1")
        variables = {
            "CELLOS_NATS_URL": Path(plane.facts["natsUrl"]).read_text().strip(),
            "CELLOS_NODE_ID": "second",
            "CELLOS_NODE_SLOTS": "1",
            "CELLOS_STATE_DIR": str(tmp_path / "second"),
        }
        ends(plane.commands.start("cellos-node", variables=variables))
        until(lambda: len(plane.get("nodes")) == 2, "the second node is there")
        held = tmp_path / "held"
        held.mkdir()
        held.chmod(0o755)
        spec = {
            "run": {"argv": ["/bin/sh", "-c", "until test -e /held/go; do sleep 0.1; done"]},
            "authority": {"filesystem": {"mounts": [{"source": str(held), "target": "/held"}]}},
            "lifetime": {"ttlSeconds": 600},
        }
        members = [{"id": "m0", "use": "t"}, *({"id": f"m{n}", "authorizedBy": "m0", "use": "t"} for n in range(1, 4))]
        document = {
            "name": "shared",
            "coordinator": "m0",
            "templates": {"t": spec},
            "members": [{**m, "onNodeLost": "retry"} for m in members],
        }
        path = tmp_path / "shared.json"
        path.write_text(json.dumps(document))
        plane.call("apply", "-f", str(path))
        until(lambda: len([each for each in plane.get("cells") if each["state"] == "running"]) == 2, "both nodes have a cell")
        plane.kill("cellos.node.main")
        (held / "go").touch()
        plane.call("wait", "formation", "shared", "--timeout", "60s")
        told = [json.loads(line) for line in plane.call("events", "--formation", "shared", "--json").splitlines()]
        assert [run["verdict"]["state"] for run in told] == ["verified"] * 5
        nodes = {event["data"]["node"] for run in told for event in run["events"] if event["type"].endswith(".claimed")}
        assert len(nodes) == 2


class TestClient:
    def test_against_the_real_server(self, plane: Plane) -> None:
        with Server(find_server(plane.commands.environment)) as server:
            assert server.end() == 0
            made = [server.apply(json.dumps(DOCUMENT | {"name": f"f{number}"}).encode()) for number in range(5)]
            ids = sorted(each.id for each in made)
            assert [record["id"] for record in server.formations()] == ids
            assert [record["id"] for record in server.formations(limit=3)] == ids[:3]
            assert server.events(since=server.end() - 1).events[0].seq == server.end() == 10  # a name and a formation each
            with pytest.raises(ServerProblem) as refused:
                server.apply(json.dumps(DOCUMENT | {"coordinator": "nobody"}).encode())
            assert refused.value.type == "/problems/formation/no-coordinator"
            with pytest.raises(ServerError, match="subscribe failed"):
                next(server.follow(since=0, subject="other.>"))
            with pytest.raises(CursorExpired) as expired:
                next(server.follow(since=1_000_000))
            assert expired.value.oldest == 1
            created = next(server.follow(since=0, subject=f"cellos.events.formations.{made[3].id}.>"))
            assert json.loads(bytes(created.event))["data"]["formationName"] == "f3"
            server.delete(made[0].id)
            server.delete(made[0].id)
            assert server.formation("f0")["status"] == "CANCELLED"

    def test_from_now_on(self, plane: Plane) -> None:
        plane.run_cell("before")
        until(lambda: plane.get("cells"))
        with Server(find_server(plane.commands.environment)) as server:
            stream = server.follow(since=server.end())
            plane.run_cell("after")
            assert json.loads(bytes(next(stream).event))["data"]["cellId"] == "after"


def _last(plane: Plane) -> int:
    """The sequence of the last event, once a cell's record is complete."""
    states = {each["state"] for each in plane.get("cells")}
    if states != {"destroyed"}:
        return 0
    with Server(find_server(plane.commands.environment)) as server:
        return server.end()
