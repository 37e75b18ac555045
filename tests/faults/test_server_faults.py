"""Servers and NATS die while formations are written: nothing acknowledged is missing afterwards, and nothing is there twice."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cellos.testing.nats_server import NatsServer
from cellos.testing.server_process import TOKEN, ServerProcess

SECONDS = 60.0
WRITERS = 4
EACH = 12
DEATHS = 3


class Writer(threading.Thread):
    """Posts documents one after the other; one that is not acknowledged is repeated with its key, for as long as it takes."""

    def __init__(self, number: int, servers: list[ServerProcess], progress: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.names = [f"w{number}.{each}" for each in range(EACH)]
        self.acknowledged: dict[str, str] = {}
        self.attempts = 0
        self._servers = servers
        self._number = number
        self._progress = progress

    def run(self) -> None:
        with httpx2.Client(timeout=SECONDS, trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            for name in self.names:
                while name not in self.acknowledged:
                    self.attempts += 1
                    server = self._servers[(self._number + self.attempts) % len(self._servers)]
                    try:
                        document = {"name": name, "coordinator": "a", "members": [{"id": "a"}]}
                        answer = client.post(f"{server.url}/v1/formations", json=document, headers={"Idempotency-Key": name})
                    except (httpx2.TransportError, OSError):
                        continue
                    assert answer.status_code in {201, 503}, answer.text
                    if answer.status_code == 201:
                        self.acknowledged[name] = answer.json()["id"]
                self._progress.release()


def formations(server: ServerProcess) -> bytes:
    answer = httpx2.get(f"{server.url}/v1/formations", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=SECONDS, trust_env=False)
    return bytes(answer.content)


@pytest.mark.parametrize("victim", ["server", "nats"])
def test_nothing_acknowledged_is_lost_and_nothing_is_done_twice(tmp_path: Path, victim: str) -> None:
    with NatsServer(str(tmp_path / "nats")) as nats, ServerProcess(nats.url) as first, ServerProcess(nats.url) as second:
        servers = [first, second]
        progress = threading.Semaphore(0)
        writers = [Writer(number, servers, progress) for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        for death in range(DEATHS):
            for _ in range(WRITERS * EACH // (DEATHS + 2)):
                assert progress.acquire(timeout=SECONDS)
            kill: Callable[[], Any] = nats.kill if victim == "nats" else servers[death % 2].kill
            kill()
            revive: Callable[[], Any] = nats.start if victim == "nats" else servers[death % 2].start
            revive()
        for writer in writers:
            writer.join(SECONDS)
            assert not writer.is_alive()
        acknowledged = {name: found for writer in writers for name, found in writer.acknowledged.items()}
        with ServerProcess(nats.url) as fresh:
            body = formations(fresh)
            fresh.kill()
            fresh.start()
            assert formations(fresh) == body
    found = {each["name"]: each["id"] for each in json.loads(body)["formations"]}
    assert found == acknowledged
    assert len(json.loads(body)["formations"]) == WRITERS * EACH


@pytest.mark.parametrize("gone", ["store", "stream"])
def test_a_log_that_was_wiped_is_made_anew_and_told_as_it_is(tmp_path: Path, gone: str) -> None:
    """What the log has lost is not shown any more, and the server goes on by itself."""
    with NatsServer(str(tmp_path / "nats")) as nats, ServerProcess(nats.url) as server:
        progress = threading.Semaphore(0)
        before, after = Writer(0, [server], progress), Writer(1, [server], progress)
        before.start()
        before.join(SECONDS)
        nats.kill()
        shutil.rmtree(tmp_path / "nats/store" if gone == "store" else next((tmp_path / "nats/store").rglob("CELLOS_EVENTS")))
        nats.start()
        after.start()
        after.join(SECONDS)
        deadline = time.monotonic() + SECONDS
        while (listed := {each["name"]: each["id"] for each in json.loads(formations(server))["formations"]}) != after.acknowledged:
            assert time.monotonic() < deadline, listed  # writes may come through before the reader has found another log
            time.sleep(0.02)
        assert len(before.acknowledged) == len(after.acknowledged) == EACH
