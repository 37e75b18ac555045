"""The controller's variables: a table, from which the reference page is made, and one value that they are read into, once."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import msgspec

from cellos.core.documents.identifiers import PORTABLE_RULE, is_portable
from cellos.core.evidence.sign import KEY, KID, MODE
from cellos.core.formation.decide import IN_FLIGHT
from cellos.daemon import variables
from cellos.daemon.variables import Variable
from cellos.errors import ConfigError
from cellos.eventlog.connect import VARIABLES as NATS_VARIABLES
from cellos.eventlog.stream import VARIABLES as STREAM_VARIABLES

CONTROLLER_ID = "CELLOS_CONTROLLER_ID"
MOST_IN_FLIGHT = "CELLOS_CONTROLLER_IN_FLIGHT"
LEASE_MS = "CELLOS_CONTROLLER_LEASE_MS"
DEFAULT_LEASE_MS = 15_000
LARGEST_IN_FLIGHT = 10_000
LEASE_RANGE_MS = (500, 3_600_000)


VARIABLES = (
    Variable(CONTROLLER_ID, "host name and process id", "name of the controller, where it is shown", "an error"),
    Variable(
        MOST_IN_FLIGHT,
        f"`{IN_FLIGHT}`",
        f"how many members of one formation may be under way at once, 1 to {LARGEST_IN_FLIGHT}; equal in all controllers",
        "an error",
    ),
    Variable(
        LEASE_MS,
        f"`{DEFAULT_LEASE_MS}`",
        f"after how many milliseconds without a sign of life it no longer counts as running, {LEASE_RANGE_MS[0]} to {LEASE_RANGE_MS[1]}",
        "an error",
    ),
    Variable(MODE, "off", "`ed25519` or `hmac`: sign what it writes, as [the supervisor](supervisor.md) does", "an error"),
    Variable(KID, "none", "id of the key", "an error"),
    Variable(KEY, "none", "the key, base64url", "an error"),
    Variable("RUST_LOG", "`info`", "lowest level of the log, also as `target=level`, separated by commas", "left out"),
)


def table() -> str:
    """The table of the page: also what the connection and the stream ask for."""
    return variables.table((*VARIABLES, *NATS_VARIABLES, *STREAM_VARIABLES))


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The environment, read once."""

    id: str
    host: str
    in_flight: int = IN_FLIGHT
    lease_ms: int = DEFAULT_LEASE_MS


def read_config(environment: Mapping[str, str]) -> Config:
    """The configuration of a controller. Raises ConfigError, naming the variable."""
    host = socket.gethostname()
    name = environment.get(CONTROLLER_ID, "").strip() or f"{_portable(host)}-{os.getpid()}"
    if not is_portable(name):
        raise ConfigError(f"{CONTROLLER_ID}={name[:80]!r}: {PORTABLE_RULE}")
    return Config(
        id=name,
        host=host,
        in_flight=_number(environment, MOST_IN_FLIGHT, IN_FLIGHT, 1, LARGEST_IN_FLIGHT),
        lease_ms=_number(environment, LEASE_MS, DEFAULT_LEASE_MS, *LEASE_RANGE_MS),
    )


def _portable(host: str) -> str:
    """A host may have any name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", host)[:64].strip("-") or "host"


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19 and least <= int(text) <= most):
        raise ConfigError(f"{name}={text[:40]!r}: not a whole number from {least} to {most}")
    return int(text)
