"""Agents that are killed, stopped and lied to by their store: each spec ends once, and what was promised for its case comes of it.

All cells are real ones, of the real supervisor.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cellos.core.evidence.verify import verify
from cellos.core.objects import ObjectStore
from cellos.fleet.layout import PARTS, Layout
from cellos.fleet.queue import Queue, Story
from cellos.fleet.store import open_store
from cellos.testing.daemon_process import hears
from cellos.testing.s3_proxy import FAULTS, Proxy, in_turn, proxy

T = TypeVar("T")
SECONDS = 90.0
LEASE_MS, SHORT_LEASE_MS = 60_000, 6_000
"""A test may have to wait for the end of a short one. Longer than anything takes on a slow machine."""
HOUR = 3600
SPECS = int(os.environ.get("CELLOS_FLEET_SPECS", "24"))
KILLS = max(3, SPECS // 12)
SEED = int(os.environ.get("CELLOS_FAULT_SEED", "1"))
LAYOUT = Layout("fleet")


def document(id: str, *argv: str) -> dict[str, Any]:
    body = {"id": id, "authority": {}, "lifetime": {"ttlSeconds": 600}, "run": {"argv": list(argv)}}
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float = SECONDS) -> Any:
    """The first true answer of `condition`, which may ask a server."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
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
        """An agent. `at`: the step at which it stops."""
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
        return process

    def await_stop(self, process: subprocess.Popen[str], node: str) -> None:
        """Until it stands at its step."""
        options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
        how = wait_for(lambda: os.waitid(os.P_PID, process.pid, options), f"its step: {self.log(node)}")
        assert how.si_code == os.CLD_STOPPED, f"it never came to its step: {self.log(node)}"

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

    def said(self) -> Counter[str]:
        """How often the program of a spec wrote `ran ID`: agents hand on to their standard error what cells write."""
        return Counter(re.findall(r"^ran (\S+)$", "".join(path.read_text() for path in self.place.glob("*.log")), re.MULTILINE))


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
    "after remove leases": COMPLETED,
    "before create claimed": RUN_BY_ANOTHER,
}


@pytest.mark.linux_backend
def test_an_agent_killed_at_any_step_is_replaced_by_another(fleet: Fleet) -> None:
    mark = f"30{uuid.uuid4().int % 10**12}"
    victims, documents = [], []
    for number, step in enumerate(STEPS):
        documents.append(document(f"s{number}", "/bin/sleep", mark) if step == "after start" else document(f"s{number}", "/bin/true"))
        documents[-1]["spec"]["placement"] = {"poolId": f"p{number}"}
        # Its clock is an hour slow, that of the agent which goes on an hour fast.
        variables = {"SKEW_SECONDS": str(-HOUR), "CELLOS_FLEET_POOL_ID": f"p{number}"}
        victims.append(fleet.start(f"victim-{number}", at=step, **variables))
    fleet.submit(*documents)
    for number, victim in enumerate(victims):
        fleet.await_stop(victim, f"victim-{number}")
    wait_for(lambda: running_with(mark), "the cell")
    for victim in victims:
        victim.kill()
        victim.wait()
    wait_for(lambda: not running_with(mark), "the end of the cell whose agent was killed")
    fleet.shorten_leases()
    heir = fleet.start("heir", SKEW_SECONDS=str(HOUR), CELLOS_FLEET_SLOTS="4")
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
def test_an_agent_that_is_stopped_or_cut_off_loses_its_lease_and_its_cell(commands: Any, tmp_path: Path, ends: Any, s3_server: Any) -> None:
    """With real time, and therefore both at once."""
    cut = threading.Event()
    with proxy(s3_server.endpoint, lambda _method, _path: "reset" if cut.is_set() else "") as between, ThreadPoolExecutor() as threads:
        places = [tmp_path / "stopped", tmp_path / "cut off"]
        for place in places:
            place.mkdir()
        frozen = Fleet(f"file://{places[0]}/bucket", {}, commands, places[0], ends)
        bucket = f"s3://{s3_server.bucket}/{uuid.uuid4()}"
        behind = Fleet(bucket, s3_server.environment, commands, places[1], ends, through=between.url)
        cases = [threads.submit(stop_an_agent, frozen), threads.submit(cut_an_agent_off, behind, cut.set)]
        for case in cases:
            case.result()


def stop_an_agent(fleet: Fleet) -> None:
    """It goes on later, without harm."""
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


ALONE = "exec 9</alone/lock; flock -n 9 || echo twice; echo ran one; exec sleep 600"


def cut_an_agent_off(fleet: Fleet, cut: Callable[[], None]) -> None:
    """From its store. At no moment do two cells run: each tries to be the only one that holds a lock."""
    alone = fleet.place / "alone"
    alone.mkdir()
    (alone / "lock").touch()
    one = document("one", "/bin/sh", "-c", ALONE)
    one["spec"]["authority"] = {"filesystem": {"mounts": [{"source": str(alone), "target": "/alone"}]}}
    fleet.submit(one)
    first = fleet.start("first", CELLOS_FLEET_LEASE_MS=str(SHORT_LEASE_MS))
    wait_for(lambda: fleet.said()["one"], "the first cell")
    cut()
    second = fleet.start("second", CELLOS_FLEET_RETRIES="1", AWS_ENDPOINT_URL=fleet.variables["AWS_ENDPOINT_URL"])
    wait_for(lambda: fleet.said()["one"] == 2, "the second cell")
    assert "twice\n" not in fleet.log("first") + fleet.log("second")
    assert [each.reason for each in fleet.story("one").receipts] == ["agent_lost"]
    assert "the object store cannot be used" in fleet.log("first")
    for process in (first, second):
        process.kill()
        process.wait()


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


def below(pid: int) -> list[int]:
    """The processes that it started, and those that they started."""
    found = read_or_nothing(f"/proc/{pid}/task/{pid}/children").split()
    return [each for child in map(int, found) for each in (child, *below(child))]


class Victims:
    """What runs for agents that are killed: it has to go with them, and to leave nothing."""

    def __init__(self) -> None:
        self.pidfds: dict[int, int] = {}
        self.cgroups: set[str] = set()
        self.ids: set[Path] = set()

    def kill(self, agent: subprocess.Popen[str], state: Path, *, with_all: bool) -> None:
        """SIGKILL to an agent; `with_all`: to all that it started, too, as at the end of a unit, or of memory."""
        own = {}
        for pid in below(agent.pid):
            uids = read_or_nothing(f"/proc/{pid}/uid_map").split()
            if uids and uids[1].decode() not in {"0", str(os.geteuid())}:
                self.ids.add(Path("/run/cellos/ids", uids[1].decode()))
            try:
                own[pid] = os.pidfd_open(pid)
            except ProcessLookupError:  # it has ended
                continue
        for path in state.glob("runs/*.json"):
            self.cgroups.update(re.findall(r'"(/sys/fs/cgroup/[^"]+)"', read_or_nothing(str(path)).decode()))
        agent.kill()
        for pidfd in own.values() if with_all else ():
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                continue
        agent.wait()
        self.pidfds |= own

    def are_gone(self) -> bool:
        """All processes."""
        for pid, pidfd in tuple(self.pidfds.items()):
            if select.select([pidfd], [], [], 0)[0]:
                os.close(self.pidfds.pop(pid))
        return not self.pidfds

    def left(self) -> list[str]:
        """Control groups, and host ids that nobody holds."""
        ids = [path for path in self.ids if path.exists() and is_free(path)]
        return [path for path in self.cgroups if os.path.exists(path)] + [str(path) for path in ids]


def is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def host_mounts(place: Path) -> list[str]:
    """But for those of other runs of tests, which come and go beside us."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/pytest-of-" not in line or f"{place}/" in line]


@pytest.mark.linux_backend
def test_four_agents_run_each_spec_once_although_they_are_killed_and_lied_to(
    fleet: Fleet, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each cell says that it runs: no spec does so twice, and none is completed that did not.

    Two of the agents find S3 behind a proxy. CELLOS_FLEET_SPECS=500 is the long mode, CELLOS_FAULT_SEED=7 repeats one.
    """
    chance = random.Random(SEED)
    state = fleet.commands.state
    mark = f"cellos-fault-{uuid.uuid4()}"
    mounts = host_mounts(tmp_path)
    kinds = {"quick": "true", "slow": "sleep 1", "failing": "exit 3"}
    ids = [f"{chance.choice(['quick', 'quick', 'slow', 'failing'])}-{number}" for number in range(SPECS)]
    documents = {}
    for id in ids:
        documents[id] = document(id, "/bin/sh", "-c", f"echo ran {id}; {kinds[id.partition('-')[0]]}", mark)
    fleet.submit(*documents.values())
    victims, kills = Victims(), 0
    with ExitStack() as stack:
        between = None
        if not fleet.bucket.startswith("file:"):
            s3 = request.getfixturevalue("s3_server")
            between = stack.enter_context(proxy(s3.endpoint, in_turn(25)))

        def start(name: str) -> subprocess.Popen[str]:
            variables = {"CELLOS_FLEET_SLOTS": "2", "CELLOS_FLEET_LEASE_MS": "3000"}
            if between is not None and name in {"n0", "n1"}:
                variables["AWS_ENDPOINT_URL"] = between.url
            return fleet.start(name, **variables)

        began = time.monotonic()
        agents = {name: start(name) for name in ("n0", "n1", "n2", "n3")}
        for due in sorted(chance.sample(range(1, SPECS - 3 * KILLS), KILLS)):
            wait_for(lambda due=due: fleet.said().total() >= due, f"{due} cells")  # type: ignore[misc]
            name = chance.choice(list(agents))
            with_all = chance.random() < 0.3
            victims.kill(agents[name], state, with_all=with_all)
            kills += 1
            agents[name] = start(name)
            wait_for(victims.are_gone, "the end of what a killed agent has started")
        wait_for(lambda: fleet.ended(*ids), "all specs", seconds=SECONDS + SPECS)
        drained = time.monotonic() - began
        for agent in agents.values():
            wait_for(lambda agent=agent: hears(agent.pid, signal.SIGTERM), "its start")  # type: ignore[misc]
            agent.send_signal(signal.SIGTERM)
        assert [agent.wait(SECONDS) for agent in agents.values()] == [0] * 4
        assert between is None or between.seen.keys() >= (set(FAULTS) if SPECS >= 100 else {"500", "reset", "lost"})
    wait_for(lambda: not running_with(mark), "the end of all cells")
    # The next start of a supervisor here ends what a killed one could not.
    assert fleet.commands.run("cellos", "run", "--", "/bin/true").returncode == 0
    assert (victims.left(), host_mounts(tmp_path)) == ([], mounts)
    assert [str(path) for pattern in ("runs/*", "spool/*") for path in state.glob(pattern)] == []
    runs = fleet.said()
    assert {id: count for id, count in runs.items() if count > 1} == {}, "run twice"
    lost = check_ends(fleet, documents, runs)
    faults = dict(between.seen) if between else {}
    sys.stdout.write(f"\nseed {SEED}: {SPECS} specs, {drained:.1f} s, {kills} kills, {lost} agent_lost, none twice, faults {faults}\n")


def check_ends(fleet: Fleet, documents: dict[str, dict[str, Any]], runs: Counter[str]) -> int:
    """None is lost, and what the bucket says is what was; how many are `agent_lost`."""
    found = fleet.ask(objects)
    assert [key for part in ("pending", "claimed", "leases") for key in found[part]] == []
    receipts = {key: json.loads(body) for key, body in found["receipts"].items()}
    assert receipts.keys() == {LAYOUT.receipt(id, 1) for id in documents}
    lines = fleet.jsonl.read_bytes().splitlines()
    events = [json.loads(line) for line in lines]
    began = [(each["data"]["specId"], each["data"]["runId"]) for each in events if each["type"].endswith("cell.lifecycle.v1.started")]
    begun = {spec: run for spec, run in began if spec in documents}
    assert len(begun) == len([spec for spec, _ in began if spec in documents]), "a spec was begun twice"
    ended = Counter(each["data"]["runId"] for each in events if each["type"].endswith("cell.lifecycle.v1.destroyed"))
    assert all(ended[run] == 1 for run in begun.values()), "a run has no end"
    lost = 0
    for receipt in receipts.values():
        id, outcome = receipt["id"], receipt["outcome"]
        raw = json.dumps(documents[id]).encode()
        assert [
            key for key in (LAYOUT.result(id, "completed"), LAYOUT.result(id, "failed")) if key in found["completed"] | found["failed"]
        ] == [LAYOUT.result(id, outcome)]
        assert found[outcome][LAYOUT.result(id, outcome)] == raw
        assert begun.get(id, receipt["runId"]) == receipt["runId"]
        if receipt.get("reason") == "agent_lost":
            lost += 1
            assert runs[id] <= 1
            continue
        assert (runs[id], receipt["exitCode"] == 0, outcome == "completed") == (
            1,
            not id.startswith("failing"),
            not id.startswith("failing"),
        ), receipt
        ours = [line + b"\n" for line in lines if receipt["runId"].encode() in line]
        assert receipt["events"] == {"count": len(ours), "sha256": hashlib.sha256(b"".join(ours)).hexdigest()}
    report = verify(lines)
    assert (report.faults, {run.state for run in report.runs}) == ((), {"verified"})
    return lost


async def objects(queue: Queue) -> dict[str, dict[str, bytes]]:
    """All that is in the bucket, by its part."""
    found: dict[str, dict[str, bytes]] = {part: {} for part in PARTS}
    for part, keys in found.items():
        async for page in queue.store.pages(LAYOUT.within(part)):
            for entry in page:
                stored = await queue.store.read(entry.key, 1 << 20)
                assert stored is not None
                keys[entry.key] = stored.body
    return found


LOSSES = [
    ("PUT", "/claimed/", "hang"),
    ("PUT", "/leases/", "lost"),
    ("PUT", "/receipts/", "lost"),
    ("PUT", "/completed/", "lost"),
    ("POST", "?delete", "lost"),
    ("PUT", "/agents/", "lost"),
]


@pytest.mark.linux_backend
def test_a_request_that_was_done_and_not_answered_is_settled(s3_server: Any, with_faults: Callable[[Proxy], Fleet]) -> None:
    left = list(LOSSES)

    def decide(method: str, path: str) -> str:
        for each in left:
            if each[0] == method and each[1] in path:
                left.remove(each)
                return each[2]
        return ""

    with proxy(s3_server.endpoint, decide) as between:
        fleet = with_faults(between)
        fleet.submit(document("one", "/bin/echo", "ran", "one"))
        fleet.start("n1", CELLOS_FLEET_LEASE_MS="12000")  # a request is given up after a quarter
        wait_for(lambda: fleet.ended("one"), "the spec")
    assert not left
    [receipt] = fleet.story("one").receipts
    assert (receipt.outcome, receipt.attempt, receipt.epoch) == ("completed", 1, 0)
    assert (fleet.said(), fleet.started()) == ({"one": 1}, {"one": 1})
