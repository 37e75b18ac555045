"""Writing to a real server: acknowledgements, guards, batches, and what becomes of an unknown outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cellos.errors import DuplicateInBatch, LogFull, LogUnreachable, MessageRefused, NoStream, OutcomeUnknown, WrongSequence
from cellos.eventlog.api import Ack
from cellos.eventlog.batch import MAX_BATCH_MESSAGES, Message
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.stream import stream_info
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]
NAME = "cellos.events.names.n"


def reservation(number: int) -> list[Message]:
    """A name and what is made under it, in one write."""
    created = Message(subject=f"cellos.events.formations.f{number}.created", payload=b"{}", message_id=f"created-{number}", expected_last=0)
    return [Message(subject=NAME, payload=b"{}", message_id=f"name-{number}", expected_last=0), created]


def test_a_write_is_acknowledged_with_its_sequence_and_a_repetition_with_the_same(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await opened.write(2)
            assert await opened.log.publish("cellos.events.x", b"{}", message_id="id") == Ack(sequence=3)
            assert await opened.log.publish("cellos.events.x", b"{}", message_id="id") == Ack(sequence=3, duplicate=True)

    run(test())


def test_a_filter_guards_every_subject_below_it(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            log, guarded = opened.log, "cellos.events.formations.f.>"
            first = await log.publish("cellos.events.formations.f.created", b"{}", message_id="1", expected_last=0, expected_filter=guarded)
            await log.publish("cellos.events.formations.other.created", b"{}", message_id="2")
            await log.publish(
                "cellos.events.formations.f.failed", b"{}", message_id="3", expected_last=first.sequence, expected_filter=guarded
            )
            with pytest.raises(WrongSequence):
                await log.publish(
                    "cellos.events.formations.f.completed", b"{}", message_id="4", expected_last=first.sequence, expected_filter=guarded
                )
            assert (await stream_info(opened.client)).messages == 3

    run(test())


def test_of_forty_racing_claims_one_wins(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as one, open_log(server.url) as other:
            claims = [
                (one, other)[number % 2].log.publish("cellos.events.runs.f.m.1", b"{}", message_id=f"claim-{number}", expected_last=0)
                for number in range(40)
            ]
            answers = await asyncio.gather(*claims, return_exceptions=True)
            won = [number for number, answer in enumerate(answers) if isinstance(answer, Ack)]
            assert len(won) == 1
            assert sum(isinstance(answer, WrongSequence) for answer in answers) == 39
            # Each finds out by itself, whatever it was told.
            settled = [await other.log.settle("cellos.events.runs.f.m.1", f"claim-{number}") for number in range(40)]
            assert [number for number, ack in enumerate(settled) if ack] == won

    run(test())


def test_of_32_racing_reservations_of_a_name_one_wins_and_the_others_leave_nothing(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as one, open_log(server.url) as other:
            batches = [(one, other)[number % 2].log.publish_batch(reservation(number)) for number in range(32)]
            answers = await asyncio.gather(*batches, return_exceptions=True)
            won = [number for number, answer in enumerate(answers) if isinstance(answer, Ack)]
            assert len(won) == 1
            assert sum(isinstance(answer, WrongSequence) for answer in answers) == 31
            assert [stored.message_id for stored in await one.log.read(0, 100)] == [f"name-{won[0]}", f"created-{won[0]}"]

    run(test())


def test_a_batch_is_all_or_nothing(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            log = opened.log
            assert await log.publish_batch(reservation(1)) == Ack(sequence=2)
            with pytest.raises(WrongSequence):
                await log.publish_batch([Message(subject="cellos.events.x", payload=b"", message_id="x"), *reservation(2)])
            with pytest.raises(DuplicateInBatch):
                await log.publish_batch(
                    [Message(subject=f"cellos.events.{name}", payload=b"", message_id=name) for name in ("y", "name-1")]
                )
            assert (await stream_info(opened.client)).messages == 2
            assert await log.publish_batch([Message(subject="cellos.events.x", payload=b"", message_id="x")]) == Ack(sequence=3)

    run(test())


def test_a_batch_may_have_a_thousand_messages(server: NatsServer, open_log: Open, run: Run) -> None:
    def messages(count: int) -> list[Message]:
        return [Message(subject="cellos.events.many", payload=b"{}", message_id=f"{count}-{number}") for number in range(count)]

    async def test() -> None:
        async with open_log(server.url) as opened:
            assert (await opened.log.publish_batch(messages(MAX_BATCH_MESSAGES))).sequence == MAX_BATCH_MESSAGES
            for count in (0, MAX_BATCH_MESSAGES + 1):
                with pytest.raises(MessageRefused, match="1 to 1000"):
                    await opened.log.publish_batch(messages(count))
            assert (await stream_info(opened.client)).messages == MAX_BATCH_MESSAGES

    run(test())


@pytest.mark.parametrize("is_batch", [False, True], ids=["message", "batch"])
def test_a_lost_acknowledgement_is_an_unknown_outcome_that_settles(
    server: NatsServer, open_log: Open, run: Run, line: Any, until: Any, is_batch: bool
) -> None:
    async def test() -> None:
        async with open_log(server.url) as direct, line(server.port) as lossy, open_log(lossy.url) as opened:
            lossy.answers = lambda data: None if b"CELLOS_EVENTS" in data else data
            log = opened.log
            write = log.publish_batch(reservation(1)) if is_batch else log.publish(NAME, b"{}", message_id="name-1", expected_last=0)
            with pytest.raises(OutcomeUnknown):
                await write
            lossy.answers = lambda data: data
            ack = await until(lambda: opened.log.settle(NAME, "name-1"), LogUnreachable)
            assert ack.sequence == 1
            assert await opened.log.settle(NAME, "name-2") is None
            # Said again it is refused, and settles just the same.
            with pytest.raises(WrongSequence):
                await opened.log.publish(NAME, b"{}", message_id="name-1", expected_last=0)
            assert (await stream_info(direct.client)).messages == (2 if is_batch else 1)

    run(test())


def test_an_answer_that_never_comes_is_an_unknown_outcome_after_the_time_out(
    server: NatsServer, open_log: Open, run: Run, line: Any
) -> None:
    async def test() -> None:
        async with line(server.port) as lossy, open_log(lossy.url) as opened:
            lossy.answers = lambda data: b"" if b"CELLOS_EVENTS" in data else data
            with pytest.raises(OutcomeUnknown, match="no answer in time"):
                await opened.log.publish("cellos.events.x", b"{}", message_id="1", timeout=0.1)

    run(test())


def test_nothing_is_sent_without_a_connection_nor_later(server: NatsServer, open_log: Open, run: Run, until: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await opened.log.publish("cellos.events.x", b"{}", message_id="first")
            server.kill()
            with pytest.raises(OutcomeUnknown):  # it has not been noticed yet
                await opened.log.publish("cellos.events.x", b"{}", message_id="lost")
            with pytest.raises(LogUnreachable, match=r"no connection|connection refused"):
                await opened.log.publish("cellos.events.x", b"{}", message_id="refused")
            with pytest.raises(LogUnreachable, match=r"no connection|connection refused"):
                await opened.log.publish_batch(reservation(1))
            with pytest.raises(LogUnreachable):
                await opened.log.last("cellos.events.>")
            server.start()
            await until(lambda: opened.log.publish("cellos.events.x", b"{}", message_id="next"), LogUnreachable, OutcomeUnknown, NoStream)
            assert [stored.message_id for stored in await opened.log.read(0, 9)] == ["first", "next"]

    run(test())


def test_writes_find_their_way_again_alone(server: NatsServer, open_log: Open, run: Run, line: Any) -> None:
    """Their connection may be lost while that of the client is not; those who wait for another one share it."""

    async def test() -> None:
        async with line(server.port) as relay, open_log(relay.url) as opened:
            for number in range(3):
                acks = await asyncio.gather(
                    *(opened.log.publish("cellos.events.x", b"{}", message_id=f"{number}-{each}") for each in range(8))
                )
                assert sorted(ack.sequence for ack in acks) == list(range(8 * number + 1, 8 * number + 9))
                opened.log._writer._link.fail("cut")
            assert relay.connections == 1 + 3
            assert opened.client.stats["reconnects"] == 0

    run(test())


def test_a_closed_client_writes_nothing(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await opened.write(1)
            waiting = asyncio.create_task(opened.log.publish("cellos.events.x", b"{}", message_id="x"))
            await asyncio.sleep(0)
            await opened.client.close()
            with pytest.raises(OutcomeUnknown, match="closed"):
                await waiting
            with pytest.raises(LogUnreachable, match="no connection"):
                await opened.log.publish("cellos.events.x", b"{}", message_id="y")

    run(test())


def test_a_full_stream_says_so_and_keeps_what_it_has(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url, max_bytes=1 << 20) as opened:
            await opened.write(10, payload=bytes(100_000))
            with pytest.raises(LogFull, match="maximum bytes exceeded"):
                await opened.log.publish("cellos.events.x", bytes(100_000), message_id="one more")
            with pytest.raises(LogFull):
                await opened.log.publish_batch(
                    [Message(subject="cellos.events.x", payload=bytes(100_000), message_id=f"b{number}") for number in range(2)]
                )
            assert (await stream_info(opened.client)).messages == 10

    run(test())


def test_messages_that_can_never_be_taken_are_refused_before_they_are_sent(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            most = opened.client.max_payload
            with pytest.raises(MessageRefused, match="max_payload"):
                await opened.log.publish("cellos.events.x", bytes(most - 30), message_id="large")
            with pytest.raises(MessageRefused, match="message id"):
                await opened.log.publish("cellos.events.x", b"", message_id="a\r\nNats-Rollup: all")
            with pytest.raises(MessageRefused):
                await opened.log.publish("cellos.events.a b", b"", message_id="subject")
            await opened.log.publish("cellos.events.x", bytes(most - 100), message_id="fits")
            assert opened.client.stats["reconnects"] == 0

    run(test())


def test_without_a_stream_nothing_is_taken(server: NatsServer, run: Run) -> None:
    async def test() -> None:
        client = await connect(Settings(url=server.url), name="test")
        log = EventLog(client)
        with pytest.raises(NoStream, match="CELLOS_EVENTS"):
            await log.publish("cellos.events.x", b"{}", message_id="1")
        with pytest.raises(NoStream):
            await log.last("cellos.events.>")
        with pytest.raises(NoStream):
            await log.read(0, 10)
        await client.close()

    run(test())


def test_pages_hold_the_exact_bytes_and_leave_no_consumer(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            log = opened.log
            assert await log.read(0, 10) == []
            payloads = [b"{}", b"not json", b"\xff\xfe", b"", b"x" * 1_000_000]
            for number, payload in enumerate(payloads):
                await log.publish(f"cellos.events.{number}", payload, message_id=f"e{number}")
            page = await log.read(0, 10)
            assert [stored.data for stored in page] == payloads
            assert page == [await log.get(number) for number in range(1, 6)]
            assert await log.read(3, 1) == [page[3]]
            assert await log.read(5, 10) == await log.read(2**64 - 1, 10) == await log.read(0, 0) == []
            assert page[-1] == await log.last("cellos.events.>")
            assert await log.last("cellos.events.none") is None
            assert await log.get(6) is None
            tail = await log.tail()
            assert (tail.sequence, tail.digest) == (5, page[-1].digest)
            info = await opened.client.jetstream().stream_info("CELLOS_EVENTS")
            assert info.state.consumer_count == 0

    run(test())
