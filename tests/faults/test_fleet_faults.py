"""Agents that are killed, stopped and lied to by their store: each spec ends once, and what was promised for its case comes of it.

Cells are real ones, of the real supervisor, but where a test is about many of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cellos.core.objects import ObjectStore
from cellos.fleet.layout import Layout
from cellos.fleet.queue import Queue, Story
from cellos.fleet.store import open_store
from cellos.testing.s3_proxy import FAULTS, Proxy, in_turn, proxy

T = TypeVar("T")
SECONDS = 90.0
LEASE_MS, SHORT_LEASE_MS = 60_000, 6_000
"""A test may have to wait for the end of a short one. Longer than anything takes on a slow machine."""
HOUR = 3600
LAYOUT = Layout("fleet")


def document(id: str, *argv: str) -> dict[str, Any]:
    body = {"id": id, "authority": {}, "lifetime": {"ttlSeconds": 600}, "run": {"argv": list(argv)}}
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true answer of `condition`, which may ask a server."""
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for {what}"
        time.sleep(0.1)
    return answer


class Fleet:
    """A bucket, and agents on it."""

    def __init__(
        self, bucket: str, variables: dict[str, str], commands: Any, place: Path, ends: Callable[[Any], None], *, through: str = ""
    ) -> None:
        """`through`: where the agents find the store, if not where we do."""
        self.bucket = bucket
        self.variables = variables
        self.way = {"AWS_ENDPOINT_URL": through} if through else {}
        self.commands = commands
        self.place = place
        self.jsonl = place / "events.jsonl"
        self._ends = ends

    def start(self, node: str, *, at: str = "never", **variables: str) -> subprocess.Popen[str]:
        """An agent. `at`: the step at which it stops; we wait for that."""
        ours = {
            "CELLOS_FLEET_BUCKET": self.bucket,
            "CELLOS_FLEET_NODE_ID": node,
            "CELLOS_FLEET_LEASE_MS": str(LEASE_MS),
            "CELLOS_FLEET_POLL_INTERVAL_MS": "100",
            "CELLOS_FLEET_SLOTS": "1",
            "CELLOS_FLEET_SUPERVISOR": str(self.supervisor()),
            "CELL_OS_JSONL_EVENTS": str(self.jsonl),
        }
        argv = [sys.executable, str(Path(__file__).with_name("fleet_held_at.py")), at]
        log = (self.place / f"{node}.log").open("a")
        environment = self.commands.environment | self.variables | self.way | ours | variables
        process = subprocess.Popen(argv, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        self._ends(process)
        if at != "never":
            how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert how is not None
            assert how.si_code == os.CLD_STOPPED, f"it never came to {at}: {self.log(node)}"
        return process

    def supervisor(self) -> Path:
        """`cellos-supervisor` of this checkout, as a program."""
        path = self.place / "supervisor"
        if not path.exists():
            line = self.commands.line("cellos-supervisor")
            found = [each for each in self.commands.environment.get("PYTHONPATH", "").split(os.pathsep) if each]
            path.write_text(f"#!{line[0]}\nimport sys; sys.path[:0] = {found}\n{line[2]}\n")
            path.chmod(0o755)
        return path

    def log(self, node: str) -> str:
        return (self.place / f"{node}.log").read_text()

    def ask(self, work: Callable[[Queue], Awaitable[T]]) -> T:
        async def run() -> T:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in self.variables.items():
                    patch.setenv(name, value)
                store: ObjectStore = open_store(self.bucket, self.variables, request_seconds=30)
            queue = Queue(store, LAYOUT, who="a test", wall_ns=time.time_ns, token=uuid.uuid4().hex, pause=asyncio.sleep)
            return await work(queue)

        return asyncio.run(run())

    def submit(self, *documents: dict[str, Any]) -> None:
        async def hand_in(queue: Queue) -> None:
            for each in documents:
                assert await queue.submit(each["spec"]["id"], json.dumps(each).encode())

        self.ask(hand_in)

    def ended(self, *ids: str) -> bool:
        """All of them, and nothing is left to be cleared away."""

        async def look(queue: Queue) -> bool:
            rows = {row.id: row.state for row in await queue.rows()}
            leases = [entry async for page in queue.store.pages(LAYOUT.within("leases")) for entry in page]
            return not leases and all(rows.get(id) in {"completed", "failed"} for id in ids)

        return self.ask(look)

    def story(self, id: str) -> Story:
        return self.ask(lambda queue: queue.show(id))

    def shorten_leases(self) -> None:
        """As if the agents that are dead now had asked for a second."""

        async def rewrite(queue: Queue) -> None:
            for part in ("claimed", "leases"):
                async for page in queue.store.pages(LAYOUT.within(part)):
                    for entry in page:
                        found = await queue.store.read(entry.key, 1 << 20)
                        assert found is not None
                        await queue.store.write(entry.key, json.dumps(json.loads(found.body) | {"leaseMs": 1000}).encode())

        self.ask(rewrite)

    def started(self) -> Counter[str]:
        """How often the cell of a spec was started, by the record of its events."""
        events = [json.loads(line) for line in self.jsonl.read_text().splitlines()] if self.jsonl.exists() else []
        return Counter(event["data"]["specId"] for event in events if event["type"].endswith("cell.lifecycle.v1.started"))


@pytest.fixture(params=["file", "s3"])
def fleet(request: pytest.FixtureRequest, commands: Any, tmp_path: Path, ends: Any) -> Fleet:
    if request.param == "file":
        return Fleet(f"file://{tmp_path}/bucket", {}, commands, tmp_path, ends)
    s3 = request.getfixturevalue("s3_server")
    return Fleet(f"s3://{s3.bucket}/{uuid.uuid4()}", s3.environment, commands, tmp_path, ends)


@pytest.fixture
def with_faults(s3_server: Any, commands: Any, tmp_path: Path, ends: Any) -> Callable[[Proxy], Fleet]:
    """A bucket behind a proxy for agents, and without for us."""

    def make(proxy: Proxy) -> Fleet:
        return Fleet(f"s3://{s3_server.bucket}/{uuid.uuid4()}", s3_server.environment, commands, tmp_path, ends, through=proxy.url)

    return make


def running_with(mark: str) -> list[int]:
    """Processes that have `mark` in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in line:
                found.append(int(name))
    return found


RUN_BY_ANOTHER, COMPLETED, LOST = "run by another agent", "completed by the first", "lost"
STEPS = {
    "after create claimed": RUN_BY_ANOTHER,
    "after create leases": LOST,  # it may have been started
    "after start": LOST,
    "after wait": LOST,  # it ended, and nobody was told
    "after create receipts": COMPLETED,
    "after create completed": COMPLETED,
    "after remove pending": COMPLETED,
    "after remove claimed": COMPLETED,
    "before create claimed": RUN_BY_ANOTHER,
}


@pytest.mark.linux_backend
def test_an_agent_killed_at_any_step_is_replaced_by_another(fleet: Fleet) -> None:
    mark = f"30{uuid.uuid4().int % 10**12}"
    for number, step in enumerate(STEPS):
        id = f"s{number}"
        fleet.submit(document(id, "/bin/sleep", mark) if step == "after start" else document(id, "/bin/true"))
        # Its clock is an hour slow, that of the agent which goes on an hour fast.
        victim = fleet.start(f"victim-{number}", at=step, SKEW_SECONDS=str(-HOUR))
        if step == "after start":
            wait_for(lambda: running_with(mark), "the cell")
        victim.kill()
        victim.wait()
    wait_for(lambda: not running_with(mark), "the end of the cell whose agent was killed")
    fleet.shorten_leases()
    heir = fleet.start("heir", SKEW_SECONDS=str(HOUR))
    ids = [f"s{number}" for number in range(len(STEPS))]
    wait_for(lambda: fleet.ended(*ids), "all specs")
    heir.send_signal(signal.SIGTERM)
    assert heir.wait(SECONDS) == 0, fleet.log("heir")
    started = fleet.started()
    for id, (step, outcome) in zip(ids, STEPS.items(), strict=True):
        story = fleet.story(id)
        [receipt] = story.receipts
        told = (step, story.state, receipt.reason, receipt.node, started[id])
        match outcome:
            case "run by another agent":
                assert told == (step, "completed", None, "heir", 1)
            case "completed by the first":
                assert told == (step, "completed", None, f"victim-{ids.index(id)}", 1)
            case "lost":
                assert told[1:4] == ("failed", "agent_lost", "heir"), told
                assert started[id] <= 1, told


@pytest.mark.linux_backend
def test_a_stopped_agent_loses_its_lease_and_its_cell_and_goes_on_without_harm(commands: Any, tmp_path: Path, ends: Any) -> None:
    fleet = Fleet(f"file://{tmp_path}/bucket", {}, commands, tmp_path, ends)
    mark = f"30{uuid.uuid4().int % 10**12}"
    fleet.submit(document("long", "/bin/sleep", mark))
    stopped = fleet.start("stopped", CELLOS_FLEET_LEASE_MS=str(SHORT_LEASE_MS))
    wait_for(lambda: running_with(mark), "the cell")
    stopped.send_signal(signal.SIGSTOP)
    heir = fleet.start("heir", CELLOS_FLEET_RETRIES="1")
    wait_for(lambda: fleet.story("long").receipts, "the receipt of the first attempt")
    [receipt] = fleet.story("long").receipts
    assert (receipt.reason, receipt.again, receipt.node) == ("agent_lost", True, "heir")
    assert receipt.detail == "its agent (stopped) ended or was cut off while it ran"
    # One may ask for another attempt, and then it runs; the first cell is gone, although its agent could do nothing about it.
    wait_for(lambda: len([lease for lease in fleet.story("long").leases.values() if lease.started and lease.node == "heir"]), "attempt 2")
    first_run = receipt.run_id
    wait_for(lambda: len(runs_with(mark)) == 1, "one cell")
    assert first_run not in runs_with(mark)
    stopped.send_signal(signal.SIGCONT)
    wait_for(lambda: "the lease is lost" in fleet.log("stopped") or "no longer ours" in fleet.log("stopped"), "that it notices")
    fleet.submit(document("next", "/bin/true"))
    wait_for(lambda: fleet.story("next").state == "completed", "what the agent does next")
    assert [each.node for each in fleet.story("next").receipts] == ["stopped"]
    assert [each.again for each in fleet.story("long").receipts] == [True]
    for process in (stopped, heir):
        process.kill()
    wait_for(lambda: not running_with(mark), "the end of the cell")


def runs_with(mark: str) -> set[str]:
    """The runs whose supervisors have a cell with `mark`."""
    found = set()
    for each in running_with(mark):
        pid = each
        while pid > 1:
            run = re.search(rb"CELLOS_RUN_ID=([0-9a-f-]+)", read_or_nothing(f"/proc/{pid}/environ"))
            if run:
                found.add(run.group(1).decode())
                break
            parent = re.search(rb"^PPid:\t(\d+)$", read_or_nothing(f"/proc/{pid}/status"), re.MULTILINE)
            pid = int(parent.group(1)) if parent else 0
    return found


def read_or_nothing(path: str) -> bytes:
    """Of processes that have ended, and of those that nobody may look into, as the inside of a cell."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


NOTHING = """#!/bin/sh
cat > /dev/null
echo "$CELLOS_RUN_ID" >> {ran}
"""


def quick(fleet: Fleet) -> Path:
    """Have agents run a program that only says that it was run; where it does."""
    ran = fleet.place / "ran"
    program = fleet.place / "supervisor"
    program.write_text(NOTHING.format(ran=ran))
    program.chmod(0o755)
    return ran


def test_four_agents_run_each_spec_once_on_a_store_that_fails_now_and_then(s3_server: Any, with_faults: Callable[[Proxy], Fleet]) -> None:
    with proxy(s3_server.endpoint, in_turn(10)) as between:
        fleet = with_faults(between)
        ran = quick(fleet)
        ids = [f"s{number}" for number in range(24)]
        fleet.submit(*(document(id, "/bin/true") for id in ids))
        agents = [fleet.start(f"n{number}", CELLOS_FLEET_SLOTS="2") for number in range(4)]
        wait_for(lambda: fleet.ended(*ids), "all specs")
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        assert [agent.wait(SECONDS) for agent in agents] == [0] * 4
        assert set(FAULTS) <= between.seen.keys()
    receipts = {id: fleet.story(id).receipts for id in ids}
    assert {id: [each.outcome for each in found] for id, found in receipts.items()} == {id: ["completed"] for id in ids}
    assert Counter(ran.read_text().split()) == Counter([each.run_id for found in receipts.values() for each in found])


LOSSES = [
    ("PUT", "/claimed/"),
    ("PUT", "/leases/"),
    ("PUT", "/receipts/"),
    ("PUT", "/completed/"),
    ("POST", "?delete"),
    ("PUT", "/agents/"),
]


@pytest.mark.parametrize("fault", ["lost", "hang"])
def test_a_request_that_was_done_and_not_answered_is_settled(fault: str, s3_server: Any, with_faults: Callable[[Proxy], Fleet]) -> None:
    left = list(LOSSES) if fault == "lost" else LOSSES[:1]

    def decide(method: str, path: str) -> str:
        for each in left:
            if each[0] == method and each[1] in path:
                left.remove(each)
                return fault
        return ""

    with proxy(s3_server.endpoint, decide) as between:
        fleet = with_faults(between)
        ran = quick(fleet)
        fleet.submit(document("one", "/bin/true"))
        fleet.start("n1", CELLOS_FLEET_LEASE_MS="12000" if fault == "hang" else str(LEASE_MS))
        wait_for(lambda: fleet.ended("one"), "the spec")
    assert not left
    [receipt] = fleet.story("one").receipts
    assert (receipt.outcome, receipt.attempt, receipt.epoch) == ("completed", 1, 0)
    assert ran.read_text().split() == [receipt.run_id]


ALONE = """#!/bin/sh
cat > /dev/null
cd {place}
if test -e pid && kill -0 "$(cat pid)"; then touch twice; fi
echo $$ > pid
echo $$ >> runs
exec sleep {seconds}
"""


def test_an_agent_cut_off_from_its_store_ends_its_cell_before_another_one_begins(
    s3_server: Any, with_faults: Callable[[Proxy], Fleet]
) -> None:
    """With real time: at no moment do two of them run."""
    cut = threading.Event()
    with proxy(s3_server.endpoint, lambda _method, _path: "reset" if cut.is_set() else "") as between:
        fleet = with_faults(between)
        runs, program = fleet.place / "runs", fleet.place / "supervisor"
        program.write_text(ALONE.format(place=fleet.place, seconds=600))
        program.chmod(0o755)
        fleet.submit(document("one", "/bin/true"))
        first = fleet.start("first", CELLOS_FLEET_LEASE_MS=str(SHORT_LEASE_MS))
        wait_for(runs.exists, "the first cell")
        cut.set()
        second = fleet.start("second", CELLOS_FLEET_RETRIES="1", AWS_ENDPOINT_URL=s3_server.endpoint)
        wait_for(lambda: len(runs.read_text().split()) == 2, "the second cell")
        assert not (fleet.place / "twice").exists()
        assert [each.reason for each in fleet.story("one").receipts] == ["agent_lost"]
        assert "the object store cannot be used" in fleet.log("first")
        for process in (first, second):
            process.kill()
            process.wait()
