"""Reading from a real server: everything once and in order, whatever becomes of the connection, the server and the stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from cellos.errors import LogUnreachable, NoStream, OutcomeUnknown, Rebuild
from cellos.eventlog import reader as module
from cellos.eventlog.api import ask
from cellos.eventlog.link import Link
from cellos.eventlog.reader import Reader
from cellos.eventlog.stored import Cursor, Stored
from cellos.eventlog.stream import ensure_stream
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]
STREAM = "CELLOS_EVENTS"


async def take(reader: Reader, count: int) -> list[Stored]:
    """At least so many."""
    found: list[Stored] = []
    while len(found) < count:
        found += await reader.read()
    return found


def ids(found: list[Stored]) -> list[str | None]:
    return [stored.message_id for stored in found]


def numbered(count: int, begin: int = 0) -> list[str]:
    return [f"e{number}" for number in range(begin, begin + count)]


async def lost(reader: Reader) -> bool:
    return not reader.connected


async def nothing_comes(reader: Reader) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(), 0.1)


async def no_more_comes(reader: Reader) -> None:
    """It is connected, and everything there is has been given."""
    reading, caught_up = asyncio.create_task(reader.read()), asyncio.create_task(reader.caught_up.wait())
    await asyncio.wait({reading, caught_up}, return_when=asyncio.FIRST_COMPLETED)
    assert not reading.done()
    reading.cancel()
    await nothing_comes(reader)


def test_replay_and_tail_are_one(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            await opened.write(1500)  # more than two pulls
            writing = asyncio.create_task(opened.write(300, begin=1500))
            found = await take(reader, 1800)
            await writing
            assert ids(found) == numbered(1800)
            assert [stored.sequence for stored in found] == list(range(1, 1801))
            await no_more_comes(reader)

    run(test())


def test_a_busy_reader_rests_between_batches_and_loses_nothing(
    server: NatsServer, open_log: Open, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    rest = Link.rest

    def counted(link: Link, seconds: float) -> None:
        rests.append(seconds)
        rest(link, seconds)

    monkeypatch.setattr(module, "BUSY_PER_SECOND", 1)
    monkeypatch.setattr(module, "_WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(Link, "rest", counted)

    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            writing = asyncio.create_task(opened.write(300))
            found = await take(reader, 300)
            await writing
            assert ids(found) == numbered(300)
            assert rests
            await no_more_comes(reader)  # and it may end while it rests

    run(test())


def test_it_gives_what_nats_py_gives(server: NatsServer, open_log: Open, run: Run) -> None:
    payloads = [b'{"n":1}', b"", b"not json", b"\xff\x00\r\n", b"MSG a 1 3\r\nabc\r\n", b"x" * 1_000_000]

    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            for number, payload in enumerate(payloads):
                await opened.log.publish(f"cellos.events.{number}", payload, message_id=f"e{number}")
            await opened.client.jetstream().publish("cellos.events.plain", b"from elsewhere")
            await opened.client.jetstream().publish("cellos.events.headers", b"", headers={"A": "1", "B": "zwölf"})
            subscription = await opened.client.jetstream().subscribe("cellos.events.>", ordered_consumer=True)
            theirs = [await subscription.next_msg() for _ in range(len(payloads) + 2)]
            for ours, their in zip(await take(reader, len(theirs)), theirs, strict=True):
                metadata = their.metadata
                assert (ours.sequence, ours.subject, ours.data) == (metadata.sequence.stream, their.subject, their.data)
                assert abs(ours.time / 1e9 - metadata.timestamp.timestamp()) < 1e-3
                assert ours.message_id == (their.headers or {}).get("Nats-Msg-Id")
                assert ours == await opened.log.get(ours.sequence)
            await subscription.unsubscribe()

    run(test())


def test_iteration_gives_one_at_a_time(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            await opened.write(5)
            found = [await anext(reader) for _ in range(5)]
            assert ids(found) == numbered(5)

    run(test())


def test_it_goes_on_from_a_cursor(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            async with Reader(opened.client) as first:
                await opened.write(10)
                await take(first, 10)
                cursor = first.cursor
            assert cursor == await opened.log.tail()
            async with Reader(opened.client, start=cursor) as second:
                await no_more_comes(second)
                await opened.write(3, begin=10)
                assert ids(await take(second, 3)) == numbered(3, 10)

    run(test())


def test_caught_up_means_that_the_owner_has_been_given_everything(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            async with Reader(opened.client) as reader:
                await no_more_comes(reader)
            await opened.write(600)
            async with Reader(opened.client) as reader:
                found = await reader.read()
                assert not reader.caught_up.is_set()
                found += await take(reader, 600 - len(found))
                assert not reader.caught_up.is_set()  # it has not come back yet
                await no_more_comes(reader)

    run(test())


def test_a_cancelled_read_loses_nothing(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            await nothing_comes(reader)  # to be cut short while it connects only makes it connect again
            writing = asyncio.create_task(opened.write(200))
            found: list[Stored] = []
            while len(found) < 200:
                with contextlib.suppress(TimeoutError):
                    found += await asyncio.wait_for(reader.read(), 0.0005)
            await writing
            assert ids(found) == numbered(200)

    run(test())


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_it_outlives_the_server(server: NatsServer, open_log: Open, run: Run, until: Any, end: str) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            troubles: list[str] = []
            async with Reader(opened.client, on_trouble=troubles.append) as reader:
                found: list[Stored] = []
                for number in range(40):
                    if number % 10 == 5:
                        getattr(server, end)()
                        server.start()

                    async def write(number: int = number) -> object:
                        return await opened.log.publish("cellos.events.x", b"{}", message_id=f"e{number}", timeout=1)

                    await until(write, LogUnreachable, OutcomeUnknown, NoStream)
                    if number % 3 == 0:
                        found += await reader.read()
                found += await take(reader, 40 - len(found))
                assert ids(found) == numbered(40)
                assert troubles

    run(test())


def test_it_waits_for_a_server_that_is_not_there_yet(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await opened.write(3)
            server.stop()
            async with Reader(opened.client) as reader:
                await nothing_comes(reader)
                assert not reader.connected
                server.start()
                assert ids(await take(reader, 3)) == numbered(3)
                assert reader.connected

    run(test())


def test_a_line_that_breaks_again_and_again_gives_everything_once(server: NatsServer, open_log: Open, run: Run, line: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as direct, line(server.port) as bad, open_log(bad.url) as opened:
            await direct.write(600, payload=bytes(1000))
            passed = 0

            def cut(data: bytes) -> bytes | None:
                nonlocal passed
                passed += len(data)
                if passed > 150_000:
                    passed = 0
                    return None
                return data

            async with Reader(opened.client) as reader:
                bad.answers = cut
                found = await take(reader, 600)
                assert ids(found) == numbered(600)
                assert bad.connections >= 4
                bad.answers = lambda data: data

    run(test())


def test_a_message_that_the_line_swallowed_is_asked_for_again(server: NatsServer, open_log: Open, run: Run, line: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as direct, line(server.port) as bad, open_log(bad.url) as opened, Reader(opened.client) as reader:
            await direct.write(1)
            await take(reader, 1)
            bad.answers = lambda data: b"" if b"e1\r\n" in data else data
            await direct.write(1, begin=1)
            await nothing_comes(reader)
            bad.answers = lambda data: data
            await direct.write(1, begin=2)
            assert ids(await take(reader, 2)) == ["e1", "e2"]

    run(test())


def test_silence_is_an_end(server: NatsServer, open_log: Open, run: Run, line: Any, until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)

    async def test() -> None:
        async with open_log(server.url) as direct, line(server.port) as bad, open_log(bad.url) as opened, Reader(opened.client) as reader:
            await direct.write(1)
            await take(reader, 1)
            bad.answers = lambda data: b""
            await direct.write(1, begin=1)
            reading = asyncio.create_task(take(reader, 1))
            await until(lambda: lost(reader))
            bad.answers = lambda data: data
            assert ids(await reading) == ["e1"]

    run(test())


def test_a_consumer_that_was_removed_is_made_again(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            await opened.write(3)
            await take(reader, 3)
            names = json.loads(await ask(opened.client, f"CONSUMER.NAMES.{STREAM}"))["consumers"]
            assert len(names) == 1
            await ask(opened.client, f"CONSUMER.DELETE.{STREAM}.{names[0]}")
            await opened.write(3, begin=3)
            assert ids(await take(reader, 3)) == numbered(3, 3)

    run(test())


def test_it_leaves_nothing_behind(server: NatsServer, open_log: Open, run: Run, until: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            stream = opened.client.jetstream()
            async with Reader(opened.client) as reader:
                await no_more_comes(reader)
                (consumer,) = await stream.consumers_info(STREAM)
                config = consumer.config
                assert (config.durable_name, config.ack_policy, config.deliver_subject) == (None, "none", None)
                assert config.inactive_threshold >= 60  # should we not come to remove it

            async def is_gone() -> bool:
                return not await stream.consumers_info(STREAM)

            await until(is_gone)

    run(test())


def test_a_slow_owner_gets_everything_and_hinders_nobody(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as slow, Reader(opened.client) as quick:
            await opened.write(60, payload=bytes(500_000))
            found = await slow.read()
            assert ids(await take(quick, 60)) == numbered(60)
            session = slow._session
            assert session is not None
            held = sum(len(stored.data) for stored in session.items)
            assert held <= module.PULLS * max(module.PULL_BYTES, 2 << 20)
            found += await take(slow, 60 - len(found))
            assert ids(found) == numbered(60)

    run(test())


def test_a_message_larger_than_a_pull_may_bring(server: NatsServer, open_log: Open, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pull_bytes", lambda max_payload: 1000)

    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            for number, size in enumerate((10, 100_000, 100_000, 10)):
                await opened.write(1, begin=number, payload=bytes(size))
            assert ids(await take(reader, 4)) == numbered(4)
            await opened.write(200, begin=4, payload=bytes(100))
            await opened.write(1, begin=204, payload=bytes(100_000))
            assert ids(await take(reader, 201)) == numbered(201, 4)
            assert reader.connected

    run(test())


# ---------------------------------------------------------------- begin anew


async def cursor_after(opened: Any, count: int) -> Cursor:
    async with Reader(opened.client) as reader:
        await opened.write(count)
        await take(reader, count)
        return reader.cursor


def test_floor_messages_that_were_never_read_are_gone(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            cursor = await cursor_after(opened, 10)
            await opened.write(10, begin=10)
            await ask(opened.client, f"STREAM.PURGE.{STREAM}", {"seq": 11})
            async with Reader(opened.client, start=cursor) as reader:  # everything up to the cursor is gone, and no more than that
                assert ids(await take(reader, 10)) == numbered(10, 10)
            await ask(opened.client, f"STREAM.PURGE.{STREAM}", {"seq": 13})
            async with Reader(opened.client, start=cursor) as reader:
                with pytest.raises(Rebuild) as raised:
                    await reader.read()
                assert raised.value.reason == "floor"
            async with Reader(opened.client) as reader:  # anew: what there is
                assert ids(await take(reader, 8)) == numbered(8, 12)

    run(test())


def test_floor_a_purge_ahead_of_a_reader_that_runs(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            await opened.write(3000)
            found = await reader.read()
            await ask(opened.client, f"STREAM.PURGE.{STREAM}", {"seq": 2900})
            with pytest.raises(Rebuild) as raised:
                await take(reader, 3000 - len(found))
            assert raised.value.reason == "floor"

    run(test())


def test_single_messages_that_were_removed_are_no_gap(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await opened.write(10)
            for sequence in (4, 5, 10):
                await ask(opened.client, f"STREAM.MSG.DELETE.{STREAM}", {"seq": sequence})
            async with Reader(opened.client) as reader:
                assert [stored.sequence for stored in await take(reader, 7)] == [1, 2, 3, 6, 7, 8, 9]
                await no_more_comes(reader)

    run(test())


@pytest.mark.parametrize("is_running", [True, False], ids=["while reading", "at the start"])
def test_recreated_a_stream_of_the_same_name(server: NatsServer, open_log: Open, run: Run, is_running: bool) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            cursor = await cursor_after(opened, 5)
            async with Reader(opened.client, start=cursor) as reader:
                if is_running:
                    await no_more_comes(reader)
                server.stop()
                shutil.rmtree(f"{server.directory}/store")
                server.start()
                async with open_log(server.url) as again:
                    await again.write(7)
                with pytest.raises(Rebuild) as raised:
                    await reader.read()
                assert raised.value.reason == "recreated"

    run(test())


def test_recreated_without_a_restart_of_the_server(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, Reader(opened.client) as reader:
            await opened.write(5)
            await take(reader, 5)
            await ask(opened.client, f"STREAM.DELETE.{STREAM}")
            await nothing_comes(reader)
            async with open_log(server.url) as again:
                await again.write(5)
            with pytest.raises(Rebuild) as raised:
                await reader.read()
            assert raised.value.reason == "recreated"

    run(test())


def test_a_stream_that_is_missing_is_made_where_the_owner_says_how(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            cursor = await cursor_after(opened, 5)
            async with Reader(opened.client, start=cursor, on_missing=lambda: ensure_stream(opened.client, max_bytes=1 << 24)) as reader:
                await no_more_comes(reader)
                await ask(opened.client, f"STREAM.DELETE.{STREAM}")
                with pytest.raises(Rebuild) as raised:
                    await reader.read()
                assert raised.value.reason == "recreated"

    run(test())


@pytest.mark.parametrize(("written_anew", "reason"), [(0, "shorter"), (3, "changed"), (9, "changed")])
def test_a_power_cut_that_took_the_end_of_the_stream(server: NatsServer, open_log: Open, run: Run, written_anew: int, reason: str) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await opened.write(5)
            server.stop()
            shutil.copytree(f"{server.directory}/store", f"{server.directory}/then")
            server.start()
            async with Reader(opened.client) as reader:
                async with open_log(server.url) as more:
                    await more.write(3, begin=5)
                assert ids(await take(reader, 8)) == numbered(8)
                cursor = reader.cursor
                server.kill()
                shutil.rmtree(f"{server.directory}/store")
                shutil.move(f"{server.directory}/then", f"{server.directory}/store")
                server.start()
                async with open_log(server.url) as more:
                    await more.write(written_anew, begin=100)
                with pytest.raises(Rebuild) as raised:
                    await reader.read()
                assert raised.value.reason == reason
            async with Reader(opened.client, start=cursor) as reader:
                with pytest.raises(Rebuild) as raised:
                    await reader.read()
                assert raised.value.reason == reason

    run(test())
