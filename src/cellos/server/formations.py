"""The routes of formations. Reading is the projection's; writing goes to the log first (writes.py)."""

from __future__ import annotations

import re

import msgspec
from starlette.types import Receive, Scope

from cellos.core.documents.parse import Syntax
from cellos.core.documents.strict import decode
from cellos.core.formation import phase_of_request
from cellos.core.formation.documents import parse_formation
from cellos.core.problem import ambiguous_name, formation_name_not_found, formation_not_found, problem, problem_of_status
from cellos.errors import SpecSyntaxError
from cellos.server import writes
from cellos.server.cells import MAX_LIMIT, next_link
from cellos.server.query import read_query, unsigned
from cellos.server.replies import Refused, Reply, json_reply, no_content, tagged_reply
from cellos.server.requests import header, if_match, path_uuid, read_body
from cellos.server.state import ServerState

MAX_DOCUMENT_BYTES = 65536
MAX_STATUS_BYTES = 2 << 20
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_YAML = re.compile(rb"(application|text)/(x-)?yaml", re.IGNORECASE)
_JSON = re.compile(rb"application/([\w.-]+\+)?json", re.IGNORECASE)


class StatusReport(msgspec.Struct, frozen=True):
    """The body of POST …/status. Other members are ignored."""

    state: str
    reason: str | None = None
    failed_cells: tuple[str, ...] = ()


async def list_formations(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """All of them, or a page; and the cursor that the list is at, exactly."""
    query = read_query(scope["query_string"], ("limit", "after"))
    limit = unsigned(query, "limit")
    page = state.projection.formations(after=query.get("after"), limit=None if limit is None else min(limit, MAX_LIMIT))
    body = b'{"formations":[%s],"cursor":%d}' % (b",".join(page.parts), state.cursor)
    links = next_link("/v1/formations", {**query, "after": page.next}) if page.next is not None else ()
    return tagged_reply(body, scope, state.etag(cursor=True), headers=links)


async def get_formation(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """One record, by id."""
    formation_id = path_uuid(scope)
    record = state.projection.formation(formation_id)
    if record is None:
        raise Refused(formation_not_found(formation_id))
    return tagged_reply(record, scope)


async def get_formation_by_name(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """The one that has the name now, or else had it last."""
    record = state.projection.formation(_ids_of(state, scope["path_params"]["name"])[0])
    assert record is not None
    return tagged_reply(record, scope)


async def create_formation(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """201 once the log has the reservation of the name and the whole document."""
    raw = await read_body(scope, receive, MAX_DOCUMENT_BYTES)
    key = header(scope, b"idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise Refused(problem("bad-request", "Idempotency-Key must be 1 to 255 visible ASCII characters"))
    syntax: Syntax = "yaml" if _YAML.match(header(scope, b"content-type") or b"") else "json"
    formation = parse_formation(raw, syntax=syntax)
    formation_id = await writes.create(state, formation, key.decode() if key is not None else None)
    body = msgspec.json.encode({"id": formation_id, "name": formation.name, "status": "PENDING"})
    return json_reply(body, status=201, headers=((b"location", f"/v1/formations/{formation_id}".encode()),))


async def delete_formation(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """204, also if it was over already."""
    await writes.cancel(state, path_uuid(scope), condition=if_match(scope))
    return no_content()


async def delete_formation_by_name(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """The same; 409 where more than one that is not over has the name, and nothing is done."""
    name: str = scope["path_params"]["name"]
    ids = _ids_of(state, name)
    if len(ids) > 1:
        raise Refused(ambiguous_name(name, ids))
    await writes.cancel(state, ids[0], condition=if_match(scope))
    return no_content()


async def report_status(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """Whoever drives a formation without specs says how it fares."""
    formation_id = path_uuid(scope)
    if not _JSON.match(header(scope, b"content-type") or b""):
        raise Refused(problem("unsupported-media-type", "Expected request with `Content-Type: application/json`"))
    report = _read_report(await read_body(scope, receive, MAX_STATUS_BYTES))
    await writes.require_known(state, formation_id)
    phase = phase_of_request(report.state)
    await writes.report(state, formation_id, phase, reason=report.reason, failed_cells=report.failed_cells, condition=if_match(scope))
    return no_content()


def _read_report(raw: bytes) -> StatusReport:
    try:
        value = decode(raw)
    except SpecSyntaxError as error:
        raise Refused(problem("bad-request", f"Failed to parse the request body as JSON: {error.text}")) from error
    try:
        return msgspec.convert(value, StatusReport)
    except msgspec.ValidationError as error:
        text = f"Failed to deserialize the JSON body into the target type: {error}"
        raise Refused(problem_of_status(422, text)) from error


def _ids_of(state: ServerState, name: str) -> list[str]:
    ids = state.projection.formation_by_name(name)
    if not ids:
        raise Refused(formation_name_not_found(name[:300]))
    return ids
