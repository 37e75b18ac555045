"""What somebody sees who follows a formation: `cellos wait`, `logs`, `describe`, `get nodes` and `apply --wait`.

The server and NATS are real; the test itself is the controller and the node.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cellos.cli.main import _guarded
from cellos.client.address import Address
from cellos.client.server import Server
from cellos.core.output import OutputEnd, Piece
from cellos.testing.crew import Crew
from cellos.testing.nats_server import NatsServer, reserve_port
from cellos.testing.server_process import TOKEN, ServerProcess

SECONDS = 60
PAGE = Path(__file__).parents[2] / "docs/how-to/follow-formations.md"
BODY = {"authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"]}}
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Stack:
    nats: NatsServer
    process: ServerProcess
    crew: Crew

    @property
    def variables(self) -> dict[str, str]:
        return {"CELLOS_SERVER": self.process.url, "CELLOS_SERVER_API_TOKEN": TOKEN, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "140"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with (
        NatsServer(str(tmp_path_factory.mktemp("following") / "nats")) as nats,
        ServerProcess(nats.url) as process,
        Crew(nats.url) as crew,
    ):
        crew.lease()
        crew.controller()
        yield Stack(nats, process, crew)


@dataclass
class Shell:
    """Types `cellos …`: as a process, or, which is faster, as what the process does, in this one."""

    stack: Stack
    commands: Any
    ends: Callable[[Any], None]
    capfd: Any

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (self.stack.variables | variables).items():
                patch.setenv(name, value)
            self.capfd.readouterr()
            code = _guarded(list(arguments), is_run=False, failure=1, usage=2)
            out, err = self.capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    def start(self, *arguments: str, **how: Any) -> Any:
        process = self.commands.start("cellos", *arguments, variables=self.stack.variables, **how)
        self.ends(process)
        return process

    def terminal(self, *arguments: str) -> Terminal:
        ours, theirs = pty.openpty()
        process = self.start(*arguments, stdout=theirs)
        os.close(theirs)
        return Terminal(process, ours)


@dataclass
class Terminal:
    process: Any
    descriptor: int
    seen: str = ""

    def until(self, text: str) -> None:
        """Until it was shown."""
        while text not in _CONTROLS.sub("", self.seen):
            assert select.select([self.descriptor], [], [], SECONDS)[0], self.seen
            try:
                self.seen += os.read(self.descriptor, 65536).decode()
            except OSError:  # EIO: the last one that wrote is gone
                break
        assert text in _CONTROLS.sub("", self.seen)

    def end(self) -> tuple[int, str]:
        """Exit code, and all that was shown."""
        while True:
            try:
                self.seen += os.read(self.descriptor, 65536).decode()
            except OSError:
                break
        os.close(self.descriptor)
        return self.process.wait(SECONDS), _CONTROLS.sub("", self.seen).replace("\r\n", "\n")


@pytest.fixture
def cellos(stack: Stack, commands: Any, ends: Any, capfd: Any) -> Shell:
    return Shell(stack, commands, ends, capfd)


@pytest.fixture
def server(stack: Stack) -> Iterator[Server]:
    with Server(Address(url=stack.process.url, token=TOKEN, given=True)) as server:
        yield server


@pytest.fixture
def name() -> str:
    return f"f-{uuid.uuid4().hex[:10]}"


def document(name: str) -> bytes:
    """a, then b; b may fail twice."""
    members = [{"id": "a", "spec": BODY}, {"id": "b", "authorizedBy": "a", "spec": BODY, "after": ["a"], "retries": 2, "critical": False}]
    return json.dumps({"name": name, "coordinator": "a", "members": members}).encode()


@pytest.fixture
def made(server: Server, name: str) -> str:
    return server.apply(document(name)).id


def written(tmp_path: Path, name: str) -> str:
    path = tmp_path / "formation.json"
    path.write_bytes(document(name))
    return str(path)


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    pytest.fail(f"not within {SECONDS} s")


def lines(text: str) -> list[list[str]]:
    """Without the times."""
    return [re.split(r"  +", line.strip())[1:] for line in text.splitlines()]


class TestWait:
    def test_a_line_per_change_in_a_pipe(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        waiting = cellos.start("wait", "formation", name)
        seen = [waiting.stdout.readline()]
        for word in ("running", "succeeded"):
            if word == "running":
                run = stack.crew.run(made, "a").start()
            else:
                run.end()
            while word not in seen[-1]:
                seen.append(waiting.stdout.readline())
                assert seen[-1], waiting.stderr.read()
        stack.crew.phase(made, "completed")
        out, err = waiting.communicate(timeout=SECONDS)
        assert (waiting.returncode, err) == (0, "")
        first, *_ = lines("".join(seen))
        assert first == [name, "PENDING", "2 members"]
        assert ["a", "running", "on node-1"] in lines("".join(seen))
        assert re.fullmatch(rf"{name} COMPLETED in .* · 2 members: 1 succeeded, 1 skipped", out.splitlines()[-1])

    def test_a_live_table_on_a_terminal(self, stack: Stack, cellos: Shell, made: str) -> None:
        terminal = cellos.terminal("wait", "formation", made)
        terminal.until("waits for: a")
        run = stack.crew.run(made, "a").start()
        terminal.until("node-1")
        run.end(3)
        stack.crew.phase(made, "failed", reason="a failed")
        code, shown = terminal.end()
        assert code == 1
        assert shown.count("MEMBER") > 1
        assert "command exited with status 3" in shown
        assert terminal.process.stderr.read().startswith("cellos: see: cellos logs f-")

    def test_json_when_it_is_over(self, stack: Stack, cellos: Shell, made: str) -> None:
        stack.crew.phase(made, "completed")
        done = cellos("wait", "formation", made, "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["formationId"], found["status"]) == (0, made, "COMPLETED")
        assert [each["id"] for each in found["members"]] == ["a", "b"]

    def test_the_time_is_over(self, cellos: Shell, name: str, made: str) -> None:
        done = cellos("wait", "formation", made, "--timeout", "1ms")
        assert done.returncode == 124
        assert done.stderr == f"cellos: {name} is PENDING after 1 ms, and goes on\ncellos: see: cellos describe formation {name}\n"

    def test_another_status(self, stack: Stack, cellos: Shell, made: str) -> None:
        stack.crew.dispatch(made, "a")
        assert cellos("wait", "formation", made, "--for", "running,launching").returncode == 0
        stack.crew.phase(made, "cancelled")
        assert cellos("wait", "formation", made, "--for", "RUNNING").returncode == 1
        assert cellos("wait", "formation", made, "--for", "cancelled").returncode == 0

    def test_an_interrupt(self, cellos: Shell, made: str) -> None:
        waiting = cellos.start("wait", "formation", made)
        assert waiting.stdout.readline()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(SECONDS) == 130
        assert waiting.stderr.read() == ""

    def test_unknown(self, cellos: Shell) -> None:
        done = cellos("wait", "formation", "nobody")
        assert (done.returncode, done.stdout) == (1, "")
        assert "formation 'nobody' not found" in done.stderr

    def test_after_apply(self, stack: Stack, cellos: Shell, server: Server, name: str, tmp_path: Path) -> None:
        applied = cellos.start("apply", "-f", written(tmp_path, name), "--wait")
        assert applied.stdout.readline() == f"formation/{name} created (state=PENDING)\n"
        stack.crew.phase(server.formation(name)["id"], "completed")
        assert applied.wait(SECONDS) == 0
        done = cellos("apply", "-f", written(tmp_path, name + "2"), "--wait", "--timeout", "1ms", "--json")
        assert (done.returncode, json.loads(done.stdout)["name"]) == (124, name + "2")


class TestLogs:
    def test_each_stream_to_its_own(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        run = stack.crew.run(made, "a").start()
        run.write("stdout", b"out\x1b[31m\xff\n")
        run.write("stderr", b"err\n")
        run.end()
        reading = cellos.start("logs", f"{name}/a", encoding="latin-1")
        out, err = reading.communicate(timeout=SECONDS)
        assert (reading.returncode, out, err) == (0, "out\x1b[31m\xff\n", "err\n")
        assert cellos("logs", run.cell_id, "--stream", "stderr").stdout == ""
        code, shown = cellos.terminal("logs", f"{made}/a").end()
        assert (code, shown) == (0, "out\\x1b[31m\\xff\n")

    def test_followed_through_its_attempts(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        following = cellos.start("logs", f"{name}/b", "-f")
        assert following.stderr.readline() == f"cellos: {name}/b is waiting: waits for: a\n"
        stack.crew.run(made, "a").start().end()
        run = stack.crew.run(made, "b").start()
        run.write("stdout", b"one\n")
        assert following.stdout.readline() == "one\n"
        run.end(1)
        run = stack.crew.run(made, "b", 2).start()
        run.write("stdout", b"two\n")
        assert following.stdout.readline() == "two\n"
        run.end(0)
        out, err = following.communicate(timeout=SECONDS)
        assert (following.returncode, out) == (0, "")
        assert f"cellos: attempt 2 of {name}/b\n" in err
        first = cellos("describe", "formation", name, "--json")
        earlier = json.loads(first.stdout)["members"][1]["attempts"][0]["runId"]
        assert cellos("logs", f"{name}/b", "--run", earlier).stdout == "one\n"

    def test_the_end_of_a_reader(self, stack: Stack, cellos: Shell, made: str) -> None:
        run = stack.crew.run(made, "a").start()
        run.write("stdout", b"x" * 300_000)
        following = cellos.start("logs", f"{made}/a", "-f")
        assert following.stdout.read(10) == "x" * 10
        following.stdout.close()
        assert following.wait(SECONDS) == 141

    def test_one_that_never_ran(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        stack.crew.phase(made, "cancelled", reason="r")
        done = cellos("logs", f"{name}/b", "-f")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.startswith(f"cellos: {name}/b did not run: ")

    def test_mistakes(self, cellos: Shell, made: str, name: str) -> None:
        for target, text in (
            (name, f"{name} is a formation: name one of its members, {name}/a, {name}/b"),
            (f"{name}/c", f"formation {name} has no member c; it has {name}/a, {name}/b"),
            ("nobody", "no cell and no formation is called nobody; list them: cellos get cells, cellos get formations"),
            ("nobody/a", "formation 'nobody' not found"),
        ):
            done = cellos("logs", target)
            assert (done.returncode, done.stdout) == (1, "")
            assert text in done.stderr
        assert "x is no run of a; there are none" in cellos("logs", f"{name}/a", "--run", "x").stderr


class TestDescribe:
    def test_a_formation(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        stack.crew.run(made, "a").start().end()
        stack.crew.run(made, "b").start().end(1)
        stack.crew.run(made, "b", 2).start()
        code, shown = cellos.terminal("describe", "formation", name).end()
        assert code == 0
        assert shown.startswith(f"formation {name}  LAUNCHING\n")
        assert re.search(r"^a +succeeded +1/1 +node-1 +\d+ ms +exit 0$", shown, re.MULTILINE)
        assert re.search(r"^└ b +running +2/3 +node-1 +[\d.]+ m?s +after a, not critical$", shown, re.MULTILINE)
        assert re.search(r"^ +attempt 1 +failed +on node-1, command exited with status 1, .*, run [0-9a-f-]{36}$", shown, re.MULTILINE)
        assert f"Next:  cellos wait formation {name}   or   cellos logs {name}/b -f" in shown

    def test_why_it_waits(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        shown = cellos("describe", "formation", name).stdout
        assert re.search(r"└ b +waiting +waits for: a; after a, not critical", shown)

    def test_a_cell(self, stack: Stack, cellos: Shell, made: str, name: str) -> None:
        assert cellos("describe", "cell", f"{name}/a").stdout.startswith(f"cell {name}/a  has not begun\n")
        run = stack.crew.run(made, "a").start()
        run.end()
        until(lambda: json.loads(cellos("get", "cell", run.cell_id).stdout or "{}").get("state") == "destroyed")
        shown = cellos("describe", "cell", f"{name}/a").stdout
        assert shown.startswith(f"cell {run.cell_id}  destroyed\n")
        assert f"  run         {run.run_id}\n" in shown
        assert "claimed        by node-1, attempt 1 of a\n" in shown
        assert shown.splitlines()[-1] == f"Next:  cellos logs {name}/a   or   cellos describe formation {name}"
        assert json.loads(cellos("describe", "cell", run.cell_id, "--json").stdout)["member"]["phase"] == "succeeded"

    def test_a_node(self, stack: Stack, cellos: Shell) -> None:
        shown = cellos("describe", "node", "node-1").stdout
        assert shown.startswith("node node-1  ready\n")
        assert "  slots free  3 of 4, runs 1\n  memory free 4 GiB of 8 GiB\n  cpu free    1.5 of 2\n" in shown
        assert "there is no node other; there are: node-1" in cellos("describe", "node", "other").stderr

    @pytest.mark.parametrize(("kind", "text"), [("formation", "formation 'x' not found"), ("cell", "there is no cell x; list them")])
    def test_unknown(self, cellos: Shell, kind: str, text: str) -> None:
        done = cellos("describe", kind, "x")
        assert (done.returncode, done.stdout) == (1, "")
        assert text in done.stderr


class TestNodes:
    def test_a_table(self, cellos: Shell) -> None:
        code, shown = cellos.terminal("get", "nodes").end()
        assert code == 0
        head, row = shown.splitlines()
        assert re.split("  +", head) == ["NODE", "POOL", "STATE", "RUNS", "SLOTS FREE", "MEMORY FREE", "CPU FREE", "CLASSES", "LIFE"]
        assert re.split("  +", row) == ["node-1", "default", "ready", "1", "3 of 4", "4 GiB of 8 GiB", "1.5 of 2", "base, limits", "life-1"]

    def test_json(self, cellos: Shell) -> None:
        (node,) = json.loads(cellos("get", "nodes").stdout)
        assert json.loads(cellos("get", "node", "node-1").stdout) == node

    def test_names_are_completed(self, cellos: Shell, made: str, name: str) -> None:
        for line, found in (
            (f"cellos wait formation {name[:6]}", name),
            ("cellos describe node no", "node-1"),
            (f"cellos logs {name[:6]}", f"{name}/"),
            (f"cellos logs {name}/", f"{name}/b"),
        ):
            variables = {"_CELLOS_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
            done = cellos(**variables)
            assert found in [each.partition(",")[2] for each in done.stdout.splitlines()], done


class TestClient:
    def test_from_a_program(self, stack: Stack, server: Server, made: str, name: str) -> None:
        assert server.wait(name, timeout=0).status == "PENDING"
        run = stack.crew.run(made, "a").start()
        run.write("stdout", b"one")
        assert server.wait(name, until={"LAUNCHING"}).member("a").phase == "running"
        pieces = server.output(run.cell_id, run=run.run_id, follow=True)
        first = next(pieces)
        assert isinstance(first, Piece)
        assert (first.data, first.stream, first.run_id) == (b"one", "stdout", run.run_id)
        run.end()
        stack.crew.phase(made, "completed")
        assert list(pieces) == [OutputEnd(run_id=run.run_id, state="complete")]
        assert server.wait(made).has_ended
        assert server.nodes()["nodes"][0]["node"] == "node-1"

    def test_the_example_of_the_page(
        self, stack: Stack, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = server.apply(json.dumps({"name": "pipeline", "coordinator": "plan", "members": [{"id": "plan", "spec": BODY}]}).encode())
        run = stack.crew.run(made.id, "plan").start()
        run.write("stdout", b"planned")
        run.end()
        stack.crew.phase(made.id, "completed")
        (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        monkeypatch.setenv("CELLOS_SERVER", stack.process.url)
        monkeypatch.setenv("CELLOS_SERVER_API_TOKEN", TOKEN)
        exec(code, {})
        assert capsys.readouterr().out == "plan succeeded 0 None\nstdout b'planned'\n"


class TestOutage:
    def test_followers_outlive_the_server(self, tmp_path: Path, commands: Any, ends: Any, capfd: Any) -> None:
        nats = NatsServer(str(tmp_path / "nats"))
        process = ServerProcess(nats.url, CELLOS_SERVER_BIND=f"127.0.0.1:{reserve_port(nats)}")  # nobody else is given it while it is down
        with nats, process, Crew(nats.url) as crew:
            cellos = Shell(Stack(nats, process, crew), commands, ends, capfd)
            with Server(Address(url=process.url, token=TOKEN, given=True)) as server:
                made = server.apply(document("demo")).id
            run = crew.run(made, "a").start()
            run.write("stdout", b"one\n")
            waiting, following = cellos.start("wait", "formation", "demo"), cellos.start("logs", "demo/a", "-f")
            assert waiting.stdout.readline()
            assert following.stdout.readline() == "one\n"
            process.kill()
            for each in (waiting, following):
                assert each.stderr.readline().endswith("; trying again\n")
            run.write("stdout", b"two\n")
            run.end()
            crew.phase(made, "completed")
            with ServerProcess(nats.url, CELLOS_SERVER_BIND=process.address):
                assert [each.wait(SECONDS) for each in (waiting, following)] == [0, 0]
            assert following.stdout.read() == "two\n"
            assert waiting.stdout.read().splitlines()[-1].startswith("demo COMPLETED")
