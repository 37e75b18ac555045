"""The work queue of nodes: what is dispatched in the log goes to one node each, until that node acks.

There is one durable consumer of the log per pool and class, shared by all nodes that can run such work. A message is a hint and no promise:
it may come twice, or late, or of an attempt that somebody else runs; the claim in the log decides. A stream of its own that NATS fills from
the log would forget what is done, but in a cluster whose leader died NATS begins to fill it again only after pauses of up to minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from cellos.core.formation.runs import WORK_CLASSES, WORK_PREFIX, WorkClass, token, work_filter
from cellos.errors import EventLogError, LogUnreachable
from cellos.eventlog.api import STREAM, ask, without_prefix
from cellos.eventlog.connect import pause
from cellos.eventlog.side_stream import NANO

ACK_WAIT_SECONDS = 5
"""After which a message that nobody answered goes to another node. A claim takes milliseconds: who is silent is most likely gone."""
PULL_SECONDS = 5.0
"""How long a pull stays with the server. A lost one is asked for again after that."""
HOLD_SECONDS = 0.1
"""How long a message that came before there was room waits for some: a node whose cells are short need not ask for each and wait."""
_CHECK_SECONDS = 0.5


class WorkItem:
    """A message. One that is not answered within ACK_WAIT_SECONDS comes again, here or elsewhere. Answers are sent, not awaited."""

    __slots__ = ("_client", "_reply", "payload", "subject")

    def __init__(self, client: Client, message: Msg) -> None:
        self.subject = message.subject
        self.payload: bytes = message.data
        """The line of the `dispatched` event, as it is in the log."""
        self._client = client
        self._reply = message.reply

    async def ack(self) -> None:
        """It is taken, or never to be taken."""
        await self._answer(b"+ACK")

    async def nak(self, delay_seconds: float = 0.0) -> None:
        """Not here, not now: it comes again, at the earliest after the delay."""
        delay = msgspec.json.encode({"delay": int(delay_seconds * NANO)}) if delay_seconds > 0 else b""
        await self._answer(b"-NAK " + delay if delay else b"-NAK")

    async def in_progress(self) -> None:
        """The time to answer begins anew."""
        await self._answer(b"+WPI")

    async def _answer(self, text: bytes) -> None:
        with contextlib.suppress(nats_errors.Error, OSError):  # then it comes again
            await self._client.publish(self._reply, text)


def consumer_name(pool: str, work: WorkClass) -> str:
    """Of the durable consumer that all nodes of the pool share."""
    return f"{token(pool)}-{work}"


def consumer_config(pool: str, work: WorkClass) -> dict[str, Any]:
    """As CONSUMER.CREATE takes it."""
    return {
        "durable_name": consumer_name(pool, work),
        "name": consumer_name(pool, work),
        "filter_subject": work_filter(pool, work),
        "ack_policy": "explicit",
        "ack_wait": ACK_WAIT_SECONDS * NANO,
        "deliver_policy": "all",
        "max_deliver": -1,
        "max_ack_pending": -1,  # those that wait for a node with more room must not stop the others
        "max_waiting": 4096,
    }


class WorkQueue:
    """What a node of `pool` may take: work of these classes, dearest first. One task at a time calls `take`.

    A consumer that is missing, or was removed, is made, and offers all that the log has; the log itself is made by others. It ends with
    `close`, or as a context manager. `on_trouble` is told, once per reason, why no work can come.
    """

    def __init__(
        self,
        client: Client,
        pool: str,
        classes: Sequence[WorkClass],
        *,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        self._client = client
        self._pool = pool
        self._classes = tuple(sorted(classes, key=WORK_CLASSES.index, reverse=True))
        self._on_trouble = on_trouble
        self._told = ""
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._pulls: dict[str, _Pull] = {}
        self._asked = 0
        self._room = 0
        """How many messages `take` would still give to its caller."""
        self._got: list[WorkItem] = []
        self._held: dict[WorkItem, asyncio.TimerHandle] = {}
        """What came before it was asked for, and goes back when its time is over."""
        self._giving: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_ready = False
        self._failure = ""
        self._connections = client.stats["reconnects"]

    async def __aenter__(self) -> WorkQueue:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def take(self, most: int, wait_seconds: float) -> list[WorkItem]:
        """1 to `most` messages; none where none came in time, or there is no connection. Cancelled, what had come comes again later."""
        self._room, self._got = most, []
        for item in list(self._held)[:most]:
            self._held.pop(item).cancel()
            self._give(item)
        attempt = 0
        try:
            async with asyncio.timeout(wait_seconds):
                while not self._got:
                    try:
                        await self._prepare()
                        await self._sweep()
                        if not self._got:
                            await self._wait_for_one()
                    except (EventLogError, nats_errors.Error, OSError) as error:
                        self._begin_anew(error.text if isinstance(error, EventLogError) else without_prefix(error))
                        attempt += 1
                        await asyncio.sleep(pause(attempt))
                if self._is_ready:
                    with contextlib.suppress(nats_errors.Error, OSError):  # the next one says so
                        await self._ask_ahead()
        except TimeoutError:
            pass
        except BaseException:
            for item in self._got:
                await item.nak()
            raise
        finally:
            self._room = 0
        return self._got

    async def close(self) -> None:
        """Idempotent. What is on its way comes again, elsewhere."""
        subscription, self._subscription = self._subscription, None
        self._pulls.clear()
        for item in list(self._held):
            await self._give_back(item)
        if subscription is not None:
            with contextlib.suppress(nats_errors.Error, OSError):
                await subscription.unsubscribe()

    async def _prepare(self) -> None:
        """Stream, consumers and a place for answers. Raises EventLogError."""
        if self._is_ready:
            return
        if self._subscription is None:
            self._inbox = self._client.new_inbox()
            self._subscription = await self._client.subscribe(f"{self._inbox}.*", cb=self._hear)
        for work in self._classes:
            config = consumer_config(self._pool, work)
            await ask(self._client, f"CONSUMER.DURABLE.CREATE.{STREAM}.{config['durable_name']}", {"stream_name": STREAM, "config": config})
        self._is_ready = True
        self._told = ""

    async def _sweep(self) -> None:
        """What is there already, class by class, so that never more comes than there is room for. Raises EventLogError."""
        waiting = self._waiting()
        for work in self._classes:
            if self._room > 0 and work not in waiting:
                pull = await self._pull(work, self._room, {"no_wait": True})
                await self._until(pull.is_over)

    async def _wait_for_one(self) -> None:
        """Until a message came, or a pull ended."""
        await self._ask_ahead()
        pulls = len(self._pulls)
        await self._until(lambda: bool(self._got) or len(self._pulls) < pulls)

    async def _ask_ahead(self) -> None:
        """Let one message of each class come when there is one. What comes after `take` is for the next one, if that comes soon."""
        waiting = self._waiting()
        for work in self._classes:
            if work not in waiting:
                await self._pull(work, 1, {"expires": int(PULL_SECONDS * NANO)})

    def _waiting(self) -> set[WorkClass]:
        """Classes of which a pull is with the server: nothing of them is there, or it is on its way."""
        now = asyncio.get_running_loop().time()
        self._pulls = {name: pull for name, pull in self._pulls.items() if now < pull.until}
        return {pull.work for pull in self._pulls.values()}

    async def _pull(self, work: WorkClass, batch: int, options: dict[str, Any]) -> _Pull:
        self._asked += 1
        name = f"{self._inbox}.{self._asked}"
        pull = self._pulls[name] = _Pull(work, batch, asyncio.get_running_loop().time() + PULL_SECONDS + 1)
        request = msgspec.json.encode({"batch": batch, **options})
        await self._client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{consumer_name(self._pool, work)}", request, reply=name)
        return pull

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Raises LogUnreachable where the pulls were lost with their connection or consumer."""
        deadline = asyncio.get_running_loop().time() + PULL_SECONDS + 2
        while not is_so():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CHECK_SECONDS):  # wait_for of Python 3.11 forgets that it was cancelled where both come at once
                    await self._changed.wait()
            if self._failure:
                raise LogUnreachable(self._failure)
            if not self._client.is_connected or self._client.stats["reconnects"] != self._connections:
                raise LogUnreachable("the connection to NATS was lost")
            if asyncio.get_running_loop().time() > deadline:
                raise LogUnreachable(f"{STREAM}: no answer in time")

    async def _hear(self, message: Msg) -> None:
        """A message, or the end of a pull. The subject of a message is that of the work; only that of a status is ours."""
        self._changed.set()
        status = (message.headers or {}).get("Status")
        if status is None:
            work = message.subject.removeprefix(WORK_PREFIX).split(".")[1]
            name = next((name for name, pull in self._pulls.items() if pull.work == work), None)  # the server serves them in this order
            if name is not None:
                self._pulls[name].left -= 1
                if self._pulls[name].left == 0:
                    del self._pulls[name]
            item = WorkItem(self._client, message)
            if self._room > 0:
                self._give(item)
            else:
                self._held[item] = asyncio.get_running_loop().call_later(HOLD_SECONDS, self._begin_to_give_back, item)
            return
        found = self._pulls.pop(message.subject, None)
        if found is not None:
            found.left = 0
        description = (message.headers or {}).get("Description", "")
        if status == "503":  # what nats-py calls its description is other headers
            self._failure = f"{STREAM}: nobody gives work; the consumer is gone, or its leader"
        elif status == "409" and "Exceeded" not in description:
            self._failure = f"{STREAM}: {description}"

    def _give(self, item: WorkItem) -> None:
        self._room -= 1
        self._got.append(item)

    def _begin_to_give_back(self, item: WorkItem) -> None:
        task = asyncio.ensure_future(self._give_back(item))
        self._giving.add(task)
        task.add_done_callback(self._giving.discard)

    async def _give_back(self, item: WorkItem) -> None:
        """Nobody here wants it now."""
        timer = self._held.pop(item, None)
        if timer is not None:
            timer.cancel()
            await item.nak()

    def _begin_anew(self, why: str) -> None:
        self._pulls.clear()
        self._failure = ""
        self._is_ready = False
        self._connections = self._client.stats["reconnects"]
        if self._on_trouble is not None and why != self._told:
            self._on_trouble(why)
        self._told = why


@dataclass(slots=True)
class _Pull:
    """A request that is with the server: for so many more messages."""

    work: WorkClass
    left: int
    until: float
    """Without a word until then it was lost."""

    def is_over(self) -> bool:
        return self.left == 0
