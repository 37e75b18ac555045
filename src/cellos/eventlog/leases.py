"""Who is alive: the KV bucket CELLOS_LEASES, one key per life of a node and per controller, each renewed by its owner.

Keys are `nodes.<life>` and `controllers.<id>`; values are NodeLease and ControllerLease in JSON. Whoever renews expects the revision that
he wrote last, whoever deletes expects the one that he saw: of a renewal and a deletion at the same time the log takes one.

The bucket is a plain stream, made as `nats kv add` makes one: https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-8.md
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from nats import errors as nats_errors

from cellos.errors import EventLogError, NoStream
from cellos.eventlog.api import NO_MESSAGE, NO_STREAM, ask
from cellos.eventlog.connect import LogClient, pause
from cellos.eventlog.log import EventLog, read_message
from cellos.eventlog.pages import read_page
from cellos.eventlog.side_stream import ensure_side_stream
from cellos.eventlog.stored import Stored

BUCKET = "CELLOS_LEASES"
STREAM = f"KV_{BUCKET}"
PREFIX = f"$KV.{BUCKET}."
NEWS_PREFIX = "cellos.news.leases."
"""Where the server tells what was stored. (Watchers of the subjects themselves would be taken for a bucket that answers.)"""
NODES = "nodes."
CONTROLLERS = "controllers."
MARKER_SECONDS = 3600
"""How long the place of a deleted key remains marked: longer than anybody needs to notice it."""
_SETTLE_SECONDS = 0.02


class NodeLease(Struct, frozen=True, kw_only=True, rename="camel"):
    """What a node says of itself with each renewal. Bytes; cpu in microseconds per second."""

    node: str
    life: str
    host: str
    pid: int
    pool: str
    classes: tuple[str, ...]
    slots: int
    slots_free: int
    memory_bytes: int
    memory_free: int
    cpu_micros: int
    cpu_free: int
    lease_ms: int
    eligible: bool = True
    draining: bool = False
    started_at: str
    runs: int = 0
    version: str = ""


class ControllerLease(Struct, frozen=True, kw_only=True, rename="camel"):
    """What a controller says of itself."""

    controller: str
    host: str
    pid: int
    lease_ms: int
    started_at: str
    formations: int = 0
    """How many of them it follows to their end."""
    version: str = ""


class Lease(Struct, frozen=True):
    """A key as it is now. `created_ns`: when the log took this revision, in nanoseconds since 1970, by the clock of NATS."""

    key: str
    value: bytes
    revision: int
    created_ns: int


_NODE = msgspec.json.Decoder(NodeLease)
_CONTROLLER = msgspec.json.Decoder(ControllerLease)


def read_node(lease: Lease) -> NodeLease | None:
    """None where it is no node's, or not one that can be read."""
    if not lease.key.startswith(NODES):
        return None
    try:
        return _NODE.decode(lease.value)
    except msgspec.MsgspecError:
        return None


def read_controller(lease: Lease) -> ControllerLease | None:
    """None where it is no controller's, or not one that can be read."""
    if not lease.key.startswith(CONTROLLERS):
        return None
    try:
        return _CONTROLLER.decode(lease.value)
    except msgspec.MsgspecError:
        return None


def bucket_config(*, replicas: int = 1) -> dict[str, Any]:
    """As STREAM.CREATE takes it."""
    return {
        "name": STREAM,
        "subjects": [f"{PREFIX}>"],
        "storage": "file",
        "num_replicas": replicas,
        "max_msgs_per_subject": 1,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        "allow_msg_ttl": True,  # markers of deleted keys go by themselves
        "republish": {"src": f"{PREFIX}>", "dest": f"{NEWS_PREFIX}>", "headers_only": True},  # watchers hear what is stored
    }


async def ensure_leases(client: LogClient, *, replicas: int = 1) -> None:
    """Make the bucket unless it is there. Raises NoStream where the one that is there cannot be used; other EventLogErrors."""
    config = bucket_config(replicas=replicas)
    await ensure_side_stream(
        client, config, needed=("subjects", "max_msgs_per_subject", "allow_rollup_hdrs", "allow_direct", "allow_msg_ttl")
    )


class Leases:
    """The bucket behind one connection. A bucket that was removed is made again by the next `put`."""

    def __init__(self, client: LogClient, *, replicas: int = 1) -> None:
        self._client = client
        self._log = EventLog(client)
        self._replicas = replicas

    async def put(self, key: str, value: bytes, expected_revision: int | None) -> int:
        """Write a key: its new revision. `expected_revision` 0: it must not be there; None: whatever is there.

        Raises WrongSequence, LogUnreachable, OutcomeUnknown, other EventLogErrors.
        """
        try:
            return await self._write(key, value, expected_revision, {})
        except NoStream:
            await ensure_leases(self._client, replicas=self._replicas)
            return await self._write(key, value, expected_revision, {})

    async def delete(self, key: str, expected_revision: int | None) -> None:
        """Remove a key. Raises as `put`."""
        marker = {"KV-Operation": "PURGE", "Nats-Rollup": "sub", "Nats-TTL": f"{MARKER_SECONDS}s"}
        await self._write(key, b"", expected_revision, marker)

    async def entries(self, prefix: str = "") -> list[Lease]:
        """The keys that are there now, oldest renewal first. Raises LogUnreachable, other EventLogErrors; no bucket is an empty one."""
        found: list[Lease] = []
        after = 0
        subjects = f"{PREFIX}{prefix}>"
        while True:
            try:
                page = await read_page(self._client, STREAM, {"seq": after + 1, "next_by_subj": subjects, "batch": 1_000})
            except NoStream as error:
                if error.number != NO_STREAM:  # nobody there who could tell: that is not the same as nobody alive
                    raise
                return []
            found += [lease for lease in map(_lease, page) if lease is not None]
            if not page:
                return found
            after = page[-1].sequence

    async def get(self, key: str) -> Lease | None:
        """A key as the leader of the bucket has it; None where it is not there. Raises LogUnreachable, other EventLogErrors."""
        try:
            payload = await ask(self._client, f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": PREFIX + key})
        except EventLogError as error:
            if error.number in {NO_MESSAGE, NO_STREAM}:
                return None
            raise
        return _lease(read_message(payload))

    async def watch(self, *, seconds: float = 1.0) -> AsyncIterator[Mapping[str, Lease]]:
        """All keys that are there, by key, at once and again after each change; never ends by itself.

        A change is noticed at once, at the latest after `seconds` (renewals in quick succession are told together). Without connection
        nothing is told: what was told last may no longer be so.
        """
        changed = asyncio.Event()

        async def heard(_message: object) -> None:
            changed.set()

        known: dict[str, Lease] | None = None
        subscription = None
        attempt = 0
        try:
            while True:
                changed.clear()
                try:
                    if subscription is None:
                        subscription = await self._client.subscribe(f"{NEWS_PREFIX}>", cb=heard)
                    now = {lease.key: lease for lease in await self.entries()}
                except (EventLogError, nats_errors.Error, OSError):
                    attempt += 1
                    await asyncio.sleep(pause(attempt))
                    continue
                attempt = 0
                if now != known:
                    known = now
                    yield now
                try:
                    async with asyncio.timeout(seconds):
                        await changed.wait()
                    await asyncio.sleep(_SETTLE_SECONDS)  # renewals come together
                except TimeoutError:
                    pass
        finally:
            if subscription is not None:
                with contextlib.suppress(nats_errors.Error, OSError):
                    await subscription.unsubscribe()

    async def _write(self, key: str, value: bytes, expected: int | None, block: Mapping[str, str]) -> int:
        headers = dict(block)
        if expected is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected)
        return (await self._log.commit(PREFIX + key, value, headers)).sequence


def _lease(stored: Stored) -> Lease | None:
    """None for the marker of a key that was deleted."""
    if b"KV-Operation:" in stored.headers:
        return None
    return Lease(stored.subject.removeprefix(PREFIX), stored.data, stored.sequence, stored.time)
