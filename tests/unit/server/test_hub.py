from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame as WireFrame
from websockets.streams import StreamReader

from cellos.server import hub as hub_module
from cellos.server.hub import EXHAUSTED, MAX_WAITING_BYTES, SLOW, CloseReason, Frame, Hub, encode_frame


class Client:
    """An outlet that remembers."""

    def __init__(self, waiting: int = 0) -> None:
        self.got: list[int] = []
        self.said: list[bytes] = []
        self.wires = 0
        self.ended: CloseReason | None = None
        self.waiting = waiting

    def write(self, frames: Sequence[Frame], wire: bytes) -> None:
        assert wire == b"".join(frame.wire for frame in frames)
        self.wires += 1
        self.got += [frame.sequence for frame in frames]

    def say(self, text: bytes) -> None:
        self.said.append(text)

    def close(self, why: CloseReason) -> None:
        self.ended = why

    @property
    def closed(self) -> bool:
        return self.ended is not None

    async def drained(self) -> None:
        return


def in_loop(test: Callable[[Hub], Awaitable[None]]) -> None:
    async def go() -> None:
        hub = Hub()
        hub.clients = 1
        await test(hub)
        hub.flush()

    asyncio.run(go())


def push(hub: Hub, *sequences: int, subject: str = "cellos.events.x") -> None:
    for sequence in sequences:
        assert hub.push(sequence, subject, b'{"n":%d}' % sequence)


def parsed(wire: bytes) -> WireFrame:
    reader = StreamReader()
    reader.feed_data(wire)
    parser = WireFrame.parse(reader.read_exact, mask=False)
    while True:
        try:
            next(parser)
        except StopIteration as done:
            found: WireFrame = done.value
            return found


@pytest.mark.parametrize("length", [0, 1, 80, 125, 126, 200, 65_000, 65_535, 65_536, 70_000, 1_100_000])
def test_a_frame_is_one_text_message(length: int) -> None:
    payload = json.dumps({"p": "é" + "x" * length}, ensure_ascii=False).encode()
    frame = encode_frame(7, "s", payload)
    assert frame is not None
    wire = parsed(frame.wire)
    assert (wire.opcode, wire.fin, bytes(wire.data)) == (1, True, frame.text)
    assert frame.text == b'{"seq":7,"event":%s}' % payload


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"1", b"[]", b'"x"', b'{"a":"\xff"}', b'{"a":NaN}', b"{} {}", b"\xef\xbb\xbf{}", b"[" * 5000]
)
def test_what_is_no_event(payload: bytes) -> None:
    assert encode_frame(1, "s", payload) is None


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text()))
def test_bytes_are_kept(event: dict[str, object]) -> None:
    for payload in (json.dumps(event).encode(), json.dumps(event, indent=2, sort_keys=True).encode()):
        frame = encode_frame(1, "s", payload)
        assert frame is not None
        assert payload in frame.wire
        assert json.loads(frame.text) == {"seq": 1, "event": event}


def test_everybody_gets_what_comes_in_one_write() -> None:
    async def test(hub: Hub) -> None:
        clients = [Client() for _ in range(3)]
        for client in clients:
            hub.join(client, "cellos.events.>", None)
        push(hub, 1, 2, 3)
        await asyncio.sleep(0.01)
        assert [(client.got, client.wires) for client in clients] == [([1, 2, 3], 1)] * 3
        assert hub.delivered == 9

    in_loop(test)


def test_filters() -> None:
    async def test(hub: Hub) -> None:
        everything, some, none = Client(), Client(), Client()
        hub.join(everything, "cellos.events.>", None)
        hub.join(some, "cellos.events.a.*", None)
        hub.join(none, "cellos.events.b", None)
        push(hub, 1, 3)
        push(hub, 4, 9, subject="cellos.events.a.x")
        hub.flush()
        assert (everything.got, some.got, none.got, none.wires) == ([1, 3, 4, 9], [4, 9], [], 0)

    in_loop(test)


@given(st.lists(st.integers(1, 3), max_size=30), st.integers(0, 40), st.integers(0, 30), st.integers(2, 12))
def test_joining_from_anywhere_gives_each_event_once(gaps: list[int], position: int, at: int, kept: int) -> None:
    """Whatever is remembered, and whether the client read behind or ahead of the hub."""
    sequences = [sum(gaps[: end + 1]) for end in range(len(gaps))]
    client = Client()

    async def test(hub: Hub) -> None:
        push(hub, *sequences[:at])
        member = hub.join(client, "cellos.events.>", position)
        if member is None:
            assert position < (sequences[:at] or [0])[-1]
            assert not hub.remembers(position)
            client.got = [-1]
            return
        push(hub, *sequences[at:])
        hub.flush()

    before = hub_module.KEPT_FRAMES
    hub_module.KEPT_FRAMES = kept
    try:
        in_loop(test)
    finally:
        hub_module.KEPT_FRAMES = before
    assert client.got in ([-1], [each for each in sequences if each > position])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "KEPT_BYTES", 1000)

    async def test(hub: Hub) -> None:
        push(hub, *range(1, 200))
        assert hub._recent_bytes <= 1000
        assert hub._recent_bytes == sum(len(frame.wire) for frame in hub._recent)
        assert hub.remembers(199)
        assert not hub.remembers(1)
        hub.clients = 0
        push(hub, 200)
        assert (len(hub._recent), hub._recent_bytes, hub.remembers(200), hub.remembers(199)) == (0, 0, True, False)

    in_loop(test)


def test_who_is_slow_is_closed_alone() -> None:
    async def test(hub: Hub) -> None:
        slow, quick = Client(waiting=MAX_WAITING_BYTES), Client()
        hub.join(slow, "cellos.events.>", None)
        hub.join(quick, "cellos.events.>", None)
        push(hub, 1)
        hub.flush()
        push(hub, 2)
        hub.flush()
        assert (slow.ended, slow.got, hub.slow) == (SLOW, [], 1)
        assert (quick.ended, quick.got) == (None, [1, 2])

    in_loop(test)


def test_one_large_message_goes_to_who_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_WAITING_BYTES", 10)

    async def test(hub: Hub) -> None:
        client = Client()
        hub.join(client, "cellos.events.>", None)
        push(hub, 1)
        hub.flush()
        assert (client.got, client.ended) == ([1], None)

    in_loop(test)


def test_the_end_of_a_log_is_told_to_all() -> None:
    async def test(hub: Hub) -> None:
        client = Client()
        hub.join(client, "cellos.events.>", None)
        push(hub, 1)
        hub.flush()
        hub.start_at(0)
        hub.close_all(EXHAUSTED, text=b"bye")
        push(hub, 1)
        hub.flush()
        assert (client.got, client.said, client.ended) == ([1], [b"bye"], EXHAUSTED)
        assert not hub._groups

    in_loop(test)
