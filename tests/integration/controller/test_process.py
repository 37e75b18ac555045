"""`cellos-controller` as a process: its start, its end, its log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cellos.eventlog.leases import CONTROLLERS, Leases, read_controller
from cellos.testing.daemon_process import ControllerProcess
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]
MEMBER = {"id": "a", "spec": {"authority": {}, "lifetime": {"ttlSeconds": 600}}}


def test_it_runs_formations_says_that_it_is_there_and_ends_in_order(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            with ControllerProcess(server.url, CELLOS_CONTROLLER_ID="c1") as controller:
                await at.node()
                assert (await at.ended(await at.create([MEMBER]))).status == "COMPLETED"
                await at.until(lambda: is_listed(at))
                assert controller.stop() == 0
            assert await Leases(at.client).entries(CONTROLLERS) == []
            assert controller.find("cellos-controller ended") is not None
            assert all(line["level"] == "INFO" for line in controller.log), controller.log

    async def is_listed(at: Any) -> bool:
        return [read_controller(lease).controller for lease in await Leases(at.client).entries(CONTROLLERS)] == ["c1"]  # type: ignore[union-attr]

    run(test())


def test_after_a_kill_the_next_one_goes_on(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            with ControllerProcess(server.url) as controller:
                formation = await at.create([MEMBER, {**MEMBER, "id": "b", "authorizedBy": "a", "after": ["a"]}])
                await at.until(lambda: dispatched(at, formation))
                await asyncio.to_thread(controller.kill)
                await at.node()
                await asyncio.to_thread(controller.start)
                assert (await at.ended(formation)).status == "COMPLETED"

    async def dispatched(at: Any, formation: str) -> bool:
        return (await at.state(formation)).status == "LAUNCHING"

    run(test())


def test_without_nats_it_waits_and_a_signal_still_ends_it() -> None:
    controller = ControllerProcess("nats://127.0.0.1:1")
    controller.launch()
    assert "127.0.0.1:1" in controller.wait_for("no connection to NATS; trying again")["error"]
    assert controller.stop() == 0


@pytest.mark.parametrize(
    ("name", "value"), [("CELLOS_CONTROLLER_IN_FLIGHT", "0"), ("CELLOS_NATS_URL", "http://x"), ("CELLOS_EVENT_SIGNING", "x")]
)
def test_a_variable_that_cannot_be_used_is_an_error(name: str, value: str) -> None:
    controller = ControllerProcess("nats://127.0.0.1:1", **{name: value})
    controller.launch()
    assert controller.wait() == 1
    found = controller.find("cellos-controller fatal")
    assert found is not None
    assert (found["code"], name in found["error"]) == ("config", True)
