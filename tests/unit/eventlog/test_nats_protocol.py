from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ProtocolError
from cellos.eventlog import nats_protocol as protocol
from cellos.eventlog.nats_protocol import Info, Message, Ok, Parser, Ping, Pong, ServerError, ServerInfo

TOKENS = st.text(alphabet="abcXYZ019._-$é", min_size=1, max_size=12)
CHUNKS = st.lists(st.integers(1, 7), max_size=200)


def fed(data: bytes, sizes: list[int]) -> list[protocol.Event]:
    """The events of `data`, fed in pieces of these sizes and then the rest."""
    parser = Parser()
    events: list[protocol.Event] = []
    for size in sizes:
        events += parser.feed(data[:size])
        data = data[size:]
    events += parser.feed(data)
    assert parser.pending == 0
    return events


@st.composite
def said(draw: st.DrawFn) -> tuple[bytes, protocol.Event]:
    """Something that a server says, and what it means."""
    kind = draw(st.sampled_from(["ping", "pong", "ok", "err", "info", "msg", "hmsg"]))
    match kind:
        case "ping":
            return draw(st.sampled_from([b"PING\r\n", b"ping\r\n", b"PING  \r\n"])), Ping()
        case "pong":
            return b"PONG\r\n", Pong()
        case "ok":
            return b"+OK\r\n", Ok()
        case "err":
            text = draw(TOKENS)
            return f"-ERR '{text}'\r\n".encode(), ServerError(text)
        case "info":
            most = draw(st.integers(0, 1 << 40))
            members = {"server_id": "x", "max_payload": most, "headers": True, "jetstream": True, "connect_urls": ["a:1"]}
            return b"INFO " + json.dumps(members).encode() + b" \r\n", Info(ServerInfo(max_payload=most, headers=True, jetstream=True))
    subject, sid, payload = draw(TOKENS), draw(TOKENS), draw(st.binary(max_size=60))
    reply = draw(st.none() | TOKENS)
    names = " ".join([subject, sid, *([reply] if reply else [])])
    if kind == "msg":
        line = f"MSG {names} {len(payload)}\r\n".encode()
        return line + payload + b"\r\n", Message(subject=subject, sid=sid, reply=reply, headers=b"", payload=payload)
    headers = draw(st.sampled_from([b"NATS/1.0 503\r\n\r\n", b"NATS/1.0\r\nA: b\r\n\r\n", b""]))
    line = f"HMSG {names} {len(headers)} {len(headers) + len(payload)}\r\n".encode()
    message = Message(subject=subject, sid=sid, reply=reply, headers=headers, payload=payload)
    return line + headers + payload + b"\r\n", message


@given(st.lists(said(), max_size=8), CHUNKS)
def test_what_is_said_is_understood_in_pieces_of_any_size(parts: list[tuple[bytes, protocol.Event]], sizes: list[int]) -> None:
    data = b"".join(text for text, _ in parts)
    assert fed(data, sizes) == [event for _, event in parts]


@given(st.binary(max_size=300), CHUNKS)
def test_any_bytes_are_events_or_a_protocol_error(data: bytes, sizes: list[int]) -> None:
    parser = Parser()
    try:
        for size in sizes:
            parser.feed(data[:size])
            data = data[size:]
        parser.feed(data)
    except ProtocolError:
        pass


@given(st.lists(st.sampled_from([b"MSG a 1 ", b"HMSG a 1 ", b"5", b" ", b"3 8", b"\r\n", b"hello", b"PING", b"INFO {", b"}"]), max_size=12))
def test_broken_messages_are_events_or_a_protocol_error(parts: list[bytes]) -> None:
    try:
        Parser().feed(b"".join(parts))
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\r\n",
        b"INFO {\r\n",
        b"INFO []\r\n",
        b'INFO {"max_payload":"x"}\r\n',
        b"MSG a 1\r\n",
        b"MSG a 1 -5\r\n",
        b"MSG a 1 x\r\n",
        b"MSG a 1 b c 5\r\n",
        b"MSG a 1 99999999999\r\n",
        b"HMSG a 1 9 5\r\n",
        b"HMSG a 1 5\r\n",
        b"MSG a 1 2\r\nabc\r\n",
        b"x" * (protocol.MAX_LINE_BYTES + 1),
    ],
)
def test_what_is_not_of_the_protocol_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Parser().feed(data)


def test_a_long_line_in_small_pieces_is_searched_once() -> None:
    urls = ["nats.example.org:4222"] * 20_000
    data = b"INFO " + json.dumps({"connect_urls": urls}).encode() + b"\r\n"
    parser = Parser()
    events = [event for begin in range(0, len(data), 100) for event in parser.feed(data[begin : begin + 100])]
    assert events == [Info(ServerInfo())]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (b"NATS/1.0 503\r\n\r\n", "503"),
        (b"NATS/1.0 503\r\nNats-Subject: a\r\n\r\n", "503"),
        (b"NATS/1.0 409 Consumer Deleted\r\n\r\n", "409 Consumer Deleted"),
        (b"NATS/1.0\r\nA: 503\r\n\r\n", ""),
        (b"", ""),
        (b"HTTP/1.0 503\r\n", ""),
    ],
)
def test_the_status_of_headers(headers: bytes, expected: str) -> None:
    assert protocol.status(headers) == expected


@given(TOKENS, TOKENS, TOKENS, st.binary(max_size=100))
def test_what_is_published_counts_its_bytes(subject: str, reply: str, message_id: str, payload: bytes) -> None:
    headers = protocol.header_block({"Nats-Msg-Id": message_id})
    line, _, rest = protocol.publish(subject, reply, headers, payload).partition(b"\r\n")
    verb, said_subject, said_reply, header_size, size = line.decode().split(" ")
    assert (verb, said_subject, said_reply) == ("HPUB", subject, reply)
    assert rest[: int(header_size)] == headers == f"NATS/1.0\r\nNats-Msg-Id: {message_id}\r\n\r\n".encode()
    assert rest[int(header_size) :] == payload + b"\r\n"
    assert int(size) == len(headers) + len(payload)
