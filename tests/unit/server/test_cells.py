from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MEMBERS = ["id", "spec_id", "run_id", "state", "status", "formation_id", "started_at", "destroyed_at", "outcome", "exit_code"]


def test_a_record_has_all_its_members(served: Any) -> None:
    served.cell("c1")
    record = served.get("/v1/cells/c1").json()
    assert list(record) == MEMBERS
    assert (record["state"], record["status"], record["exit_code"], record["formation_id"]) == ("running", "running", None, None)
    assert served.get("/v1/cells").json() == [record]


def test_the_list_is_in_the_order_of_ids(served: Any) -> None:
    for cell_id in ("b", "c", "a"):
        served.cell(cell_id)
    answer = served.get("/v1/cells")
    assert answer.headers["content-type"] == "application/json"
    assert [each["id"] for each in answer.json()] == ["a", "b", "c"]


@pytest.mark.parametrize(("word", "ids"), [("pending", ["p"]), ("RUNNING", ["r"]), ("Destroyed", ["d"])])
def test_cells_by_state(served: Any, word: str, ids: list[str]) -> None:
    served.cell("p", "command.v1.completed")
    served.cell("r")
    served.cell("d", "lifecycle.v1.started", "lifecycle.v1.destroyed", outcome="succeeded")
    assert [each["id"] for each in served.get(f"/v1/cells?state={word}").json()] == ids


def test_cells_by_formation(served: Any) -> None:
    found = served.formation(0, name="demo")
    served.cell("in", formation=found)
    served.cell("out")
    (only,) = served.get(f"/v1/cells?formation={found}").json()
    assert (only["id"], only["formation_id"]) == ("in", found)
    assert served.get("/v1/cells?formation=demo").json() == []


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("state=gone", "unknown ?state value: gone (want pending|running|destroyed)"),
        ("cursor=abc", "Failed to deserialize query string: unknown field `cursor`"),
        ("limit=-1", "Failed to deserialize query string: limit"),
        ("limit=ten", "Failed to deserialize query string: limit"),
        ("limit=1.5", "Failed to deserialize query string: limit"),
        ("limit=", "Failed to deserialize query string: limit"),
        ("limit=18446744073709551616", "Failed to deserialize query string: limit"),
        ("limit=\u0661", "Failed to deserialize query string: limit"),
        ("limit=1&limit=1", "duplicate field `limit`"),
        ("state=%ff", "not a query string"),
    ],
)
def test_bad_queries(served: Any, is_problem: Callable[..., None], query: str, detail: str) -> None:
    is_problem(served.get(f"/v1/cells?{query}"), 400, "bad-request", detail)


def test_limits(served: Any) -> None:
    for number in range(1100):
        served.cell(f"c{number:04}")
    sizes = {query: len(served.get(f"/v1/cells{query}").json()) for query in ("", "?limit=0", "?limit=3", "?limit=1000", "?limit=5000")}
    assert sizes == {"": 1100, "?limit=0": 0, "?limit=3": 3, "?limit=1000": 1000, "?limit=5000": 1000}


def test_pages_lead_to_each_other(served: Any) -> None:
    for number in range(25):
        served.cell(f"c/{number:02}&x=")
    path, seen, pages = "/v1/cells?state=running&limit=10", [], 0
    while path:
        answer = served.get(path)
        seen += [each["id"] for each in answer.json()]
        path = answer.links.get("next", {}).get("url", "")
        pages += 1
    assert pages == 3
    assert seen == [f"c/{number:02}&x=" for number in range(25)]


def test_an_unknown_cell(served: Any, is_problem: Callable[..., None]) -> None:
    is_problem(served.get("/v1/cells/nobody"), 404, "not-found", "cell nobody not found")


def test_what_did_not_change_is_not_sent_again(served: Any) -> None:
    served.cell("c1")
    for path in ("/v1/cells/c1", "/v1/cells"):
        first = served.get(path)
        again = served.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
        assert "content-type" not in again.headers
    tags = {path: served.get(path).headers["etag"] for path in ("/v1/cells/c1", "/v1/cells")}
    served.cell("c1", "lifecycle.v1.destroyed", outcome="failed")
    for path, tag in tags.items():
        assert served.get(path, headers={"If-None-Match": tag}).status_code == 200


def test_head_is_get_without_a_body(served: Any) -> None:
    served.cell("c1")
    got, head = served.get("/v1/cells/c1"), served.client.head("/v1/cells/c1")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == got.headers
