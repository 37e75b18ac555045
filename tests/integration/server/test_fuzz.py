"""Requests made from the OpenAPI document, right and wrong ones: no answer is an accident."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from starlette.testclient import TestClient

from cellos.server import ServerState, create_app
from cellos.server.openapi import document

pytest_plugins = ["schemathesis.pytest.plugin"]
TOKEN = "t"
SCHEMA = schemathesis.openapi.from_dict(document())
SCHEMA.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Without a log: whatever would be written is 503."""
    return TestClient(create_app(ServerState(token=TOKEN)), headers={"Authorization": f"Bearer {TOKEN}"})


@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_every_answer_is_one_that_is_documented(case: Any, client: TestClient) -> None:
    known = {int(status) for status in case.operation.definition.raw["responses"]}
    request = case.as_transport_kwargs(base_url="http://testserver")
    request.pop("cookies", None)
    if not isinstance(request.get("data", {}), dict):
        request["content"] = request.pop("data")
    headers = {name: value for name, value in (request.pop("headers", None) or {}).items() if name.lower() != "authorization"}
    answer = client.request(headers=headers, **request)
    assert answer.status_code in known | {400, 401, 404, 405}
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert list(answer.json()) == ["type", "title", "status", "detail"]
