"""One reader feeds all WebSockets: an event becomes one text frame, whose bytes are the same for everybody who gets it.

A frame holds the event's own bytes. Frames that come in one turn of the loop go out in one write to each client. Every client has a bound
on what waits for it; one that is behind it is closed, and nobody else notices. The hub keeps the latest frames, as long as anybody listens,
so that a client that reads the past from the log can step over into the present without gap or repetition.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import msgspec

from cellos.server.filters import EVERYTHING, matcher

MAX_WAITING_BYTES = 4 << 20
"""What may wait for one client."""
KEPT_BYTES = 16 << 20
KEPT_FRAMES = 8192
FLUSH_SECONDS = 0.005
"""Least time between two writes to a client."""


class CloseReason(NamedTuple):
    """How the server ends a WebSocket."""

    code: int
    reason: str
    when: str


NO_LOG = CloseReason(1008, "no upstream broker configured", "there has been no connection to NATS yet")
SUBSCRIBE_FAILED = CloseReason(1008, "subscribe failed", "`subject` is no filter of events, or the log could not be read")
EXHAUSTED = CloseReason(4410, "retention-exhausted", "the log no longer has what follows `since`, or is another log; after a text frame")
SLOW = CloseReason(4408, "slow-client", f"more than {MAX_WAITING_BYTES >> 20} MiB waited for the client; resume from the last `seq`")
RESTART = CloseReason(1012, "", "the server ends")
DEAD = CloseReason(1011, "keepalive ping timeout", "a ping was not answered within 50 s")
TOO_BIG = CloseReason(1009, "", "the client sent a message of more than 64 KiB")
NOT_UTF8 = CloseReason(1007, "", "the client sent a text that is no UTF-8")
CLOSE_REASONS = (NO_LOG, SUBSCRIBE_FAILED, EXHAUSTED, SLOW, RESTART, DEAD, TOO_BIG, NOT_UTF8)


def close_table() -> str:
    """The table of the page."""
    rows = ["| code | reason | when |", "|---|---|---|"]
    rows += [f"| {each.code} | {f'`{each.reason}`' if each.reason else ''} | {each.when} |" for each in CLOSE_REASONS]
    return "\n".join(rows) + "\n"


class Frame(NamedTuple):
    """An event on its way out. `wire` is a whole, unmasked text frame (RFC 6455, 5.2)."""

    sequence: int
    subject: str
    wire: bytes

    @property
    def text(self) -> bytes:
        """The message in the frame."""
        return self.wire[_HEAD_LENGTHS.get(self.wire[1], 2) :]


_HEAD_LENGTHS = {126: 4, 127: 10}
_TEXT = 0x81  # the last and only fragment of a text message


def encode_frame(sequence: int, subject: str, payload: bytes) -> Frame | None:
    """The frame of an event; None where the payload is not a JSON object in UTF-8, which no client could read."""
    if not is_event(payload):
        return None
    return Frame(sequence, subject, text_frame(b'{"seq":%d,"event":%s}' % (sequence, payload)))


def is_event(payload: bytes) -> bool:
    """Whether bytes are one JSON object in UTF-8."""
    try:
        payload.decode()
        return isinstance(msgspec.json.decode(payload), dict)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return False


def text_frame(text: bytes) -> bytes:
    """A message as a frame."""
    length = len(text)
    if length < 126:
        head = bytes((_TEXT, length))
    elif length < 1 << 16:
        head = bytes((_TEXT, 126)) + length.to_bytes(2, "big")
    else:
        head = bytes((_TEXT, 127)) + length.to_bytes(8, "big")
    return head + text


class Outlet(Protocol):
    """The way to one client. Nothing here waits but `drained`."""

    def write(self, frames: Sequence[Frame], wire: bytes) -> None:
        """Send frames; `wire` is all of them, one after the other. A client that is gone is no error."""

    def say(self, text: bytes) -> None:
        """Send a message that is no event."""

    def close(self, why: CloseReason) -> None:
        """Send a Close frame behind what waits. Idempotent."""

    @property
    def waiting(self) -> int:
        """Bytes that wait."""

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""

    async def drained(self) -> None:
        """Until little waits, or the client is gone."""


class Member:
    """A client that is listening. It has had everything up to `position` that its filter selects."""

    __slots__ = ("filter", "outlet", "position")

    def __init__(self, outlet: Outlet, subject: str, position: int) -> None:
        self.outlet = outlet
        self.filter = subject
        self.position = position


class _Group:
    """Members with the same filter: frames are chosen and joined once for all of them."""

    __slots__ = ("matches", "members")

    def __init__(self, subject: str) -> None:
        self.matches: Callable[[str], bool] | None = None if subject == EVERYTHING else matcher(subject)
        self.members: set[Member] = set()

    def chosen(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        return frames if self.matches is None else [frame for frame in frames if self.matches(frame.subject)]


class Hub:
    """Belongs to one event loop. `push` every event of the log, in order."""

    def __init__(self) -> None:
        self.position = 0
        """Sequence of the last event that came by."""
        self.clients = 0
        """Members, and those that still read the past."""
        self.generation = 0
        """Changes when sequences no longer mean what they meant."""
        self.delivered = 0
        self.slow = 0
        self._floor = 0
        self._recent: deque[Frame] = deque()
        self._recent_bytes = 0
        self._pending: list[Frame] = []
        self._groups: dict[str, _Group] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_at = 0.0

    def start_at(self, position: int) -> None:
        """The log, perhaps another one, is read from after `position`. Forgets what went before."""
        self.generation += 1
        self.position = self._floor = position
        self._recent.clear()
        self._recent_bytes = 0
        self._pending.clear()

    def remembers(self, position: int) -> bool:
        """Whether a client that has everything up to `position` can go on from here."""
        return self._floor <= position <= self.position

    def push(self, sequence: int, subject: str, payload: bytes) -> bool:
        """Pass an event on. False where it is none that anybody could read: nobody gets it."""
        self.position = sequence
        if not self.clients:
            self._floor = sequence
            if self._recent:
                self._recent.clear()
                self._recent_bytes = 0
            return True
        frame = encode_frame(sequence, subject, payload)
        if frame is None:
            return False
        self._recent.append(frame)
        self._recent_bytes += len(frame.wire)
        while self._recent_bytes > KEPT_BYTES or len(self._recent) > KEPT_FRAMES:
            oldest = self._recent.popleft()
            self._recent_bytes -= len(oldest.wire)
            self._floor = oldest.sequence
        self._pending.append(frame)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            wait = self._flushed_at + FLUSH_SECONDS - loop.time()
            self._timer = loop.call_later(max(0.0, wait), self.flush)
        return True

    def flush(self) -> None:
        """Send now what came since the last time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flushed_at = asyncio.get_running_loop().time()
        frames, self._pending = self._pending, []
        if not frames:
            return
        for group in list(self._groups.values()):
            chosen = group.chosen(frames)
            if not chosen:
                continue
            wire = b"".join([frame.wire for frame in chosen])
            for member in list(group.members):
                if member.position >= chosen[0].sequence:  # it read ahead of us, in the log
                    own = [frame for frame in chosen if frame.sequence > member.position]
                    self._send(member, own, b"".join([frame.wire for frame in own]))
                else:
                    self._send(member, chosen, wire)

    def _send(self, member: Member, frames: Sequence[Frame], wire: bytes) -> None:
        if not frames:
            return
        waiting = member.outlet.waiting
        if waiting and waiting + len(wire) > MAX_WAITING_BYTES:  # one message alone may be larger than all that may wait
            self.slow += 1
            self.leave(member)
            member.outlet.close(SLOW)
            return
        member.outlet.write(frames, wire)
        self.delivered += len(frames)

    def join(self, outlet: Outlet, subject: str, position: int | None) -> Member | None:
        """Listen from after `position`, None: from now on. None where the hub does not remember that far back: read the log up to here."""
        self.flush()
        if position is None:
            position = self.position
        elif position < self._floor:
            return None
        member = Member(outlet, subject, position)
        group = self._groups.get(subject)
        if group is None:
            group = self._groups[subject] = _Group(subject)
        if position < self.position:
            missed = list(takewhile(lambda frame: frame.sequence > position, reversed(self._recent)))[::-1]
            chosen = group.chosen(missed)
            self._send(member, chosen, b"".join([frame.wire for frame in chosen]))
        group.members.add(member)
        return member

    def leave(self, member: Member) -> None:
        """Idempotent."""
        group = self._groups.get(member.filter)
        if group is not None:
            group.members.discard(member)
            if not group.members:
                del self._groups[member.filter]

    def close_all(self, why: CloseReason, *, text: bytes | None = None) -> None:
        """End every client, with a last message if there is one."""
        self._pending.clear()
        for group in list(self._groups.values()):
            for member in list(group.members):
                self.leave(member)
                if text is not None:
                    member.outlet.say(text)
                member.outlet.close(why)
