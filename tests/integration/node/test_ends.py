"""How a node ends, and what the next one makes of what it left: signals, kill -9, NATS away, somebody of the same name."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cellos.core import events
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.verify import verify
from cellos.core.formation.runs import CLAIMED
from cellos.errors import ConfigError
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.leases import NODES, Leases, NodeLease, ensure_leases
from cellos.node.lease import refuse_namesake
from cellos.testing.daemon_process import NodeProcess
from cellos.testing.nats_server import NatsServer

pytestmark = pytest.mark.linux_backend

LEASE_SECONDS = 5.0
"""Long enough for a node that a loaded machine does not let run for a while."""
LEASE = {"CELLOS_NODE_LEASE_MS": f"{LEASE_SECONDS * 1000:.0f}"}
SECONDS = 60.0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for {what}"
        time.sleep(0.02)
    return answer


def unique() -> str:
    """An argument of `sleep` by which its process is found on the host."""
    return f"600.{int.from_bytes(os.urandom(6), 'big')}"


def alive(argument: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if argument.encode() in words:
            found.append(pid)
    return found


def home_of(node: NodeProcess) -> Path:
    return Path(node.variables["CELLOS_STATE_DIR"], "nodes", node.variables["CELLOS_NODE_ID"])


def groups_of(node: NodeProcess) -> list[str]:
    """Control groups of the cells that its records name."""
    records = [json.loads(path.read_bytes()) for path in (home_of(node) / "runs").glob("*.json")]
    return [group for record in records for group in record["footprint"]["cgroups"]]


def left(node: NodeProcess) -> list[str]:
    return sorted(path.name for path in home_of(node).rglob("*") if path.is_file() and path.name not in {"lock", "life"})


def pool_of(node: NodeProcess) -> str:
    return node.variables["CELLOS_NODE_POOL"]


def test_drained_it_waits_for_its_cells(log: Any, nats: NatsServer, nodes: Any, held: Any) -> None:
    node = nodes(nats.url)
    attempt = log.dispatch("sh", "-c", held.wait, authority=held.authority, pool=pool_of(node))
    log.until_runs(attempt)
    node.signal(signal.SIGTERM)
    wait_for(lambda: any(each.draining and not each.eligible for each in log.nodes().values() if each.pool == pool_of(node)), "the lease")
    late = log.dispatch("true", pool=pool_of(node))
    held.go_on()
    assert node.wait() == 0
    assert log.until_ended(attempt)["outcome"] == "succeeded"
    assert log.stored(late) == []
    assert [each for each in log.nodes().values() if each.pool == pool_of(node)] == []
    assert left(node) == []
    nodes(nats.url, **node.variables)
    assert log.until_ended(late)["outcome"] == "succeeded"


def test_after_the_time_to_drain_cells_are_ended(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url, CELLOS_NODE_DRAIN_MS="100")
    mark = unique()
    attempt = log.dispatch("sleep", mark, pool=pool_of(node))
    log.until_runs(attempt)
    assert node.stop() == 0
    destroyed = log.until_ended(attempt)
    assert (destroyed["outcome"], destroyed["reason"]) == ("failed", "node_drained")
    assert (alive(mark), left(node)) == ([], [])


def test_a_second_signal_ends_it_at_once_and_the_next_start_tells_the_rest(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url)
    mark = unique()
    attempt = log.dispatch("sleep", mark, pool=pool_of(node))
    log.until_runs(attempt)
    node.signal(signal.SIGTERM)
    node.wait_for("draining")
    node.signal(signal.SIGTERM)
    assert node.wait() == 128 + signal.SIGTERM
    wait_for(lambda: not alive(mark), "the end of the cell")
    nodes(nats.url, **node.variables)
    assert log.until_ended(attempt)["reason"] == "node_restarted"


def test_killed_it_leaves_nothing_and_the_next_start_ends_its_runs(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url, CELLOS_NODE_LEASE_MS="600000")
    mark = unique()
    attempts = [log.dispatch("sleep", mark, pool=pool_of(node), member=f"m{number}") for number in range(2)]
    for attempt in attempts:
        log.until_runs(attempt)
    groups = groups_of(node)
    life = log.until_claimed(attempts[0])["life"]
    node.kill()
    wait_for(lambda: not alive(mark), "the end of the cells")
    assert log.lease(life) is not None
    nodes(nats.url, **node.variables)
    for attempt in attempts:
        destroyed = log.until_ended(attempt)
        assert (destroyed["outcome"], destroyed["reason"], destroyed["terminalState"]) == ("failed", "node_restarted", "forced")
    assert log.lease(life) is None, "nobody has to wait for its end"
    assert [group for group in groups if os.path.exists(group)] == []
    assert left(node) == []
    assert log.until_ended(log.dispatch("true", pool=pool_of(node)))["outcome"] == "succeeded"


def test_a_signed_record_is_signed_to_its_end_by_the_next_start(log: Any, nats: NatsServer, nodes: Any) -> None:
    key = os.urandom(32)
    signing = {"CELLOS_EVENT_SIGNING": "hmac", "CELLOS_EVENT_SIGNING_KID": "k"}
    node = nodes(nats.url, **signing, CELLOS_EVENT_SIGNING_KEY_BASE64=base64.urlsafe_b64encode(key).decode())
    attempt = log.dispatch("sleep", "600", pool=pool_of(node))
    log.until_runs(attempt)
    node.kill()
    nodes(nats.url, **node.variables)
    assert log.until_ended(attempt)["reason"] == "node_restarted"
    lines = [stored.data + b"\n" for stored in log.stored(attempt)]
    [run] = verify(lines, ring=Keyring(hmac={"k": key}), require_signed=True).runs
    assert (run.state, run.signature, run.signers) == ("verified", "verified", ("k",))


def test_killed_and_closed_by_a_controller(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url)
    attempt = log.dispatch("sleep", "600", pool=pool_of(node))
    log.until_runs(attempt)
    node.kill()
    last = log.stored(attempt)[-1]
    closed = events.Event(id=log.new_id(), source="test", type=events.DESTROYED, data={"reason": "node_lost"})
    log.write(last.subject, closed, expected_last=last.sequence)
    nodes(nats.url, **node.variables)
    assert log.events(attempt)[-1].id == closed.id
    assert [name.rpartition(".")[2] for name in left(node)] == ["refused"]


def test_a_life_that_was_declared_over_ends_its_runs_and_another_begins(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url, **LEASE)
    mark = unique()
    attempt = log.dispatch("sleep", mark, pool=pool_of(node), on_disconnect="finish")
    log.until_runs(attempt)
    life = log.until_claimed(attempt)["life"]
    log.do(log.leases.delete(NODES + life, None))
    assert log.until_ended(attempt)["reason"] == "node_lost"
    assert alive(mark) == []
    next_one = log.dispatch("true", pool=pool_of(node))
    log.until_ended(next_one)
    assert log.until_claimed(next_one)["life"] != life
    assert life not in log.nodes()


def test_nats_away_for_less_than_the_lease(make_server: Any, open_log: Any, nodes: Any) -> None:
    server = make_server()
    with open_log(server.url) as log:
        node = nodes(server.url, CELLOS_NODE_LEASE_MS="60000")
        mark = f"1.{unique()[4:]}"
        short, long = log.dispatch("sleep", mark, pool=pool_of(node)), log.dispatch("sleep", "600", pool=pool_of(node))
        log.until_runs(short)
        log.until_runs(long)
        server.stop()
        wait_for(lambda: not alive(mark), "its end")
        server.start()
        assert log.until_ended(short)["outcome"] == "succeeded"
        log.cancel(long.formation_id)
        assert log.until_ended(long)["reason"] == "cancelled"


def test_nats_away_for_longer_than_the_lease(make_server: Any, open_log: Any, nodes: Any) -> None:
    """What may finish without it goes on; the rest is ended. The key is still there afterwards, so the life goes on, too."""
    server = make_server()
    with open_log(server.url) as log:
        node = nodes(server.url, **LEASE, CELLOS_NODE_DRAIN_MS="0")
        kills, finishes = unique(), unique()
        killed = log.dispatch("sleep", kills, pool=pool_of(node))
        kept = log.dispatch("sleep", finishes, pool=pool_of(node), on_disconnect="finish")
        log.until_runs(killed)
        log.until_runs(kept)
        life = log.until_claimed(killed)["life"]
        server.stop()
        wait_for(lambda: not alive(kills), "the end of the cell")
        assert alive(finishes)
        server.start()
        assert log.until_ended(killed)["reason"] == "node_lost"
        later = log.dispatch("true", pool=pool_of(node))
        log.until_ended(later)
        assert log.until_claimed(later)["life"] == life
        assert alive(finishes)
        assert node.stop() == 0


def test_stopped_for_longer_than_the_lease(log: Any, nats: NatsServer, nodes: Any) -> None:
    """As the process of a host that sleeps: the first thing that it does afterwards is to end its runs."""
    node = nodes(nats.url, **LEASE)
    mark = unique()
    attempt = log.dispatch("sleep", mark, pool=pool_of(node))
    log.until_runs(attempt)
    life = log.until_claimed(attempt)["life"]
    node.signal(signal.SIGSTOP)
    wait_for(lambda: time.time_ns() - log.lease(life).created_ns > (LEASE_SECONDS + 0.2) * 1e9, "the end of the lease")
    node.signal(signal.SIGCONT)
    assert log.until_ended(attempt)["reason"] == "node_lost"
    assert alive(mark) == []


def test_two_of_one_name(log: Any, nats: NatsServer, nodes: Any, tmp_path: Path) -> None:
    node = nodes(nats.url, **LEASE)
    here = nodes(nats.url, wait=False, **node.variables)
    assert here.wait() == 1
    fatal = here.log[-1]["fields"]
    assert (fatal["message"], fatal["code"]) == ("cellos-node fatal", "config")
    assert f"as process {node.pid}" in fatal["error"]
    elsewhere = nodes(nats.url, wait=False, **(node.variables | {"CELLOS_STATE_DIR": str(tmp_path / "elsewhere")}))
    assert elsewhere.wait() == 1
    fatal = elsewhere.log[-1]["fields"]
    assert node.variables["CELLOS_NODE_ID"] in fatal["error"]
    assert f"as process {node.pid}" in fatal["error"]


def test_one_that_may_be_alive_is_waited_for(nats: NatsServer) -> None:
    """For the rest of its lease, by the clock of NATS; one that gives a sign of life is not taken for dead."""

    def lease(life: str, node: str) -> bytes:
        numbers = dict.fromkeys(("pid", "slots", "slots_free", "memory_bytes", "memory_free", "cpu_micros", "cpu_free"), 1)
        lease_ms = 60_000 if life == "alive" else 1000
        found = NodeLease(node=node, life=life, host="h", pool="p", classes=("base",), lease_ms=lease_ms, started_at="", **numbers)
        return msgspec.json.encode(found)

    async def test() -> None:
        client = await connect(Settings(url=nats.url), name="test")
        try:
            await ensure_leases(client)
            leases = Leases(client)
            began = time.monotonic()
            for life, node in (("dead", "a"), ("own", "a"), ("alive", "b")):
                await leases.put(NODES + life, lease(life, node), 0)
            await refuse_namesake(client, "a", own="own")
            assert time.monotonic() - began > 0.99
            await leases.put(NODES + "alive", lease("alive", "b"), None)
            refusing = asyncio.create_task(refuse_namesake(client, "b", own=None))
            while not refusing.done():
                await leases.put(NODES + "alive", lease("alive", "b"), None)
                await asyncio.sleep(0.05)
            with pytest.raises(ConfigError, match="a node b runs already, on host h as process 1"):
                refusing.result()
            for life in ("dead", "own", "alive"):
                await leases.delete(NODES + life, None)
        finally:
            await client.close()

    asyncio.run(test())


def test_without_its_launcher_it_ends(log: Any, nats: NatsServer, nodes: Any) -> None:
    """It would fail whatever it is given: whoever started it is to start it again."""
    node = nodes(nats.url, CELLOS_NODE_DRAIN_MS="0")
    attempt = log.dispatch("sleep", "600", pool=pool_of(node))
    log.until_runs(attempt)
    for child in Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert node.wait() == 1
    assert node.log[-1]["fields"]["code"] == "host_backend"
    assert log.until_ended(attempt)["reason"] == "node_drained"


def test_two_nodes_share_the_work_of_a_pool(log: Any, nats: NatsServer, nodes: Any) -> None:
    first = nodes(nats.url, CELLOS_NODE_SLOTS="1", CELLOS_NODE_DRAIN_MS="0")
    second = nodes(nats.url, CELLOS_NODE_SLOTS="1", CELLOS_NODE_DRAIN_MS="0", CELLOS_NODE_POOL=pool_of(first))
    attempts = [log.dispatch("sleep", "600", pool=pool_of(first)) for _ in range(2)]
    claims = {log.until_claimed(attempt)["node"] for attempt in attempts}
    assert claims == {node.variables["CELLOS_NODE_ID"] for node in (first, second)}


def test_what_does_not_fit_waits(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url, CELLOS_NODE_SLOTS="1")
    first, second = log.dispatch("sleep", "600", pool=pool_of(node)), log.dispatch("true", pool=pool_of(node))
    log.until_runs(first)
    assert log.stored(second) == []
    log.cancel(first.formation_id)
    log.until_ended(first)
    assert log.until_ended(second)["outcome"] == "succeeded"


@pytest.mark.needs("limit memory", "limit processor time")
def test_declared_memory_is_counted(log: Any, nats: NatsServer, nodes: Any) -> None:
    node = nodes(nats.url, CELLOS_NODE_MEMORY_BYTES=str(100 << 20), **LEASE)
    limits = {"limits": {"memoryMaxBytes": 64 << 20}}
    first = log.dispatch("sleep", "600", pool=pool_of(node), work="limits", run=limits)
    log.until_runs(first)
    second = log.dispatch("true", pool=pool_of(node), work="limits", run=limits)
    never = log.dispatch("true", pool=pool_of(node), work="limits", run={"limits": {"memoryMaxBytes": 1 << 30}})
    log.until_ended(log.dispatch("true", pool=pool_of(node)))
    wait_for(lambda: log.node_of(pool_of(node)).memory_free == 36 << 20, "the lease")
    assert log.stored(second) == []
    log.cancel(first.formation_id)
    assert log.until_ended(second)["outcome"] == "succeeded"
    assert log.stored(never) == []
    assert CLAIMED not in [event.type for event in log.events(never)]


@pytest.mark.parametrize(("name", "value"), [("CELLOS_NODE_SLOTS", "0"), ("CELLOS_BROKER", "x"), ("CELLOS_NATS_URL", "http://x")])
def test_a_variable_that_cannot_be_used(nats: NatsServer, nodes: Any, name: str, value: str) -> None:
    node = nodes(nats.url, wait=False, **{name: value})
    assert node.wait() == 1
    fatal = node.log[-1]["fields"]
    assert fatal["code"] == "config"
    assert name in fatal["error"]


def test_a_server_without_jetstream_is_waited_for(make_server: Any, nodes: Any) -> None:
    """As one that has only just started."""
    node = nodes(make_server(jetstream=False).url, wait=False)
    assert "JetStream" in node.wait_for("no event log; trying again")["error"]
    assert node.stop() == 0


def test_it_can_be_ended_while_it_waits_for_nats(nodes: Any) -> None:
    node = nodes("nats://127.0.0.1:1", wait=False)
    node.wait_for("no event log; trying again")
    assert node.stop() == 0
