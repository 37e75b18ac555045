"""GET /v1/formations/{formation}/members: what each member of a formation does, or waits for."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import Receive, Scope

from cellos.core.messages import canonical_uuid
from cellos.core.problem import formation_name_not_found, formation_not_found
from cellos.server.nodes import present
from cellos.server.replies import Refused, Reply, tagged_reply
from cellos.server.state import ServerState


async def list_members(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """By id, or by name; a name that looks like an id is one only where no formation has that id."""
    formation_id = _id_of(state, scope["path_params"]["formation"])
    log, client = state.required_log(), state.required_client()
    story, found = await asyncio.gather(state.stories.story(formation_id, log), present(client))
    view = story.view(found.live_nodes, found.live_controllers, state.clock() // 1_000_000)
    return tagged_reply(msgspec.json.encode(view), scope)


def _id_of(state: ServerState, ident: str) -> str:
    """Raises Refused."""
    formation_id = canonical_uuid(ident)
    if formation_id is not None and state.projection.formation(formation_id) is not None:
        return formation_id
    ids = state.projection.formation_by_name(ident)
    if ids:
        return ids[0]
    raise Refused(formation_name_not_found(ident[:300]) if formation_id is None else formation_not_found(formation_id))
