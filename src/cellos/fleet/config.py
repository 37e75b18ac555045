"""The agent's variables: a table, from which the reference page is made, and one value that they are read into, once."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import msgspec

from cellos.core.documents.identifiers import PORTABLE_RULE, is_portable
from cellos.daemon import variables
from cellos.daemon.capacity import host_cpu_micros, host_memory_bytes
from cellos.daemon.variables import Variable
from cellos.errors import ConfigError
from cellos.fleet.layout import PARTS, Layout

BUCKET = "CELLOS_FLEET_BUCKET"
PREFIX = "CELLOS_FLEET_PREFIX"
QUEUE = "CELLOS_FLEET_QUEUE_NAME"
POOL = "CELLOS_FLEET_POOL_ID"
SUPERVISOR = "CELLOS_FLEET_SUPERVISOR"
POLL_MS = "CELLOS_FLEET_POLL_INTERVAL_MS"
HEARTBEAT_MS = "CELLOS_FLEET_HEARTBEAT_INTERVAL_MS"
NODE_ID = "CELLOS_FLEET_NODE_ID"
SLOTS = "CELLOS_FLEET_SLOTS"
MEMORY_BYTES = "CELLOS_FLEET_MEMORY_BYTES"
CPU_MICROS = "CELLOS_FLEET_CPU_MICROS"
LEASE_MS = "CELLOS_FLEET_LEASE_MS"
RETRIES = "CELLOS_FLEET_RETRIES"

DEFAULT_PREFIX = "fleet"
DEFAULT_SUPERVISOR = "cellos-supervisor"
DEFAULT_POLL_MS = 5_000
DEFAULT_HEARTBEAT_MS = 30_000
DEFAULT_LEASE_MS = 60_000
SHORTEST_LEASE_MS = 10_000
LONGEST_MS = 86_400_000
MOST_SLOTS = 4_096
MOST_RETRIES = 100
LONGEST_NODE = 253
_PREFIX_PART = re.compile(r"[A-Za-z0-9!_.*'()@=+,:-]+")


VARIABLES = (
    Variable(BUCKET, "required", "a bucket of S3, or `s3://BUCKET[/PATH]`, `file:///DIRECTORY`, `gs://…`, `az://…`"),
    Variable(PREFIX, f"`{DEFAULT_PREFIX}`", "what all keys begin with; slashes at its end are taken off"),
    Variable(QUEUE, "none", "the lane: another queue below the same prefix; its agents see no other"),
    Variable(POOL, "none", "take only specs without `placement.poolId`, or with this one; none: take all"),
    Variable(SUPERVISOR, f"`{DEFAULT_SUPERVISOR}`", "the program that runs a cell: a path, or a name that is looked up in `PATH`"),
    Variable(POLL_MS, f"{DEFAULT_POLL_MS}", "how often an agent looks for work when there was none"),
    Variable(HEARTBEAT_MS, f"{DEFAULT_HEARTBEAT_MS}", "how often it says that it is there"),
    Variable(NODE_ID, "the host's name", "its name in logs, claims and receipts, at most 253 printable characters"),
    Variable(SLOTS, "the processors that it may use", f"how many cells it runs at once, 1 to {MOST_SLOTS}"),
    Variable(MEMORY_BYTES, "the host's, or its control group's", "memory that declared limits are subtracted from"),
    Variable(CPU_MICROS, "the host's, or its control group's", "processor time, in microseconds per second, likewise"),
    Variable(LEASE_MS, f"{DEFAULT_LEASE_MS}", f"how long a claim is held without a sign of life, {SHORTEST_LEASE_MS} or more"),
    Variable(RETRIES, "0", "how often a spec is run again whose agent was lost while its cell ran"),
    Variable("RUST_LOG", "`info`", "lowest level of the log, also as `target=level`, separated by commas", "left out"),
    Variable("CELLOS_GIT_SHA", "`unknown`", "shown by `--version`", "anything is taken"),
)
STORE_VARIABLES = (
    Variable("AWS_ACCESS_KEY_ID", "none", "with `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`: who we are"),
    Variable("AWS_REGION", "`us-east-1`", "or `AWS_DEFAULT_REGION`: where the bucket is"),
    Variable("AWS_ENDPOINT_URL", "that of the region", "or `AWS_ENDPOINT_URL_S3`: the URL of another S3 API, `http://` too"),
    Variable("AWS_CA_BUNDLE", "none", "file of certificates that are trusted besides the system's"),
    Variable("AWS_WEB_IDENTITY_TOKEN_FILE", "none", "with `AWS_ROLE_ARN`, or the variables of ECS, or the instance's role: who we are"),
)
"""What the library reads besides stands in its own documentation. There are no profiles: `AWS_PROFILE` and `~/.aws` are not read."""


def table() -> str:
    """The table of the page."""
    return variables.table((*VARIABLES, *STORE_VARIABLES))


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The environment, read once."""

    bucket: str
    prefix: str = DEFAULT_PREFIX
    queue: str = ""
    pool: str = ""
    supervisor: str = DEFAULT_SUPERVISOR
    poll_ms: int = DEFAULT_POLL_MS
    heartbeat_ms: int = DEFAULT_HEARTBEAT_MS
    node: str
    slots: int
    memory_bytes: int
    cpu_micros: int
    lease_ms: int = DEFAULT_LEASE_MS
    retries: int = 0

    @property
    def layout(self) -> Layout:
        return layout_of(self.prefix, self.queue)

    @property
    def request_seconds(self) -> float:
        """A request that takes longer is given up, so that several fit into a lease."""
        return min(self.lease_ms / 4000, 30.0)


def layout_of(prefix: str, queue: str) -> Layout:
    return Layout("/".join(part for part in (prefix, queue) if part))


def read_bucket(environment: Mapping[str, str]) -> str:
    """Raises ConfigError."""
    bucket = environment.get(BUCKET)
    if bucket is None:
        raise ConfigError(f"failed to read configuration: {BUCKET} is required: environment variable not found")
    if not bucket.strip():
        raise ConfigError(f"failed to read configuration: {BUCKET} is empty; name a bucket, or file:///DIRECTORY to try it without one")
    return bucket.strip()


def read_layout(environment: Mapping[str, str]) -> Layout:
    """Where the queue lies in the bucket. Raises ConfigError."""
    return layout_of(_prefix(environment), _queue(environment))


def read_config(environment: Mapping[str, str]) -> Config:
    """The configuration of an agent. Raises ConfigError, naming the variable."""
    return Config(
        bucket=read_bucket(environment),
        prefix=_prefix(environment),
        queue=_queue(environment),
        pool=_identifier(environment, POOL),
        supervisor=environment.get(SUPERVISOR, "").strip() or DEFAULT_SUPERVISOR,
        poll_ms=_number(environment, POLL_MS, DEFAULT_POLL_MS, 1, LONGEST_MS),
        heartbeat_ms=_number(environment, HEARTBEAT_MS, DEFAULT_HEARTBEAT_MS, 1, LONGEST_MS),
        node=_node(environment),
        slots=_number(environment, SLOTS, len(os.sched_getaffinity(0)), 1, MOST_SLOTS),
        memory_bytes=_number(environment, MEMORY_BYTES, 0, 1, 2**63 - 1) or host_memory_bytes(),
        cpu_micros=_number(environment, CPU_MICROS, 0, 1, 2**63 - 1) or host_cpu_micros(),
        lease_ms=_number(environment, LEASE_MS, DEFAULT_LEASE_MS, SHORTEST_LEASE_MS, LONGEST_MS),
        retries=_number(environment, RETRIES, 0, 0, MOST_RETRIES),
    )


def find_program(name: str, path: str | None) -> str:
    """The supervisor as a path. Raises ConfigError: a spec cannot be blamed for a program that is not there."""
    from shutil import which

    found = which(name, path=path)
    if found is None:
        raise ConfigError(f"{SUPERVISOR}={name}: no such program (PATH is {path or 'empty'}); install cellos, or name its path")
    return os.path.abspath(found)


def _prefix(environment: Mapping[str, str]) -> str:
    prefix = environment.get(PREFIX, DEFAULT_PREFIX).rstrip("/")
    if prefix and not all(_PREFIX_PART.fullmatch(part) and part.strip(".") for part in prefix.split("/")):
        raise ConfigError(f"{PREFIX}: {prefix[:80]!r} is no path of letters, digits and !_.*'()@=+,:- (no empty part, no . or ..)")
    return prefix


def _queue(environment: Mapping[str, str]) -> str:
    queue = _identifier(environment, QUEUE)
    if queue in PARTS:
        raise ConfigError(f"{QUEUE}: a lane called {queue} would lie in the middle of the default lane; choose another name")
    return queue


def _node(environment: Mapping[str, str]) -> str:
    name = environment.get(NODE_ID, "").strip()
    if not name.isprintable() or len(name) > LONGEST_NODE:
        raise ConfigError(f"{NODE_ID}: {name[:80]!r} is no name of at most {LONGEST_NODE} printable characters")
    return name or socket.gethostname() or "unknown-node"


def _identifier(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "").strip()
    if value and not is_portable(value):
        raise ConfigError(f"{name}: {value[:80]!r} {PORTABLE_RULE}")
    return value


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise ConfigError(f"{name}: {text[:40]!r} is no whole number from {least} to {most}; leave it out for the default")
    return int(text)
