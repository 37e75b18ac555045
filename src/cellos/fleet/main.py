"""`cellos-fleet`: reads its variables, proves the store, takes work until SIGTERM or SIGINT, lets its cells end.

Exit code 0 after a drain; 1 where it could not start or the store refuses it for good; 128 + n where a second signal n came.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from cellos import __version__
from cellos.errors import ConfigError
from cellos.fleet.config import Config, find_program, read_config

NAME = "cellos-fleet"
HELP = """\
Usage: cellos-fleet    run cells from a queue in a bucket; everything is set by variables: docs/reference/fleet.md
       cellos-fleet --version | -V | --help | -h

Example:
  CELLOS_FLEET_BUCKET=file:///var/tmp/queue cellos-fleet      try it without S3; documents are handed in by: cellos fleet submit
"""
_log = logging.getLogger("cellos_fleet")


def main() -> NoReturn:
    """Entry point of `cellos-fleet`."""
    match sys.argv[1:]:
        case ["--version" | "-V", *_]:
            sys.stdout.write(f"{NAME} {__version__} ({os.environ.get('CELLOS_GIT_SHA', '').strip()[:7] or 'unknown'})\n")
            sys.exit(0)
        case ["--help" | "-h", *_]:
            sys.stdout.write(HELP)
            sys.exit(0)
    try:
        config = read_config(os.environ)
        if len(sys.argv) > 1:
            raise ConfigError(f"{NAME} takes no argument {sys.argv[1]} (see: {NAME} --help)")
    except ConfigError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)
    from cellos.daemon.process import guarded

    sys.exit(guarded(NAME, lambda environment: _run(config, environment)))


def _run(config: Config, environment: Mapping[str, str]) -> None:
    """Until a signal. Raises CellosError."""
    import uvloop

    from cellos.daemon.process import stop_event
    from cellos.fleet.agent import Agent
    from cellos.fleet.cell import supervisor_environment
    from cellos.fleet.preflight import check
    from cellos.fleet.store import open_store
    from cellos.sandbox import cgroups
    from cellos.supervisor.state import evidence_directory

    # With control groups version 2, a group with a process in it hands nothing down: we go into a leaf, and our supervisors begin there.
    cgroups.discover(ours=frozenset({os.getpid()}))
    # What would fail every cell is found before a spec is blamed for it.
    program = find_program(config.supervisor, environment.get("PATH"))
    given = supervisor_environment(environment, "agent")
    lenient = check(given, lambda text: _log.warning(text, extra={"fields": {"node": config.node}})).allow_unknown_fields
    evidence_directory(given)
    store = open_store(config.bucket, environment, request_seconds=config.request_seconds)
    fields = {
        "node": config.node,
        "bucket": config.bucket,
        "prefix": config.prefix,
        "queue_name": config.queue,
        "pool_id": config.pool,
        "supervisor": program,
        "poll_interval_ms": str(config.poll_ms),
        "heartbeat_interval_ms": str(config.heartbeat_ms),
        "slots": config.slots,
        "lease_ms": config.lease_ms,
        "retries": config.retries,
    }
    _log.info("cellos-fleet agent starting", extra={"fields": fields})

    async def serve() -> None:
        await Agent(config, store, program, environment, lenient=lenient).run(stop_event())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
