"""Every route: what it answers, which parameters it takes and how it can fail. The application, the OpenAPI document and the page of the
reference are made from this table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.types import Receive, Scope

from cellos.server import about, cells, events, formations, members, nodes, openapi, output
from cellos.server.replies import Reply
from cellos.server.state import ServerState

Handler = Callable[[ServerState, Scope, Receive], Awaitable[Reply]]
STREAM_PATH = "/ws/events"


class Parameter(NamedTuple):
    """A parameter of the query: `kind` is `string`, `integer`, or the words it may be, separated by |."""

    name: str
    kind: str
    text: str


class Operation(NamedTuple):
    """A method of a path. `shape` names the schema of the answer, `body` that of the request; `failures` beside 401.

    `media` is the type of an answer that is no JSON.
    """

    method: str
    handler: Handler
    text: str
    success: int
    failures: tuple[int, ...] = ()
    query: tuple[Parameter, ...] = ()
    shape: str | None = None
    body: str | None = None
    media: str | None = None


class Route(NamedTuple):
    """A path with all that it takes."""

    path: str
    operations: tuple[Operation, ...]


_LIMIT = Parameter("limit", "integer", "how many at most; more than 1000 is 1000")
_AFTER = Parameter("after", "string", "begin behind this id, which the Link header of the page before names")
_SINCE = Parameter("since", "integer", "what follows this `seq`")
_SUBJECT = Parameter("subject", "string", "a NATS filter, all events without it")

ROUTES = (
    Route(
        "/v1/cells/{id}",
        (Operation("GET", cells.get_cell, "one cell", 200, (404,), shape="CellRecord"),),
    ),
    Route(
        "/v1/cells",
        (
            Operation(
                "GET",
                cells.list_cells,
                "cells, in the order of their ids",
                200,
                (400,),
                (
                    Parameter("state", "pending|running|destroyed", "in any case"),
                    Parameter("formation", "string", "the formation's id, in lower case"),
                    _LIMIT,
                    _AFTER,
                ),
                "CellList",
            ),
        ),
    ),
    Route(
        "/v1/formations",
        (
            Operation(
                "POST", formations.create_formation, "admit a formation", 201, (400, 409, 413, 422, 503), shape="Created", body="Formation"
            ),
            Operation(
                "GET",
                formations.list_formations,
                "formations, in the order of their ids",
                200,
                (400,),
                (_LIMIT, _AFTER),
                "FormationList",
            ),
        ),
    ),
    Route(
        "/v1/formations/by-name/{name}",
        (
            Operation(
                "GET",
                formations.get_formation_by_name,
                "the formation that has the name, or else had it last",
                200,
                (404,),
                shape="FormationRecord",
            ),
            Operation("DELETE", formations.delete_formation_by_name, "cancel it", 204, (404, 409, 412, 503)),
        ),
    ),
    Route(
        "/v1/formations/{id}",
        (
            Operation("GET", formations.get_formation, "one formation", 200, (400, 404), shape="FormationRecord"),
            Operation("DELETE", formations.delete_formation, "cancel it; again is no error", 204, (400, 404, 412, 503)),
        ),
    ),
    Route(
        "/v1/formations/{id}/status",
        (
            Operation(
                "POST",
                formations.report_status,
                "say how a formation without specs fares",
                204,
                (400, 404, 409, 412, 413, 415, 422, 503),
                body="StatusReport",
            ),
        ),
    ),
    Route(
        "/v1/formations/{formation}/members",
        (
            Operation(
                "GET",
                members.list_members,
                "its members, by its id or its name: what each does, or waits for",
                200,
                (404, 503),
                shape="FormationView",
            ),
        ),
    ),
    Route("/v1/nodes", (Operation("GET", nodes.list_nodes, "who runs cells, and who drives formations", 200, (503,), shape="NodeList"),)),
    Route(
        "/v1/cells/{id}/output",
        (
            Operation(
                "GET",
                output.get_output,
                "what it wrote",
                200,
                (400, 404, 503),
                (
                    Parameter("stream", "stdout|stderr", "that one only"),
                    Parameter("run", "string", "of that run; the latest one without it"),
                    Parameter("follow", "0|1", "1: and what comes, until the run has ended"),
                    Parameter("format", "raw|ndjson", "raw without it: the bytes, as they were written"),
                    Parameter("after", "integer", "what follows this `seq`"),
                ),
                media="application/octet-stream",
            ),
        ),
    ),
    Route(
        "/v1/events",
        (
            Operation(
                "GET",
                events.list_events,
                "events of the log, in its order",
                200,
                (400, 503),
                (_SINCE, _SUBJECT, Parameter("limit", "integer", "how many at most, 100 without it; more than 1000 is 1000")),
                "EventPage",
            ),
        ),
    ),
    Route("/v1/version", (Operation("GET", about.get_version, "who answers", 200, shape="Version"),)),
    Route("/v1/openapi.json", (Operation("GET", openapi.get_document, "this table, as an OpenAPI document", 200),)),
    Route(
        STREAM_PATH,
        (
            Operation(
                "GET",
                about.no_upgrade,
                "a WebSocket: events as they come",
                101,
                (400, 426),
                (_SINCE, _SUBJECT),
            ),
        ),
    ),
)


def table() -> str:
    """The table of the page."""
    rows = ["| method, path | answer | parameters | fails with | what |", "|---|---|---|---|---|"]
    for route in ROUTES:
        for each in route.operations:
            answer = f"{each.success}{f' {each.shape}' if each.shape else ''}"
            query = ", ".join(f"`{parameter.name}`" for parameter in each.query)
            failures = ", ".join(map(str, sorted({401, *each.failures})))
            rows.append(f"| {each.method} `{route.path}` | {answer} | {query} | {failures} | {each.text} |")
    return "\n".join(rows) + "\n"
