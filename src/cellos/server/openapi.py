"""The API as an OpenAPI 3.1 document, made from the table of routes and the structs that bodies are made of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import Receive, Scope

from cellos import __version__
from cellos.core.cell import CellRecord
from cellos.core.formation.views import FormationView
from cellos.core.problem import MEDIA_TYPE, Problem
from cellos.core.projection import FormationRecord
from cellos.eventlog.leases import ControllerLease, NodeLease
from cellos.server.query import MAX_U64
from cellos.server.replies import Reply, tagged_reply
from cellos.server.state import ServerState

if TYPE_CHECKING:
    from cellos.server.routes import Operation, Parameter

_TEMPLATE = "#/components/schemas/{name}"
_UUID = {"type": "string", "format": "uuid"}
_CURSOR = {"type": "integer", "minimum": 0, "maximum": MAX_U64}
_PHRASES = {
    200: "as asked",
    201: "admitted",
    204: "done",
    101: "a WebSocket",
    304: "as the client has it already",
}


async def get_document(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """The document."""
    return tagged_reply(_encoded(), scope)


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """As OpenAPI has it."""
    from cellos.server.routes import ROUTES  # which has `get_document` among its handlers

    paths = {route.path: {each.method.lower(): _operation(route.path, each) for each in route.operations} for route in ROUTES}
    return {
        "openapi": "3.1.0",
        "info": {"title": "CellOS control plane", "version": __version__},
        "security": [{"token": []}],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(path: str, operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": operation.text,
        "responses": {str(operation.success): _answer(operation)},
    }
    for status in sorted({401, *operation.failures}):
        found["responses"][str(status)] = {"description": "a problem", "content": {MEDIA_TYPE: _of("Problem")}}
    if operation.shape is not None and operation.method == "GET" and operation.shape != "Version":
        found["responses"]["304"] = {"description": _PHRASES[304]}
    if operation.method != "GET":
        found["responses"]["403"] = {"description": "the token may only read", "content": {MEDIA_TYPE: _of("Problem")}}
    parameters = [*_path_parameters(path), *map(_parameter, operation.query)]
    if operation.body == "Formation":
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"}})
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": _of(operation.body)}}
    return found


def _answer(operation: Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": _PHRASES[operation.success]}
    if operation.shape is not None:
        answer["content"] = {"application/json": _of(operation.shape)}
    if operation.media is not None:
        answer["content"] = {operation.media: {"schema": {}}}
    return answer


def _of(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _TEMPLATE.format(name=name)}}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    kind = _UUID if path.startswith("/v1/formations") else {"type": "string"}
    return [{"name": name, "in": "path", "required": True, "schema": kind if name == "id" else {"type": "string"}} for name in _names(path)]


def _names(path: str) -> list[str]:
    return [part.strip("{}") for part in path.split("/") if part.startswith("{")]


def _parameter(parameter: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if parameter.kind == "integer":
        schema = dict(_CURSOR)
    elif parameter.kind != "string":
        schema = {"type": "string", "enum": parameter.kind.split("|")}
    return {"name": parameter.name, "in": "query", "description": parameter.text, "schema": schema}


def _schemas() -> dict[str, Any]:
    from cellos.server.formations import StatusReport

    shapes = (CellRecord, FormationRecord, FormationView, NodeLease, ControllerLease, Problem, StatusReport)
    _, found = msgspec.json.schema_components(shapes, ref_template=_TEMPLATE)
    event = {"type": "object", "required": ["seq", "event"], "properties": {"seq": _CURSOR, "event": {"type": "object"}}}
    return {
        **found,
        "CellList": {"type": "array", "items": {"$ref": _TEMPLATE.format(name="CellRecord")}},
        "FormationList": _object(formations={"type": "array", "items": {"$ref": _TEMPLATE.format(name="FormationRecord")}}, cursor=_CURSOR),
        "NodeList": _object(
            nodes={"type": "array", "items": _leased("NodeLease")}, controllers={"type": "array", "items": _leased("ControllerLease")}
        ),
        "EventPage": _object(events={"type": "array", "items": event}, cursor=_CURSOR),
        "Created": _object(id=_UUID, name={"type": "string"}, status={"const": "PENDING"}),
        "Version": _object(server={"type": "object"}, api=_object(version={"type": "string"})),
        "Formation": {
            "type": "object",
            "required": ["name", "coordinator", "members"],
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$", "maxLength": 253},
                "coordinator": {"type": "string"},
                "members": {"type": "array", "items": _member()},
            },
        },
    }


def _leased(name: str) -> dict[str, Any]:
    """A lease, and what the server says of it."""
    return {"allOf": [{"$ref": _TEMPLATE.format(name=name)}, _object(renewedAt={"type": "string"}, late={"type": "boolean"})]}


def _member() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["id"],
        "properties": {"id": {"type": "string"}, "authorizedBy": {"type": ["string", "null"]}},
    }


def _object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}
