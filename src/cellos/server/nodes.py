"""GET /v1/nodes: who runs cells and who drives formations, by their leases, which are as old as NATS says: no two clocks are compared."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import Receive, Scope

from cellos.core.ids import rfc3339
from cellos.errors import NoStream
from cellos.eventlog.api import ask
from cellos.eventlog.connect import LogClient
from cellos.eventlog.leases import STREAM, ControllerLease, Lease, Leases, NodeLease, read_controller, read_node
from cellos.eventlog.stored import nanoseconds
from cellos.server.replies import Reply, tagged_reply
from cellos.server.state import ServerState

_MARGIN = 4 / 3
"""A lease that was not renewed for so many of its lengths is as good as lost."""


class Present(msgspec.Struct, frozen=True):
    """The leases that are there; `late` are the keys of those that nobody renewed in time."""

    nodes: list[tuple[Lease, NodeLease]]
    controllers: list[tuple[Lease, ControllerLease]]
    late: frozenset[str]

    @property
    def live_nodes(self) -> list[NodeLease]:
        return [node for lease, node in self.nodes if lease.key not in self.late]

    @property
    def live_controllers(self) -> int:
        return sum(lease.key not in self.late for lease, _ in self.controllers)


class _Clock(msgspec.Struct):
    ts: str


async def list_nodes(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """Nodes in the order of their names."""
    found = await present(state.required_client())
    nodes = [_shown(found, lease, node) for lease, node in sorted(found.nodes, key=lambda each: (each[1].node, each[1].life))]
    controllers = [_shown(found, lease, each) for lease, each in sorted(found.controllers, key=lambda each: each[1].controller)]
    return tagged_reply(msgspec.json.encode({"nodes": nodes, "controllers": controllers}), scope)


def _shown(found: Present, lease: Lease, value: NodeLease | ControllerLease) -> dict[str, object]:
    return {**msgspec.to_builtins(value), "renewedAt": rfc3339(lease.created_ns), "late": lease.key in found.late}


async def present(client: LogClient) -> Present:
    """Who is there at the moment. Raises EventLogError; no bucket is an empty one."""
    entries, now = await asyncio.gather(Leases(client).entries(), _now(client))
    nodes = [(lease, node) for lease in entries if (node := read_node(lease)) is not None]
    controllers = [(lease, controller) for lease in entries if (controller := read_controller(lease)) is not None]
    terms = [(lease, node.lease_ms) for lease, node in nodes] + [(lease, controller.lease_ms) for lease, controller in controllers]
    late = frozenset(lease.key for lease, lease_ms in terms if now - lease.created_ns > _MARGIN * lease_ms * 1_000_000)
    return Present(nodes, controllers, late)


async def _now(client: LogClient) -> int:
    """By the clock of NATS, in nanoseconds since 1970."""
    try:
        return nanoseconds(msgspec.json.decode(await ask(client, f"STREAM.INFO.{STREAM}"), type=_Clock).ts)
    except NoStream:
        return 0
