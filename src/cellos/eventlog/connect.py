"""The long-lived connection of servers, controllers and nodes to NATS: how it is configured, and nats-py made to fail the way we need.

What this client promises beyond nats-py:

- it never gives up: whatever ends a connection, an error of the server included, another one is made, after growing pauses;
- it never sends in the clear what was configured for TLS;
- nothing of a broken connection is sent on the next one, and a request whose answer can no longer come fails at once;
- it talks to the servers of its settings, and to no other that a cluster announces;
- neither its errors nor its representation hold credentials.

The small blocking client of a one-shot run is in `nats.py`; both read server addresses by `nats_url.py`.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from nats import errors as nats_errors
from nats.aio.client import Client, Srv
from nats.aio.client import Server as PoolServer
from nats.aio.msg import Msg

from cellos.daemon.variables import Variable
from cellos.errors import ConfigError, LogTooOld, os_error_text
from cellos.eventlog.nats_url import DEFAULT_URL, Server, read_servers
from cellos.eventlog.nkey import read_credentials_file, read_seed_file

MINIMUM_VERSION = "2.12"
"""The first with atomic batches."""
CONNECT_SECONDS = 5
PING_SECONDS = 3
"""A dead peer is noticed after three of them, so that a node of a cluster still has time to renew its lease by another one."""
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 4.0
_CONNECT = b"CONNECT "


VARIABLES = (
    Variable(
        "CELLOS_NATS_URL",
        DEFAULT_URL,
        "where NATS is: `nats://host:port` or `tls://host:port`, several separated by commas; may hold user and password, or a token",
    ),
    Variable("CELLOS_NATS_CA_FILE", "none", "PEM file of roots to trust beside the system's; with it the connection is always encrypted"),
    Variable("CELLOS_NATS_USER", "none", "user name; needs `CELLOS_NATS_PASSWORD`"),
    Variable("CELLOS_NATS_PASSWORD", "none", "its password"),
    Variable("CELLOS_NATS_TOKEN", "none", "token"),
    Variable("CELLOS_NATS_NKEY_SEED_FILE", "none", "file with the seed of a user NKey; read at each connection"),
    Variable("CELLOS_NATS_CREDS_FILE", "none", "credential file (`.creds`: JWT and seed); read at each connection"),
)
"""Of ways to log in at most one is set, the URL's included. A blank value is the same as none."""


class Settings(Struct, frozen=True, kw_only=True):
    """Where NATS is, and who we are to it."""

    url: str = DEFAULT_URL
    ca_file: str | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey_seed_file: str | None = None
    creds_file: str | None = None

    @property
    def servers(self) -> tuple[Server, ...]:
        """Raises ConfigError."""
        try:
            return read_servers(self.url)
        except ConfigError as error:
            raise ConfigError(f"CELLOS_{error.text}") from error

    @property
    def shown(self) -> str:
        """The addresses, without credentials."""
        return ",".join(server.shown for server in self.servers)

    def __repr__(self) -> str:
        """Without credentials."""
        return f"Settings({self.shown})"


def read_nats_settings(environment: Mapping[str, str]) -> Settings:
    """Raises ConfigError, naming the variable."""
    given = {row.name: environment.get(row.name, "").strip() or None for row in VARIABLES}
    settings = Settings(
        url=given["CELLOS_NATS_URL"] or DEFAULT_URL,
        ca_file=given["CELLOS_NATS_CA_FILE"],
        user=given["CELLOS_NATS_USER"],
        password=given["CELLOS_NATS_PASSWORD"],
        token=given["CELLOS_NATS_TOKEN"],
        nkey_seed_file=given["CELLOS_NATS_NKEY_SEED_FILE"],
        creds_file=given["CELLOS_NATS_CREDS_FILE"],
    )
    if (settings.user is None) != (settings.password is None):
        missing = "CELLOS_NATS_USER" if settings.user is None else "CELLOS_NATS_PASSWORD"
        raise ConfigError(f"{missing}: is not set, but its counterpart is; set both or none")
    in_url = any(server.user is not None or server.token is not None for server in settings.servers)
    ways = {
        "CELLOS_NATS_URL": in_url,
        "CELLOS_NATS_USER": settings.user,
        "CELLOS_NATS_TOKEN": settings.token,
        "CELLOS_NATS_NKEY_SEED_FILE": settings.nkey_seed_file,
        "CELLOS_NATS_CREDS_FILE": settings.creds_file,
    }
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}: both say how to log in to NATS; keep one")
    check_files(settings)
    return settings


def check_files(settings: Settings) -> None:
    """That every file can be used. Raises ConfigError."""
    if settings.ca_file is not None:  # to read the system's roots takes long, and tells nothing
        tls_context(settings)
    if settings.nkey_seed_file is not None:
        read_seed_file(settings.nkey_seed_file)
    if settings.creds_file is not None:
        read_credentials_file(settings.creds_file)


def login(settings: Settings, server: Server, nonce: str) -> dict[str, str]:
    """The members of CONNECT that say who we are. Raises ConfigError where a file cannot be used."""
    if settings.creds_file is not None:
        credentials = read_credentials_file(settings.creds_file)
        return {"jwt": credentials.jwt, "sig": credentials.key.sign(nonce)}
    if settings.nkey_seed_file is not None:
        key = read_seed_file(settings.nkey_seed_file)
        return {"nkey": key.public, "sig": key.sign(nonce)}
    if settings.user is not None:
        return {"user": settings.user, "pass": settings.password or ""}
    if settings.token is not None:
        return {"auth_token": settings.token}
    if server.user is not None:
        return {"user": server.user, "pass": server.password or ""}
    return {"auth_token": server.token} if server.token is not None else {}


def wants_tls(settings: Settings, server: Server) -> bool:
    """Whether nothing may be sent to `server` in the clear."""
    return server.tls or settings.ca_file is not None


def tls_context(settings: Settings) -> ssl.SSLContext:
    """The system's roots, and those of the file. Raises ConfigError."""
    context = ssl.create_default_context()
    if settings.ca_file is not None:
        try:
            context.load_verify_locations(cafile=settings.ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"CELLOS_NATS_CA_FILE {settings.ca_file}: {os_error_text(error)}") from error
    return context


def pause(attempt: int) -> float:
    """Seconds before the attempt after `attempt` failures (from 1): doubled each time, and spread, so that clients do not come at once."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * float(1 << min(attempt - 1, 10)))
    return longest * random.uniform(0.5, 1.0)


class LogClient(Client):
    """A nats-py client with the promises above. Made by `connect`."""

    def __init__(self, settings: Settings, *, name: str = "") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.on_close: list[Callable[[], None]] = []
        """What ends with it."""
        self._by_address = {f"{server.host}:{server.port}".lower(): server for server in settings.servers}

    async def request(self, *given: Any, **options: Any) -> Msg:
        """As theirs, which would remember for ever each request that it could not send."""
        if not self.is_connected:
            raise nats_errors.OutboundBufferLimitError
        answer = await super().request(*given, **options)
        # nats-py waits by `asyncio.wait_for`, which on Python 3.11 forgets a cancellation that comes together with the answer.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        return answer

    async def close(self) -> None:
        """As theirs, and all that stands beside it."""
        for end in self.on_close:
            end()
        await super().close()

    def hang_up(self) -> None:
        """Close what there is of a connection, also where it was not made to its end; `close` does not."""
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]  # nats-py's, without annotations

    # What follows overrides private methods of nats-py; tests/integration/eventlog/test_connect.py holds each to a real server.

    @property
    def server(self) -> Server:
        """Ours for the one that nats-py talks to."""
        uri = self._current_server.uri if self._current_server else None
        found = self._by_address.get(f"{uri.hostname}:{uri.port}") if uri else None
        return found or next(iter(self._by_address.values()))

    async def _connect_to_server(self, s: Srv) -> None:
        """As theirs, which forgets to close what came of the attempt before."""
        self.hang_up()
        await super()._connect_to_server(s)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:  # noqa: FBT002 (theirs)
        if initial_connection and wants_tls(self.settings, self.server):
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats_errors.Error("the server offers no TLS")
            info["tls_required"] = True  # nats-py would go on in the clear where TLS is only offered
        info.pop("connect_urls", None)  # we go where we were told to, and nowhere else
        await super()._process_info(info, initial_connection)

    def _connect_command(self) -> bytes:
        options = msgspec.json.decode(super()._connect_command().removeprefix(_CONNECT))
        try:
            options |= login(self.settings, self.server, self._server_info.get("nonce", ""))
        except ConfigError as error:
            raise nats_errors.Error(error.text) from error
        return _CONNECT + msgspec.json.encode(options) + b"\r\n"

    async def _process_err(self, err_msg: str) -> None:
        """An error of the server closes a nats-py client for good; this one connects again."""
        error = nats_errors.Error(f"the server says: {err_msg}")
        if err_msg.strip("' ").startswith("permissions violation"):
            await self._error_cb(error)
        else:
            await self._process_op_err(error)

    async def _read_loop(self) -> None:
        """An exception of its parser ends the loop of a nats-py client and leaves it deaf; this one connects again."""
        await super()._read_loop()
        if self.is_connected:
            await self._process_op_err(nats_errors.ProtocolError())

    async def _attempt_reconnect(self) -> None:
        self._pending = []  # a write that was given up must not arrive later
        self._pending_data_size = 0
        for answer in list(self._resp_map.values()):
            if not answer.done():
                answer.set_exception(nats_errors.StaleConnectionError())
                answer.exception()  # some have nobody left who waits
        await super()._attempt_reconnect()


async def connect(
    settings: Settings,
    *,
    name: str,
    on_disconnect: Callable[[], Awaitable[None]] | None = None,
    on_reconnect: Callable[[], Awaitable[None]] | None = None,
    on_trouble: Callable[[str], None] | None = None,
) -> LogClient:
    """Connect, however long it takes: cancel it to give up. `on_trouble` is told why it does not succeed, once per reason.

    Raises ConfigError where the settings can never work.
    """
    check_files(settings)
    client = LogClient(settings, name=name)
    told = ""

    async def failed(error: Exception) -> None:
        nonlocal told
        text = describe(error)
        if on_trouble is not None and text != told:
            on_trouble(f"nats {settings.shown}: {text}")
        told = text

    async def reconnected() -> None:
        nonlocal told
        told = ""
        if on_reconnect is not None:
            await on_reconnect()

    async def disconnected() -> None:
        if on_disconnect is not None and not client.is_closed:
            await on_disconnect()

    def next_server(pool: list[PoolServer], info: dict[str, Any]) -> tuple[PoolServer, float]:
        chosen = min(pool, key=lambda server: server.reconnects)
        return chosen, pause(chosen.reconnects) if chosen.reconnects else 0.0

    try:
        await client.connect(
            servers=[server.shown for server in settings.servers],
            name=name,
            tls=tls_context(settings),
            error_cb=failed,
            disconnected_cb=disconnected,
            reconnected_cb=reconnected,
            reconnect_to_server_handler=next_server,
            reconnect_time_wait=0.25,  # type: ignore[arg-type]  # seconds; it is slept
            max_reconnect_attempts=-1,
            connect_timeout=CONNECT_SECONDS,
            ping_interval=PING_SECONDS,
            pending_size=0,  # while there is no connection, nothing is taken
            no_echo=True,
        )
    except BaseException:
        await client.close()
        client.hang_up()
        raise
    told = ""
    return client


def require_version(client: Client, minimum: str = MINIMUM_VERSION) -> None:
    """Raises LogTooOld where the server is older than `minimum` (`major.minor`)."""
    found = client.connected_server_version
    try:
        is_enough = (found.major, found.minor) >= tuple(int(part) for part in minimum.split("."))
    except ValueError:
        is_enough = False
    if not is_enough:
        url = client.connected_url
        where = f"{url.hostname}:{url.port}" if url else "NATS"
        version = found._server_version[:40]  # noqa: SLF001 (its text has no public name)
        raise LogTooOld(f"the NATS server at {where} is version {version}; {minimum} or later is needed (atomic batches); upgrade it")


def describe(error: BaseException) -> str:
    """A failure of a connection for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return os_error_text(error)
    return str(error).removeprefix("nats: ") or type(error).__name__
