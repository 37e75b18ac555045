"""Writing requests made from the OpenAPI document, right and wrong ones, to a server with a real log: no answer is an accident."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cellos.server.openapi import document

SCHEMA = schemathesis.openapi.from_dict(document())
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
CREATE = SCHEMA["/v1/formations"]["POST"]
ON_ONE = (
    SCHEMA["/v1/formations/{id}/status"]["POST"],
    SCHEMA["/v1/formations/{id}"]["DELETE"],
    SCHEMA["/v1/formations/by-name/{name}"]["DELETE"],
)
QUIET = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


def cases(operation: Any) -> Any:
    return st.sampled_from(MODES).flatmap(lambda mode: operation.as_strategy(generation_mode=mode))


def send(api: Any, case: Any) -> Any:
    """The answer, which is one that is documented."""
    request = case.as_transport_kwargs(base_url=api.server.url)
    request.pop("cookies", None)
    if not isinstance(request.get("data", {}), dict):
        request["content"] = request.pop("data")
    headers = {name: value for name, value in (request.pop("headers", None) or {}).items() if name.lower() != "authorization"}
    answer = api.client.request(headers=headers, **request)
    assert answer.status_code in {int(status) for status in case.operation.definition.raw["responses"]} | {404, 405}
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert list(answer.json()) == ["type", "title", "status", "detail"]
    assert answer.status_code != 503 or "retry-after" in answer.headers
    return answer


def nothing_went_wrong(api: Any) -> None:
    assert [line for line in api.server.log if line["level"] == "ERROR" or "Traceback" in json.dumps(line)] == []


def test_whatever_is_submitted(shared: Any) -> None:
    statuses: set[int] = set()

    @QUIET
    @given(cases(CREATE), st.booleans(), st.integers(0, 20))
    def submit(case: Any, mended: bool, number: int) -> None:
        if mended and isinstance(case.body, dict):  # what a schema cannot say: that the coordinator is a member
            case.body = {**case.body, "name": f"n{number}", "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}]}
        statuses.add(send(shared.api, case).status_code)

    submit()
    assert {201, 409} <= statuses
    assert statuses & {400, 422}
    nothing_went_wrong(shared.api)


def test_whatever_is_done_to_formations(shared: Any) -> None:
    statuses: set[int] = set()

    @QUIET
    @given(
        st.sampled_from(ON_ONE).flatmap(cases), st.booleans(), st.integers(0, 9), st.sampled_from(["LAUNCHING", "RUNNING", "FAILED", None])
    )
    def change(case: Any, known: bool, number: int, state: str | None) -> None:
        if known:
            name = f"known-{number}"
            submitted = {"name": name, "coordinator": "a", "members": [{"id": "a"}]}
            found = shared.api.post("/v1/formations", json=submitted, headers={"Idempotency-Key": f"{name}-{len(statuses)}"})
            if found.status_code == 201:
                case.path_parameters = {"id": found.json()["id"]} if "id" in case.path_parameters else {"name": name}
            if state is not None and isinstance(case.body, dict):
                case.body = {**case.body, "state": state}
        statuses.add(send(shared.api, case).status_code)

    change()
    assert {204, 404} <= statuses
    nothing_went_wrong(shared.api)
