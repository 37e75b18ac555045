"""What a NATS server sends to a reader, cut into messages: the hot path of every replay. No I/O.

A message of a consumer becomes a Stored; where it stands in the stream is in its reply subject,
`$JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>` (newer servers put domain and account in front, and
may append a token). Everything else becomes a Control. `nats_protocol.Parser` reads the same protocol for publishers, who get few messages.
Source: https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

from msgspec import Struct

from cellos.errors import EventLogError
from cellos.eventlog.stored import Stored

MAX_LINE_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 96 << 20
"""A server can be configured to take messages of 64 MiB."""
_ACK = b"$JS.ACK."
_CRLF = b"\r\n"


class Control(Struct, frozen=True):
    """A protocol line (`verb` in capitals, `text` its rest), or with verb MSG an answer or a status for us."""

    verb: bytes
    text: bytes = b""
    """The line; of MSG, the subject."""
    headers: bytes = b""
    data: bytes = b""

    @property
    def has_no_responders(self) -> bool:
        """Whether it says that nobody listens on the subject of the request."""
        return not self.data and self.headers.startswith(b"NATS/1.0 503")


class WireError(EventLogError):
    """What came is not of the protocol, or something is missing in it: the connection is of no use any more."""


class Wire:
    """Turns the bytes of a connection, in pieces of any size, into messages. After a WireError it takes no more."""

    def __init__(self) -> None:
        self.pending = 0
        """Messages that the server had behind the last one, when it sent that one."""
        self.delivered = 0
        """How many came from the consumer; they are numbered from 1 without a gap."""
        self.controls = 0
        """How many items of all so far were Controls."""
        self._parts: list[bytes] = []
        self._have = 0
        self._need = 0

    @property
    def buffered(self) -> int:
        """Bytes that are not yet part of an item."""
        return self._have

    def feed(self, data: bytes) -> list[Stored | Control]:
        """Every item that is whole now, in order. Raises WireError."""
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._parts)
            self._parts = []
        items: list[Stored | Control] = []
        begin = 0
        self._need = 0
        try:
            begin = self._cut(data, items)
        except (ValueError, IndexError) as error:  # no number where one belongs
            raise WireError("a message line that cannot be read") from error
        self._have = len(data) - begin
        if self._have:
            self._parts = [data[begin:]]
        return items

    def _cut(self, data: bytes, items: list[Stored | Control]) -> int:
        """Append every whole item, and say where the one that is not whole begins; `_need` is its size where that is known.

        One loop without calls of ours: it runs for every message of a replay.
        """
        begin, available, delivered = 0, len(data), self.delivered
        while True:
            end = data.find(_CRLF, begin)
            if end < 0:
                if available - begin > MAX_LINE_BYTES:
                    raise WireError(f"a line of more than {MAX_LINE_BYTES} bytes")
                self._need = available - begin + 1
                break
            fields = data[begin:end].split(b" ")
            verb = fields[0]
            if verb == b"HMSG":
                body = end + 2
                content, after = body + int(fields[-2]), body + int(fields[-1])
                reply = fields[3] if len(fields) == 6 else b""
            elif verb == b"MSG":
                body = content = end + 2
                after = body + int(fields[-1])
                reply = fields[3] if len(fields) == 5 else b""
            else:
                self.controls += 1
                items.append(Control(verb.upper(), data[begin + len(verb) + 1 : end]))
                begin = end + 2
                continue
            if not body <= content <= after <= body + MAX_MESSAGE_BYTES:
                raise WireError(f"a message line that cannot be read: {data[begin:end][:80]!r}")
            if after + 2 > available:
                self._need = after + 2 - begin
                break
            if data[after : after + 2] != _CRLF:
                raise WireError("a message without its end")
            if reply.startswith(_ACK):
                tokens = reply.split(b".")
                at = 5 if len(tokens) == 9 else 7
                delivered += 1
                if int(tokens[at + 1]) != delivered:
                    raise WireError(f"message {delivered} of the consumer was lost")
                subject = fields[1].decode("utf-8", "replace")
                items.append(Stored(int(tokens[at]), subject, data[body:content], data[content:after], int(tokens[at + 2])))
                self.pending = int(tokens[at + 3])
            else:
                self.controls += 1
                items.append(Control(b"MSG", fields[1], data[body:content], data[content:after]))
            begin = after + 2
        self.delivered = delivered
        return begin
