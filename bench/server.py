"""What the control plane costs: requests, writes, replay, start, memory, fan-out; each against its promise.

    python bench/server.py [--json FILE] [--quick]

Times are CPU time of the server process, of NATS too where that is said; the client is this process. A bare Starlette route that returns
the same bytes is served by the same process, so the ratios are of one run. Exit code 1 where an answer was wrong; slowness is no failure.

A write waits for NATS, which syncs the batch to disk: milliseconds in which other programs take the processor's caches, and everything that
the server does next costs two to three times as much as in a row of requests. So the bare route is measured once more, at the pace of POST.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import uvloop
from projection import run_events
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cellos.eventlog.batch import Message
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.stream import ensure_stream
from cellos.server import ServerState, create_app
from cellos.server.config import Address
from cellos.server.main import open_server
from cellos.testing.nats_server import NatsServer
from cellos.testing.server_process import TOKEN, ServerProcess

CELLS = 100_000
PAGE = "/v1/cells?limit=100&after=c0050000"
ONE = "/v1/cells/c0054321"
SUBJECT = "cellos.events.v1"
TIME = "2026-11-21T10:00:00.000000000+00:00"
STARTED = "lifecycle.v1.started"
TICKS = os.sysconf("SC_CLK_TCK")


def cell_event(number: int, kind: str) -> bytes:
    data = {"cellId": f"c{number:07}", "specId": "build", "runId": f"r{number}", "exitCode": 0, "outcome": "succeeded"}
    event = {
        "specversion": "1.0",
        "id": str(uuid.UUID(int=number)),
        "source": "bench",
        "type": f"dev.cellos.events.cell.{kind}",
        "datacontenttype": "application/json",
        "data": data,
        "time": TIME,
        "traceparent": None,
    }
    return json.dumps(event, separators=(",", ":")).encode()


def cpu_seconds(pid: int) -> float:
    """User and system time, of all threads."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


# --- the process that serves both --------------------------------------------------------------------------------------------------------


async def serve(cells: int) -> None:
    state = ServerState(token=TOKEN)
    for number in range(cells):
        state.apply(number + 1, SUBJECT, cell_event(number, STARTED))
    record = state.projection.cell(ONE.rpartition("/")[2]) or b""

    async def bare(request: Request) -> Response:
        return Response(record, media_type="application/json")

    plain = Starlette(routes=[Route("/v1/cells/{id}", bare)])
    servers = [await open_server(app, Address("127.0.0.1", 0), "") for app in (create_app(state), plain)]
    print(json.dumps([server.address for server in servers]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent is gone
    await asyncio.gather(*(server.end() for server in servers))


class Connection:
    """Keep-alive, one request after the other."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), 30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        status = int(self._file.readline().split()[1])
        length = 0
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, self._file.read(length)


class Bench:
    """All measurements. `failures` are wrong answers."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []

    def run(self) -> None:
        command = [sys.executable, __file__, "--serve", str(CELLS)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdin is not None
            ours, bare = json.loads(child.stdout.readline())
            self.requests(child.pid, ours, bare)
            self.log(child.pid, bare)
            child.stdin.close()

    def note(self, name: str, value: float, promised: float | None, unit: str) -> None:
        self.results[name] = {"value": value, "promised": promised, "unit": unit}
        limit = "" if promised is None else f"   (promised: {promised:g} {unit})"
        print(f"{name:44} {value:10.2f} {unit}{limit}")

    def check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.failures.append(what)

    def requests(self, pid: int, ours: str, bare: str) -> None:
        self.check(Connection(ours).ask("GET", ONE) == Connection(bare).ask("GET", ONE), "one cell is not the bytes of the bare route")
        self.check(len(json.loads(Connection(ours).ask("GET", PAGE)[1])) == 100, "a page is not of 100 cells")
        count = 2_000 if self.quick else 8_000
        rounds: dict[str, list[float]] = {"bare": [], "one": [], "page": []}
        for _ in range(3):
            for name, address, path in (("bare", bare, ONE), ("one", ours, ONE), ("page", ours, PAGE)):
                ask = partial(Connection(address).ask, "GET", path)
                rounds[name].append(self._cpu_us(pid, count, ask))
        bare_us, one_us, page_us = (statistics.median(rounds[name]) for name in ("bare", "one", "page"))
        self.note("bare Starlette route", bare_us, None, "us")
        self.note("GET one cell", one_us, None, "us")
        self.note("GET one cell / bare route", one_us / bare_us, 1.4, "")
        self.note("page of 100 of 100,000 / GET one cell", page_us / one_us, 4, "")

    @staticmethod
    def _cpu_us(pid: int, count: int, action: Callable[[], object]) -> float:
        begun = cpu_seconds(pid)
        for _ in range(count):
            action()
        return (cpu_seconds(pid) - begun) / count * 1e6

    def log(self, bare_pid: int, bare: str) -> None:
        """Everything that needs NATS."""
        with tempfile.TemporaryDirectory() as directory, NatsServer(f"{directory}/nats") as nats:
            with ServerProcess(nats.url) as server:
                empty_cpu, empty_rss = cpu_seconds(server.pid), resident(server.pid)
                self._writes(server, bare_pid, bare)
                self._idle(server)
                self._fan_out(nats, server)
            with NatsServer(f"{directory}/replayed") as large:
                self._replay(large, directory, empty_cpu, empty_rss)

    def _writes(self, server: ServerProcess, bare_pid: int, bare: str) -> None:
        count = 300 if self.quick else 1_500
        connection = Connection(server.address)
        statuses = set()
        numbers = iter(range(count))

        def post() -> None:
            document = {"name": f"f{next(numbers)}", "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}]}
            statuses.add(connection.ask("POST", "/v1/formations", json.dumps(document).encode())[0])

        begun = time.monotonic()
        post_us = self._cpu_us(server.pid, count, post)
        took = (time.monotonic() - begun) / count
        self.check(statuses == {201}, f"POST answered {statuses}")
        plain = Connection(bare)

        def paced() -> None:
            next_one = time.monotonic() + took
            plain.ask("GET", ONE)
            time.sleep(max(0.0, next_one - time.monotonic()))

        paced_us = self._cpu_us(bare_pid, count, paced)
        self.note("POST acknowledged", post_us, 700, "us")
        self.note("POST / bare route", post_us / self.results["bare Starlette route"]["value"], None, "")
        self.note("POST, from request to answer", took * 1e3, None, "ms")
        self.note("bare route at the pace of POST", paced_us, None, "us")
        self.note("POST / bare route at that pace", post_us / paced_us, None, "")

    def _idle(self, server: ServerProcess) -> None:
        count = 200 if self.quick else 1_000
        before = resident(server.pid)
        clients = [open_stream(server.address) for _ in range(count)]
        self.note(f"{count} idle WebSocket clients", (resident(server.pid) - before) / 1e6, 60 * count / 1000, "MB")
        for client in clients:
            client.close()

    def _fan_out(self, nats: NatsServer, server: ServerProcess) -> None:
        clients, count = 100, 500 if self.quick else 3_000
        nats_pid = nats.pid
        streams = [open_stream(server.address) for _ in range(clients)]
        before = cpu_seconds(server.pid) + cpu_seconds(nats_pid)
        asyncio.run(write(nats.url, [cell_event(number, STARTED) for number in range(count)]))
        expected = received(streams, count)
        cost = cpu_seconds(server.pid) + cpu_seconds(nats_pid) - before
        self.note(f"fan-out to {clients} clients, per frame", cost / (clients * count) * 1e6, 3, "us")
        self.check(expected, "a client did not get every event")

    def _replay(self, nats: NatsServer, directory: str, empty_cpu: float, empty_rss: int) -> None:
        cells = 5_000 if self.quick else 50_000
        written = 0
        for begin in range(0, cells, 1_000):
            events = [event for number in range(begin, begin + 1_000) for event in run_events(number)]
            asyncio.run(write(nats.url, events))
            written += len(events)
        starts = []
        for _ in range(2):
            with ServerProcess(nats.url, CELLOS_SERVER_STATE_DIR=f"{directory}/state") as server:
                server.wait_for("replay_complete")
                starts.append(cpu_seconds(server.pid) - empty_cpu)
                self.check(len(json.loads(Connection(server.address).ask("GET", "/v1/cells")[1])) == cells, "cells are missing")
                if len(starts) == 1:
                    rss = resident(server.pid) - empty_rss
        replay, snapshot = starts[0], max(starts[1], 1 / TICKS)  # less than a tick cannot be seen
        self.note("replay", written / replay, 80_000, "events/s")
        self.note(f"start from a snapshot of {cells} cells", snapshot * 1e3, None, "ms")
        self.note("replay / start from the snapshot", replay / snapshot, 5, "")
        self.note("resident memory per cell record", rss / cells, 900, "bytes")


async def write(url: str, events: list[bytes]) -> None:
    """In atomic batches, which is the quickest way in."""
    client = await connect(Settings(url=url), name="bench")
    try:
        await ensure_stream(client)
        log = EventLog(client)
        for begin in range(0, len(events), 500):
            piece = events[begin : begin + 500]
            await log.publish_batch([Message(subject=SUBJECT, payload=each, message_id=uuid.uuid4().hex) for each in piece], timeout=60)
    finally:
        await client.close()


def open_stream(address: str) -> socket.socket:
    """A WebSocket after its handshake."""
    host, port = address.rsplit(":", 1)
    stream = socket.create_connection((host, int(port)), 30)
    head = "GET /ws/events HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    stream.sendall(f"{head}Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += stream.recv(1)
    assert answer.startswith(b"HTTP/1.1 101 ")
    return stream


def received(streams: list[socket.socket], count: int) -> bool:
    """Read until every client has so many frames; they are counted by the member that each begins with."""
    frames = dict.fromkeys(streams, 0)
    rests = dict.fromkeys(streams, b"")
    deadline = time.monotonic() + 120
    with selectors.DefaultSelector() as selector:
        for each in streams:
            each.setblocking(False)
            selector.register(each, selectors.EVENT_READ)
        while min(frames.values()) < count and time.monotonic() < deadline:
            for key, _ in selector.select(1):
                stream: Any = key.fileobj
                data = rests[stream] + stream.recv(1 << 20)
                frames[stream] += data.count(b'{"seq":')
                rests[stream] = data[-6:]
    return set(frames.values()) == {count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a look")
    parser.add_argument("--serve", type=int, metavar="CELLS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options.serve))
        return 0
    bench = Bench(quick=options.quick)
    bench.run()
    for failure in bench.failures:
        print(f"WRONG: {failure}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"python": platform.python_version(), "machine": platform.machine(), **bench.results}, file, indent=1)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
