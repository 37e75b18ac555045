"""Formations to their end: with a real NATS server, real controllers, and a node that only writes events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from cellos.controller import loop
from cellos.controller.config import Config
from cellos.controller.loop import Controller
from cellos.core.events import Event, canonical_bytes, parse_event, parse_signed
from cellos.core.evidence.sign import Signer
from cellos.core.formation.decide import decide
from cellos.core.formation.events import FORMATION_TYPE, subject_of
from cellos.core.formation.runs import NODE_LOST, run_subject
from cellos.core.formation.state import FormationState
from cellos.eventlog.api import ask
from cellos.eventlog.leases import NODES, Leases
from cellos.eventlog.log import EventLog
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]
SPEC = {"authority": {}, "lifetime": {"ttlSeconds": 600}, "run": {"argv": ["true"]}}


def member(id: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "spec": SPEC, **({} if id == "a" else {"authorizedBy": "a"}), **more}


def test_a_formation_is_taken_to_its_end_in_the_order_of_its_members(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            node = await at.node()
            formation = await at.create([member("a"), member("b", after=["a"]), member("c", after=["a"]), member("d", after=["b", "c"])])
            state = await at.ended(formation)
            assert state.status == "COMPLETED"
            assert sorted(node.ran) == [(name, 1) for name in "abcd"]
            assert await at.phases(formation) == ["created", "launching", "running", "completed"]

    run(test())


def test_a_member_that_fails_is_tried_again(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            node = await at.node(lambda member, attempt: "fail" if (member, attempt) in {("b", 1), ("b", 2)} else "succeed")
            formation = await at.create([member("a"), member("b", retries=2, backoff={"initialMs": 1, "maxMs": 5})])
            state = await at.ended(formation)
            assert state.status == "COMPLETED"
            assert sorted(node.ran) == [("a", 1), ("b", 1), ("b", 2), ("b", 3)]
            assert "degraded" in await at.phases(formation)

    run(test())


def test_what_cannot_run_any_more_is_skipped(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            node = await at.node(lambda member, attempt: "fail" if member == "b" else "succeed")
            entries = [member("a"), member("b", critical=False), member("c", critical=False, after=["b"]), member("d", after=["a"])]
            formation = await at.create(entries)
            state = await at.ended(formation)
            assert state.status == "COMPLETED"
            assert state.failed_cell_ids() == (f"{formation}.b", f"{formation}.c")
            assert [state.members[name].phase for name in "abcd"] == ["succeeded", "failed", "skipped", "succeeded"]
            assert sorted(node.ran) == [("a", 1), ("b", 1), ("d", 1)]

    run(test())


def test_when_a_critical_member_fails_for_good_the_others_are_ended_first(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            await at.node(lambda member, attempt: "fail" if member == "b" else "hang")
            formation = await at.create([member("a"), member("b"), member("c", pool="nobody"), member("d", after=["a"])])
            state = await at.ended(formation)
            assert state.status == "FAILED"
            assert state.reason is not None
            assert "b" in state.reason
            assert {name: found.phase for name, found in state.members.items()} == {
                "a": "failed",
                "b": "failed",
                "c": "skipped",
                "d": "skipped",
            }
            assert (await at.phases(formation))[-2:] == ["cancelling", "failed"]

    run(test())


def test_a_delete_ends_what_runs_and_voids_what_nobody_took(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            node = await at.node(lambda member, attempt: "hang")
            formation = await at.create([member("a"), member("b", pool="nobody"), member("c", after=["a"])])
            await at.until(lambda: claimed(node))
            await at.delete(formation)
            await at.delete(formation)
            state = await at.ended(formation)
            assert state.status == "CANCELLED"
            assert sorted(node.ran) == [("a", 1)]

    async def claimed(node: Any) -> bool:
        return bool(node.ran)

    run(test())


def test_deletes_race_with_dispatches(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            await at.node(lambda member, attempt: "hang" if member == "e" else "succeed")
            formations = [await at.create([member("a"), *(member(name, after=["a"]) for name in "bcde")]) for _ in range(8)]

            async def delete(number: int, formation: str) -> None:
                for _ in range(number % 4):  # as long as it takes to look
                    await at.state(formation)
                await at.delete(formation)

            await asyncio.gather(*(delete(number, formation) for number, formation in enumerate(formations)))
            assert {(await at.ended(formation)).status for formation in formations} == {"CANCELLED"}

    run(test())


@pytest.mark.parametrize("policy", ["fail", "retry"])
def test_the_runs_of_a_node_that_is_gone_are_closed(policy: str, server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            lost = await at.node(lambda member, attempt: "hang", pool="first", lease_ms=600_000)
            formation = await at.create([member("a"), member("b", pool="first", onNodeLost=policy, backoff={"initialMs": 1})])
            await at.until(lambda: runs(at, formation))
            await lost.die()
            await at.until(lambda: is_retried_or_over(at, formation))
            await at.node()
            if policy == "retry":
                await at.node(pool="first")
            state = await at.ended(formation)
            assert state.status == ("COMPLETED" if policy == "retry" else "FAILED")
            (first, *_) = state.members["b"].attempts
            assert (first.outcome, first.reason) == ("failed", NODE_LOST)
            last = parse_event((await at.stored(run_subject(first.key)))[-1].data).members
            assert (last["terminalState"], last["residueClass"], last["ttlSeconds"]) == ("forced", "documented_exception", 600)
            assert last["correlation"] == {"formationId": formation, "memberId": "b"}
            assert await Leases(at.client).get(lost.key) is None

    async def runs(at: Any, formation: str) -> bool:
        return bool((await at.state(formation)).counts["running"])

    async def is_retried_or_over(at: Any, formation: str) -> bool:
        return any(attempt.outcome for attempt in (await at.state(formation)).members["b"].attempts)

    run(test())


def test_a_claim_of_a_life_whose_key_is_gone_is_closed_at_once(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            node = await at.node(lambda member, attempt: "hang", lease_ms=3_600_000)
            revision = (await Leases(at.client).entries(NODES))[0].revision
            await Leases(at.client).delete(node.key, revision)
            formation = await at.create([member("a")])
            state = await at.ended(formation)
            assert (state.status, state.members["a"].reason) == ("FAILED", NODE_LOST)

    run(test())


def test_of_two_controllers_each_write_is_done_once(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller("one")
            await at.controller("two")
            await at.node(lambda member, attempt: "fail" if member == "m3" and attempt == 1 else "succeed")
            entries = [member("a"), *(member(f"m{number}", after=["a"], retries=1, backoff={"initialMs": 1}) for number in range(8))]
            formations = [await at.create(entries) for _ in range(4)]
            assert [(await at.ended(formation)).status for formation in formations] == ["COMPLETED"] * 4

    run(test())


class DyingLog:
    """Goes silent at its n-th write, before or after the log has it."""

    def __init__(self, log: EventLog, *, at: int, after: bool) -> None:
        self._log = log
        self._left = at
        self._after = after
        self.died = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._log, name)
        if name not in {"publish", "publish_batch"}:
            return found

        async def write(*given: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                if self._after and self._left == -1:
                    await found(*given, **options)
                self.died.set()
                await asyncio.Event().wait()
            return await found(*given, **options)

        return write


def test_a_controller_may_die_between_any_two_writes(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.node(lambda member, attempt: "fail" if member == "b" or attempt == 1 else "succeed")
            entries = [member("a", retries=1, backoff={"initialMs": 1}), member("b", after=["a"])]
            survived = False
            number = 0
            while not survived:
                for after in (False, True):
                    formation = await at.create(entries)
                    controller = Controller(Config(id="c", host="h"), at.client)
                    controller._acts._log = dying = DyingLog(controller._acts._log, at=number, after=after)  # type: ignore[assignment]
                    first = at.start(controller.run())
                    ending = asyncio.create_task(at.ended(formation))
                    dead = asyncio.create_task(dying.died.wait())
                    await asyncio.wait({ending, dead}, return_when=asyncio.FIRST_COMPLETED)
                    survived = not dead.done()
                    dead.cancel()
                    await at.stop(first)
                    second = at.start(Controller(Config(id="c", host="h"), at.client).run())
                    assert (await ending).status == "FAILED"
                    await at.stop(second)
                number += 1
            assert number > 3

    run(test())


def test_nats_may_go_away_and_come_back(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            node = await at.node()
            entries = [member("a"), *(member(f"m{number}", after=[f"m{number - 1}" if number else "a"]) for number in range(9))]
            formation = await at.create(entries)
            for wanted in (2, 5):
                await at.until(lambda wanted=wanted: ran(node, wanted))
                await asyncio.to_thread(server.kill if wanted == 2 else server.stop)
                await asyncio.to_thread(server.start)
            assert (await at.ended(formation)).status == "COMPLETED"
            assert set(node.ran.values()) == {1}

    async def ran(node: Any, wanted: int) -> bool:
        return len(node.ran) >= wanted

    run(test())


def test_when_the_log_was_wiped_it_begins_anew(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            await at.node()
            await at.ended(await at.create([member("a")]))
            open_one = await at.create([member("a", pool="nobody")])
            await at.until(lambda: dispatched(at, open_one))
            await ask(at.client, "STREAM.DELETE.CELLOS_EVENTS")
            await at.until(lambda: there_is_a_log(at))
            assert (await at.ended(await at.create([member("a")]))).status == "COMPLETED"
            assert await at.stored(open_one) == []

    async def dispatched(at: Any, formation: str) -> bool:
        return (await at.state(formation)).status == "LAUNCHING"

    async def there_is_a_log(at: Any) -> bool:
        return await at.log.last("cellos.events.>") is None  # and not NoStream

    run(test())


def test_no_more_of_a_formation_is_under_way_than_is_allowed(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller(in_flight=3)
            await at.node()
            formation = await at.create([member("a"), *(member(f"m{number}") for number in range(12))])
            assert (await at.ended(formation)).status == "COMPLETED"
            most = 0
            under_way = FormationState(formation)
            for each in await at.stored(formation):
                under_way.apply(each.sequence, each.subject, parse_event(each.data), stored_ns=each.time)
                most = max(most, len(under_way.open_attempts))
            assert most == 3

    run(test())


def test_a_deadline_is_kept_whatever_the_clock_of_the_host_does(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            offset = 0
            await at.controller(clock=lambda: time.time_ns() + offset)
            node = await at.node(lambda member, attempt: "hang")
            formation = await at.create([member("a"), member("b", after=["a"])], deadlineSeconds=3600)
            await at.until(lambda: ran(node))
            offset = -7200 * 10**9
            other = await at.create([member("a", pool="nobody")])
            await at.until(lambda: launching(at, other))
            offset = 3601 * 10**9
            state = await at.ended(formation)
            assert state.status == "FAILED"
            assert "deadline" in (state.reason or "")

    async def ran(node: Any) -> bool:
        return bool(node.ran)

    async def launching(at: Any, formation: str) -> bool:
        return (await at.state(formation)).status == "LAUNCHING"

    run(test())


def test_formations_that_others_drive_and_other_events_are_left_alone(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            await at.node()
            driven = await at.create([{"id": "a"}, {"id": "b", "authorizedBy": "a"}])
            for number, subject in enumerate(
                ("cells.x", "runs", "runs.x", "work.x", "formations", "formations.x", "names.x", "work.a.b.c.d.e.f")
            ):
                await at.log.publish(f"cellos.events.{subject}", b"no event", message_id=str(number))
            assert (await at.ended(await at.create([member("a")]))).status == "COMPLETED"
            assert await at.phases(driven) == ["created"]

    run(test())


def test_a_formation_that_nobody_could_run_fails(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            document = {"name": "n", "coordinator": "a", "members": [{"id": "a", "spec": {"from": "the future"}}]}
            data = {"formationId": "f", "formationName": "n", "cellCount": 1, "failedCellIds": [], "document": document}
            event = Event(id="1", source="f", type=FORMATION_TYPE + "created", data=data)
            await at.log.publish(subject_of("f", "created"), canonical_bytes(event), message_id="1")
            await at.controller()
            state = await at.ended("f")
            assert (state.status, (state.reason or "")[:26]) == ("FAILED", "its document cannot be run")

    run(test())


def test_what_a_controller_writes_is_signed_where_it_has_a_key(server: NatsServer, site: Open, run: Run) -> None:
    async def test() -> None:
        async with site(server.url) as at:
            await at.controller(signer=Signer("k", "hmac-sha256", b"secret"))
            await at.node()
            formation = await at.create([member("a")])
            assert (await at.ended(formation)).status == "COMPLETED"
            signed = [each.subject for each in await at.stored(formation) if parse_signed(each.data)[1] is not None]
            assert [subject.split(".")[2] for subject in signed] == ["formations", "work", "formations", "formations"]

    run(test())


def test_a_fault_that_one_formation_brings_out_does_not_stop_the_others(
    server: NatsServer, site: Open, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(state: FormationState, *given: Any, **options: Any) -> Any:
        if "bad" in state.members:
            raise RuntimeError("a fault of ours")
        return decide(state, *given, **options)

    monkeypatch.setattr(loop, "decide", faulty)

    async def test() -> None:
        async with site(server.url) as at:
            await at.controller()
            await at.node()
            bad = await at.create([member("a"), member("bad")])
            assert (await at.ended(await at.create([member("a")]))).status == "COMPLETED"
            assert await at.phases(bad) == ["created"]

    run(test())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["cannot decide about a formation"]
