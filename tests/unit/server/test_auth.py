from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cellos.server.auth import Tokens

NOBODY: dict[str, str] = {"Authorization": ""}


def without_token(served: Any, method: str, path: str, **options: Any) -> Any:
    served.client.headers.pop("Authorization", None)
    return served.client.request(method, path, **options)


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        (None, "missing Authorization header"),
        ("Bearer caf\xe9", "non-ascii Authorization header"),
        ("Basic Y29ycmVjdA==", "expected Bearer scheme"),
        ("bearer correct horse", "expected Bearer scheme"),
        ("Bearer", "expected Bearer scheme"),
        ("Bearer wrong", "invalid token"),
        ("Bearer ", "expected Bearer scheme"),
        ("Bearer correct hors", "invalid token"),
        ("Bearer correct horse2", "invalid token"),
    ],
)
def test_without_the_token_nothing_is_answered(served: Any, is_problem: Callable[..., None], header: str | None, detail: str) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    if header == "Bearer ":
        detail = "invalid token"  # an HTTP server cuts the space off; here it is there
    answer = without_token(served, "GET", "/v1/version", headers=headers)
    is_problem(answer, 401, "unauthorized", detail)
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/v1/cells?nonsense=1", {}),
        ("GET", "/v1/formations/no-uuid", {}),
        ("GET", "/no/such/route", {}),
        ("PATCH", "/v1/cells", {}),
        ("POST", "/v1/formations", {"content": b"x" * 200_000}),
        ("POST", "/v1/formations/no-uuid/status", {"content": b"{"}),
        ("GET", "/ws/events", {}),
        ("GET", "/v1/openapi.json", {}),
    ],
)
def test_the_token_comes_before_everything_else(
    served: Any, is_problem: Callable[..., None], method: str, path: str, options: dict[str, Any]
) -> None:
    is_problem(without_token(served, method, path, **options), 401, "unauthorized", "missing")


def test_the_second_token_reads_and_writes_nothing(served: Any, is_problem: Callable[..., None]) -> None:
    found = served.formation(0)
    reading = {"Authorization": "Bearer may look"}
    assert served.get("/v1/formations", headers=reading).status_code == 200
    for method, path in (("POST", "/v1/formations"), ("DELETE", f"/v1/formations/{found}"), ("POST", f"/v1/formations/{found}/status")):
        is_problem(served.client.request(method, path, headers=reading), 403, "bad-request", "may only read")


@pytest.mark.parametrize("path", ["/v1/formations", "/nowhere", "/ws/events"])
def test_a_preflight_needs_no_token_and_allows_reading_only(served: Any, path: str) -> None:
    wanted = {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}
    answer = without_token(served, "OPTIONS", path, headers=wanted)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["access-control-allow-methods"] == "GET,OPTIONS"
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/version", "/v1/cells", "/nowhere"])
def test_every_answer_may_be_read_by_pages(served: Any, path: str) -> None:
    for answer in (served.get(path), without_token(served, "GET", path)):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "origin" in answer.headers["vary"]


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_token_opens_nothing(blank: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        Tokens(blank)
    with pytest.raises(ValueError, match="empty"):
        Tokens("full", read_only=blank)


def test_tokens_do_not_show_themselves() -> None:
    assert "secret" not in repr(Tokens("secret", read_only="secret too"))
