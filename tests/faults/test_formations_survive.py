"""Formations run while their servers, controllers, nodes and NATS are killed, stopped and started again, at random.

After each round every acknowledged formation has ended, no attempt ran twice, nothing ran that nobody asked for, nothing is left of any
cell, and every chain verifies; at the end the lists are the fold of the log. The seed of a round is in its name: `CELLOS_FAULT_SEED=7
CELLOS_FAULT_ROUNDS=1` repeats round 7. CELLOS_FAULT_ROUNDS=200 is the long mode.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cellos.core.events import DESTROYED, PROCESS_SPAWNED, Event, parse_event
from cellos.core.evidence.verify import verify
from cellos.core.formation.runs import CLAIMED, DISPATCHED, VOID, Attempt, attempt_of
from cellos.core.formation.transitions import TERMINAL
from cellos.core.projection import Projection
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.stored import Stored
from cellos.testing.daemon_process import DaemonProcess, NodeProcess
from cellos.testing.nats_server import NatsServer
from cellos.testing.server_process import TOKEN, ServerProcess

pytestmark = pytest.mark.linux_backend

SECONDS = 120.0
LEASE_MS = 2000
ROUNDS = int(os.environ.get("CELLOS_FAULT_ROUNDS", "20"))
FIRST_SEED = int(os.environ.get("CELLOS_FAULT_SEED", "1"))
MARK = f"cellos-fault-{uuid.uuid4().hex[:12]}"
"""In the arguments of every program that runs in a cell of these tests."""
HARMLESS = frozenset({"kill controller", "kill server", "stop controller", "second controller", "duplicate work"})
"""They end no cell, so no member may fail for them."""
LEASE_LOST = frozenset({"no sign of life was taken for the time of the lease", "this life of the node was declared dead; another begins"})
"""What a node says when it has to end its cells."""


class ControllerProcess(DaemonProcess):
    module = "cellos.controller.main"
    ready = "follows the log"


def spec(script: str) -> dict[str, Any]:
    argv = ["/bin/sh", "-c", f'echo "ran $CELLOS_CELL_ID $CELLOS_ATTEMPT"; {script}', MARK]
    return {"run": {"argv": argv, "secretDelivery": "env"}, "authority": {}, "lifetime": {"ttlSeconds": 60}}


def document(name: str, *members: dict[str, Any]) -> dict[str, Any]:
    """The first member authorizes the others."""
    first, *others = members
    return {"name": name, "coordinator": first["id"], "members": [first, *({"authorizedBy": first["id"], **each} for each in others)]}


def documents(seed: int) -> dict[str, dict[str, Any]]:
    """Those of a round, by their names."""
    made = [
        document(f"single-{seed}", {"id": "a", "spec": spec("true")}),
        document(f"chain-{seed}", {"id": "a", "spec": spec("sleep 0.2")}, {"id": "b", "after": ["a"], "spec": spec("sleep 0.2")}),
        document(f"stubborn-{seed}", *({"id": each, "onNodeLost": "retry", "spec": spec("sleep 0.4")} for each in "abc")),
        document(
            f"flaky-{seed}",
            {"id": "a", "onNodeLost": "retry", "spec": spec("true")},
            {"id": "b", "retries": 2, "onNodeLost": "retry", "backoff": {"initialMs": 100}, "spec": spec('test "$CELLOS_ATTEMPT" -gt 1')},
            {"id": "c", "critical": False, "onNodeLost": "retry", "spec": spec("exit 3")},
        ),
        document(f"deleted-{seed}", *({"id": each, "spec": spec("sleep 30")} for each in "ab")),
    ]
    return {each["name"]: each for each in made}


class System:
    """NATS, a server, a controller, two nodes with two slots each."""

    def __init__(self, place: Path) -> None:
        self.nats = NatsServer(str(place / "nats"))
        self.nats.start()
        self.server = ServerProcess(self.nats.url)
        self.controller = self.new_controller("c1")
        self.nodes = [self.new_node(place, name) for name in ("n1", "n2")]
        self.extra: ControllerProcess | None = None
        for each in (self.server, self.controller, *self.nodes):
            each.start()

    def new_controller(self, name: str) -> ControllerProcess:
        return ControllerProcess(self.nats.url, CELLOS_CONTROLLER_ID=name, CELLOS_CONTROLLER_LEASE_MS=str(LEASE_MS))

    def new_node(self, place: Path, name: str) -> NodeProcess:
        return NodeProcess(
            self.nats.url,
            CELLOS_STATE_DIR=str(place / name),
            CELLOS_NODE_ID=name,
            CELLOS_NODE_SLOTS="2",
            CELLOS_NODE_LEASE_MS=str(LEASE_MS),
            CELLOS_NODE_DRAIN_MS="1000",
        )

    def stop(self) -> None:
        for each in (*self.nodes, self.controller, self.extra, self.server):
            if each is not None:
                each.stop()
        self.nats.stop()

    def ask(self, method: str, path: str, **how: Any) -> httpx2.Response:
        """Until somebody answers something else than that he cannot."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                headers = {"Authorization": f"Bearer {TOKEN}", **how.get("headers", {})}
                answer = httpx2.request(method, self.server.url + path, timeout=20, trust_env=False, **{**how, "headers": headers})
                if answer.status_code < 500:
                    return answer
            except (httpx2.TransportError, OSError):
                pass
            assert time.monotonic() < deadline, f"{method} {path} was not answered"
            time.sleep(0.05)


def paused(process: Any, seconds: float) -> None:
    """Stopped as by a machine that sleeps; everything else goes on."""
    process.signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.signal(signal.SIGCONT)


def killed(process: Any) -> None:
    process.kill()
    process.start()


class Faults:
    """What can happen, by name."""

    def __init__(self, system: System, chance: random.Random) -> None:
        self.system = system
        self.chance = chance

    def cause(self, name: str) -> None:
        system = self.system
        node = self.chance.choice(system.nodes)
        match name:
            case "kill controller":
                killed(system.controller)
            case "kill server":
                killed(system.server)
            case "kill node":
                killed(node)
            case "kill nats":
                killed(system.nats)
            case "stop controller":
                paused(system.controller, 1.0)
            case "stop node beyond its lease":
                paused(node, LEASE_MS / 1000 * 2)
            case "stop node briefly":
                paused(node, LEASE_MS / 1000 / 4)
            case "nats away briefly":
                self._nats_away(LEASE_MS / 1000 / 4)
            case "nats away beyond the lease":
                self._nats_away(LEASE_MS / 1000 * 2)
            case "second controller":
                if system.extra is None:
                    system.extra = system.new_controller("c2")
                    system.extra.start()
                else:
                    system.extra.kill()
                    system.extra = None
            case "duplicate work":
                asyncio.run(self._repeat_work())

    def _nats_away(self, seconds: float) -> None:
        self.system.nats.pause()
        time.sleep(seconds)
        self.system.nats.go_on()

    async def _repeat_work(self) -> None:
        """The last things that were asked for, once more."""
        client = await connect(Settings(url=self.system.nats.url), name="test")
        log = EventLog(client)
        try:
            last = await log.tail()
            for stored in await log.read(max(0, last.sequence - 100), 100):
                if stored.subject.startswith("cellos.events.work."):
                    await log.publish(stored.subject, stored.data, message_id=str(uuid.uuid4()))
        finally:
            await client.close()


KINDS = (
    "kill controller",
    "kill server",
    "kill node",
    "kill nats",
    "stop controller",
    "stop node beyond its lease",
    "stop node briefly",
    "nats away briefly",
    "nats away beyond the lease",
    "second controller",
    "duplicate work",
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    found = System(tmp_path_factory.mktemp("system"))
    yield found
    found.stop()


async def read_log(url: str) -> list[Stored]:
    client = await connect(Settings(url=url), name="test")
    try:
        log, found = EventLog(client), []
        while page := await log.read(found[-1].sequence if found else 0, 1000):
            found += page
        return found
    finally:
        await client.close()


def log_of(system: System) -> list[Stored]:
    return asyncio.run(read_log(system.nats.url))


def until(what: Callable[[], Any], why: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {SECONDS:g} s: {why}"
        time.sleep(0.05)
    return found


def living() -> list[str]:
    """Programs of these tests' cells that run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if MARK.encode() in words:
            found.append(name)
    return found


def leases_lost(system: System) -> int:
    """How often the nodes of now have lost theirs, since they began."""
    return sum(line["fields"]["message"] in LEASE_LOST for node in system.nodes for line in node.log)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + ROUNDS))
def test_a_round_of_faults(system: System, seed: int) -> None:
    chance = random.Random(seed)
    lost = leases_lost(system)
    faults = [chance.choice(KINDS) for _ in range(chance.randint(1, 3))]
    pauses = [chance.uniform(0, 0.7) for _ in faults]
    wanted = documents(seed)
    ids: dict[str, str] = {}

    def write() -> None:
        for name, each in wanted.items():
            answer = system.ask("POST", "/v1/formations", json=each, headers={"Idempotency-Key": f"{MARK}-{name}"})
            assert answer.status_code == 201, answer.text
            ids[name] = answer.json()["id"]
        assert system.ask("DELETE", f"/v1/formations/{ids[f'deleted-{seed}']}").status_code == 204

    writer = threading.Thread(target=write)
    writer.start()
    for fault, pause in zip(faults, pauses, strict=True):
        time.sleep(pause)
        Faults(system, chance).cause(fault)
    writer.join(SECONDS)
    assert len(ids) == len(wanted), f"not all were acknowledged: {ids}"

    def statuses() -> dict[str, str]:
        return {name: system.ask("GET", f"/v1/formations/{each}").json()["status"] for name, each in ids.items()}

    def told() -> str:
        return f"{faults}: {statuses()}, {[system.ask('GET', f'/v1/formations/{each}/members').text for each in ids.values()]}"

    deadline = time.monotonic() + SECONDS
    while not all(status in TERMINAL for status in statuses().values()):
        assert time.monotonic() < deadline, f"not all have ended after {told()}"
        time.sleep(0.1)
    ended = statuses()
    assert ended[f"deleted-{seed}"] in {"CANCELLED", "FAILED"}, told()
    for name in ("stubborn", "flaky"):
        assert ended[f"{name}-{seed}"] == "COMPLETED", told()
    if HARMLESS.issuperset(faults) and leases_lost(system) == lost:  # a machine may keep a node from running for that long
        for name in ("single", "chain"):
            assert ended[f"{name}-{seed}"] == "COMPLETED", told()
    until(lambda: not living(), f"programs are left after {faults}")
    check_runs(log_of(system), set(ids.values()))


def check_runs(log: list[Stored], formations: set[str]) -> None:
    """Each attempt was asked for once, taken once, run once, ended once; and its chain holds.

    One that began, and was to be cancelled before any controller came to ask for it, is void without having been asked for.
    """
    asked: set[Attempt] = set()
    runs: dict[Attempt, list[Event]] = {}
    lines: list[bytes] = []
    for stored in log:
        attempt = attempt_of(stored.subject)
        if attempt is None or attempt.formation_id not in formations:
            continue
        event = parse_event(stored.data)
        if event.type == DISPATCHED:
            asked.add(attempt)
            continue
        assert attempt in asked or event.type == VOID, f"{attempt} was not asked for before {event.type}"
        runs.setdefault(attempt, []).append(event)
        if event.type != VOID:
            lines.append(stored.data)
    assert asked <= runs.keys(), "every attempt has an end"
    for attempt, events in runs.items():
        counts = Counter(event.type for event in events)
        if counts[VOID]:
            assert len(events) == 1, f"{attempt} was void, and ran: {counts}"
            continue
        assert (counts[CLAIMED], counts[DESTROYED]) == (1, 1), f"{attempt}: {counts}"
        assert counts[PROCESS_SPAWNED] <= 1, f"{attempt}: {counts}"
        assert (events[0].type, events[-1].type) == (CLAIMED, DESTROYED), f"{attempt}: {[event.type for event in events]}"
    report = verify(lines)
    assert report.faults == (), report.faults
    assert {run.state for run in report.runs} <= {"verified"}, [run for run in report.runs if run.state != "verified"]


class HeldNode(NodeProcess):
    """It stops itself at a step (node_held_at.py)."""

    step = ""

    @property
    def program(self) -> list[str]:
        return [str(Path(__file__).with_name("node_held_at.py")), self.step]


UNCLAIMED, LOST, TOLD = "it is as if nothing had been", "the run is lost, and tried again", "the run had ended"


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("spooled claim", UNCLAIMED),
        ("claimed", LOST),
        ("answered", LOST),
        ("recorded", LOST),
        ("created", LOST),
        ("started", LOST),
        ("destroying", LOST),
        ("destroyed", LOST),
        ("spooled end", TOLD),
        ("told", TOLD),
    ],
)
def test_a_node_that_is_killed_at_a_step(system: System, tmp_path: Path, step: str, outcome: str) -> None:
    pool = step.replace(" ", "-")
    variables = {"CELLOS_STATE_DIR": str(tmp_path), "CELLOS_NODE_ID": f"held-{pool}", "CELLOS_NODE_POOL": pool, "CELLOS_NODE_SLOTS": "1"}
    held = HeldNode(system.nats.url, **variables)
    held.step = step
    successor = NodeProcess(system.nats.url, **variables)
    try:
        held.start()
        member = {"id": "a", "pool": pool, "onNodeLost": "retry", "backoff": {"initialMs": 0}, "spec": spec("true")}
        answer = system.ask("POST", "/v1/formations", json=document(f"held-{pool}", member))
        assert answer.status_code == 201, answer.text
        formation = answer.json()["id"]
        until(lambda: _is_stopped(held.pid), f"the node came to {step}")
        held.kill()
        until(lambda: not living(), "its program is gone")
        successor.start()
        until(lambda: system.ask("GET", f"/v1/formations/{formation}").json()["status"] == "COMPLETED", "the formation ends")
        assert successor.stop() == 0
    finally:
        held.kill()
        successor.stop()
    log = log_of(system)
    check_runs(log, {formation})
    ends = [event.data for event in events_of(log, formation) if event.type == DESTROYED]
    reasons = [data.get("reason") for data in ends]
    assert reasons == (["node_restarted", None] if outcome == LOST else [None])
    assert [data["residueClass"] for data in ends] == ["none"] * len(ends)
    assert [str(path) for pattern in ("runs/*.json", "spool/*.jsonl") for path in tmp_path.rglob(pattern)] == []


def events_of(log: list[Stored], formation: str) -> list[Event]:
    return [parse_event(each.data) for each in log if (attempt := attempt_of(each.subject)) and attempt.formation_id == formation]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_the_lists_are_the_fold_of_the_log_and_nothing_is_left(system: System) -> None:
    log = log_of(system)
    projection = Projection()
    for stored in log:
        projection.apply(stored.sequence, stored.subject, stored.data, stored_ns=stored.time)
    cells, formations = lists(system, log[-1].sequence)
    assert json.loads(cells) == [json.loads(each) for each in projection.cells().parts]
    assert json.loads(formations)["formations"] == [json.loads(each) for each in projection.formations().parts]
    killed(system.server)
    assert lists(system, log[-1].sequence) == (cells, formations)
    for node in system.nodes:
        assert node.stop() == 0
        state = Path(node.variables["CELLOS_STATE_DIR"])
        assert [str(path) for pattern in ("runs/*.json", "spool/*.jsonl") for path in state.rglob(pattern)] == []
    assert living() == []


def lists(system: System, sequence: int) -> tuple[bytes, bytes]:
    """The cells and the formations, when the server has read so far."""

    def ready() -> bytes | None:
        content = system.ask("GET", "/v1/formations").content
        return content if json.loads(content)["cursor"] >= sequence else None

    formations = until(ready, "the lists are up to date")
    return system.ask("GET", "/v1/cells").content, formations
