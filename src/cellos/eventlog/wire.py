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
        position = 0
        self._need = 0
        try:
            while self._need == 0:
                position = self._item(data, position, items)
        except (ValueError, IndexError) as error:
            raise WireError(f"a message line that cannot be read: {data[position : position + 80]!r}") from error
        self._have = len(data) - position
        if self._have:
            self._parts = [data[position:]]
        return items

    def _item(self, data: bytes, begin: int, items: list[Stored | Control]) -> int:
        """Append the item at `begin`, and say where the next one begins; set `_need` where it is not whole."""
        end = data.find(_CRLF, begin)
        if end < 0:
            if len(data) - begin > MAX_LINE_BYTES:
                raise WireError(f"a line of more than {MAX_LINE_BYTES} bytes")
            self._need = len(data) - begin + 1
            return begin
        line = data[begin:end]
        if line.startswith(b"HMSG "):
            fields = line.split()
            header_size, size = int(fields[-2]), int(fields[-1])
            reply = fields[3] if len(fields) == 6 else b""
        elif line.startswith(b"MSG "):
            fields = line.split()
            header_size, size = 0, int(fields[-1])
            reply = fields[3] if len(fields) == 5 else b""
        else:
            verb, _, text = line.partition(b" ")
            self.controls += 1
            items.append(Control(verb.upper(), text))
            return end + 2
        body = end + 2
        after = body + size
        if after + 2 > len(data):
            if not 0 <= header_size <= size <= MAX_MESSAGE_BYTES:
                raise WireError(f"a message line that cannot be read: {line[:80]!r}")
            self._need = after + 2 - begin
            return begin
        content = body + header_size
        if reply.startswith(_ACK):
            tokens = reply.split(b".")
            at = 5 if len(tokens) == 9 else 7
            number = int(tokens[at + 1])
            if number != self.delivered + 1:
                raise WireError(f"message {self.delivered + 1} of the consumer was lost: {number} came")
            self.delivered = number
            self.pending = int(tokens[at + 3])
            subject = fields[1].decode("utf-8", "replace")
            items.append(Stored(int(tokens[at]), subject, data[body:content], data[content:after], int(tokens[at + 2])))
        else:
            self.controls += 1
            items.append(Control(b"MSG", fields[1], data[body:content], data[content:after]))
        return after + 2
