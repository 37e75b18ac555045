"""A control plane on a disk that fills up: it says so, shows what it has, and goes on where there is room again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cellos.eventlog.embedded import EmbeddedNats
from cellos.testing.server_process import TOKEN, ServerProcess

SECONDS = 120.0
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    """With what somebody else writes, to the last block."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


class Writer:
    """Submits formations, each with a key of its own, and keeps what was acknowledged."""

    def __init__(self, client: httpx2.AsyncClient, server: ServerProcess) -> None:
        self.acknowledged: dict[str, str] = {}
        self._client = client
        self._server = server

    async def submit(self, name: str) -> Any:
        document = {"name": name, "coordinator": "a", "members": [{"id": "a"}], "pad": "x" * 60_000}
        answer = await self._post("/v1/formations", document, {"Idempotency-Key": f"key-{name}"})
        if answer.status_code == 201:
            self.acknowledged[name] = answer.json()["id"]
        return answer

    async def report(self, name: str, state: str) -> Any:
        return await self._post(f"/v1/formations/{self.acknowledged[name]}/status", {"state": state, "reason": "x" * 500_000})

    async def get(self, path: str) -> Any:
        return await self._client.get(self._server.url + path, headers=HEADERS)

    async def _post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        return await self._client.post(self._server.url + path, json=body, headers=HEADERS | (headers or {}))


def shown(answer: Any) -> dict[str, str]:
    assert answer.status_code == 200, answer.text
    return {each["name"]: each["id"] for each in answer.json()["formations"]}


def is_refused(answer: Any) -> None:
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/service-unavailable")
    assert "retry-after" in answer.headers


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_writes_stop_and_come_back_and_nothing_acknowledged_is_missing(disk: Path) -> None:
    ballast = disk / "ballast"

    async def test() -> None:
        troubles: list[str] = []
        nats = EmbeddedNats(str(disk / "nats"), reserve_bytes=8 << 20, on_trouble=troubles.append)
        async with nats, httpx2.AsyncClient(timeout=SECONDS, trust_env=False) as client:
            size = {"CELLOS_NATS_STREAM_MAX_BYTES": str(16 << 20)}
            with ServerProcess(nats.url_with_credentials, **size) as server:
                writer = Writer(client, server)
                for number in range(3):
                    assert (await writer.submit(f"before-{number}")).status_code == 201
                fill(ballast)
                is_refused(await writer.submit("full"))
                assert shown(await writer.get("/v1/formations")) == writer.acknowledged
                events = (await writer.get("/v1/events")).json()["events"]
                assert [each["seq"] for each in events] == [1, 2, 3, 4, 5, 6], "a name and a formation each"

                is_refused(await writer.report("before-0", "RUNNING"))  # with this one the store of NATS gives up
                while not troubles:  # noqa: ASYNC110 (told by another task)
                    await asyncio.sleep(0.01)
                assert "no space left on device" in troubles[0]
                is_refused(await writer.submit("fuller"))
                assert shown(await writer.get("/v1/formations")) == writer.acknowledged
                assert nats.starts == 1, "there is no use in it without room"

                ballast.unlink()
                for name in ("full", "fuller", "after"):
                    while (await writer.submit(name)).status_code != 201:  # noqa: ASYNC110 (each asks anew)
                        await asyncio.sleep(0.05)
                assert nats.starts == 2
                assert shown(await writer.get("/v1/formations")) == writer.acknowledged
                assert (await writer.report("before-1", "RUNNING")).status_code == 204
            with ServerProcess(nats.url_with_credentials, **size) as fresh:
                answer = await Writer(client, fresh).get("/v1/formations")
                assert shown(answer) == writer.acknowledged
                assert {each["name"] for each in answer.json()["formations"] if each["status"] == "RUNNING"} >= {"before-1"}

    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await test()

    asyncio.run(bounded())
