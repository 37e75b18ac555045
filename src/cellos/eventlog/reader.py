"""Reading the log from a place to its end, and on: replay and tail are one consumer, so nothing can fall between them.

What a Reader promises: every message once, in order, from the one after its start; no message is passed over without a word. It connects
again for ever. At the start and after every connection it makes sure that what it read is still the beginning of what is there; where it
is not, it raises Rebuild, and its owner begins anew:

    recreated   the stream is another one of the same name
    shorter     the stream ends before our place: a power cut took its end
    changed     another message is at our place: the end was lost, and its numbers given again
    floor       messages that we have not read are gone: too old, or purged

It needs no acknowledgements and leaves nothing behind: the consumer is removed, by the server too when it has heard nothing for a while.
Memory is bounded by what is asked for at once; a slow owner slows only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct

from cellos.errors import EventLogError, Rebuild
from cellos.eventlog.api import NO_MESSAGE, NO_STREAM, STREAM, read_reply
from cellos.eventlog.connect import CONNECT_SECONDS, LogClient, Settings, pause
from cellos.eventlog.link import Link, open_link
from cellos.eventlog.log import read_message
from cellos.eventlog.nats_url import Server
from cellos.eventlog.stored import Cursor, Stored
from cellos.eventlog.stream import StreamInfo, read_info
from cellos.eventlog.wire import Control

PULL_MESSAGES = 500
PULL_BYTES = 4 << 20
PULLS = 2
"""At once, so that the server never waits for us."""
HEARTBEAT_SECONDS = 1
SILENCE_SECONDS = 3.0 * HEARTBEAT_SECONDS
"""In a cluster the consumer may be on a server that dies while ours goes on: nobody tells us."""
EXPIRY_SECONDS = 30
INACTIVE_SECONDS = 60
BUSY_PER_SECOND = 200
"""Messages from which on a reader that is up to date rests between two batches: each costs it, and the server, the same however small."""
REST_SECONDS = 0.04
_WINDOW_SECONDS = 0.25
_NANO = 1_000_000_000
_ENDED_PULL = (b"408", b"404", b"409 Message Size Exceeds", b"409 Batch Completed", b"409 Exceeded Max")


class Reader:
    """An asynchronous iterator of Stored; `read` gives all that is there at once, which is what a replay wants.

    `caught_up` is set while everything that was there when it connected has been handed out and the owner has come back for more.
    `on_trouble` is told, once per reason, why there is no connection. `on_missing` is for making the stream where there is none (any more).
    `subjects` is a filter: only messages under it come, and `caught_up` means nothing then.
    """

    def __init__(
        self,
        client: LogClient,
        *,
        start: Cursor | None = None,
        name: str = "cellos-reader",
        on_trouble: Callable[[str], None] | None = None,
        on_missing: Callable[[], Awaitable[object]] | None = None,
        subjects: str | None = None,
    ) -> None:
        self.caught_up = asyncio.Event()
        self._settings: Settings = client.settings
        self._start = start
        self._name = name
        self._on_trouble = on_trouble
        self._on_missing = on_missing
        self._subjects = subjects
        self._told = ""
        self._created = start.stream_created if start else ""
        self._position = start.sequence if start else 0
        self._last: Stored | None = None
        self._target = 0
        self._session: _Session | None = None
        self._batch: list[Stored] = []
        """What iteration has yet to give, in reverse."""
        self._servers = 0

    @property
    def cursor(self) -> Cursor:
        """After the last message that `read` gave; of iteration, use the messages themselves."""
        digest = self._last.digest if self._last is not None else self._start.digest if self._start is not None else ""
        return Cursor(stream_created=self._created, sequence=self._position, digest=digest)

    @property
    def connected(self) -> bool:
        """Whether messages can come at this moment."""
        return self._session is not None and self._session.link.failure is None

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> Stored:
        if not self._batch:
            self._batch = (await self.read())[::-1]
        return self._batch.pop()

    async def read(self) -> list[Stored]:
        """The next messages, at least one. May be cancelled without loss (but then connects anew where it had not yet).

        Raises Rebuild, after which the reader is of no use any more.
        """
        attempt = 0
        while True:
            try:
                session = self._session or await self._connect(patience(attempt))
                attempt = 0
                if self._position >= self._target:
                    self.caught_up.set()
                if session.items:
                    return await self._take(session)
                await session.wait()
            except Rebuild:
                self.close()
                raise
            except (EventLogError, msgspec.MsgspecError) as error:  # the latter: not the answers of a NATS server
                self.close()
                self._tell(error.text if isinstance(error, EventLogError) else f"nats: {error}")
                if self._on_missing is not None and getattr(error, "number", 0) == NO_STREAM:
                    await self._make_stream(self._on_missing)
                attempt += 1
                await asyncio.sleep(pause(attempt))

    def close(self) -> None:
        """Idempotent; `read` would connect again."""
        session, self._session = self._session, None
        self.caught_up.clear()
        if session is not None:
            session.close()

    async def _make_stream(self, make: Callable[[], Awaitable[object]]) -> None:
        try:
            await make()
        except EventLogError as error:
            self._tell(error.text)

    async def _connect(self, seconds: float) -> _Session:
        servers = self._settings.servers
        server = servers[self._servers % len(servers)]
        self._servers += 1
        session = await _Session.open(self._settings, server, self._name, seconds)
        try:
            info = await session.info()
            await self._check(session, info)
            if self._start is None and self._last is None:
                self._position = info.first_seq - 1
            nothing_more = await session.consume(self._position + 1, self._subjects)
        except BaseException:
            session.close()
            raise
        self._created = info.created
        self._target = self._position if nothing_more else info.last_seq
        self._session = session
        self._told = ""
        return session

    async def _check(self, session: _Session, info: StreamInfo) -> None:
        """That the stream still begins with what was read. Raises Rebuild."""
        cursor = self.cursor
        if cursor.stream_created and info.created != cursor.stream_created:
            raise Rebuild(f"the stream {STREAM} was made anew at {info.created}", reason="recreated")
        if self._start is None and self._last is None:
            return
        if cursor.sequence > info.last_seq:
            raise Rebuild(f"the stream {STREAM} ends at {info.last_seq}, before {cursor.sequence}", reason="shorter")
        self._check_floor(info)
        if cursor.digest and cursor.sequence >= info.first_seq:
            found = await session.get(cursor.sequence)
            if found is None or found.digest != cursor.digest:
                raise Rebuild(f"the stream {STREAM} has another message at {cursor.sequence}", reason="changed")

    def _check_floor(self, info: StreamInfo) -> None:
        if self._position + 1 < info.first_seq:
            raise Rebuild(f"the stream {STREAM} begins at {info.first_seq}, after {self._position + 1}", reason="floor")

    async def _take(self, session: _Session) -> list[Stored]:
        items = session.items
        if items[-1].sequence - self._position != len(items) and (self._start is not None or self._last is not None):
            self._check_floor(await session.info())  # single messages may have been removed; that is for nobody to mourn
        items, session.items = session.items, []
        self._position, self._last = items[-1].sequence, items[-1]
        if session.link.wire.pending == 0:
            self._target = min(self._target, self._position)
        session.refill()
        session.rest_if_busy(len(items))
        return items

    def _tell(self, text: str) -> None:
        if self._on_trouble is not None and text != self._told:
            self._on_trouble(text)
        self._told = text


def patience(attempt: int) -> float:
    """Seconds to wait for an answer after `attempt` failures: while a cluster elects a leader nobody answers, and soon somebody will."""
    return min(CONNECT_SECONDS, 1 + attempt / 2)


def pull_bytes(max_payload: int) -> int:
    """How much one pull may bring: some messages, of whatever size the server takes."""
    return max(PULL_BYTES, 2 * max_payload)


class _Made(Struct):
    name: str
    num_pending: int = 0


class _Session:
    """One connection with its consumer."""

    def __init__(self, seconds: float) -> None:
        self.items: list[Stored] = []
        """What came and nobody took yet."""
        self.link: Link
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._quiet = 0
        """Thirds of SILENCE_SECONDS that went by without a word."""
        self._timer: asyncio.TimerHandle | None = None
        self._consumer = ""
        self._pulls: dict[bytes, int] = {}
        """Messages that each pull may still bring, by its inbox; the server serves them in this order."""
        self._pulled = 0
        self._pull_bytes = 0
        self._alone = False
        """The next message is larger than a pull may bring."""
        self._seconds = seconds
        self._window_began = 0.0
        self._counted = 0
        self._busy = False

    @classmethod
    async def open(cls, settings: Settings, server: Server, name: str, seconds: float) -> _Session:
        """`seconds`: how long to wait for each answer. Raises EventLogError."""
        session = cls(seconds)
        session.link = await open_link(settings, server, name=name, on_items=session._hear, on_end=session._wake)
        session._pull_bytes = pull_bytes(session.link.info.max_payload)
        return session

    async def info(self) -> StreamInfo:
        """Raises NoStream, LogUnreachable."""
        return read_info(read_reply(await self._ask(f"STREAM.INFO.{STREAM}", None), what="STREAM.INFO"))

    async def get(self, sequence: int) -> Stored | None:
        """One message. Raises EventLogError."""
        try:
            return read_message(read_reply(await self._ask(f"STREAM.MSG.GET.{STREAM}", {"seq": sequence}), what="STREAM.MSG.GET"))
        except EventLogError as error:
            if error.number == NO_MESSAGE:
                return None
            raise

    async def consume(self, begin: int, subjects: str | None) -> bool:
        """Let messages come, from sequence `begin`; whether there are none yet. Raises EventLogError."""
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, begin),
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": INACTIVE_SECONDS * _NANO,
        }
        if subjects is not None:
            config["filter_subject"] = subjects
        request = {"stream_name": STREAM, "config": config}
        answer = read_reply(await self._ask(f"CONSUMER.CREATE.{STREAM}", request), what="CONSUMER.CREATE")
        made = msgspec.json.decode(answer, type=_Made)
        self._consumer = made.name
        self._watch()
        self.refill()
        return made.num_pending == 0

    def refill(self) -> None:
        """Ask for more, as long as less than two pulls are under way."""
        while len(self._pulls) < PULLS:
            self._pulled += 1
            reply = f"{self.link.inbox}.p.{self._pulled}"
            pull = {"batch": PULL_MESSAGES, "expires": EXPIRY_SECONDS * _NANO, "idle_heartbeat": HEARTBEAT_SECONDS * _NANO}
            if self._alone:
                pull["batch"] = 1
            else:
                pull["max_bytes"] = self._pull_bytes
            self._alone = False
            self._pulls[reply.encode()] = pull["batch"]
            self.link.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{self._consumer}", reply, msgspec.json.encode(pull))

    def rest_if_busy(self, messages: int) -> None:
        """Let what comes next wait a moment, so that more comes with it; not while more is there already, nor for single messages."""
        now = self._loop.time()
        self._counted += messages
        if now >= self._window_began + _WINDOW_SECONDS:
            self._busy = self._counted >= BUSY_PER_SECOND * (now - self._window_began)
            self._window_began, self._counted = now, 0
        if self._busy and self.link.wire.pending == 0:
            self.link.rest(REST_SECONDS)

    async def wait(self) -> None:
        """Until something came. Raises EventLogError at the end of the connection."""
        if self.link.failure is not None:
            raise EventLogError(f"nats: {self.link.failure}")
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _watch(self) -> None:
        """A clock of its own, that no message has to set: a link that is silent for too long has ended."""
        if self._quiet == 3:
            self.link.fail(f"nothing was heard for {SILENCE_SECONDS:.0f} s")
            return
        self._quiet += 1
        self._timer = self._loop.call_later(SILENCE_SECONDS / 3, self._watch)

    def close(self) -> None:
        """Idempotent."""
        if self._consumer:
            self.link.publish(f"$JS.API.CONSUMER.DELETE.{STREAM}.{self._consumer}", f"{self.link.inbox}.d", b"")
        if self._timer is not None:
            self._timer.cancel()
        self.link.close()

    def _hear(self, items: list[Stored | Control]) -> None:
        self._quiet = 0
        self._wake()
        messages = [item for item in items if isinstance(item, Stored)]
        if len(messages) == len(items):
            self._count(len(messages))
        else:
            for item in items:
                if isinstance(item, Stored):
                    self._count(1)
                else:
                    self._status(item)
        self.items += messages

    async def _ask(self, call: str, body: Any) -> bytes:
        return await self.link.request(f"$JS.API.{call}", body, self._seconds)

    def _count(self, messages: int) -> None:
        for reply, left in list(self._pulls.items()):
            if left > messages:
                self._pulls[reply] = left - messages
                return
            del self._pulls[reply]
            messages -= left

    def _status(self, item: Control) -> None:
        """A pull is over, or the consumer is; a heartbeat says nothing more."""
        status = item.headers.removeprefix(b"NATS/1.0 ")
        if status.startswith(b"100"):
            return
        if not status.startswith(_ENDED_PULL):
            why = status.partition(b"\r")[0][:80].decode("utf-8", "replace")
            self.link.fail(f"the consumer ended: {why}")
            return
        if status.startswith(b"409 Message Size") and self._pulls.get(item.text) == PULL_MESSAGES:
            self._alone = True
        self._pulls.pop(item.text, None)
        if not self.items:
            self.refill()
