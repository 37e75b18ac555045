"""`cellos-server`: reads its variables, opens its ports, lives until SIGTERM or SIGINT.

Order: log, variables, admin listener, NATS, stream, replay, the API's port. The port opens when the lists are up to date; where there is no
NATS, or a replay takes longer than START_SECONDS, it opens before that, and /readyz tells. At the end requests are drained and WebSockets
closed within DRAIN_SECONDS; a second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import uvicorn
import uvloop
from starlette.types import ASGIApp

from cellos import __version__
from cellos.core.evidence.keys import Keyring, read_hmac_keys, read_verify_keys
from cellos.core.evidence.sign import verify
from cellos.core.projection import Verify
from cellos.daemon.process import command, raise_open_files, stop_event
from cellos.errors import ConfigError, os_error_text
from cellos.eventlog.connect import Settings, read_nats_settings
from cellos.eventlog.stream import StreamSettings, read_stream_settings
from cellos.http.listener import inherited, listen
from cellos.server.admin import create_admin_app
from cellos.server.app import create_app
from cellos.server.config import HMAC_KEYS, KEYS, Address, Config, read_config
from cellos.server.follow import Follower
from cellos.server.protocol import EventProtocol, limited_http
from cellos.server.state import ServerState
from cellos.server.store import SnapshotStore

START_SECONDS = 10.0
DRAIN_SECONDS = 10
PING_SECONDS = 25.0
PONG_SECONDS = 50.0
MAX_MESSAGE_BYTES = 64 << 10
_RESERVED_DESCRIPTORS = 64
HELP = """\
Usage: cellos-server    serve the control plane; everything is set by variables: docs/reference/server.md
       cellos-server --version | --help

Example:
  CELLOS_SERVER_API_TOKEN=… CELLOS_NATS_URL=nats://127.0.0.1:4222 cellos-server
"""
_log = logging.getLogger("cellos.server")


def main() -> NoReturn:
    """Entry point of `cellos-server`."""
    command("cellos-server", __version__, HELP, _run)


def _run(environment: Mapping[str, str]) -> None:
    plan = _Plan(environment)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(plan))


class _Plan:
    """All that is read before anything is opened. Raises ConfigError."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.config: Config = read_config(environment)
        self.place = inherited(environment) or self.config.bind
        self.nats: Settings = read_nats_settings(environment)
        self.stream: StreamSettings = read_stream_settings(environment)
        self.verify, keys = _read_keys(self.config)
        directory = self.config.state_dir
        self.store = SnapshotStore(directory, keys=keys) if directory is not None and not self.config.skip_replay else None


def _read_keys(config: Config) -> tuple[Verify | None, str]:
    """How signatures are checked, and a name for the keys."""
    files = {KEYS: config.keys, HMAC_KEYS: config.hmac_keys}
    read: dict[str, bytes] = {}
    for variable, path in files.items():
        if path is not None:
            try:
                with open(path, "rb") as file:
                    read[variable] = file.read()
            except OSError as error:
                raise ConfigError(f"{variable}={path}: {os_error_text(error)}") from error
    if not read:
        return None, ""
    try:
        ring = Keyring(
            ed25519=read_verify_keys(read[KEYS]) if KEYS in read else {}, hmac=read_hmac_keys(read[HMAC_KEYS]) if HMAC_KEYS in read else {}
        )
    except ConfigError as error:
        raise ConfigError(f"{' and '.join(read)}: {error.text}") from error
    digest = hashlib.sha256()
    for variable, raw in sorted(read.items()):
        digest.update(b"%s %d\n%s" % (variable.encode(), len(raw), raw))
    return lambda envelope: verify(envelope, ring), digest.hexdigest()


async def _serve(plan: _Plan) -> None:
    """Until a signal, or until something fails for good."""
    config = plan.config
    state = ServerState(
        token=config.token,
        read_token=config.read_token,
        verify=plan.verify,
        git_sha=config.git_sha,
        skip_replay=config.skip_replay,
    )
    stop = stop_event()
    follower = Follower(state, plan.nats, stream=plan.stream, store=plan.store)
    servers: list[Server] = []
    following = asyncio.create_task(follower.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        if config.admin is not None:
            servers.append(await open_server(create_admin_app(state), config.admin, "cellos-server admin listening"))
        settled = asyncio.create_task(follower.settled.wait())
        await asyncio.wait({following, stopping, settled}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if not (stopping.done() or following.done()):
            servers.append(await open_server(create_app(state), plan.place, "cellos-server listening"))
            await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        _log.info("shutdown signal received; draining")
    finally:
        stopping.cancel()
        state.ending.set()
        await asyncio.gather(*(server.end() for server in reversed(servers)))
        follower.save()
        following.cancel()
        await asyncio.wait({following})
        if plan.store is not None:
            plan.store.close()
    _log.info("cellos-server ended")


class Server(uvicorn.Server):
    """Uvicorn without its own idea of signals."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.address = str(Address(*listener.getsockname()[:2]))
        self._serving = asyncio.create_task(self.serve(sockets=[listener]))

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def end(self) -> None:
        """Answer what was asked, close the rest."""
        self.should_exit = True
        await self._serving


async def open_server(app: ASGIApp, place: Address | socket.socket, message: str) -> Server:
    """Serve, at an address or from a socket that listens already. Raises ConfigError."""
    if isinstance(place, Address):
        try:
            place = listen(place.host, place.port)
        except OSError as error:
            raise ConfigError(f"binding {place}: {os_error_text(error)}") from error
    config = uvicorn.Config(
        app,
        loop="none",
        http=limited_http(_most_connections()),
        ws=EventProtocol,
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = Server(config, place)
    _log.info(message, extra={"fields": {"bind": server.address}})
    return server


def _most_connections() -> int:
    """As many as the system lets us, less what we need ourselves: a full table of descriptors would stop the reader, too."""
    return max(16, raise_open_files() - _RESERVED_DESCRIPTORS)


if __name__ == "__main__":
    main()
