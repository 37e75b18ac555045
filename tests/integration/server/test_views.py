"""What is seen of formations that run: members, nodes and output, of a server whose controller and node are the test."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from cellos.eventlog.output import MAX_RUN_BYTES
from cellos.testing.crew import Crew

BODY = {"authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"]}}


def member(id: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "spec": BODY, **({} if id == "a" else {"authorizedBy": "a"}), **more}


@pytest.fixture(scope="module")
def crew(shared: Any) -> Iterator[Crew]:
    with Crew(shared.log.url) as crew:
        yield crew


@pytest.fixture
def name() -> str:
    return f"f-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def made(shared: Any, name: str) -> str:
    """A formation of two members with specs; b waits for a."""
    return str(shared.api.create(name, members=[member("a"), member("b", after=["a"], retries=2, critical=False)]))


def members(shared: Any, ident: str) -> dict[str, Any]:
    answer = shared.api.get(f"/v1/formations/{ident}/members")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def one(shared: Any, ident: str, id: str) -> dict[str, Any]:
    return next(each for each in members(shared, ident)["members"] if each["id"] == id)


class TestMembers:
    def test_before_anything_happens(self, shared: Any, made: str, name: str) -> None:
        found = members(shared, made)
        assert (found["formationId"], found["name"], found["status"], found["endedAt"]) == (made, name, "PENDING", None)
        a, b = found["members"]
        assert (a["phase"], a["attempt"], a["attempts"], a["runId"], a["authorizedBy"]) == ("ready", 0, [], None, None)
        assert (b["phase"], b["waiting"], b["after"], b["critical"], b["retries"]) == ("waiting", "waits for: a", ["a"], False, 2)
        assert (b["cellId"], b["authorizedBy"], b["pool"]) == (f"{made}.b", "a", "default")
        assert members(shared, name) == found
        assert members(shared, made.upper()) == found

    def test_from_the_claim_to_the_end(self, shared: Any, crew: Crew, made: str) -> None:
        crew.dispatch(made, "a")
        assert one(shared, made, "a")["phase"] == "dispatched"
        assert members(shared, made)["status"] == "LAUNCHING"
        run = crew.run(made, "a", 1)
        claimed = one(shared, made, "a")
        assert (claimed["phase"], claimed["node"], claimed["runId"], claimed["attempt"]) == ("claimed", "node-1", run.run_id, 1)
        assert claimed["waiting"] is None
        run.start()
        assert one(shared, made, "a")["phase"] == "running"
        run.end()
        found = members(shared, made)
        a, b = found["members"]
        assert (a["phase"], a["exitCode"], a["reason"]) == ("succeeded", 0, None)
        assert b["phase"] == "ready"
        (attempt,) = a["attempts"]
        assert attempt["dispatchedAt"] < attempt["claimedAt"] < attempt["startedAt"] < attempt["endedAt"]
        assert (attempt["attempt"], attempt["state"], attempt["runId"]) == (1, "succeeded", run.run_id)
        assert found["cursor"] > 0

    def test_a_retry(self, shared: Any, crew: Crew, made: str) -> None:
        crew.run(made, "a").start().end()
        first = crew.run(made, "b")
        first.start().end(3)
        b = one(shared, made, "b")
        assert (b["phase"], b["exitCode"], b["reason"], b["attempt"]) == ("backing_off", 3, "command exited with status 3", 1)
        crew.run(made, "b", 2).start()
        b = one(shared, made, "b")
        assert (b["phase"], b["attempt"], [each["state"] for each in b["attempts"]]) == ("running", 2, ["failed", "running"])
        assert b["attempts"][0]["runId"] == first.run_id

    def test_why_it_waits_depends_on_who_is_there(self, shared: Any, crew: Crew, made: str) -> None:
        crew.dispatch(made, "a", pool="elsewhere")
        assert "default" in one(shared, made, "a")["waiting"]
        crew.lease()
        assert "node-1" in one(shared, made, "a")["waiting"]

    def test_the_end(self, shared: Any, crew: Crew, made: str) -> None:
        crew.phase(made, "failed", reason="a member failed")
        found = members(shared, made)
        assert (found["status"], found["reason"], found["cancelling"]) == ("FAILED", "a member failed", None)
        assert found["endedAt"] > found["createdAt"]
        assert [each["waiting"] for each in found["members"]] == [None, None]

    def test_others_drive_it(self, shared: Any, name: str) -> None:
        formation = shared.api.create(name)
        assert shared.api.report(formation, "RUNNING").status_code == 204
        found = members(shared, formation)
        assert found["status"] == "RUNNING"
        assert [(each["id"], each["phase"], each["waiting"]) for each in found["members"]] == [("a", None, None), ("b", None, None)]

    def test_many_members_come_whole(self, shared: Any, crew: Crew, name: str) -> None:
        ids = [f"m{number}" for number in range(300)]
        formation = shared.api.create(name, coordinator="m0", members=[{"id": "m0"}, *({"id": id, "authorizedBy": "m0"} for id in ids[1:])])
        assert [each["id"] for each in members(shared, formation)["members"]] == ids
        for _ in range(260):
            crew.phase(formation, "running")
        assert members(shared, formation)["cursor"] == crew.phase(formation, "running") - 1
        assert members(shared, formation)["cursor"] == crew.phase(formation, "completed") - 1

    def test_unknown(self, shared: Any) -> None:
        absent = str(uuid.uuid4())
        assert shared.api.get(f"/v1/formations/{absent}/members").json()["detail"] == f"formation {absent} not found"
        answer = shared.api.get("/v1/formations/nobody/members")
        assert (answer.status_code, answer.json()["detail"]) == (404, "formation 'nobody' not found")

    def test_the_same_again_costs_nothing(self, shared: Any, made: str) -> None:
        first = shared.api.get(f"/v1/formations/{made}/members")
        again = shared.api.get(f"/v1/formations/{made}/members", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


class TestDelete:
    def test_with_nothing_dispatched_it_is_over_at_once(self, shared: Any, made: str) -> None:
        assert shared.api.delete(f"/v1/formations/{made}").status_code == 204
        found = members(shared, made)
        assert (found["status"], found["reason"]) == ("CANCELLED", "deleted by operator")
        assert shared.api.delete(f"/v1/formations/{made}").status_code == 204

    def test_what_runs_is_ended_first(self, shared: Any, crew: Crew, made: str, name: str) -> None:
        run = crew.run(made, "a").start()
        for _ in range(2):
            assert shared.api.delete(f"/v1/formations/{made}").status_code == 204
        found = members(shared, made)
        assert (found["status"], found["cancelling"]) == ("LAUNCHING", "deleted by operator")
        kinds = [each.subject.rpartition(".")[2] for each in shared.log.read() if made in each.subject and ".formations." in each.subject]
        assert kinds == ["created", "launching", "cancelling"]
        assert shared.api.post("/v1/formations", json={"name": name, "coordinator": "a", "members": [{"id": "a"}]}).status_code == 409
        run.end(reason="cancelled")
        crew.phase(made, "cancelled", reason="deleted by operator")
        assert shared.api.until(f"/v1/formations/{made}", lambda answer: answer.json()["status"] == "CANCELLED")
        assert shared.api.delete(f"/v1/formations/{made}").status_code == 204
        shared.api.create(name)

    def test_its_status_cannot_be_set(self, shared: Any, made: str) -> None:
        assert shared.api.report(made, "COMPLETED").status_code == 409


class TestNodes:
    def test_who_is_there(self, shared: Any, crew: Crew) -> None:
        crew.lease(life="life-n", node="node-n", slots=9)
        crew.controller("controller-n")
        found = shared.api.get("/v1/nodes").json()
        node = next(each for each in found["nodes"] if each["life"] == "life-n")
        assert (node["node"], node["slots"], node["slotsFree"], node["memoryFree"], node["late"]) == ("node-n", 9, 3, 4 << 30, False)
        assert node["renewedAt"] > "2026"
        assert "controller-n" in {each["controller"] for each in found["controllers"]}

    def test_whoever_did_not_renew_in_time_counts_no_more(self, shared: Any, crew: Crew, made: str) -> None:
        crew.lease(life="life-late", node="node-late", lease_ms=0)
        crew.controller("controller-late", lease_ms=0)
        found = shared.api.get("/v1/nodes").json()
        late = {each.get("life") or each["controller"] for each in (*found["nodes"], *found["controllers"]) if each["late"]}
        assert late >= {"life-late", "controller-late"}

    def test_nobody(self, api: Any) -> None:
        assert api.get("/v1/nodes").json() == {"nodes": [], "controllers": []}


def output(shared: Any, cell_id: str, **query: Any) -> httpx2.Response:
    answer: httpx2.Response = shared.api.get(f"/v1/cells/{cell_id}/output", params=query)
    return answer


def lines(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines() if line]


class TestOutput:
    def test_of_a_run_that_ended(self, shared: Any, crew: Crew, made: str) -> None:
        run = crew.run(made, "a").start()
        run.write("stdout", b"one\n")
        run.write("stderr", b"two\xff\n")
        run.write("stdout", b"three\n")
        run.end()
        shared.api.until(f"/v1/cells/{run.cell_id}", lambda answer: answer.json().get("state") == "destroyed")
        answer = output(shared, run.cell_id)
        assert (answer.status_code, answer.content) == (200, b"one\ntwo\xff\nthree\n")
        assert answer.headers["cellos-output"] == "complete"
        assert answer.headers["cellos-run"] == run.run_id
        assert answer.headers["content-length"] == "15"
        assert output(shared, run.cell_id, stream="stderr").content == b"two\xff\n"
        first, second, third, end = lines(output(shared, run.cell_id, format="ndjson"))
        assert (first["stream"], first["offset"], first["text"]) == ("stdout", 0, "one\n")
        assert (second["stream"], second["base64"]) == ("stderr", "dHdv/wo=")
        assert (third["offset"], third["runId"]) == (4, run.run_id)
        assert end == {"runId": run.run_id, "end": True, "output": "complete"}
        rest = lines(output(shared, run.cell_id, format="ndjson", after=first["seq"], stream="stdout"))
        assert [each.get("text") for each in rest] == ["three\n", None]

    def test_while_it_runs(self, shared: Any, crew: Crew, made: str) -> None:
        run = crew.run(made, "a").start()
        shared.api.until(f"/v1/cells/{run.cell_id}", lambda answer: answer.status_code == 200)
        answer = output(shared, run.cell_id)
        assert (answer.content, answer.headers["cellos-output"]) == (b"", "open")
        run.write("stdout", b"so far")
        assert output(shared, run.cell_id).content == b"so far"

    def test_followed_to_its_end(self, shared: Any, crew: Crew, made: str) -> None:
        run = crew.run(made, "a").start()
        shared.api.until(f"/v1/cells/{run.cell_id}", lambda answer: answer.status_code == 200)
        run.write("stdout", b"one ")
        with shared.api.client.stream("GET", f"{shared.api.server.url}/v1/cells/{run.cell_id}/output", params={"follow": "1"}) as answer:
            pieces = answer.iter_bytes()
            assert next(pieces) == b"one "
            run.write("stdout", b"two ")
            assert next(pieces) == b"two "
            run.write("stderr", b"three")
            run.end()
            assert b"".join(pieces) == b"three"

    def test_followed_over_the_death_of_its_node(self, shared: Any, crew: Crew, made: str) -> None:
        run = crew.run(made, "a").start()
        shared.api.until(f"/v1/cells/{run.cell_id}", lambda answer: answer.status_code == 200)
        run.write("stdout", b"last words")
        url = f"{shared.api.server.url}/v1/cells/{run.cell_id}/output"
        with shared.api.client.stream("GET", url, params={"follow": "1", "format": "ndjson"}) as answer:
            found = (json.loads(line) for line in answer.iter_lines() if line)
            assert next(found)["text"] == "last words"
            run.end(reason="node_lost", output=False)
            assert list(found) == [{"runId": run.run_id, "end": True, "output": "partial"}]
        assert output(shared, run.cell_id).content == b"last words"

    def test_before_its_cell_is_there(self, shared: Any, crew: Crew, made: str) -> None:
        assert (output(shared, f"{made}.a").status_code, output(shared, f"{made}.a").headers["cellos-output"]) == (200, "open")
        run = crew.run(made, "a")
        url = f"{shared.api.server.url}/v1/cells/{run.cell_id}/output"
        with shared.api.client.stream("GET", url, params={"follow": "1", "run": run.run_id}) as answer:
            run.start()
            run.write("stdout", b"hello")
            run.end()
            assert answer.read() == b"hello"

    def test_of_an_attempt_before_the_latest(self, shared: Any, crew: Crew, made: str) -> None:
        runs = [crew.run(made, "b", number) for number in (1, 2)]
        for run in runs:
            run.start()
            run.write("stdout", run.run_id.encode())
            run.end(1)
        shared.api.until(f"/v1/cells/{made}.b", lambda answer: answer.json()["run_id"] == runs[1].run_id)
        shared.api.until(f"/v1/cells/{made}.b", lambda answer: answer.json()["state"] == "destroyed")
        assert output(shared, f"{made}.b").text == runs[1].run_id
        first = output(shared, f"{made}.b", run=runs[0].run_id)
        assert (first.text, first.headers["cellos-output"]) == (runs[0].run_id, "complete")

    def test_by_a_clock_that_is_behind(self, shared: Any, crew: Crew, made: str) -> None:
        crew.run(made, "b", 1).start().end(1)
        crew.skew_ns = -3600 * 1_000_000_000
        try:
            run = crew.run(made, "b", 2).start()
            run.write("stdout", b"here")
            assert output(shared, run.cell_id, run=run.run_id).headers["cellos-output"] == "open"
            run.end()
        finally:
            crew.skew_ns = 0
        answer = output(shared, run.cell_id, run=run.run_id, follow="1")
        assert (answer.content, answer.headers["cellos-output"]) == (b"here", "complete")

    def test_more_than_is_kept(self, shared: Any, crew: Crew, made: str) -> None:
        run = crew.run(made, "a").start()
        run.write("stdout", b"x" * (MAX_RUN_BYTES + 1))
        run.end()
        shared.api.until(f"/v1/cells/{run.cell_id}", lambda answer: answer.json().get("state") == "destroyed")
        answer = output(shared, run.cell_id)
        assert (len(answer.content), answer.headers["cellos-truncated"]) == (MAX_RUN_BYTES, "true")
        *_, end = lines(output(shared, run.cell_id, format="ndjson"))
        assert end["truncated"] is True

    def test_of_a_cell_that_no_node_ran(self, shared: Any, cell_event: Any) -> None:
        shared.log.write(
            ("cellos.events.cells", cell_event("plain")), ("cellos.events.cells", cell_event("plain", "lifecycle.v1.destroyed"))
        )
        shared.api.until("/v1/cells/plain", lambda answer: answer.json().get("state") == "destroyed")
        answer = output(shared, "plain", follow="1")
        assert (answer.content, answer.headers["cellos-output"]) == (b"", "gone")  # its events are of January

    @pytest.mark.parametrize(
        ("query", "text"),
        [
            ({"stream": "both"}, "stream: want stdout or stderr"),
            ({"follow": "yes"}, "follow: want 1 or 0"),
            ({"format": "xml"}, "format: want raw or ndjson"),
            ({"run": "*"}, "run: not the id of a run"),
            ({"after": "x"}, "after: `x` is not an integer"),
            ({"since": "1"}, "unknown field `since`"),
        ],
    )
    def test_bad_queries(self, shared: Any, query: dict[str, str], text: str) -> None:
        answer = output(shared, "x", **query)
        assert answer.status_code == 400
        assert text in answer.json()["detail"]

    def test_of_a_run_that_is_not_its_own(self, shared: Any, crew: Crew, made: str, cell_event: Any) -> None:
        run = crew.run(made, "a").start()
        run.end()
        shared.log.write(("cellos.events.cells", cell_event("other")))
        shared.api.until("/v1/cells/other", lambda answer: answer.status_code == 200)
        shared.api.until(f"/v1/cells/{made}.a", lambda answer: answer.json().get("state") == "destroyed")
        for cell in (f"{made}.a", f"{made}.b", "other"):
            wanted = "other-run" if cell.endswith(".a") else run.run_id
            answer = output(shared, cell, run=wanted, follow="1")
            assert (answer.status_code, answer.json()["detail"]) == (404, f"cell {cell} has no run {wanted}")

    def test_unknown(self, shared: Any, made: str) -> None:
        for cell in ("nobody", f"{made}.c", f"{uuid.uuid4()}.a"):
            answer = output(shared, cell)
            assert (answer.status_code, answer.json()["detail"]) == (404, f"cell {cell} not found")


class TestAround:
    def test_a_token_that_may_only_read_will_do(self, nats: Any, start: Any) -> None:
        api = start(nats.url, CELLOS_SERVER_READ_TOKEN="may look")
        formation = api.create(members=[member("a")])
        for path in ("/v1/nodes", f"/v1/formations/{formation}/members", f"/v1/cells/{formation}.a/output"):
            assert api.get(path, headers={"Authorization": "Bearer may look"}).status_code == 200
            assert api.get(path, headers={"Authorization": "Bearer x"}).status_code == 401
            assert (api.request("HEAD", path).status_code, api.request("HEAD", path).content) == (200, b"")

    def test_a_log_that_was_made_anew_has_other_events(self, nats: Any, start: Any, log: Any) -> None:
        api = start(nats.url)
        call = {"json": {"name": "f", "coordinator": "a", "members": [member("a")]}, "headers": {"Idempotency-Key": "k"}}
        formation = api.post("/v1/formations", **call).json()["id"]
        with Crew(nats.url) as crew:
            crew.run(formation, "a").start().end()
            crew.phase(formation, "completed")
            assert api.get(f"/v1/formations/{formation}/members").json()["status"] == "COMPLETED"
            log.recreate()
            api.until(f"/v1/formations/{formation}", lambda answer: answer.status_code == 404)
            assert api.post("/v1/formations", **call).json()["id"] == formation
            found = api.get(f"/v1/formations/{formation}/members").json()
            assert (found["status"], found["members"][0]["phase"], found["cursor"]) == ("PENDING", "ready", 2)

    def test_an_end_and_an_outage_end_what_follows(self, nats: Any, start: Any, log: Any, cell_event: Any) -> None:
        api = start(nats.url)
        formation = api.create(members=[member("a")])
        with Crew(nats.url) as crew:
            run = crew.run(formation, "a").start()
        log.write(("cellos.events.cells", cell_event("over")), ("cellos.events.cells", cell_event("over", "lifecycle.v1.destroyed")))
        api.until("/v1/cells/over", lambda answer: answer.json().get("state") == "destroyed")
        url = f"{api.server.url}/v1/cells/{run.cell_id}/output?follow=1&format=ndjson"
        with api.client.stream("GET", url) as answer:
            nats.stop()
            assert answer.read() == b""
        over = api.get("/v1/cells/over/output")
        assert over.status_code == 503
        away = api.get(f"/v1/formations/{formation}/members")
        assert (away.status_code, away.headers["retry-after"]) == (503, "2")
        assert api.get(f"/v1/cells/{run.cell_id}/output").status_code == 503
        nats.start()
        api.until(f"/v1/formations/{formation}/members", lambda answer: answer.status_code == 200)
        with api.client.stream("GET", url) as answer:
            assert api.server.stop() == 0
            assert answer.read() == b""
        assert not any(line["level"] == "ERROR" for line in api.server.log)
