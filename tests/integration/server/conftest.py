"""Real servers: NATS, cellos-server as a process, and what tests say to both."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.stream import ensure_stream
from cellos.testing.nats_server import NatsServer
from cellos.testing.server_process import TOKEN, ServerProcess

SECONDS = 60.0
TIME = "2026-01-02T03:04:05.000000006+00:00"


def document(name: str = "demo", **more: Any) -> dict[str, Any]:
    return {"name": name, "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}], **more}


@dataclass(frozen=True)
class Api:
    """HTTP with the token."""

    server: ServerProcess
    client: httpx2.Client

    def request(self, method: str, path: str, **options: Any) -> Any:
        return self.client.request(method, self.server.url + path, **options)

    def get(self, path: str, **options: Any) -> Any:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> Any:
        return self.request("POST", path, **options)

    def delete(self, path: str, **options: Any) -> Any:
        return self.request("DELETE", path, **options)

    def create(self, name: str = "demo", **more: Any) -> str:
        answer = self.post("/v1/formations", json=document(name, **more))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def report(self, formation_id: str, state: str, **more: Any) -> Any:
        return self.post(f"/v1/formations/{formation_id}/status", json={"state": state, **more})

    def until(self, path: str, wanted: Callable[[Any], bool]) -> Any:
        """Ask until the answer is the wanted one."""
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self.get(path)
            if wanted(answer):
                return answer
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.02)


@dataclass(frozen=True)
class Log:
    """The event log, seen by somebody else."""

    url: str

    def write(self, *messages: tuple[str, bytes]) -> int:
        """Gives the sequence of the last one."""

        async def go(log: EventLog, client: Any) -> int:
            last = 0
            for subject, payload in messages:
                last = (await log.publish(subject, payload, message_id=uuid.uuid4().hex)).sequence
            return last

        return int(self._do(go))

    def read(self) -> list[Any]:
        async def go(log: EventLog, client: Any) -> list[Any]:
            return await log.read(0, 1000)

        found: list[Any] = self._do(go)
        return found

    def purge(self, below: int) -> None:
        async def go(log: EventLog, client: Any) -> None:
            await client.jetstream().purge_stream("CELLOS_EVENTS", seq=below)

        self._do(go)

    def recreate(self) -> None:
        async def go(log: EventLog, client: Any) -> None:
            await client.jetstream().delete_stream("CELLOS_EVENTS")
            await ensure_stream(client)

        self._do(go)

    def _do(self, action: Any) -> Any:
        async def connected() -> Any:
            async with asyncio.timeout(SECONDS):
                client = await connect(Settings(url=self.url), name="test")
                try:
                    await ensure_stream(client)
                    return await action(EventLog(client), client)
                finally:
                    await client.close()

        return asyncio.run(connected())


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(str(tmp_path / "nats")) as server:
        yield server


@pytest.fixture
def log(nats: NatsServer) -> Log:
    return Log(nats.url)


@dataclass(frozen=True)
class Plane:
    """A server, and its log."""

    api: Api
    log: Log


def reached(server: ServerProcess) -> Api:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return Api(server, httpx2.Client(headers=headers, timeout=SECONDS, trust_env=False))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """For tests to which it is all the same what there is already."""
    with (
        NatsServer(str(tmp_path_factory.mktemp("shared") / "nats")) as nats,
        ServerProcess(nats.url, CELLOS_SERVER_ADMIN_BIND="127.0.0.1:0") as server,
    ):
        api = reached(server)
        with api.client:
            yield Plane(api, Log(nats.url))


@pytest.fixture
def start() -> Iterator[Callable[..., Api]]:
    """Servers with variables of their own."""
    started: list[Api] = []

    def go(nats_url: str, **variables: str) -> Api:
        server = ServerProcess(nats_url, **variables)
        server.start()
        started.append(reached(server))
        return started[-1]

    yield go
    for api in started:
        api.client.close()
        api.server.stop()


@pytest.fixture
def api(nats: NatsServer, start: Callable[..., Api]) -> Api:
    return start(nats.url)


@pytest.fixture
def cell_event() -> Callable[..., bytes]:
    """An event of a cell, with spaces that nobody may take out."""

    def make(cell_id: str, kind: str = "lifecycle.v1.started") -> bytes:
        data = f'{{"cellId": "{cell_id}", "specId": "s", "runId": "r", "z": 1, "a": 1.0e3}}'
        head = f'"specversion": "1.0", "id": "{uuid.uuid4()}", "source": "t", "type": "dev.cellos.events.cell.{kind}"'
        return f'{{{head}, "data": {data}, "time": "{TIME}"}}'.encode()

    return make
