"""The server's variables: a table, from which the reference page is made, and one value that they are read into, once."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cellos.daemon import variables
from cellos.daemon.variables import Variable
from cellos.errors import ConfigError
from cellos.eventlog.connect import VARIABLES as NATS_VARIABLES
from cellos.eventlog.stream import VARIABLES as STREAM_VARIABLES
from cellos.http.listener import FDS, PID

TOKEN = "CELLOS_SERVER_API_TOKEN"
READ_TOKEN = "CELLOS_SERVER_READ_TOKEN"
BIND = "CELLOS_SERVER_BIND"
ADMIN_BIND = "CELLOS_SERVER_ADMIN_BIND"
SKIP_REPLAY = "CELLOS_SERVER_SKIP_REPLAY"
STATE_DIR = "CELLOS_SERVER_STATE_DIR"
KEYS = "CELLOS_EVENT_VERIFY_KEYS_PATH"
HMAC_KEYS = "CELLOS_EVENT_VERIFY_HMAC_KEYS_PATH"
DEFAULT_BIND = "127.0.0.1:8080"
_TRUE = frozenset({"1", "true"})


VARIABLES = (
    Variable(BIND, f"`{DEFAULT_BIND}`", "host and port of the API; port 0 takes a free one, which the log names", "an error"),
    Variable(TOKEN, "required", "the token that every request must show, used as it stands", "an error"),
    Variable(READ_TOKEN, "none", "a second token, for GET and WebSockets only", "an error where it is blank, or equal to the first"),
    Variable(STATE_DIR, "none", "directory for the snapshot, made if need be", "an error"),
    Variable(SKIP_REPLAY, "off", "`1` or `true`: begin at the end of the log, without snapshot", "any other word is off"),
    Variable(ADMIN_BIND, "none", "host and port of `/healthz`, `/readyz` and `/metrics`, without token", "an error"),
    Variable(KEYS, "none", "file of key id to public key: records say whether their events were signed", "an error"),
    Variable(HMAC_KEYS, "none", "the same with shared keys", "an error"),
    Variable(FDS, "none", f"`1`: descriptor 3 is a socket that listens, used in place of one at `{BIND}`", "an error"),
    Variable(PID, "none", f"the process that `{FDS}` is meant for", f"`{FDS}` is left out"),
    Variable("CELLOS_GIT_SHA", "none", "shown by `/v1/version`", "anything is taken"),
    Variable("RUST_LOG", "`info`", "lowest level of the log, also as `target=level`, separated by commas", "left out"),
)


def table() -> str:
    """The table of the page: also what the connection and the stream ask for."""
    return variables.table((*VARIABLES, *NATS_VARIABLES, *STREAM_VARIABLES))


class Address(msgspec.Struct, frozen=True):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The environment, read once."""

    bind: Address
    token: str
    read_token: str | None = None
    admin: Address | None = None
    skip_replay: bool = False
    state_dir: str | None = None
    keys: str | None = None
    hmac_keys: str | None = None
    git_sha: str | None = None

    def __repr__(self) -> str:
        return f"Config(bind={str(self.bind)!r})"  # the rest may be secret


def read_config(environment: Mapping[str, str]) -> Config:
    """The configuration of a server. Raises ConfigError, naming the variable."""
    admin = environment.get(ADMIN_BIND)
    return Config(
        token=_token(environment),
        read_token=_read_token(environment),
        bind=_address(BIND, environment.get(BIND, DEFAULT_BIND)),
        admin=_address(ADMIN_BIND, admin) if admin is not None else None,
        skip_replay=environment.get(SKIP_REPLAY, "").lower() in _TRUE,
        state_dir=environment.get(STATE_DIR, "").strip() or None,
        keys=environment.get(KEYS, "").strip() or None,
        hmac_keys=environment.get(HMAC_KEYS, "").strip() or None,
        git_sha=environment.get("CELLOS_GIT_SHA", "").strip() or None,
    )


def _token(environment: Mapping[str, str]) -> str:
    token = environment.get(TOKEN)
    if token is None:
        raise ConfigError(f"{TOKEN} must be set (fail-closed)")
    if not token.strip():
        raise ConfigError(f"{TOKEN} must not be empty")
    return token


def _read_token(environment: Mapping[str, str]) -> str | None:
    token = environment.get(READ_TOKEN)
    if token is None:
        return None
    if not token.strip():
        raise ConfigError(f"{READ_TOKEN} must not be empty; unset it if there is none")
    if token == environment.get(TOKEN):
        raise ConfigError(f"{READ_TOKEN} is the same as {TOKEN}, which may also write; give it a value of its own")
    return token


def _address(name: str, text: str) -> Address:
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and colon and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"{name}={text!r}: not HOST:PORT, for example {DEFAULT_BIND}")
    return Address(host, int(port))
