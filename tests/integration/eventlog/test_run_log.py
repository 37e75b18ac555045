"""The events of a run on a real server: in order, once, and none after somebody else closed the run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cellos.errors import EventLogError, MessageRefused, WrongSequence
from cellos.eventlog.run_log import RunPublisher
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]
SUBJECT = "cellos.events.runs.f.ME.1"


async def stored(opened: Any) -> list[str | None]:
    return [message.message_id for message in await opened.log.read(0, 1000)]


def numbered(*numbers: int) -> list[str]:
    return [f"e{number}" for number in numbers]


def test_a_claim_is_won_by_one_and_its_run_goes_on(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            publishers = [RunPublisher(opened.log, SUBJECT, last_sequence=0) for _ in range(5)]
            for number, publisher in enumerate(publishers):
                publisher.add(f"claim{number}", b"{}")
            answers = await asyncio.gather(*(publisher.drained() for publisher in publishers), return_exceptions=True)
            (winner,) = [publisher for publisher, answer in zip(publishers, answers, strict=True) if answer is None]
            assert sum(isinstance(answer, WrongSequence) for answer in answers) == 4
            for number in range(250):
                winner.add(f"e{number}", b"%d" % number)
            await winner.drained()
            assert (await stored(opened))[1:] == numbered(*range(250))
            assert winner.last_sequence == 251
            assert winner.pending == 0

    run(test())


def test_events_may_come_from_another_thread(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            publisher = RunPublisher(opened.log, SUBJECT, last_sequence=0)
            thread = threading.Thread(target=lambda: [publisher.add(f"e{number}", b"{}") for number in range(100)])
            thread.start()
            await asyncio.to_thread(thread.join)
            await publisher.drained()
            assert await stored(opened) == numbered(*range(100))

    run(test())


def test_a_run_that_somebody_closed_is_refused_once(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            refused: list[EventLogError] = []
            publisher = RunPublisher(opened.log, SUBJECT, last_sequence=0, on_refused=refused.append)
            publisher.add("e0", b"{}")
            await publisher.drained()
            await opened.log.publish(SUBJECT, b"{}", message_id="closed", expected_last=1)
            publisher.add("e1", b"{}")
            with pytest.raises(WrongSequence, match="closed by somebody else"):
                await publisher.drained()
            publisher.add("e2", b"{}")
            with pytest.raises(WrongSequence):
                await publisher.drained()
            assert len(refused) == 1
            assert await stored(opened) == ["e0", "closed"]

    run(test())


@pytest.mark.parametrize("together", [1, 3, 60])
def test_a_write_whose_answer_was_lost_is_not_written_twice(together: int, server: NatsServer, open_log: Open, run: Run, line: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as direct, line(server.port) as cut, open_log(cut.url) as opened:
            publisher = RunPublisher(opened.log, SUBJECT, last_sequence=0)
            publisher.add("e0", b"{}")
            await publisher.drained()
            lost = 0

            def lose(data: bytes) -> bytes | None:
                nonlocal lost
                if lost == 0 and b'"seq":' in data:
                    lost += 1
                    return None
                return data

            cut.answers = lose
            for number in range(1, together + 1):
                publisher.add(f"e{number}", b"{}")
            await publisher.drained()
            publisher.add("last", b"{}")
            await publisher.drained()
            assert lost == 1
            assert await stored(direct) == [*numbered(*range(together + 1)), "last"]

    run(test())


def test_it_waits_for_the_server_and_says_why(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            trouble = asyncio.Event()
            publisher = RunPublisher(opened.log, SUBJECT, last_sequence=0, on_trouble=lambda _: trouble.set())
            publisher.add("e0", b"{}")
            await publisher.drained()
            await asyncio.to_thread(server.stop)
            for number in (1, 2):
                publisher.add(f"e{number}", b"{}")
            waiting = asyncio.create_task(publisher.drained())
            await trouble.wait()
            assert publisher.pending == 2
            await asyncio.to_thread(server.start)
            await waiting
            assert await stored(opened) == numbered(0, 1, 2)

    run(test())


def test_an_event_that_no_log_takes_ends_the_run(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            publisher = RunPublisher(opened.log, SUBJECT, last_sequence=0)
            publisher.add("e0", b"x" * (2 << 20))
            with pytest.raises(MessageRefused):
                await publisher.drained()
            await publisher.close()

    run(test())


def test_what_is_not_acknowledged_when_it_closes_is_given_up(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            publisher = RunPublisher(opened.log, SUBJECT, last_sequence=0)
            publisher.add("e0", b"{}")
            await publisher.close()
            await publisher.close()
            await publisher.drained()
            assert publisher.pending == 1

    run(test())
