"""The NATS client protocol without I/O: bytes in, what the server said out; and the bytes of what a client says.

Only what a publisher needs is written; everything a server may say is read. Source: https://docs.nats.io/reference/reference-protocols
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from cellos.errors import ProtocolError

MAX_LINE_BYTES = 1 << 20
"""A server that lists the addresses of a large cluster in INFO writes long lines; nobody writes one like this."""
MAX_MESSAGE_BYTES = 64 << 20
"""What a server can be configured to pass on at most."""
PING = b"PING\r\n"
PONG = b"PONG\r\n"
_CRLF = b"\r\n"
_HEADER_VERSION = "NATS/1.0"


class ServerInfo(Struct, frozen=True, kw_only=True):
    """The members of INFO that matter to a publisher."""

    max_payload: int = 1_048_576
    headers: bool = False
    jetstream: bool = False
    tls_required: bool = False
    tls_available: bool = False
    auth_required: bool = False
    server_name: str = ""
    version: str = ""


class Info(Struct, frozen=True):
    """INFO: at the begin of a connection, and whenever something of it changed."""

    info: ServerInfo


class Message(Struct, frozen=True, kw_only=True):
    """MSG and HMSG. `headers` are the raw bytes of the header block, empty where there is none."""

    subject: str
    sid: str
    reply: str | None
    headers: bytes
    payload: bytes


class Ping(Struct, frozen=True):
    """To be answered with PONG."""


class Pong(Struct, frozen=True):
    """The answer to our PING: everything that we sent before was read."""


class Ok(Struct, frozen=True):
    """+OK, which only a verbose connection gets."""


class ServerError(Struct, frozen=True):
    """-ERR. Most are followed by the end of the connection."""

    text: str


Event = Info | Message | Ping | Pong | Ok | ServerError


class Parser:
    """Turns the bytes of a connection, in pieces of any size, into events. After a ProtocolError it takes no more."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._due: _Due | None = None
        self._searched = 0

    @property
    def pending(self) -> int:
        """Bytes that are not yet part of an event."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Event]:
        """Every event that is whole now. Raises ProtocolError."""
        self._buffer += data
        return list(self._events())

    def _events(self) -> Iterator[Event]:
        while True:
            event = self._payload(self._due) if self._due is not None else self._line()
            if event is not None:
                yield event
            elif self._due is None or len(self._buffer) < self._due.size + 2:
                return

    def _line(self) -> Event | None:
        """The next control line; one that announces a message gives no event yet."""
        end = self._buffer.find(_CRLF, self._searched)
        if end < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes")
            self._searched = max(0, len(self._buffer) - 1)  # a CR may be its last byte
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._searched = 0
        verb, _, rest = line.strip().partition(b" ") if b" " in line.strip() else line.strip().partition(b"\t")
        match verb.upper():
            case b"MSG":
                self._due = _due(rest, with_headers=False)
                return None
            case b"HMSG":
                self._due = _due(rest, with_headers=True)
                return None
            case b"PING":
                return Ping()
            case b"PONG":
                return Pong()
            case b"+OK":
                return Ok()
            case b"-ERR":
                return ServerError(rest.strip().strip(b"'").decode("utf-8", "replace"))
            case b"INFO":
                return Info(_info(rest))
        raise ProtocolError(f"unexpected {line[:40]!r}; is this a NATS server?")

    def _payload(self, due: _Due) -> Event | None:
        if len(self._buffer) < due.size + 2:
            return None
        if self._buffer[due.size : due.size + 2] != _CRLF:
            raise ProtocolError("a message without its end")
        body = bytes(self._buffer[: due.size])
        del self._buffer[: due.size + 2]
        self._due = None
        return Message(subject=due.subject, sid=due.sid, reply=due.reply, headers=body[: due.header_size], payload=body[due.header_size :])


class _Due(Struct, frozen=True, kw_only=True):
    """A message whose line was read and whose bytes are to come."""

    subject: str
    sid: str
    reply: str | None
    header_size: int
    size: int


def _due(rest: bytes, *, with_headers: bool) -> _Due:
    """MSG <subject> <sid> [reply-to] <#bytes>; HMSG has <#header bytes> before <#total bytes>."""
    fields = rest.decode("utf-8", "replace").split()
    numbers = 2 if with_headers else 1
    sizes = [int(field) for field in fields[-numbers:] if field.isascii() and field.isdigit() and len(field) < 12]
    names = fields[:-numbers]
    if len(sizes) != numbers or len(names) not in {2, 3} or sizes[-1] > MAX_MESSAGE_BYTES or sizes[0] > sizes[-1]:
        raise ProtocolError(f"a message line that cannot be read: {rest[:80]!r}")
    return _Due(
        subject=names[0],
        sid=names[1],
        reply=names[2] if len(names) == 3 else None,
        header_size=sizes[0] if with_headers else 0,
        size=sizes[-1],
    )


def _info(rest: bytes) -> ServerInfo:
    try:
        return msgspec.json.decode(rest, type=ServerInfo)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ProtocolError(f"INFO that cannot be read: {error}") from error


def status(headers: bytes) -> str:
    """Status and description of a header block (`503`, `409 …`); empty where it has none."""
    first, _, _ = headers.partition(_CRLF)
    text = first.decode("utf-8", "replace")
    return text.removeprefix(_HEADER_VERSION).strip() if text.startswith(_HEADER_VERSION) else ""


def connect(options: Mapping[str, Any]) -> bytes:
    """CONNECT."""
    return b"CONNECT " + msgspec.json.encode(options) + _CRLF


def subscribe(subject: str, sid: str) -> bytes:
    """SUB."""
    return f"SUB {subject} {sid}\r\n".encode()


def header_block(headers: Mapping[str, str]) -> bytes:
    """The bytes of a header block. Names and values hold no line ends: that is for the caller to make sure of."""
    lines = [_HEADER_VERSION, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


def publish(subject: str, reply: str, headers: bytes, payload: bytes) -> bytes:
    """HPUB."""
    line = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(payload)}\r\n".encode()
    return b"".join((line, headers, payload, _CRLF))
