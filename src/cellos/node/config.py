"""The node's variables: a table, from which the reference page is made, and one value that they are read into, once.

What isolates, where secrets come from, policies, signing and exports are set by the supervisor's variables; those of them that say where a
single run's events go have no meaning here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import msgspec

from cellos.core.documents.identifiers import PORTABLE_RULE, is_portable
from cellos.core.evidence.redact import VARIABLE as REDACTION
from cellos.core.formation.members import DEFAULT_POOL
from cellos.daemon import variables
from cellos.daemon.capacity import host_cpu_micros, host_memory_bytes
from cellos.daemon.variables import Variable
from cellos.errors import ConfigError
from cellos.eventlog.connect import VARIABLES as NATS_VARIABLES
from cellos.eventlog.stream import VARIABLES as STREAM_VARIABLES
from cellos.supervisor import config as supervisor

NODE_ID = "CELLOS_NODE_ID"
POOL = "CELLOS_NODE_POOL"
SLOTS = "CELLOS_NODE_SLOTS"
LEASE_MS = "CELLOS_NODE_LEASE_MS"
DRAIN_MS = "CELLOS_NODE_DRAIN_MS"
MEMORY_BYTES = "CELLOS_NODE_MEMORY_BYTES"
CPU_MICROS = "CELLOS_NODE_CPU_MICROS"
DEFAULT_LEASE_MS = 15_000
DEFAULT_DRAIN_MS = 30_000
SHORTEST_LEASE_MS = 1_000
LONGEST_LEASE_MS = 3_600_000
MOST_SLOTS = 4_096

NOT_HERE = (
    "CELLOS_RUN_ID",
    "CELL_OS_JSONL_EVENTS",
    "NATS_URL",
    "NATS_CA_FILE",
    "CELL_OS_REQUIRE_JETSTREAM",
    "CELL_OS_USE_NOOP_SINK",
    "CELLOS_EVENTS_SUBJECT_TEMPLATE",
    "CELLOS_TENANT_ID",
    "CELL_OS_EVENTS_SUBJECT",
    "CELLOS_DLQ_DIR",
)
"""Variables of the supervisor without effect on a node: its events go to the subjects of the log, and wait in its spool."""

KEPT = frozenset(
    {"attempt", "correlation", "exitCode", "formationId", "life", "memberId", "node", "outcome", "pool", "terminalState", "ttlSeconds"}
)
"""Members of events that others have to read."""


VARIABLES = (
    Variable(NODE_ID, "the host's name", "name of the node; two that run must not have the same", "an error"),
    Variable(POOL, f"`{DEFAULT_POOL}`", "the pool whose members it runs", "an error"),
    Variable(SLOTS, "the processors that it may use", f"how many cells it runs at once, 1 to {MOST_SLOTS}", "an error"),
    Variable(
        LEASE_MS,
        f"{DEFAULT_LEASE_MS}",
        f"how long it is believed to be alive after a sign of life, {SHORTEST_LEASE_MS} to {LONGEST_LEASE_MS}; after that its runs end",
        "an error",
    ),
    Variable(DRAIN_MS, f"{DEFAULT_DRAIN_MS}", "how long running cells may go on after SIGTERM", "an error"),
    Variable(MEMORY_BYTES, "the host's, or its control group's", "memory that declared limits are subtracted from", "an error"),
    Variable(CPU_MICROS, "the host's, or its control group's", "processor time, in microseconds per second, likewise", "an error"),
    Variable("CELLOS_STATE_DIR", "as of the supervisor", "directory for records and spools; the node's are below `nodes/<id>`", "an error"),
    Variable("RUST_LOG", "`info`", "lowest level of the log, also as `target=level`, separated by commas", "left out"),
)  # fmt: skip


def table() -> str:
    """The table of the page: also what the connection and the stream ask for."""
    return variables.table((*VARIABLES, *NATS_VARIABLES, *STREAM_VARIABLES))


def without_effect() -> str:
    """The supervisor's variables that the page says have no effect."""
    return ", ".join(f"`{name}`" for name in NOT_HERE) + "\n"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The environment, read once."""

    id: str
    pool: str
    slots: int
    lease_ms: int
    drain_ms: int
    memory_bytes: int
    cpu_micros: int
    run: supervisor.Config
    """What applies to each run."""

    @property
    def lease_seconds(self) -> float:
        return self.lease_ms / 1000

    @property
    def drain_seconds(self) -> float:
        return self.drain_ms / 1000

    def __repr__(self) -> str:
        return f"Config(id={self.id!r})"  # the rest may hold secrets


def read_config(environment: Mapping[str, str]) -> Config:
    """The configuration of a node. Raises ConfigError, naming the variable."""
    run = supervisor.read_config(environment)
    for name in sorted(run.redacted_fields & KEPT):
        raise ConfigError(f"{REDACTION}: cannot redact {name} on a node: controllers go by it; leave it out")
    return Config(
        id=_identifier(environment, NODE_ID, socket.gethostname()),
        pool=_identifier(environment, POOL, DEFAULT_POOL),
        slots=_number(environment, SLOTS, 1, MOST_SLOTS) or len(os.sched_getaffinity(0)),
        lease_ms=_number(environment, LEASE_MS, SHORTEST_LEASE_MS, LONGEST_LEASE_MS) or DEFAULT_LEASE_MS,
        drain_ms=_default(_number(environment, DRAIN_MS, 0, 10**9), DEFAULT_DRAIN_MS),
        memory_bytes=_number(environment, MEMORY_BYTES, 1, 2**63 - 1) or host_memory_bytes(),
        cpu_micros=_number(environment, CPU_MICROS, 1, 2**63 - 1) or host_cpu_micros(),
        run=run,
    )


def _identifier(environment: Mapping[str, str], name: str, default: str) -> str:
    value = environment.get(name, "").strip() or default
    if not is_portable(value):
        raise ConfigError(f"{name}: {value[:80]!r} {PORTABLE_RULE}; set {name} to such a name")
    return value


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    """None where it is not set; blank is not set."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise ConfigError(f"{name}: {text[:40]!r} is no whole number from {least} to {most}; leave it out for the default")
    return int(text)


def _default(value: int | None, default: int) -> int:
    return default if value is None else value
