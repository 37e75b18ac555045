from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cellos import __version__
from cellos.server.events import clamp


@pytest.mark.parametrize("path", ["/", "/nope", "/v1", "/v1/formations/", "/v1/cells/", "/healthz", "/metrics", "/v1/cells/a/events"])
def test_no_route(served: Any, is_problem: Callable[..., None], path: str) -> None:
    is_problem(served.get(path), 404, "not-found", f"no route matched '{path}'")


def test_a_long_path_is_cut(served: Any) -> None:
    assert served.get("/" + "x" * 500).json()["detail"] == f"no route matched '/{'x' * 199}'"


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/formations", "POST,GET,HEAD"),
        ("/v1/formations/x", "GET,HEAD,DELETE"),
        ("/v1/formations/by-name/x", "GET,HEAD,DELETE"),
        ("/v1/formations/x/status", "POST"),
        ("/v1/cells", "GET,HEAD"),
        ("/v1/cells/x", "GET,HEAD"),
        ("/v1/events", "GET,HEAD"),
        ("/v1/version", "GET,HEAD"),
    ],
)
def test_the_wrong_method(served: Any, is_problem: Callable[..., None], path: str, allow: str) -> None:
    answer = served.client.patch(path)
    is_problem(answer, 405, "method-not-allowed", f"method 'PATCH' not allowed for '{path}' — see Allow header")
    assert answer.headers["allow"] == allow


def test_the_version(served: Any) -> None:
    answer = served.get("/v1/version")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"server": {"version": __version__, "buildProfile": "release"}, "api": {"version": "v1"}}


def test_the_version_with_a_commit(served: Any) -> None:
    served.state.git_sha = "abc"
    answer = served.get("/v1/version").json()
    assert list(answer["server"].items()) == [("version", __version__), ("gitSha", "abc"), ("buildProfile", "release")]


@pytest.mark.parametrize(("query", "cursor"), [("", 0), ("?since=7", 7), ("?limit=0&formation=x", 0)])
def test_events_without_a_log(served: Any, query: str, cursor: int) -> None:
    assert served.get(f"/v1/events{query}").json() == {"events": [], "cursor": cursor}


@pytest.mark.parametrize(
    "query",
    ["since=x", "since=-1", "since=18446744073709551616", "limit=-1", "limit=x", "since=1&since=2", "subject=a.b", "subject=cellos..>"],
)
def test_bad_queries_for_events(served: Any, is_problem: Callable[..., None], query: str) -> None:
    is_problem(served.get(f"/v1/events?{query}"), 400, "bad-request", "Failed to deserialize query string: ")


def test_a_log_that_never_came_is_not_an_empty_one(served: Any, is_problem: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    served.state.following = True
    answer = served.get("/v1/events")
    is_problem(answer, 503, "service-unavailable")
    assert answer.json()["detail"] == "Event store is temporarily unreachable; retry later"
    assert "CELLOS_EVENTS" not in answer.text
    (record,) = [each for each in caplog.records if each.name == "cellos.server.events"]
    assert record.levelname == "WARNING"
    assert record.__dict__["fields"]["stream"] == "CELLOS_EVENTS"


@pytest.mark.parametrize(("cursor", "tail", "clamped"), [(1_000_000, 42, 42), (43, 42, 42), (42, 42, 42), (10, 42, 10), (99, None, 99)])
def test_no_cursor_leads_beyond_the_log(cursor: int, tail: int | None, clamped: int) -> None:
    assert clamp(cursor, tail) == clamped


def test_an_error_of_ours_is_told_to_nobody(served: Any, is_problem: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("tell nobody")

    monkeypatch.setattr(served.state.projection, "cell", broken)
    answer = served.get("/v1/cells/x")
    is_problem(answer, 500, "internal")
    assert "tell nobody" not in answer.text


@pytest.mark.parametrize("path", ["/ws/events", "/ws/events?since=5&subject=x"])
def test_a_plain_request_for_the_stream(served: Any, is_problem: Callable[..., None], path: str) -> None:
    is_problem(served.get(path), 400, "bad-request", "Connection header did not include 'upgrade'")
