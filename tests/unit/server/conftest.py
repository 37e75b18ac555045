"""A server in process, without socket and NATS, and events for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from cellos.server import ServerState, create_app

TOKEN = "correct horse"
READ_TOKEN = "may look"
TIME = "2026-01-02T03:04:05.000000006+00:00"
UUIDS = tuple(f"{digit * 8}-0000-4000-8000-000000000000" for digit in "123456789")


def event(kind: str, data: Mapping[str, Any]) -> bytes:
    members = {"specversion": "1.0", "id": "e", "source": "test", "type": kind, "data": dict(data), "time": TIME}
    return json.dumps(members).encode()


@dataclass
class Served:
    """The state, a client that shows the token, and a log that counts."""

    state: ServerState
    client: TestClient = field(init=False)
    sequence: int = 0

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.client = TestClient(create_app(self.state), headers=headers, raise_server_exceptions=False)

    def add(self, subject: str, payload: bytes) -> int:
        self.sequence += 1
        self.state.apply(self.sequence, subject, payload)
        return self.sequence

    def cell(self, cell_id: str, *kinds: str, formation: str | None = None, **more: Any) -> None:
        data = {"cellId": cell_id, "specId": "s", "runId": "r", **more}
        if formation is not None:
            data["correlation"] = {"formationId": formation}
        for kind in kinds or ("lifecycle.v1.started",):
            self.add("cellos.events.cells", event(f"dev.cellos.events.cell.{kind}", data))

    def formation(self, number: int, *phases: str, name: str = "demo", document: Any = None) -> str:
        found = UUIDS[number]
        for phase in phases or ("created",):
            data: dict[str, Any] = {"formationId": found, "formationName": name}
            if phase == "created":
                data["document"] = document or {"name": name, "coordinator": "a", "members": [{"id": "a"}]}
            subject = f"cellos.events.formations.{found}.{phase}"
            self.add(subject, event(f"dev.cellos.events.cell.formation.v1.{phase}", data))
        return found

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, **options)


@pytest.fixture
def served() -> Served:
    return Served(ServerState(token=TOKEN, read_token=READ_TOKEN))


@pytest.fixture
def is_problem() -> Callable[..., None]:
    def check(response: Any, status: int, kind: str, detail: str = "") -> None:
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        assert list(body) == ["type", "title", "status", "detail"]
        assert (response.status_code, body["status"], body["type"]) == (status, status, f"/problems/{kind}")
        assert body["detail"]
        assert detail in body["detail"]

    return check
