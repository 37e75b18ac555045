from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.eventlog.stored import Stored
from cellos.eventlog.wire import MAX_LINE_BYTES, Control, Wire, WireError

HEADERS = b"NATS/1.0\r\nNats-Msg-Id: e1\r\n\r\n"


def delivered(number: int, data: bytes = b"{}", headers: bytes = b"", *, pending: int = 0, style: str = "old") -> bytes:
    """A message of a consumer, as servers write it."""
    reply = {
        "old": f"$JS.ACK.CELLOS_EVENTS.name.1.{number + 10}.{number}.1795272983181312837.{pending}",
        "new": f"$JS.ACK.domain.hash.CELLOS_EVENTS.name.1.{number + 10}.{number}.1795272983181312837.{pending}",
        "newest": f"$JS.ACK.domain.hash.CELLOS_EVENTS.name.1.{number + 10}.{number}.1795272983181312837.{pending}.token",
    }[style]
    if headers:
        line = f"HMSG cellos.events.x 1 {reply} {len(headers)} {len(headers) + len(data)}\r\n"
    else:
        line = f"MSG cellos.events.x 1 {reply} {len(data)}\r\n"
    return line.encode() + headers + data + b"\r\n"


def stored(number: int, data: bytes = b"{}", headers: bytes = b"") -> Stored:
    return Stored(number + 10, "cellos.events.x", headers, data, 1795272983181312837)


EVERYTHING = b"".join(
    [
        b'INFO {"version":"2.15.1"}\r\n',
        b"PING\r\n",
        delivered(1, b"MSG a 1 2\r\n{}\r\n", HEADERS, pending=2),
        delivered(2, b""),
        b"HMSG _INBOX.x.p.1 1 37 37\r\nNATS/1.0 100 Idle Heartbeat\r\nA: 1\r\n\r\n\r\n",
        b"MSG _INBOX.x.r.1 1 3\r\nabc\r\n",
        b"+OK\r\n",
        b"-ERR 'Stale Connection'\r\n",
        delivered(3, b"\xff\x00", HEADERS),
    ]
)
ITEMS = [
    Control(b"INFO", b'{"version":"2.15.1"}'),
    Control(b"PING"),
    stored(1, b"MSG a 1 2\r\n{}\r\n", HEADERS),
    stored(2, b""),
    Control(b"MSG", b"_INBOX.x.p.1", b"NATS/1.0 100 Idle Heartbeat\r\nA: 1\r\n\r\n"),
    Control(b"MSG", b"_INBOX.x.r.1", b"", b"abc"),
    Control(b"+OK"),
    Control(b"-ERR", b"'Stale Connection'"),
    stored(3, b"\xff\x00", HEADERS),
]


def test_everything_at_once() -> None:
    wire = Wire()
    assert wire.feed(EVERYTHING) == ITEMS
    assert (wire.delivered, wire.pending, wire.controls, wire.buffered) == (3, 0, 6, 0)


@given(st.lists(st.integers(0, len(EVERYTHING)), max_size=12))
def test_in_pieces_of_any_size(cuts: list[int]) -> None:
    wire = Wire()
    edges = [0, *sorted(cuts), len(EVERYTHING)]
    assert [item for begin, end in itertools.pairwise(edges) for item in wire.feed(EVERYTHING[begin:end])] == ITEMS


def test_byte_by_byte() -> None:
    wire = Wire()
    assert [item for byte in EVERYTHING for item in wire.feed(bytes([byte]))] == ITEMS


@pytest.mark.parametrize("style", ["old", "new", "newest"])
def test_the_place_in_the_stream_in_every_style(style: str) -> None:
    wire = Wire()
    assert wire.feed(delivered(1, pending=7, style=style)) == [stored(1)]
    assert wire.pending == 7


@pytest.mark.parametrize("numbers", [(2,), (1, 3), (1, 1), (1, 2, 1)])
def test_a_message_that_is_missing_or_comes_twice_ends_it(numbers: tuple[int, ...]) -> None:
    wire = Wire()
    for number in numbers[:-1]:
        wire.feed(delivered(number))
    with pytest.raises(WireError, match="was lost"):
        wire.feed(delivered(numbers[-1]))


@pytest.mark.parametrize(
    "line",
    [
        b"MSG a 1 x",
        b"MSG a 1 -5",
        b"MSG",
        b"HMSG a 1 10 5",
        b"MSG a 1 99999999999",
        b"MSG a 1 $JS.ACK.short 0",
        b"MSG a 1 $JS.ACK.s.c.1.x.1.1.1 0",
    ],
)
def test_lines_that_cannot_be_read_end_it(line: bytes) -> None:
    with pytest.raises(WireError):
        Wire().feed(line + b"\r\n\r\n")


def test_a_message_without_its_end_ends_it() -> None:
    with pytest.raises(WireError, match="without its end"):
        Wire().feed(b"MSG a 1 2\r\n{}xx")


def test_a_line_without_end_ends_it() -> None:
    wire = Wire()
    assert wire.feed(b"x" * MAX_LINE_BYTES) == []
    with pytest.raises(WireError, match="a line of more than"):
        wire.feed(b"x")


@given(st.binary(max_size=200))
def test_nonsense_gives_items_or_the_one_error(data: bytes) -> None:
    try:
        items = Wire().feed(data)
    except WireError:
        return
    assert all(isinstance(item, Control | Stored) for item in items)
