"""`cellos-controller`: reads its variables, connects, follows the log until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NoReturn

import uvloop

from cellos import __version__
from cellos.controller.config import Config, read_config
from cellos.controller.loop import Controller
from cellos.core.evidence.sign import Signer, read_signing
from cellos.daemon.process import command, stop_event
from cellos.eventlog.connect import Settings, connect, read_nats_settings, require_version
from cellos.eventlog.stream import StreamSettings, read_stream_settings

HELP = """\
Usage: cellos-controller    take admitted formations to their end; everything is set by variables: docs/reference/controller.md
       cellos-controller --version | --help

Example:
  CELLOS_NATS_URL=nats://127.0.0.1:4222 cellos-controller
"""
_log = logging.getLogger("cellos.controller")


def main() -> NoReturn:
    """Entry point of `cellos-controller`."""
    command("cellos-controller", __version__, HELP, _run)


def _run(environment: Mapping[str, str]) -> None:
    config = read_config(environment)
    settings, stream, signer = read_nats_settings(environment), read_stream_settings(environment), read_signing(environment)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, settings, stream, signer))


async def serve(config: Config, settings: Settings, stream: StreamSettings, signer: Signer | None) -> None:
    """Until a signal, or until something fails for good."""
    stopping = asyncio.create_task(stop_event().wait())
    following = asyncio.create_task(_follow(config, settings, stream, signer))
    try:
        await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        _log.info("shutdown signal received")
    finally:
        for task in (stopping, following):
            task.cancel()
        await asyncio.wait({stopping, following})
    _log.info("cellos-controller ended")


async def _follow(config: Config, settings: Settings, stream: StreamSettings, signer: Signer | None) -> None:
    client = await connect(settings, name=f"cellos-controller-{config.id}", on_trouble=_trouble)
    try:
        require_version(client)
        _log.info("connected to NATS", extra={"fields": {"url": settings.shown, "controller": config.id}})
        controller = Controller(config, client, stream=stream, signer=signer)
        try:
            await controller.run()
        finally:
            await controller.leave()
    finally:
        await client.close()


def _trouble(text: str) -> None:
    _log.warning("no connection to NATS; trying again", extra={"fields": {"error": text}})


if __name__ == "__main__":
    main()
