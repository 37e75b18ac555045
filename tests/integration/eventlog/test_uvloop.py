"""The event loop of cellos-server is uvloop: what touches transports and processes works there, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cellos.eventlog.connect import Settings
from cellos.eventlog.embedded import EmbeddedNats
from cellos.eventlog.reader import Reader
from cellos.testing.nats_server import NatsServer

Open = Callable[..., Any]


async def written_and_read(open_log: Open, settings: Settings) -> None:
    async with open_log(settings) as opened, Reader(opened.client) as reader:
        await opened.write(20, payload=bytes(100_000))
        assert [(await anext(reader)).message_id for _ in range(20)] == [f"e{number}" for number in range(20)]


def test_tls(make_server: Callable[..., NatsServer], certificates: Path, open_log: Open) -> None:
    server = make_server(f'tls {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key" }}')
    uvloop.run(written_and_read(open_log, Settings(url=f"tls://{server.address}", ca_file=str(certificates / "ca.pem"))))


@pytest.mark.parametrize("restarts", [0, 1])
def test_an_embedded_server(tmp_path: Path, open_log: Open, restarts: int) -> None:
    async def test() -> None:
        async with EmbeddedNats(str(tmp_path / "nats")) as nats:
            for _ in range(restarts):
                await nats.restart()
            await written_and_read(open_log, nats.settings)
            assert nats.starts == restarts + 1

    uvloop.run(test())
