"""Output of cells on a real server: kept in order, up to a limit, and read to its end or as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cellos.eventlog import output as module
from cellos.eventlog.api import ask
from cellos.eventlog.output import Chunk, OutputWriter, ensure_output, read_output
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
Open = Callable[..., Any]


async def collect(client: Any, run_id: str = "r", **options: Any) -> list[Chunk]:
    return [chunk async for chunk in read_output(client, run_id, **options)]


def text(chunks: list[Chunk], stream: str = "stdout") -> bytes:
    """Of one of the two, each piece where it says that it belongs."""
    found = b""
    for chunk in chunks:
        if chunk.stream == stream and chunk.data:
            assert chunk.offset == len(found)
            found += chunk.data
    return found


def test_both_outputs_are_kept_in_order_and_have_an_end(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            writer = OutputWriter(opened.client, "r")  # makes the stream on the way
            for number in range(50):
                writer.add("stdout" if number % 2 else "stderr", b"%d\n" % number)
                if number % 7 == 0:
                    await writer.drained()
            other = OutputWriter(opened.client, "r2")
            other.add("stdout", b"another run")
            writer.end()
            writer.end()
            writer.add("stdout", b"too late")
            await writer.drained()
            await other.drained()
            found = await collect(opened.client)
            assert text(found) == b"".join(b"%d\n" % number for number in range(1, 50, 2))
            assert text(found, "stderr") == b"".join(b"%d\n" % number for number in range(0, 50, 2))
            assert [chunk.end for chunk in found] == [False] * (len(found) - 1) + [True]
            assert await collect(opened.client, after=found[2].sequence) == found[3:]
            assert await collect(opened.client, "unknown") == []

    run(test())


def test_what_waits_goes_together(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            writer = OutputWriter(opened.client, "r")
            for number in range(1000):
                writer.add("stdout", b"%03d\n" % number)
            writer.end()
            await writer.drained()
            assert len(await collect(opened.client)) == 2

    run(test())


def test_more_than_is_kept_is_dropped_and_said_so(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            writer = OutputWriter(opened.client, "r")
            for _ in range(9):
                writer.add("stdout", b"x" * 100_000)
                writer.add("stderr", b"y" * 100_000)
            writer.end()
            await writer.drained()
            found = await collect(opened.client)
            assert len(text(found)) + len(text(found, "stderr")) == module.MAX_RUN_BYTES
            assert [chunk.truncated for chunk in found].count(True) == 1
            assert found[-1].end

    run(test())


def test_a_follower_sees_it_as_it_comes(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened, open_log(server.url) as other:
            following = asyncio.create_task(collect(other.client, follow=True))
            writer = OutputWriter(opened.client, "r")
            for number in range(3):
                writer.add("stdout", b"%d" % number)
                await writer.drained()
            assert not following.done()
            writer.end()
            assert text(await following) == b"012"

    run(test())


def test_a_follower_of_a_run_whose_node_died_is_told_when_to_stop(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            writer = OutputWriter(opened.client, "r")
            writer.add("stdout", b"half")
            await writer.drained()
            assert text(await collect(opened.client, follow=True, ended=lambda: True)) == b"half"

    run(test())


def test_it_waits_for_the_server(server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            trouble = asyncio.Event()
            writer = OutputWriter(opened.client, "r", on_trouble=lambda _: trouble.set())
            writer.add("stdout", b"before ")
            await writer.drained()
            await asyncio.to_thread(server.stop)
            writer.add("stdout", b"while away, ")
            writer.add("stderr", b"!")
            await trouble.wait()
            await asyncio.to_thread(server.start)
            writer.add("stdout", b"after")
            writer.end()
            await writer.drained()
            found = await collect(opened.client)
            assert text(found) == b"before while away, after"
            assert text(found, "stderr") == b"!"

    run(test())


def test_an_answer_that_was_lost_makes_nothing_twice(server: NatsServer, open_log: Open, run: Run, line: Any) -> None:
    async def test() -> None:
        async with open_log(server.url) as direct, line(server.port) as cut, open_log(cut.url) as opened:
            await ensure_output(direct.client)
            lost = 0

            def lose(data: bytes) -> bytes | None:
                nonlocal lost
                if lost == 0 and b'"stream":"CELLOS_OUTPUT"' in data:
                    lost += 1
                    return None
                return data

            cut.answers = lose
            writer = OutputWriter(opened.client, "r")
            for number in range(4):
                writer.add("stdout" if number % 2 else "stderr", b"%d" % number)
            writer.end()
            await writer.drained()
            assert lost == 1
            found = await collect(direct.client)
            assert (text(found), text(found, "stderr"), len(found)) == (b"13", b"02", 5)

    run(test())


def test_where_there_is_little_room_the_stream_is_smaller(
    make_server: Callable[..., NatsServer], open_log: Open, run: Run, tmp_path: Path
) -> None:
    server = make_server(f'jetstream {{ max_file_store: 200MB, store_dir: "{tmp_path}" }}', jetstream=False)

    async def test() -> None:
        async with open_log(server.url) as opened:
            await ensure_output(opened.client)
            config = msgspec.json.decode(await ask(opened.client, f"STREAM.INFO.{module.STREAM}"))["config"]
            assert 64 << 20 <= config["max_bytes"] < 200 << 20

    run(test())


@pytest.mark.parametrize("headers", [{}, {"Cellos-Offset": "-1", "Cellos-Stream": "other"}])
def test_a_message_of_somebody_else_is_taken_for_output(headers: dict[str, str], server: NatsServer, open_log: Open, run: Run) -> None:
    async def test() -> None:
        async with open_log(server.url) as opened:
            await ensure_output(opened.client)
            await opened.client.jetstream().publish("cellos.output.r", b"x", headers=headers)
            assert await collect(opened.client) == [Chunk(sequence=1, data=b"x")]

    run(test())
