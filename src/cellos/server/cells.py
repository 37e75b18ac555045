"""GET /v1/cells and /v1/cells/{id}: what the projection holds, as bytes that are ready."""

from __future__ import annotations

from typing import cast
from urllib.parse import quote

from starlette.types import Receive, Scope

from cellos.core.cell import State
from cellos.core.problem import cell_not_found, problem
from cellos.server.query import read_query, unsigned
from cellos.server.replies import Header, Refused, Reply, tagged_reply
from cellos.server.state import ServerState

MAX_LIMIT = 1000
_STATES = ("pending", "running", "destroyed")
_PARAMETERS = ("state", "formation", "limit", "after")


async def list_cells(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """A bare array. With `limit`, a Link header leads to the next page."""
    query = read_query(scope["query_string"], _PARAMETERS, strict=True)
    limit = unsigned(query, "limit")
    page = state.projection.cells(
        state=_state(query.get("state")),
        formation=query.get("formation"),
        after=query.get("after"),
        limit=None if limit is None else min(limit, MAX_LIMIT),
    )
    body = b"[%s]" % b",".join(page.parts)
    links = next_link("/v1/cells", {**query, "after": page.next}) if page.next is not None else ()
    return tagged_reply(body, scope, state.etag(cursor=False), headers=links)


async def get_cell(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """One record."""
    cell_id: str = scope["path_params"]["id"]
    record = state.projection.cell(cell_id)
    if record is None:
        raise Refused(cell_not_found(cell_id))
    return tagged_reply(record, scope)


def next_link(path: str, query: dict[str, str]) -> tuple[Header, ...]:
    """RFC 8288: the request that brings the next page."""
    pairs = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
    return ((b"link", f'<{path}?{pairs}>; rel="next"'.encode()),)


def _state(text: str | None) -> State | None:
    if text is None:
        return None
    word = text.lower()
    if word not in _STATES:
        raise Refused(problem("bad-request", f"unknown ?state value: {word[:80]} (want pending|running|destroyed)"))
    return cast("State", word)
