"""The work queue on a real server: each message to one node, again without an ack, whatever happens to stream, consumer or server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from cellos.core.formation.runs import Attempt, WorkClass, work_subject
from cellos.errors import LogUnreachable, OutcomeUnknown
from cellos.eventlog import work as module
from cellos.eventlog.api import ask
from cellos.eventlog.stream import ensure_stream
from cellos.eventlog.work import STREAM, WorkItem, WorkQueue
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]


def subject(number: int, work: WorkClass = "base", pool: str = "default") -> str:
    return work_subject(pool, work, Attempt("f", f"m{number}", 1))


async def dispatch(opened: Any, *numbers: int, work: WorkClass = "base", pool: str = "default") -> None:
    for number in numbers:
        await opened.log.publish(subject(number, work, pool), b"%d" % number, message_id=f"{pool}-{work}-{number}", expected_last=0)


async def waiting_for_an_ack(client: Any, work: WorkClass = "base") -> int:
    """How many messages, delivered or not."""
    found = msgspec.json.decode(await ask(client, f"CONSUMER.INFO.{STREAM}.{module.consumer_name('default', work)}"))
    return int(found["num_pending"]) + int(found["num_ack_pending"])


async def take(queue: WorkQueue, most: int = 1) -> list[WorkItem]:
    """However long it takes."""
    while not (found := await queue.take(most, 1.0)):
        pass
    return found


def payloads(items: list[WorkItem]) -> list[bytes]:
    return [item.payload for item in items]


def test_what_is_dispatched_comes_once_and_is_gone_when_it_is_acked(server: NatsServer, open_log: Open, run: Run, until: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, WorkQueue(opened.client, "default", ["base"]) as queue:
            waiting = asyncio.create_task(take(queue))
            await dispatch(opened, 1)
            (only,) = await waiting
            assert (only.subject, only.payload) == (subject(1), b"1")
            assert await waiting_for_an_ack(opened.client) == 1
            await only.ack()
            assert await until(lambda: nothing_left(opened.client))
            assert await queue.take(1, 0.2) == []

    async def nothing_left(client: Any) -> bool:
        return await waiting_for_an_ack(client) == 0

    run(test())


def test_never_more_comes_than_was_asked_for_and_the_dearest_class_comes_first(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, WorkQueue(opened.client, "default", ["base", "limits"]) as queue:
            await dispatch(opened, *range(5))
            await dispatch(opened, 10, 11, work="limits")
            found = await take(queue, 4)
            assert payloads(found) == [b"10", b"11", b"0", b"1"]
            more = await take(queue, 9)
            while len(more) < 3:  # one came ahead, alone
                more += await take(queue, 9)
            assert payloads(more) == [b"2", b"3", b"4"]

    run(test())


def test_what_came_ahead_is_there_at_once_and_goes_back_where_nobody_wants_it(
    server: NatsServer, open_log: Open, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellos.eventlog.work.HOLD_SECONDS", 0.02)

    async def test() -> None:
        async with open_log(server.url) as opened, WorkQueue(opened.client, "default", ["base"]) as busy:
            await dispatch(opened, 0, 1)
            [first] = await take(busy, 1)
            async with WorkQueue(opened.client, "default", ["base"]) as free:
                [other] = await take(free, 1)  # held by the first queue, until it gave it back
                assert payloads([first, other]) == [b"0", b"1"]
                await first.ack()
                await other.ack()

    run(test())


def test_what_came_ahead_goes_back_at_the_end(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            async with WorkQueue(opened.client, "default", ["base"]) as ending:
                await dispatch(opened, 0, 1)
                assert payloads(await take(ending, 1)) == [b"0"]
            began = asyncio.get_running_loop().time()
            async with WorkQueue(opened.client, "default", ["base"]) as next_one:
                assert payloads(await take(next_one, 1)) == [b"1"]
            assert asyncio.get_running_loop().time() - began < module.ACK_WAIT_SECONDS

    run(test())


def test_a_node_gets_only_its_pool_and_classes(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, WorkQueue(opened.client, "a.b", ["base"]) as queue:
            await dispatch(opened, 1, pool="a")
            await dispatch(opened, 2, pool="a.b", work="egress")
            await dispatch(opened, 3, pool="a.b")
            assert payloads(await take(queue, 9)) == [b"3"]
            assert await queue.take(9, 0.3) == []

    run(test())


def test_two_nodes_share_the_work(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with (
            open_log(server.url) as opened,
            open_log(server.url) as other,
            WorkQueue(opened.client, "default", ["base"]) as one,
            WorkQueue(other.client, "default", ["base"]) as two,
        ):
            both = asyncio.gather(take(one), take(two))
            await dispatch(opened, 1, 2)
            assert sorted(payloads([*(await both)[0], *(await both)[1]])) == [b"1", b"2"]

    run(test())


def test_what_is_not_taken_here_comes_again(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with (
            open_log(server.url) as opened,
            open_log(server.url) as other,
            WorkQueue(opened.client, "default", ["base"]) as one,
            WorkQueue(other.client, "default", ["base"]) as two,
        ):
            await dispatch(opened, 1)
            (first,) = await take(one)
            await first.in_progress()
            await first.nak()
            (second,) = await take(two)
            began = asyncio.get_running_loop().time()
            await second.nak(0.3)
            (third,) = await take(one)
            assert third.payload == b"1"
            assert asyncio.get_running_loop().time() - began >= 0.29

    run(test())


def test_a_message_for_a_node_that_does_not_want_it_any_more_goes_to_another(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with (
            open_log(server.url) as opened,
            open_log(server.url) as other,
            WorkQueue(opened.client, "default", ["base"]) as one,
            WorkQueue(other.client, "default", ["base"]) as two,
        ):
            assert await one.take(1, 0.2) == []  # its pull waits on
            await dispatch(opened, 1)
            assert payloads(await take(two)) == [b"1"]

    run(test())


@pytest.mark.parametrize("removed", ["stream", "consumer"])
def test_what_was_removed_is_made_again(removed: str, server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, WorkQueue(opened.client, "default", ["base"]) as queue:
            await dispatch(opened, 1)
            (first,) = await take(queue)
            await first.ack()
            while await waiting_for_an_ack(opened.client):
                pass
            waiting = asyncio.create_task(take(queue, 9))
            if removed == "stream":
                await ask(opened.client, f"STREAM.DELETE.{STREAM}")
                await ensure_stream(opened.client, max_bytes=64 << 20)
            else:
                await ask(opened.client, f"CONSUMER.DELETE.{STREAM}.{module.consumer_name('default', 'base')}")
            await dispatch(opened, 2)
            found = payloads(await waiting)
            while b"2" not in found:
                found += payloads(await take(queue, 9))
            assert (b"1" in found) == (removed == "consumer")  # a new one gives all that the log has: a message is only a hint

    run(test())


def test_it_goes_on_when_the_server_comes_back_and_old_work_does_not(server: NatsServer, open_log: Open, run: Run, until: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, WorkQueue(opened.client, "default", ["base"]) as queue:
            await dispatch(opened, 1)
            (first,) = await take(queue)
            await first.ack()
            while await waiting_for_an_ack(opened.client):
                pass
            waiting = asyncio.create_task(take(queue, 9))
            await asyncio.to_thread(server.stop)
            assert await queue_is_patient(waiting)
            await asyncio.to_thread(server.start)
            await until(lambda: dispatched(opened), LogUnreachable, OutcomeUnknown)
            assert payloads(await waiting) == [b"2"]

    async def dispatched(opened: Any) -> bool:
        await opened.log.publish(subject(2), b"2", message_id="again")
        return True

    async def queue_is_patient(waiting: asyncio.Task[Any]) -> bool:
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        return not done

    run(test())


def test_without_a_log_it_says_so_and_waits(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await ask(opened.client, f"STREAM.DELETE.{STREAM}")
            told: list[str] = []
            async with WorkQueue(opened.client, "default", ["base"], on_trouble=told.append) as queue:
                while not told:
                    assert await queue.take(1, 0.1) == []
                assert await queue.take(1, 0.1) == []
                assert len(told) == 1
                assert "stream not found" in told[0]
                await ensure_stream(opened.client, max_bytes=64 << 20)
                await dispatch(opened, 1)
                assert payloads(await take(queue)) == [b"1"]

    run(test())
