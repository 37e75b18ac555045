import json

import msgspec
import pytest

from cellos.core import problem as problems
from cellos.core.problem import PROBLEMS, Problem, problem, problem_of_status, retention_exhausted

UUID = "018f6f0e-0000-7000-8000-000000000001"


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_four_members_in_order(name: problems.ProblemName) -> None:
    body = problem(name, "why").body()
    assert list(json.loads(body)) == ["type", "title", "status", "detail"]
    assert json.loads(body) == {
        "type": f"/problems/{name}",
        "title": PROBLEMS[name].title,
        "status": PROBLEMS[name].status,
        "detail": "why",
    }
    assert msgspec.json.decode(body, type=Problem) == problem(name, "why")


def test_the_table() -> None:
    assert [(name, kind.title, kind.status) for name, kind in PROBLEMS.items()] == [
        ("unauthorized", "Unauthorized", 401),
        ("bad-request", "Bad Request", 400),
        ("not-found", "Not Found", 404),
        ("method-not-allowed", "Method Not Allowed", 405),
        ("conflict", "Conflict", 409),
        ("payload-too-large", "Payload Too Large", 413),
        ("unsupported-media-type", "Unsupported Media Type", 415),
        ("internal", "Internal Server Error", 500),
        ("service-unavailable", "Event store unavailable", 503),
        ("formation/no-coordinator", "Formation rejected: no coordinator", 400),
        ("formation/duplicate-member-id", "Formation rejected: duplicate member id", 400),
        ("formation/authority-not-narrowing", "Formation rejected: authority does not narrow", 400),
        ("formation/cycle", "Formation rejected: authority cycle", 400),
        ("formation/multiple-coordinators", "Formation rejected: multiple coordinators", 400),
    ]


@pytest.mark.parametrize(
    ("status", "detail", "expected"),
    [
        (400, "", ("bad-request", "Bad Request")),
        (401, "who?", ("unauthorized", "who?")),
        (404, "", ("not-found", "no route matched the request path")),
        (405, " \n", ("method-not-allowed", "HTTP method not allowed for this path")),
        (409, " x ", ("conflict", "x")),
        (413, "", ("payload-too-large", "request body exceeds the per-route cap")),
        (415, "", ("unsupported-media-type", "Unsupported Media Type")),
        (422, "", ("bad-request", "Unprocessable")),
        (426, "", ("bad-request", "Upgrade Required")),
        (499, "", ("bad-request", "Bad Request")),
    ],
)
def test_any_refusal_is_a_problem_of_its_status(status: int, detail: str, expected: tuple[str, str]) -> None:
    found = problem_of_status(status, detail)
    assert (found.type, found.status) == (f"/problems/{expected[0]}", status)
    # The reason phrase of 422 has a longer name in later versions of Python.
    assert found.detail.startswith(expected[1])
    assert found.title == PROBLEMS[expected[0]].title  # type: ignore[index]


@pytest.mark.parametrize(
    ("found", "status", "detail"),
    [
        (problems.no_route("/x"), 404, "no route matched '/x'"),
        (problems.no_route("/" + "x" * 300), 404, "no route matched '/" + "x" * 199 + "'"),
        (problems.method_not_allowed("PUT", "/v1/cells"), 405, "method 'PUT' not allowed for '/v1/cells' — see Allow header"),
        (problems.formation_not_found(UUID), 404, f"formation {UUID} not found"),
        (problems.formation_name_not_found("a b"), 404, "formation 'a b' not found"),
        (problems.cell_not_found("c"), 404, "cell c not found"),
        (problems.name_taken("demo", UUID), 409, f"formation name 'demo' already in use by {UUID}"),
        (
            problems.ambiguous_name("demo", ["b", "a"]),
            409,
            "multiple formations share name 'demo': [a, b]; delete by UUID via /v1/formations/{id} to disambiguate",
        ),
        (
            problems.driven_by_controller(UUID),
            409,
            f"formation {UUID} has members with specs: its status follows their cells and cannot be set",
        ),
        (problems.event_store_unavailable(), 503, "Event store is temporarily unreachable; retry later"),
    ],
    ids=lambda value: value.detail[:20] if isinstance(value, Problem) else None,
)
def test_texts(found: Problem, status: int, detail: str) -> None:
    assert (found.status, found.detail) == (status, detail)


@pytest.mark.parametrize(("oldest", "text"), [(7, "7"), (None, "null")])
def test_the_frame_before_4410_is_no_problem_document(oldest: int | None, text: str) -> None:
    expected = f'{{"type":"/problems/ws/retention-exhausted","title":"Cursor older than stream retention","oldest_seq":{text}}}'
    assert retention_exhausted(oldest).decode() == expected
