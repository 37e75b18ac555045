"""Problem documents (RFC 9457): how the control plane tells a client what went wrong.

PROBLEMS holds every kind. A problem has exactly the members `type`, `title`, `status` and `detail`, in this order. Programs match `type`;
the texts of `detail` are part of the interface too, so those that several places need stand here.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Literal

import msgspec

MEDIA_TYPE = "application/problem+json"
_LONGEST_PATH = 200

ProblemName = Literal[
    "unauthorized",
    "bad-request",
    "not-found",
    "method-not-allowed",
    "conflict",
    "payload-too-large",
    "unsupported-media-type",
    "internal",
    "service-unavailable",
    "formation/no-coordinator",
    "formation/duplicate-member-id",
    "formation/authority-not-narrowing",
    "formation/cycle",
    "formation/multiple-coordinators",
]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One problem document. `status` is that of the HTTP answer too."""

    type: str
    title: str
    status: int
    detail: str

    def body(self) -> bytes:
        """Its JSON, of the media type MEDIA_TYPE."""
        return msgspec.json.encode(self)


class Kind(msgspec.Struct, frozen=True):
    """A row of the table."""

    title: str
    status: int


PROBLEMS: dict[ProblemName, Kind] = {
    "unauthorized": Kind("Unauthorized", 401),
    "bad-request": Kind("Bad Request", 400),
    "not-found": Kind("Not Found", 404),
    "method-not-allowed": Kind("Method Not Allowed", 405),
    "conflict": Kind("Conflict", 409),
    "payload-too-large": Kind("Payload Too Large", 413),
    "unsupported-media-type": Kind("Unsupported Media Type", 415),
    "internal": Kind("Internal Server Error", 500),
    "service-unavailable": Kind("Event store unavailable", 503),
    "formation/no-coordinator": Kind("Formation rejected: no coordinator", 400),
    "formation/duplicate-member-id": Kind("Formation rejected: duplicate member id", 400),
    "formation/authority-not-narrowing": Kind("Formation rejected: authority does not narrow", 400),
    "formation/cycle": Kind("Formation rejected: authority cycle", 400),
    # One member `coordinator` cannot name two; the type is kept for clients that know it.
    "formation/multiple-coordinators": Kind("Formation rejected: multiple coordinators", 400),
}

RETENTION_EXHAUSTED = "/problems/ws/retention-exhausted"
RETENTION_EXHAUSTED_TITLE = "Cursor older than stream retention"
EVENT_STORE_UNREACHABLE = "Event store is temporarily unreachable; retry later"

_BY_STATUS: dict[int, ProblemName] = {kind.status: name for name, kind in PROBLEMS.items() if not name.startswith("formation/")}
_WITHOUT_DETAIL = {
    404: "no route matched the request path",
    405: "HTTP method not allowed for this path",
    413: "request body exceeds the per-route cap",
}


def problem(name: ProblemName, detail: str, *, status: int | None = None) -> Problem:
    """A problem of a kind. `status` is for the few answers that share a kind's type and title, but not its status."""
    kind = PROBLEMS[name]
    return Problem(type=f"/problems/{name}", title=kind.title, status=status or kind.status, detail=detail)


def problem_of_status(status: int, detail: str = "") -> Problem:
    """The problem that an answer of a status, 400 to 499, stands for. One without a kind of its own (422, 426) is a bad request."""
    return problem(_BY_STATUS.get(status, "bad-request"), detail.strip() or _WITHOUT_DETAIL.get(status) or _phrase(status), status=status)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return PROBLEMS["bad-request"].title


def no_route(path: str) -> Problem:
    return problem("not-found", f"no route matched '{path[:_LONGEST_PATH]}'")


def method_not_allowed(method: str, path: str) -> Problem:
    return problem("method-not-allowed", f"method '{method}' not allowed for '{path[:_LONGEST_PATH]}' — see Allow header")


def formation_not_found(formation_id: str) -> Problem:
    return problem("not-found", f"formation {formation_id} not found")


def formation_name_not_found(name: str) -> Problem:
    return problem("not-found", f"formation '{name}' not found")


def cell_not_found(cell_id: str) -> Problem:
    return problem("not-found", f"cell {cell_id} not found")


def name_taken(name: str, formation_id: str) -> Problem:
    """`formation_id` is the formation that has the name."""
    return problem("conflict", f"formation name '{name}' already in use by {formation_id}")


def ambiguous_name(name: str, formation_ids: Iterable[str]) -> Problem:
    """More than one formation has the name; nothing was done."""
    ids = ", ".join(sorted(formation_ids))
    detail = f"multiple formations share name '{name}': [{ids}]; delete by UUID via /v1/formations/{{id}} to disambiguate"
    return problem("conflict", detail)


def driven_by_controller(formation_id: str) -> Problem:
    """Somebody told the status of a formation whose members have specs: what their cells do is its status."""
    return problem("conflict", f"formation {formation_id} has members with specs: its status follows their cells and cannot be set")


def event_store_unavailable(detail: str = EVENT_STORE_UNREACHABLE) -> Problem:
    return problem("service-unavailable", detail)


def retention_exhausted(oldest: int | None) -> bytes:
    """The last text frame of a WebSocket whose cursor lies before the oldest event that is left; no problem document, by its members."""
    return msgspec.json.encode({"type": RETENTION_EXHAUSTED, "title": RETENTION_EXHAUSTED_TITLE, "oldest_seq": oldest})
