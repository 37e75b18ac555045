"""Reading, and every refusal that needs no log. Writing is in tests/integration/server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

DOCUMENT = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}]}
STATUS = {"Content-Type": "application/json"}


def test_a_record_by_id_and_by_name(served: Any) -> None:
    found = served.formation(0, name="team.alpha_one", document={**DOCUMENT, "name": "team.alpha_one"})
    record = served.get(f"/v1/formations/{found}").json()
    assert list(record) == ["id", "name", "status", "document"]
    assert (record["id"], record["name"], record["status"]) == (found, "team.alpha_one", "PENDING")
    assert served.get("/v1/formations/by-name/team.alpha_one").json() == record
    assert served.get("/v1/formations/by-name/team%2Ealpha_one").json() == record


def test_the_list_says_what_it_contains(served: Any) -> None:
    first, second = served.formation(1, name="one"), served.formation(0, name="two")
    served.add("cellos.events.other", b"no json")
    body = served.get("/v1/formations").json()
    assert list(body) == ["formations", "cursor"]
    assert [each["id"] for each in body["formations"]] == [second, first]
    assert body["cursor"] == served.sequence == 3


def test_the_list_in_pages(served: Any) -> None:
    ids = [served.formation(number, name=f"n{number}") for number in range(5)]
    path, seen = "/v1/formations?limit=2", []
    while path:
        answer = served.get(path)
        seen += [each["id"] for each in answer.json()["formations"]]
        path = answer.links.get("next", {}).get("url", "")
    assert seen == ids


def test_the_list_is_new_with_every_cursor(served: Any) -> None:
    tag = served.get("/v1/formations").headers["etag"]
    assert served.get("/v1/formations", headers={"If-None-Match": tag}).status_code == 304
    served.add("cellos.events.other", b"{}")
    assert served.get("/v1/formations", headers={"If-None-Match": tag}).json()["cursor"] == 1


@pytest.mark.parametrize("spelling", ["{}", "{{{}}}", "urn:uuid:{}"])
def test_spellings_of_an_id(served: Any, spelling: str) -> None:
    found = served.formation(0)
    for text in (found, found.upper()):
        assert served.get(f"/v1/formations/{spelling.format(text)}").json()["id"] == found
    assert served.get(f"/v1/formations/{found.replace('-', '')}").json()["id"] == found


@pytest.mark.parametrize("text", ["by-name", "x", "11111111-0000-4000-8000-00000000000", "1111111-10000-4000-8000-000000000000"])
def test_what_is_no_id(served: Any, is_problem: Callable[..., None], text: str) -> None:
    is_problem(served.get(f"/v1/formations/{text}"), 400, "bad-request", "Invalid URL: UUID parsing failed: ")


def test_nobody_has_it(served: Any, is_problem: Callable[..., None]) -> None:
    unknown = "99999999-0000-4000-8000-000000000000"
    for method in ("GET", "DELETE"):
        is_problem(served.client.request(method, f"/v1/formations/{unknown}"), 404, "not-found", f"formation {unknown} not found")
        is_problem(served.client.request(method, "/v1/formations/by-name/none"), 404, "not-found", "formation 'none' not found")
    report = served.client.post(f"/v1/formations/{unknown}/status", json={"state": "nonsense"})
    is_problem(report, 404, "not-found", unknown)


def test_by_name_never_asks_for_an_id(served: Any, is_problem: Callable[..., None]) -> None:
    found = served.formation(0, name="22222222-0000-4000-8000-000000000000")
    assert served.get("/v1/formations/by-name/22222222-0000-4000-8000-000000000000").json()["id"] == found
    is_problem(served.get("/v1/formations/by-name/%20%3F"), 404, "not-found")


def test_several_of_one_name_are_not_deleted(served: Any, is_problem: Callable[..., None]) -> None:
    ids = [served.formation(number, name="twin") for number in (1, 0)]
    before = served.get("/v1/formations").content
    answer = served.client.delete("/v1/formations/by-name/twin")
    listed = f"multiple formations share name 'twin': [{', '.join(sorted(ids))}]; delete by UUID via /v1/formations/{{id}} to disambiguate"
    is_problem(answer, 409, "conflict", listed)
    assert served.get("/v1/formations").content == before
    assert served.get("/v1/formations/by-name/twin").json()["id"] == min(ids)


def test_a_name_stands_for_the_one_that_has_not_ended(served: Any) -> None:
    served.formation(0, "created", "completed", name="again")
    second = served.formation(1, name="again")
    assert served.get("/v1/formations/by-name/again").json()["id"] == second


@pytest.mark.parametrize("size", [65_537, 70 * 1024, 200 * 1024])
def test_too_large_a_document(served: Any, is_problem: Callable[..., None], size: int) -> None:
    is_problem(served.client.post("/v1/formations", content=b" " * size), 413, "payload-too-large", "length limit exceeded")


def test_a_large_document_without_a_length(served: Any, is_problem: Callable[..., None]) -> None:
    pieces = (b" " * 10_000 for _ in range(10))
    is_problem(served.client.post("/v1/formations", content=pieces), 413, "payload-too-large")


@pytest.mark.parametrize(
    ("body", "kind", "detail"),
    [
        (b"", "bad-request", "invalid json: "),
        (b"{", "bad-request", "invalid json: "),
        (b'{"name":"n","name":"m"}', "bad-request", "invalid json: "),
        (b'{"name":"demo","members":[]}', "bad-request", "coordinator"),
        (json.dumps({**DOCUMENT, "name": "-x"}).encode(), "bad-request", "must not start"),
        (json.dumps({**DOCUMENT, "kind": "Formation"}).encode(), "bad-request", "hybrid"),
        (json.dumps({**DOCUMENT, "members": []}).encode(), "formation/no-coordinator", "a"),
        (json.dumps({**DOCUMENT, "members": [{"id": "a"}, {"id": "a"}]}).encode(), "formation/duplicate-member-id", "a"),
        (json.dumps({**DOCUMENT, "members": [{"id": "a"}, {"id": "b"}]}).encode(), "formation/authority-not-narrowing", "b"),
        (json.dumps({**DOCUMENT, "members": [{"id": "a"}, {"id": "b", "authorizedBy": "b"}]}).encode(), "formation/cycle", "b"),
    ],
)
def test_a_document_that_is_refused(served: Any, is_problem: Callable[..., None], body: bytes, kind: str, detail: str) -> None:
    is_problem(served.client.post("/v1/formations", content=body), 400, kind, detail)


def test_yaml_is_read_where_it_is_called_so(served: Any, is_problem: Callable[..., None]) -> None:
    text = b"name: demo\ncoordinator: b\nmembers: [{id: a}]\n"
    is_problem(served.client.post("/v1/formations", content=text), 400, "bad-request", "invalid json")
    answer = served.client.post("/v1/formations", content=text, headers={"Content-Type": "application/yaml"})
    is_problem(answer, 400, "formation/no-coordinator")


@pytest.mark.parametrize("key", ["", "with space", "x" * 256])
def test_what_is_no_key(served: Any, is_problem: Callable[..., None], key: str) -> None:
    is_problem(served.client.post("/v1/formations", json=DOCUMENT, headers={"Idempotency-Key": key}), 400, "bad-request", "Idempotency-Key")


def test_without_a_log_nothing_is_written(served: Any, is_problem: Callable[..., None]) -> None:
    found = served.formation(0)
    before = served.get("/v1/formations").content
    for answer in (
        served.client.post("/v1/formations", json=DOCUMENT),
        served.client.delete(f"/v1/formations/{found}"),
        served.client.delete("/v1/formations/by-name/demo"),
        served.client.post(f"/v1/formations/{found}/status", json={"state": "RUNNING"}),
    ):
        is_problem(answer, 503, "service-unavailable", "Event store is temporarily unreachable; retry later")
        assert int(answer.headers["retry-after"]) > 0
    assert served.get("/v1/formations").content == before


@pytest.mark.parametrize(
    ("headers", "body", "status", "kind", "detail"),
    [
        ({}, b'{"state":"RUNNING"}', 415, "unsupported-media-type", "Expected request with `Content-Type: application/json`"),
        ({"Content-Type": "text/plain"}, b'{"state":"RUNNING"}', 415, "unsupported-media-type", ""),
        (STATUS, b"{", 400, "bad-request", "Failed to parse the request body as JSON: "),
        (STATUS, b"{}", 422, "bad-request", "Failed to deserialize the JSON body into the target type: "),
        (STATUS, b'{"state":7}', 422, "bad-request", "state"),
        (STATUS, b'{"state":"RUNNING","failed_cells":[7]}', 422, "bad-request", "failed_cells"),
        (STATUS, b'{"state":"' + b"x" * (2 << 20) + b'"}', 413, "payload-too-large", ""),
    ],
)
def test_a_report_that_is_refused(
    served: Any, is_problem: Callable[..., None], headers: dict[str, str], body: bytes, status: int, kind: str, detail: str
) -> None:
    found = served.formation(0)
    is_problem(served.client.post(f"/v1/formations/{found}/status", content=body, headers=headers), status, kind, detail)
