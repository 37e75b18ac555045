"""What a node does with work, while NATS is there: one node for all of it."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from cellos.core import events
from cellos.core.events import PREFIX, canonical_bytes
from cellos.core.formation.runs import CLAIMED, Attempt, void, work_subject
from cellos.core.ids import rfc3339

pytestmark = pytest.mark.linux_backend

WITHOUT_CORRELATION = {PREFIX + "observability.v1.container_security"}


def types(found: list[Any]) -> list[str]:
    return [event.type for event in found]


def test_a_member_runs_in_a_cell_and_its_chain_verifies(log: Any, pool: str) -> None:
    attempt = log.dispatch("sh", "-c", "test $(id -u) = 1000", pool=pool, correlation={"platform": "p", "tenantId": "acme"})
    destroyed = log.until_ended(attempt)
    assert destroyed["outcome"] == "succeeded", destroyed["reason"]
    assert (destroyed["tenantId"], destroyed["residueClass"]) == ("acme", "none")
    found = log.events(attempt)
    assert types(found)[0] == CLAIMED
    assert types(found).count(events.STARTED) == 1
    expected = {"formationId": attempt.formation_id, "memberId": "m", "platform": "p"}
    for event in found:
        data = event.members
        assert (data["cellId"], data["runId"]) == (f"{attempt.formation_id}.m", destroyed["runId"])
        if event.type not in WITHOUT_CORRELATION:
            assert data["correlation"].items() >= expected.items()
    claimed = found[0].members
    assert (claimed["attempt"], claimed["pool"]) == (1, pool)
    assert claimed["life"] in log.nodes()


def test_a_member_without_a_command_and_a_program_that_is_not_there(log: Any, pool: str) -> None:
    nothing, missing, failing = log.dispatch(pool=pool), log.dispatch("/no/such", pool=pool), log.dispatch("false", pool=pool)
    assert log.until_ended(nothing)["outcome"] == "succeeded"
    assert "No such file" in log.until_ended(missing)["reason"]
    assert log.until_ended(failing)["reason"] == "command exited with status 1"


def test_output_arrives_and_secrets_do_not_show(log: Any, pool: str, secret: str, text: Any) -> None:
    script = 'echo "the token is $TOKEN"; printf %s "$TOKEN" >&2'
    attempt = log.dispatch("sh", "-c", script, pool=pool, authority={"secretRefs": ["TOKEN"]})
    chunks = log.output(log.until_ended(attempt)["runId"])
    assert text(chunks, "stdout") == b"the token is ***\n"
    assert text(chunks, "stderr") == b"***"
    assert chunks[-1].end
    assert all(secret.encode() not in stored.data for stored in log.stored(attempt))


def test_more_output_than_is_kept(log: Any, pool: str, text: Any) -> None:
    attempt = log.dispatch("sh", "-c", "head -c 3000000 /dev/zero", pool=pool)
    chunks = log.output(log.until_ended(attempt)["runId"])
    assert len(text(chunks, "stdout")) == 1 << 20
    assert sum(chunk.truncated for chunk in chunks) == 1


def test_exports_go_where_the_document_says(log: Any, pool: str) -> None:
    export = {"artifacts": [{"name": "result", "path": "result"}]}
    attempt = log.dispatch("sh", "-c", "echo made > result", pool=pool, export=export)
    assert log.until_ended(attempt)["outcome"] == "succeeded"
    assert PREFIX + "export.v2.completed" in types(log.events(attempt))


def test_a_claim_that_somebody_else_made(log: Any, pool: str) -> None:
    attempt = Attempt(str(uuid.uuid4()), "m", 1)
    log.write(log.run_subject(attempt), void(attempt, reason="test", event_id=log.new_id(), time=rfc3339(time.time_ns())), expected_last=0)
    log.dispatch("true", formation=attempt.formation_id, pool=pool)
    other = log.dispatch("true", pool=pool)
    log.until_ended(other)
    log.until(lambda: log.waiting_work(pool) == 0)
    assert len(log.stored(attempt)) == 1


def test_work_that_comes_twice_is_done_once(log: Any, pool: str) -> None:
    attempt = log.dispatch("sleep", "0.2", pool=pool)
    again = log.events_of(work_subject(pool, "base", attempt))[0]
    log.write(work_subject(pool, "base", attempt), events.Event(**{**fields(again), "id": log.new_id()}))
    log.until_ended(attempt)
    log.write(work_subject(pool, "base", attempt), events.Event(**{**fields(again), "id": log.new_id()}))
    log.until(lambda: log.waiting_work(pool) == 0)
    assert types(log.events(attempt)).count(CLAIMED) == 1


def test_work_that_nobody_can_do_is_not_offered_again(log: Any, pool: str) -> None:
    attempt = Attempt(str(uuid.uuid4()), "m", 1)
    log.write(work_subject(pool, "base", attempt), events.Event(id=log.new_id(), source="test", type="a.b", data={}))
    log.until_ended(log.dispatch("true", pool=pool))
    log.until(lambda: log.waiting_work(pool) == 0)
    assert log.stored(attempt) == []


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"authority": {"egressRules": [{"host": "a.example", "port": 443}]}}, "cannot enforce: spec.authority.egressRules"),
        ({"lifetime": {"ttlSeconds": 7200}}, "cell spec rejected by policy pack 'house'"),
        ({"authority": {"secretRefs": ["MISSING"]}}, "secret MISSING unresolvable"),
        ({"authority": {"secretRefs": ["PATH"]}}, "cannot enforce: spec.authority.secretRefs[0]"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_refused_after_the_claim_ends_the_attempt(log: Any, pool: str, spec: dict[str, Any], reason: str) -> None:
    attempt = log.dispatch("true", pool=pool, **spec)
    destroyed = log.until_ended(attempt)
    assert destroyed["outcome"] == "failed"
    assert reason in destroyed["reason"]


def test_what_a_policy_refused_is_told_beside_the_run(log: Any, pool: str) -> None:
    log.until_ended(log.dispatch("true", pool=pool, lifetime={"ttlSeconds": 7200}))
    log.until(lambda: log.log_has("cellos.events.v1", PREFIX + "policy.v1.rejected"))


def test_a_formation_that_is_to_end(log: Any, pool: str) -> None:
    running = log.dispatch("sleep", "600", pool=pool)
    other = log.dispatch("sleep", "600", formation=running.formation_id, member="n", pool=pool)
    log.until_runs(running)
    log.until_runs(other)
    log.cancel(running.formation_id)
    for attempt in (running, other):
        destroyed = log.until_ended(attempt)
        assert (destroyed["outcome"], destroyed["reason"]) == ("failed", "cancelled")
    late = log.dispatch("sleep", "600", formation=running.formation_id, member="late", pool=pool)
    log.until_ended(log.dispatch("true", pool=pool))
    log.until(lambda: log.waiting_work(pool) == 0)
    assert log.stored(late) == [], "it is known, so it is not even claimed"


def test_a_run_that_somebody_else_closed_is_killed(log: Any, pool: str, shared: Any, held: Any) -> None:
    """It is told by the next event that is refused: here what comes after the command that was asked to end itself."""
    export = {"artifacts": [{"name": "f", "path": "f"}]}
    attempt = log.dispatch("sh", "-c", f"{held.wait}; echo more > f", pool=pool, authority=held.authority, export=export)
    log.until_runs(attempt)
    last = log.stored(attempt)[-1]
    closed = events.Event(id=log.new_id(), source="test", type=events.DESTROYED, data={"reason": "node_lost"})
    log.write(last.subject, closed, expected_last=last.sequence)
    held.go_on()
    log.until(lambda: [*Path(shared.variables["CELLOS_STATE_DIR"]).rglob("*.refused")])
    assert log.events(attempt)[-1].id == closed.id


def fields(event: events.Event) -> dict[str, Any]:
    assert canonical_bytes(event)
    return {name: getattr(event, name) for name in event.__struct_fields__}
