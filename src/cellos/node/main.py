"""`cellos-node`: reads its variables, starts the launcher, connects, and runs what the queue offers until SIGTERM or SIGINT.

Order: log, variables, launcher, state directory, backend, NATS, streams; then nobody of the same name may be alive, what a former life left
is told, and the node begins to live. At the end it takes nothing more and lets its cells end within CELLOS_NODE_DRAIN_MS; a second signal
ends the process at once, and the next start tells the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

import uvloop

from cellos import __version__
from cellos.backends.linux import missing_primitives, start_launcher
from cellos.core.formation.runs import NODE_RESTARTED
from cellos.daemon.process import command, raise_open_files, stop_event
from cellos.errors import EventLogError, LogTooOld
from cellos.eventlog.connect import LogClient, Settings, connect, pause, read_nats_settings, require_version
from cellos.eventlog.leases import NODES, Leases, ensure_leases
from cellos.eventlog.log import EventLog
from cellos.eventlog.output import ensure_output
from cellos.eventlog.stream import StreamSettings, ensure_stream, read_stream_settings
from cellos.node.alone import tell_alone
from cellos.node.config import Config, read_config
from cellos.node.home import Home
from cellos.node.lease import refuse_namesake
from cellos.node.node import Node
from cellos.node.recover import read_left, tell
from cellos.sandbox.launcher import Launcher
from cellos.supervisor import profile
from cellos.supervisor.compose import Host, make_broker, open_host

HELP = """\
Usage: cellos-node    run members of formations in cells of this host; everything is set by variables: docs/reference/node.md
       cellos-node --version | --help

Example:
  CELLOS_NATS_URL=nats://127.0.0.1:4222 cellos-node
"""
_log = logging.getLogger("cellos.node")


def main() -> NoReturn:
    """Entry point of `cellos-node`."""
    command("cellos-node", __version__, HELP, _run)


def _run(environment: Mapping[str, str]) -> None:
    started_ns = time.time_ns()
    config = read_config(environment)
    nats, stream = read_nats_settings(environment), read_stream_settings(environment)
    raise_open_files()
    with ExitStack() as closing:
        launcher = None
        if config.run.backend == "linux":
            # Before there is any thread; with a cell ready for each slot that can really be used at once.
            ahead = min(config.slots, len(os.sched_getaffinity(0)))
            launcher = closing.enter_context(start_launcher(config.run.environment, ahead=ahead, refill=True))
        make_broker(config.run)  # what it says of wrong settings is better heard now
        home = closing.enter_context(Home.open(environment, config.id))
        host = open_host(config.run, launcher, _warn, state=home.state, lost=NODE_RESTARTED)
        if launcher is not None:
            _require_primitives(config, launcher)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(_Plan(config, host, home, launcher, nats, stream, started_ns)))


def _require_primitives(config: Config, launcher: Launcher) -> None:
    """As a supervisor does; but without control groups a node can still run what declares no limits, unless it is to be hardened."""
    from cellos.sandbox.cures import OWN_GROUP

    environment = config.run.environment
    missing = profile.forced_missing(environment.get(profile.FORCED))
    missing = missing_primitives(launcher) if missing is None else missing
    if config.run.profile != "hardened" and "cgroup-v2" in missing:
        _log.warning("no limits can be enforced here", extra={"fields": {"cure": OWN_GROUP}})
        missing = tuple(name for name in missing if name != "cgroup-v2")
    profile.enforce(config.run.profile, missing, _warn)


class _Plan(NamedTuple):
    """All that is there before NATS is."""

    config: Config
    host: Host
    home: Home
    launcher: Launcher | None
    nats: Settings
    stream: StreamSettings
    started_ns: int


async def _serve(plan: _Plan) -> None:
    """Until a signal, or until something fails for good."""
    config = plan.config
    stop = stop_event()
    beginning = asyncio.create_task(_begin(plan))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({beginning, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if beginning.done():
            client = beginning.result()
            try:
                node = Node(
                    config, plan.host, plan.home, client, launcher=plan.launcher, replicas=plan.stream.replicas, started_ns=plan.started_ns
                )
                fields = {"node": config.id, "pool": config.pool, "slots": config.slots, "classes": list(node.classes)}
                _log.info("cellos-node ready", extra={"fields": fields})
                await node.run(stop)
            finally:
                await client.close()
    finally:
        for task in (beginning, stopping):
            task.cancel()
        await asyncio.gather(beginning, stopping, return_exceptions=True)
    _log.info("cellos-node ended")


async def _begin(plan: _Plan) -> LogClient:
    """A connection with everything in place, and nothing left of a former life. Raises CellosError where it will never work."""
    client = await connect(plan.nats, name=f"cellos-node {plan.config.id}", on_trouble=_trouble)
    try:
        require_version(client)
        _log.info("connected to NATS", extra={"fields": {"url": plan.nats.shown}})
        attempt, told = 0, ""
        while True:
            try:
                await _prepare(plan, client)
            except LogTooOld:
                raise
            except EventLogError as error:
                if error.text != told:
                    _trouble(error.text)
                told = error.text
                attempt += 1
                await asyncio.sleep(pause(attempt))
            else:
                return client
    except BaseException:
        await client.close()
        raise


async def _prepare(plan: _Plan, client: LogClient) -> None:
    """May be done again after an EventLogError."""
    host, home, stream = plan.host, plan.home, plan.stream
    await ensure_stream(client, replicas=stream.replicas, max_bytes=stream.max_bytes)
    await ensure_leases(client, replicas=stream.replicas)
    await ensure_output(client, replicas=stream.replicas)
    await refuse_namesake(client, plan.config.id, own=home.former)
    log = EventLog(client)
    for left in read_left(host):
        outcome = await tell(left, log)
        _log.info("a run that a former life of this node left", extra={"fields": {"subject": left.subject, "told": outcome}})
    if home.former is not None:
        leases, key = Leases(client, replicas=stream.replicas), NODES + home.former
        found = next((lease for lease in await leases.entries(NODES) if lease.key == key), None)
        if found is not None:
            await leases.delete(key, found.revision)
    await tell_alone(host, log, host.notices)
    host.notices.clear()


def _warn(text: str) -> None:
    _log.warning(text)


def _trouble(text: str) -> None:
    _log.warning("no event log; trying again", extra={"fields": {"error": text}})


if __name__ == "__main__":
    main()
