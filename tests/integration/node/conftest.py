"""A node as a process, and a test in the place of the controller."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cellos.core import events
from cellos.core.events import Event, canonical_bytes, parse_event
from cellos.core.evidence.verify import verify
from cellos.core.formation.events import phase_event, subject_of
from cellos.core.formation.runs import CLAIMED, Attempt, WorkClass, dispatched, run_subject, work_subject
from cellos.core.ids import UUID_RANDOM_BYTES, rfc3339, uuid7
from cellos.errors import EventLogError
from cellos.eventlog.api import ask
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.leases import NODES, Lease, Leases, NodeLease, ensure_leases, read_node
from cellos.eventlog.log import EventLog
from cellos.eventlog.output import Chunk, read_output
from cellos.eventlog.stored import Stored
from cellos.eventlog.stream import ensure_stream
from cellos.eventlog.work import consumer_name
from cellos.testing.daemon_process import NodeProcess
from cellos.testing.nats_server import NatsServer

SECONDS = 60.0
T = TypeVar("T")


def new_id() -> str:
    return uuid7(time.time_ns() // 1_000_000, os.urandom(UUID_RANDOM_BYTES))


class Log:
    """The log, and what a controller writes to it. Its own loop in a thread; every call blocks."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Log:
        self._thread.start()
        self.do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._client = await connect(Settings(url=self._url), name="test")
        await ensure_stream(self._client, max_bytes=64 << 20)
        await ensure_leases(self._client)
        self.log = EventLog(self._client)
        self.leases = Leases(self._client)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def write(self, subject: str, event: Event, *, expected_last: int | None = None) -> int:
        line = canonical_bytes(event)
        return self.do(self.log.publish(subject, line, message_id=event.id, expected_last=expected_last)).sequence

    # --- what a controller writes

    def dispatch(
        self,
        *argv: str,
        formation: str | None = None,
        member: str = "m",
        number: int = 1,
        pool: str = "default",
        work: WorkClass = "base",
        on_disconnect: str = "kill",
        run: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Attempt:
        """Ask for a cell that runs `argv`."""
        attempt = Attempt(formation or str(uuid.uuid4()), member, number)
        command = {"run": {"argv": list(argv), "secretDelivery": "env", **(run or {})}} if argv else {}
        body = {"authority": {}, "lifetime": {"ttlSeconds": 600}, **command, **spec}
        now = rfc3339(time.time_ns())
        event = dispatched(attempt, name="demo", pool=pool, work=work, spec=body, on_disconnect=on_disconnect, event_id=new_id(), time=now)
        self.write(work_subject(pool, work, attempt), event, expected_last=0)
        return attempt

    def cancel(self, formation: str) -> None:
        event = phase_event(
            formation, "cancelling", name="demo", cell_count=1, reason="test", event_id=new_id(), time=rfc3339(time.time_ns())
        )
        self.write(subject_of(formation, "cancelling"), event)

    # --- what is there

    new_id = staticmethod(new_id)
    run_subject = staticmethod(run_subject)

    def events_of(self, subject: str) -> list[Event]:
        found = self.do(self.log.last(subject))
        assert found is not None
        return [parse_event(found.data)]

    def log_has(self, subject: str, kind: str) -> bool:
        """Whether the last event there is of this type."""
        found = self.do(self.log.last(subject))
        return found is not None and parse_event(found.data).type == kind

    def waiting_work(self, pool: str, work: WorkClass = "base") -> int:
        """Messages of the queue that nobody has acknowledged."""
        answer = self.do(ask(self._client, f"CONSUMER.INFO.CELLOS_EVENTS.{consumer_name(pool, work)}"))
        info = json.loads(answer)
        return int(info["num_pending"] + info["num_ack_pending"])

    def node_of(self, pool: str) -> NodeLease:
        """As the node tells it from time to time."""
        [found] = [node for node in self.nodes().values() if node.pool == pool]
        return found

    def stored(self, attempt: Attempt) -> list[Stored]:
        """The events of an attempt."""
        found: list[Stored] = []
        after = 0
        while page := self.do(self.log.read(after, 1000)):
            found += [stored for stored in page if stored.subject == run_subject(attempt)]
            after = page[-1].sequence
        return found

    def events(self, attempt: Attempt) -> list[Event]:
        return [parse_event(stored.data) for stored in self.stored(attempt)]

    def last(self, attempt: Attempt) -> Event | None:
        found = self.do(self.log.last(run_subject(attempt)))
        return parse_event(found.data) if found is not None else None

    def until(self, question: Callable[[], T]) -> T:
        """Ask again until there is an answer, and it is true."""
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(EventLogError):
                if answer := question():
                    return answer
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.02)

    def until_type(self, attempt: Attempt, kind: str) -> Event:
        """The first event of that type."""
        return self.until(lambda: next((event for event in self.events(attempt) if event.type == kind), None))  # type: ignore[return-value]

    def until_claimed(self, attempt: Attempt) -> dict[str, Any]:
        return dict(self.until_type(attempt, CLAIMED).members)

    def until_runs(self, attempt: Attempt) -> None:
        self.until_type(attempt, events.PROCESS_SPAWNED)

    def until_ended(self, attempt: Attempt) -> dict[str, Any]:
        """Data of `destroyed`, after which nothing comes; the chain is that of one whole run."""

        def ended() -> Event | None:
            last = self.last(attempt)
            return last if last is not None and last.type == events.DESTROYED else None

        found = self.until(ended)
        assert found is not None
        self.verify(attempt)
        return dict(found.members)

    def verify(self, attempt: Attempt) -> None:
        report = verify([stored.data + b"\n" for stored in self.stored(attempt)])
        assert report.verified, report
        assert len(report.runs) == 1
        assert report.runs[0].start_checked

    def output(self, run_id: str) -> list[Chunk]:
        async def read() -> list[Chunk]:
            return [chunk async for chunk in read_output(self._client, run_id, follow=True)]

        return self.do(read())

    def nodes(self) -> dict[str, NodeLease]:
        """Life to what the node says of itself."""
        found = [read_node(lease) for lease in self.do(self.leases.entries(NODES))]
        return {node.life: node for node in found if node is not None}

    def lease(self, life: str) -> Lease | None:
        return next((lease for lease in self.do(self.leases.entries(NODES)) if lease.key == NODES + life), None)


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One for all nodes whose test does nothing to it: they have pools of their own."""
    with NatsServer(str(tmp_path_factory.mktemp("nats"))) as server:
        yield server


@pytest.fixture(scope="session")
def log(nats: NatsServer) -> Iterator[Log]:
    with Log(nats.url) as log:
        yield log


class Nodes:
    """Starts nodes, each with a name, a pool and a state directory of its own where nothing else is said."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.started: list[NodeProcess] = []

    def __call__(self, url: str, *, wait: bool = True, **variables: str) -> NodeProcess:
        name = f"n-{os.urandom(4).hex()}"
        given = {"CELLOS_STATE_DIR": str(self.place / "state"), "CELLOS_NODE_ID": name, "CELLOS_NODE_POOL": name, "CELLOS_NODE_SLOTS": "4"}
        process = NodeProcess(url, **(given | variables))
        self.started.append(process)
        if wait:
            process.start()
        else:
            process.launch()
        return process

    def end(self) -> None:
        for process in self.started:
            process.kill()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.end()


SECRET = "correct horse battery staple"


@pytest.fixture(scope="module")
def shared(nats: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that the tests of a module share."""
    nodes = Nodes(tmp_path_factory.mktemp("node"))
    pack = nodes.place / "pack.json"
    pack.write_text(
        json.dumps(
            {
                "apiVersion": "cellos.io/v1",
                "kind": "PolicyPack",
                "spec": {"id": "house", "version": "1.0.0", "rules": {"maxLifetimeTtlSeconds": 3600}},
            }
        )
    )
    node = nodes(
        nats.url,
        CELLOS_BROKER="env",
        CELLOS_SECRET_TOKEN=SECRET,
        CELLOS_POLICY_PACK_PATH=str(pack),
        CELLOS_EXPORT_DIR=str(nodes.place / "out"),
    )
    yield node
    assert node.stop() == 0
    left = [path for path in (nodes.place / "state").rglob("*") if path.is_file()]
    assert all(path.name in {"lock", "life"} or path.suffix == ".refused" for path in left), left


@pytest.fixture(scope="module")
def pool(shared: NodeProcess) -> str:
    """The pool of that node."""
    return shared.variables["CELLOS_NODE_POOL"]


class Held:
    """A command that goes on when the test says so."""

    wait = "until [ -e /held/go ]; do sleep 0.05; done"

    def __init__(self, place: Path) -> None:
        place.mkdir()
        place.chmod(0o755)
        self._go = place / "go"
        self.authority = {"filesystem": {"mounts": [{"source": str(place), "target": "/held"}]}}

    def go_on(self) -> None:
        self._go.touch()


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path / "held")


@pytest.fixture(scope="session")
def open_log() -> type[Log]:
    """Of a server that a test does something to."""
    return Log


@pytest.fixture(scope="session")
def secret() -> str:
    return SECRET


@pytest.fixture(scope="session")
def text() -> Callable[[list[Chunk], str], bytes]:
    """What came of a stream."""
    return lambda chunks, stream: b"".join(chunk.data for chunk in chunks if chunk.stream == stream)
