"""The stream on a real server: made as promised, used as it is, refused where it cannot keep what is promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cellos.errors import LogFull, NoStream
from cellos.eventlog.api import ask
from cellos.eventlog.connect import LogClient, Settings, connect
from cellos.eventlog.log import EventLog
from cellos.eventlog.stream import StreamInfo, ensure_stream, stream_config, stream_info
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]


@pytest.fixture
def with_client(server: NatsServer, run: Run) -> Callable[[Callable[[LogClient], Any]], None]:
    """Runs a test with a connection."""

    def go(test: Callable[[LogClient], Any]) -> None:
        async def connected() -> None:
            client = await connect(Settings(url=server.url), name="test")
            await test(client)
            await client.close()

        run(connected())

    return go


async def config_of(client: LogClient) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await ask(client, "STREAM.INFO.CELLOS_EVENTS"))["config"]
    return found


def test_it_is_made_as_promised_and_found_again(with_client: Any) -> None:
    async def test(client: LogClient) -> None:
        with pytest.raises(NoStream):
            await stream_info(client)
        made = await ensure_stream(client, max_bytes=1 << 24)
        assert (made.first_seq, made.last_seq, made.messages, made.differences) == (1, 0, 0, ())
        config = await config_of(client)
        assert {name: config[name] for name in stream_config()} == stream_config(max_bytes=1 << 24)
        assert config["max_age"] == 90 * 24 * 3600 * 10**9
        assert await ensure_stream(client, max_bytes=1 << 24) == made == await stream_info(client)

    with_client(test)


def test_an_empty_stream_begins_after_its_end(with_client: Any) -> None:
    async def test(client: LogClient) -> None:
        await ensure_stream(client, max_bytes=1 << 24)
        for number in range(3):
            await EventLog(client).publish("cellos.events.x", b"", message_id=str(number))
        await ask(client, "STREAM.PURGE.CELLOS_EVENTS")
        info = await stream_info(client)
        assert (info.first_seq, info.last_seq, info.messages) == (4, 3, 0)

    with_client(test)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"allow_atomic": False}, "allow_atomic is unset, not true"),
        ({"allow_direct": False}, "allow_direct is false, not true"),
        ({"storage": "memory"}, 'storage is "memory", not "file"'),
        ({"retention": "interest"}, 'retention is "interest", not "limits"'),
        ({"subjects": ["cellos.events.*"]}, 'subjects is \\["cellos.events.\\*"\\], not'),
        ({"max_msgs_per_subject": 5}, "max_msgs_per_subject is 5, not -1"),
        ({"no_ack": True, "allow_atomic": False}, "no_ack is true, not false"),
    ],
)
def test_a_stream_that_cannot_keep_what_is_promised_is_refused_and_left_alone(with_client: Any, other: dict[str, Any], said: str) -> None:
    async def test(client: LogClient) -> None:
        await ask(client, "STREAM.CREATE.CELLOS_EVENTS", stream_config(max_bytes=1 << 24) | other)
        before = await config_of(client)
        with pytest.raises(NoStream, match=f"cannot be used: .*{said}"):
            await ensure_stream(client)
        assert await config_of(client) == before

    with_client(test)


def test_other_differences_are_reported_and_nothing_is_changed(with_client: Any) -> None:
    async def test(client: LogClient) -> None:
        other = {"discard": "old", "max_age": 10**12, "subjects": ["cellos.>"], "max_bytes": -1}
        await ask(client, "STREAM.CREATE.CELLOS_EVENTS", stream_config() | other)
        before = await config_of(client)
        info = await ensure_stream(client)
        assert isinstance(info, StreamInfo)
        assert sorted(line.split()[0] for line in info.differences) == ["discard", "max_age", "max_bytes"]
        assert await config_of(client) == before

    with_client(test)


def test_a_stream_of_the_reference_is_refused_with_all_it_lacks(with_client: Any) -> None:
    async def test(client: LogClient) -> None:
        reference = {
            "name": "CELLOS_EVENTS",
            "subjects": ["cellos.events.>"],
            "retention": "limits",
            "storage": "file",
            "max_age": 7_776_000 * 10**9,
        }
        await ask(client, "STREAM.CREATE.CELLOS_EVENTS", reference)
        with pytest.raises(NoStream, match=r"allow_atomic .*allow_direct .*nats stream edit CELLOS_EVENTS"):
            await ensure_stream(client)

    with_client(test)


def test_no_room_for_the_stream_is_an_error_of_its_own(make_server: Callable[..., NatsServer], run: Run, tmp_path: Any) -> None:
    server = make_server(f'jetstream {{ store_dir: "{tmp_path}/small", max_file_store: 1MB }}', jetstream=False)

    async def test() -> None:
        client = await connect(Settings(url=server.url), name="test")
        with pytest.raises(LogFull):
            await ensure_stream(client, max_bytes=1 << 24)
        await client.close()

    run(test())
