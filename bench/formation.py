"""What running formations costs: the way from POST to a member's first instruction, cells per second, the controller's share.

    python bench/formation.py [--json FILE] [--quick]

Everything is real: `cellos up` with its NATS, server, controller and node, isolated cells, every event acknowledged. Times are wall time
where nothing else is said; CPU is that of one process. The baseline are the same cells in a process that only makes cells, one at a time on
each processor. Exit code 1 where an answer was wrong; slowness is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from warm import Warm

from cellos.client.address import Address, read_token
from cellos.client.server import Server
from cellos.core.events import DESTROYED, PREFIX, PROCESS_SPAWNED, parse_event
from cellos.core.formation.runs import runs_of
from cellos.core.ids import unix_ns

SPEC = {"run": {"argv": ["/bin/true"]}, "authority": {}, "lifetime": {"ttlSeconds": 60}}
TICKS = os.sysconf("SC_CLK_TCK")
PARTS = ("cellos.server.main", "cellos.controller.main", "cellos.node.main", "nats-server")
CLIENTS = 4
LATENCY_RUNS = 30


class WrongAnswerError(Exception):
    """Something did not end as it had to."""


class System:
    """A `cellos up` in a directory of its own."""

    def __init__(self, process: subprocess.Popen[str], facts: dict[str, Any]) -> None:
        self.address = Address(url=facts["server"], token=read_token(facts["token"]), given=True)
        self._pids = {part: _find(process.pid, part) for part in PARTS}

    def cpu(self, part: str) -> float:
        """Seconds of CPU of a part until now, its children that ended included."""
        with open(f"/proc/{self._pids[part]}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return sum(int(fields[place]) for place in (11, 12, 13, 14)) / TICKS

    def server(self) -> Server:
        return Server(self.address)


@contextlib.contextmanager
def system(*options: str) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="cellos-bench-") as directory:
        command = [sys.executable, "-m", "cellos.cli.main", "up", "--dir", directory, "--bind", "127.0.0.1:0", "--json", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise WrongAnswerError("`cellos up` did not start")
            yield System(process, json.loads(line))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _find(root: int, word: str) -> int:
    """The process below `root` that runs `word` itself, not the lifeline that holds it."""
    with open(f"/proc/{root}/task/{root}/children") as file:
        children = [int(each) for each in file.read().split()]
    for child in children:
        with open(f"/proc/{child}/cmdline", "rb") as file:
            line = file.read().decode(errors="replace")
        if word in line and "lifeline" not in line:
            return child
        with contextlib.suppress(LookupError):
            return _find(child, word)
    raise LookupError(word)


def single(name: str) -> bytes:
    return json.dumps({"name": name, "coordinator": "only", "members": [{"id": "only", "spec": SPEC}]}).encode()


def wide(name: str, count: int) -> bytes:
    members: list[dict[str, Any]] = [{"id": "m0", "use": "t"}]
    members += [{"id": f"m{number}", "authorizedBy": "m0", "use": "t"} for number in range(1, count)]
    return json.dumps({"name": name, "coordinator": "m0", "templates": {"t": SPEC}, "members": members}, separators=(",", ":")).encode()


def wait(server: Server, ids: Sequence[str], seconds: float) -> None:
    """Until all are COMPLETED. Asked seldom, and first only about the one that was submitted last: who waits should not be the load."""
    deadline = time.monotonic() + seconds
    last, pause = ids[-1], 0.02 if len(ids) == 1 else 0.1
    while True:
        records = {last: server.formation(last)["status"]}
        if len(ids) > 1 and records[last] == "COMPLETED":
            records = {record["id"]: record["status"] for record in server.formations()}
        for ident in set(ids) & set(records):
            if records[ident] in {"FAILED", "CANCELLED", "DEGRADED"}:
                raise WrongAnswerError(f"formation {ident} is {records[ident]}")
        if all(records.get(ident) == "COMPLETED" for ident in ids):
            return
        if time.monotonic() > deadline:
            raise WrongAnswerError(f"the {len(ids)} formations have not ended after {seconds:g} s")
        time.sleep(pause)


def times(server: Server, formation: str) -> dict[str, int]:
    """When each type of event of a formation's runs came first, in nanoseconds."""
    found: dict[str, int] = {}
    for entry in server.events(limit=1000, subject=runs_of(formation)).events:
        event = parse_event(bytes(entry.event))
        found.setdefault(event.type, unix_ns(event.time or ""))
    return found


def latency(found: System, runs: int) -> dict[str, float]:
    """Milliseconds from POST to the answer, and to the first instruction of the member's program."""
    answers: list[float] = []
    first: list[float] = []
    with found.server() as server:
        for number in range(runs):
            began = time.time_ns()
            ident = server.apply(single(f"latency-{number}")).id
            answers.append((time.time_ns() - began) / 1e6)
            wait(server, [ident], 30)
            first.append((times(server, ident)[PROCESS_SPAWNED] - began) / 1e6)
    return {"post_ms": statistics.median(answers), "first_instruction_ms": statistics.median(first), "slowest_ms": max(first)}


def throughput(found: System, count: int) -> dict[str, float]:
    """Formations of one member each, from the first POST to the last COMPLETED. The clients take the same processors, so they do little."""
    began = time.monotonic()
    before = {part: found.cpu(part) for part in PARTS}
    host = found.address.url.removeprefix("http://")
    headers = {"Authorization": f"Bearer {found.address.token}"}

    def post(share: range) -> list[str]:
        connection = http.client.HTTPConnection(host)
        made = []
        for number in share:
            connection.request("POST", "/v1/formations", single(f"many-{number}"), headers)
            answer = json.loads(connection.getresponse().read())
            made.append(answer["id"])
        connection.close()
        return made

    with ThreadPoolExecutor(CLIENTS) as pool:
        ids = [ident for some in pool.map(post, [range(start, count, CLIENTS) for start in range(CLIENTS)]) for ident in some]
    with found.server() as server:
        wait(server, ids, 300)
        took = time.monotonic() - began
        shares = {
            f"cpu_ms_{part.split('.')[-2] if '.' in part else part}": (found.cpu(part) - before[part]) * 1e3 / count for part in PARTS
        }
        events = 0
        for ident in ids:
            page = server.events(limit=1000, subject=runs_of(ident)).events
            kinds = [parse_event(bytes(entry.event)).type for entry in page]
            if kinds[0] != f"{PREFIX}run.v1.claimed" or kinds[-1] != DESTROYED or kinds.count(DESTROYED) != 1:
                raise WrongAnswerError(f"the events of {ident} are {kinds}")
            events += len(kinds)
    return {"cells_per_second": count / took, "events_per_cell": events / count, **shares}


def alone(count: int) -> dict[str, float]:
    """Cells per second with record, spool and chain, and without anything around them."""
    threads = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="cellos-bench-") as directory,
        Warm({"CELLOS_STATE_DIR": directory}, directory) as warm,
        ThreadPoolExecutor(threads) as pool,
    ):
        list(pool.map(lambda _: warm.run(), range(threads)))
        began = time.monotonic()
        list(pool.map(lambda _: warm.run(), range(count)))
        return {"cells_alone_per_second": count / (time.monotonic() - began)}


def controller(found: System, sizes: Sequence[int]) -> dict[str, float]:
    """Milliseconds of the controller's CPU per member, by the number of members."""
    cost = {}
    with found.server() as server:
        for size in sizes:
            before = found.cpu("cellos.controller.main")
            wait(server, [server.apply(wide(f"wide-{size}", size)).id], 600)
            cost[f"controller_ms_per_member_{size}"] = (found.cpu("cellos.controller.main") - before) * 1e3 / size
    return cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    sizes = (10, 100) if options.quick else (10, 100, 1000)
    try:
        with system() as found:
            latency(found, 3)  # the first cells find everything cold
            result = latency(found, LATENCY_RUNS // scale or 3) | throughput(found, 500 // scale)
        with system("--slots", str(2 * len(os.sched_getaffinity(0)))) as found:
            latency(found, 3)
            result["cells_per_second_two_slots"] = throughput(found, 500 // scale)["cells_per_second"]
        result |= alone(200 // scale)
        with system() as found:
            result |= controller(found, sizes)
    except WrongAnswerError as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    report(result, sizes)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
    return 0


def report(result: dict[str, float], sizes: Sequence[int]) -> None:
    def line(what: str, value: float, unit: str, promise: str = "") -> None:
        print(f"{what:52} {value:10.2f} {unit:10} {f'(promised: {promise})' if promise else ''}".rstrip())

    post, first = result["post_ms"], result["first_instruction_ms"]
    line("POST of one member, answered", post, "ms")
    line("POST to the member's first instruction, median", first, "ms", "50 ms")
    line("                                       slowest", result["slowest_ms"], "ms")
    line("first instruction / answer", first / post, "")
    print("one-member formations, all events acknowledged")
    line("  a slot for each processor, as by default", result["cells_per_second"], "cells/s", "60 cells/s")
    line("  two slots for each processor", result["cells_per_second_two_slots"], "cells/s", "60 cells/s")
    line("  the same cells alone", result["cells_alone_per_second"], "cells/s")
    line("  formations / alone", result["cells_per_second"] / result["cells_alone_per_second"], "")
    line("events per cell", result["events_per_cell"], "")
    for part in ("server", "controller", "node", "nats-server"):
        line(f"  CPU per cell: {part}", result[f"cpu_ms_{part}"], "ms")
    for size in sizes:
        promise = "3 ms" if size == max(sizes) else ""
        line(f"controller CPU per member, {size} members", result[f"controller_ms_per_member_{size}"], "ms", promise)
    few, many = (result[f"controller_ms_per_member_{size}"] for size in (min(sizes), max(sizes)))
    line(f"per member, {max(sizes)} / {min(sizes)} members", many / few if few else 0.0, "", "flat")


if __name__ == "__main__":
    sys.exit(main())
