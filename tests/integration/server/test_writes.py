"""Formations are written to the log, and what the log refuses is not done."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

DOCUMENT = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}], "extra": {"é": [1]}}


def kinds(log: Any) -> list[str]:
    return [json.loads(stored.data)["type"].removeprefix("dev.cellos.events.cell.") for stored in log.read()]


def test_a_formation_is_in_the_log_before_it_is_told(api: Any, log: Any) -> None:
    answer = api.post("/v1/formations", json=DOCUMENT)
    assert answer.status_code == 201
    body = answer.json()
    assert list(body) == ["id", "name", "status"]
    assert (body["name"], body["status"]) == ("demo", "PENDING")
    assert answer.headers["location"] == f"/v1/formations/{body['id']}"
    reserved, created = log.read()
    assert kinds(log) == ["name.v1.reserved", "formation.v1.created"]
    assert created.subject == f"cellos.events.formations.{body['id']}.created"
    event = json.loads(created.data)
    assert created.message_id == event["id"]
    assert reserved.message_id == json.loads(reserved.data)["id"]
    assert event["source"] == body["id"]
    assert event["data"]["document"] == DOCUMENT
    assert (event["data"]["cellCount"], event["data"]["failedCellIds"]) == (2, [])
    assert "reason" not in event["data"]
    record = api.get(f"/v1/formations/{body['id']}").json()
    assert record == {"id": body["id"], "name": "demo", "status": "PENDING", "document": DOCUMENT}
    assert api.get("/v1/formations").json() == {"formations": [record], "cursor": created.sequence}


def test_the_content_type_is_not_asked_for(api: Any) -> None:
    assert api.post("/v1/formations", content=json.dumps(DOCUMENT), headers={"Content-Type": "text/plain"}).status_code == 201


def test_a_kubectl_document_is_kept_flat(api: Any) -> None:
    sent = {
        "apiVersion": "cellos.dev/v1",
        "kind": "Formation",
        "metadata": {"name": "k", "labels": {"a": "b"}},
        "spec": {"coordinator": "a", "members": [{"name": "a"}]},
    }
    found = api.post("/v1/formations", json=sent).json()["id"]
    kept = api.get(f"/v1/formations/{found}").json()["document"]
    assert kept == {"name": "k", "coordinator": "a", "members": [{"id": "a"}], "metadata": {"labels": {"a": "b"}}}


def test_a_name_is_taken_once(api: Any, log: Any) -> None:
    first = api.create("demo")
    answer = api.post("/v1/formations", json=DOCUMENT)
    assert answer.status_code == 409
    assert answer.json()["type"] == "/problems/conflict"
    assert answer.json()["detail"] == f"formation name 'demo' already in use by {first}"
    assert api.get("/v1/formations/by-name/demo").json()["id"] == first
    assert len(log.read()) == 2


def test_the_log_decides_about_names(api: Any, log: Any, nats: Any, start: Callable[..., Any]) -> None:
    """A server that has not read the name yet refuses it all the same."""
    behind = start(nats.url, CELLOS_SERVER_SKIP_REPLAY="1")
    first = api.create("demo")
    late = start(nats.url, CELLOS_SERVER_SKIP_REPLAY="true")
    assert late.get("/v1/formations").json()["formations"] == []
    for server in (late, behind):
        answer = server.post("/v1/formations", json=DOCUMENT)
        assert (answer.status_code, first in answer.json()["detail"]) == (409, True)
    assert api.delete("/v1/formations/by-name/demo").status_code == 204
    assert late.post("/v1/formations", json=DOCUMENT).status_code == 201


def test_racing_for_a_name_over_two_servers(api: Any, log: Any, nats: Any, start: Callable[..., Any]) -> None:
    servers = (api, start(nats.url))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: servers[number % 2].post("/v1/formations", json=DOCUMENT), range(32)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201] + [409] * 31
    (winner,) = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    assert all(winner in answer.json()["detail"] for answer in answers if answer.status_code == 409)
    assert kinds(log) == ["name.v1.reserved", "formation.v1.created"]


def test_a_request_with_a_key_is_repeated_without_harm(api: Any, log: Any, nats: Any, start: Callable[..., Any]) -> None:
    key = {"Idempotency-Key": "one and only".replace(" ", "-")}
    first = api.post("/v1/formations", json=DOCUMENT, headers=key)
    other = start(nats.url, CELLOS_SERVER_SKIP_REPLAY="1")
    for server in (api, other, api):
        again = server.post("/v1/formations", json=DOCUMENT, headers=key)
        assert (again.status_code, again.json()) == (first.status_code, first.json()) == (201, first.json())
    assert len(log.read()) == 2
    without = api.post("/v1/formations", json=DOCUMENT)
    assert without.status_code == 409
    changed = api.post("/v1/formations", json={**DOCUMENT, "extra": 2}, headers=key)
    assert changed.status_code == 422
    api.delete(f"/v1/formations/{first.json()['id']}")
    ended = api.post("/v1/formations", json=DOCUMENT, headers=key)
    assert (ended.status_code, ended.json()) == (201, first.json())
    assert api.get("/v1/formations/by-name/demo").json()["status"] == "CANCELLED"


def test_racing_with_one_key(api: Any, log: Any, nats: Any, start: Callable[..., Any]) -> None:
    servers = (api, start(nats.url))
    headers = {"Idempotency-Key": "k"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: servers[number % 2].post("/v1/formations", json=DOCUMENT, headers=headers), range(16)))
    assert {(answer.status_code, answer.json()["id"]) for answer in answers} == {(201, answers[0].json()["id"])}
    assert len(log.read()) == 2


def test_delete_ends_a_formation_and_frees_its_name(api: Any, log: Any) -> None:
    first = api.create("demo")
    answer = api.delete("/v1/formations/by-name/demo")
    assert (answer.status_code, answer.content) == (204, b"")
    assert api.get(f"/v1/formations/{first}").json()["status"] == "CANCELLED"
    assert kinds(log)[2:] == ["formation.v1.cancelling", "formation.v1.cancelled"]
    assert json.loads(log.read()[-1].data)["data"]["reason"] == "deleted by operator"
    assert json.loads(log.read()[-1].data)["data"]["cellCount"] == 2
    assert api.delete(f"/v1/formations/{first}").status_code == 204
    assert len(log.read()) == 4
    second = api.create("demo")
    assert second != first
    assert api.get("/v1/formations/by-name/demo").json()["id"] == second


def test_a_condition_that_does_not_hold_changes_nothing(api: Any, log: Any) -> None:
    found = api.create("demo")
    paths = f"/v1/formations/{found}", "/v1/formations/by-name/demo"
    tag = api.get(paths[0]).headers["etag"]
    for condition in ('"other"', f"W/{tag}", "", '"a", "b"'):
        for answer in (
            *(api.delete(path, headers={"If-Match": condition}) for path in paths),
            api.post(f"{paths[0]}/status", json={"state": "RUNNING"}, headers={"If-Match": condition}),
        ):
            assert (answer.status_code, answer.json()["type"]) == (412, "/problems/bad-request")
    assert len(log.read()) == 2
    assert api.post(f"{paths[0]}/status", json={"state": "LAUNCHING"}, headers={"If-Match": f'"other", {tag}'}).status_code == 204
    assert api.delete(paths[0], headers={"If-Match": tag}).status_code == 412  # it is another record now
    assert api.delete(paths[1], headers={"If-Match": "*"}).status_code == 204
    assert api.get(paths[0]).json()["status"] == "CANCELLED"


def test_a_report_is_an_event_and_a_status(api: Any, log: Any) -> None:
    found = api.create()
    course = [("launching", "LAUNCHING"), ("Running", "RUNNING"), ("DEGRADED", "DEGRADED"), ("RUNNING", "RUNNING"), ("FAILED", "FAILED")]
    for word, status in course:
        answer = api.report(found, word, reason="why", failed_cells=["b"])
        assert (answer.status_code, answer.content) == (204, b"")
        assert api.get(f"/v1/formations/{found}").json()["status"] == status
    data = {json.loads(stored.data)["type"].rpartition(".")[2]: json.loads(stored.data)["data"] for stored in log.read()}
    assert data["launching"] == {"formationId": found, "formationName": "demo", "cellCount": 2, "failedCellIds": [], "reason": "why"}
    assert data["running"]["failedCellIds"] == []
    assert data["degraded"]["failedCellIds"] == data["failed"]["failedCellIds"] == ["b"]


def test_what_a_report_may_not_say(api: Any, log: Any) -> None:
    found = api.create()
    for word in ("PENDING", "SUCCEEDED", "CANCELLED", "", "nonsense"):
        answer = api.report(found, word)
        assert (answer.status_code, answer.json()["type"]) == (400, "/problems/bad-request")
        assert answer.json()["detail"] == f"unknown state: {word.upper()}"
    assert api.report(found, "COMPLETED").status_code == 204
    for word in ("RUNNING", "FAILED", "COMPLETED"):
        answer = api.report(found, word)
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert len(log.read()) == 3
    assert api.delete(f"/v1/formations/{found}").status_code == 204
    assert len(log.read()) == 3
    assert api.get(f"/v1/formations/{found}").json()["status"] == "COMPLETED"


def test_a_formation_with_specs_waits_and_cannot_be_driven(api: Any) -> None:
    spec = {"authority": {"secretRefs": []}, "lifetime": {"ttlSeconds": 60}, "run": {"secretDelivery": "env", "argv": ["/bin/true"]}}
    found = api.create("run", members=[{"id": "a", "spec": spec}], coordinator="a")
    answer = api.report(found, "RUNNING")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert api.get(f"/v1/formations/{found}").json()["status"] == "PENDING"
    assert api.delete(f"/v1/formations/{found}").status_code == 204
    assert api.get(f"/v1/formations/{found}").json()["status"] == "CANCELLED"


def test_racing_reports_make_one_course(api: Any, log: Any, nats: Any, start: Callable[..., Any]) -> None:
    servers = (api, start(nats.url))
    found = api.create()
    servers[1].until(f"/v1/formations/{found}", lambda answer: answer.status_code == 200)
    words = ("COMPLETED", "FAILED") * 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda row: servers[row[0] % 2].report(found, row[1]).status_code, enumerate(words)))
    assert sorted(answers) == [204] + [409] * 15
    assert len(log.read()) == 3


def test_everything_survives_a_restart(api: Any, nats: Any, start: Callable[..., Any]) -> None:
    api.report(api.create("one"), "RUNNING")
    api.delete(f"/v1/formations/{api.create('two')}")
    api.create("three", note="é")
    lists = [api.get(path).content for path in ("/v1/formations", "/v1/cells")]
    api.server.kill()
    for _ in range(2):
        again = start(nats.url)
        assert [again.get(path).content for path in ("/v1/formations", "/v1/cells")] == lists
        again.server.stop()


def test_a_full_log_refuses_and_says_so(nats: Any, start: Callable[..., Any]) -> None:
    api = start(nats.url, CELLOS_NATS_STREAM_MAX_BYTES=str(1 << 20))
    answers = [api.post("/v1/formations", json={**DOCUMENT, "name": f"n{number}", "pad": "x" * 60_000}) for number in range(24)]
    statuses = [answer.status_code for answer in answers]
    accepted = statuses.count(201)
    assert 0 < accepted < 24
    assert statuses == [201] * accepted + [503] * (24 - accepted)
    last = answers[-1]
    assert (last.json()["type"], "full" in last.json()["detail"]) == ("/problems/service-unavailable", True)
    assert "retry-after" in last.headers
    assert len(api.get("/v1/formations").json()["formations"]) == accepted
