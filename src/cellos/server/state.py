"""What the routes share: the projection, the event log, the hub, and what is known about all three.

One event loop owns it. `apply` is the only way in for events; a writer waits with `applied` until what it wrote has come back that way.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import time
from collections.abc import Callable
from itertools import count
from typing import Literal

from cellos.core.ids import UUID_RANDOM_BYTES, rfc3339, uuid7
from cellos.core.problem import event_store_unavailable
from cellos.core.projection import Projection, Verify
from cellos.errors import LogUnreachable
from cellos.eventlog.connect import LogClient
from cellos.eventlog.log import EventLog
from cellos.eventlog.reader import Reader
from cellos.eventlog.stream import StreamInfo, stream_info
from cellos.server.auth import Tokens
from cellos.server.hub import Hub
from cellos.server.replies import Header, Refused
from cellos.server.story import Stories

APPLIED_SECONDS = 5.0
RETRY_AFTER: tuple[Header, ...] = ((b"retry-after", b"2"),)
Phase = Literal["alone", "starting", "replaying", "live", "disconnected"]
"""`alone`: there is no log; `starting`: no connection to it yet; `replaying`: the lists are behind it; `disconnected`: they stand still."""
_log = logging.getLogger("cellos.server.projector")


class ServerState:
    """Embedders make one and give it to `create_app`; `token` is what requests must show.

    Without a `client`, a connection to NATS, everything can be read, and nothing written. Whoever reads events hands each to `apply`.
    """

    def __init__(
        self,
        *,
        token: str,
        read_token: str | None = None,
        projection: Projection | None = None,
        client: LogClient | None = None,
        verify: Verify | None = None,
        git_sha: str | None = None,
        skip_replay: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.tokens = Tokens(token, read_only=read_token)
        self.projection = projection if projection is not None else Projection()
        self.log: EventLog | None = None
        self._client: LogClient | None = None
        if client is not None:
            self.connected(client)
        self.verify = verify
        self.git_sha = git_sha
        self.skip_replay = skip_replay
        self.clock = clock
        self.hub = Hub()
        self.hub.start_at(self.projection.cursor)
        self.ending = asyncio.Event()
        """The server is about to end: answers that go on for ever end now."""
        self.stories = Stories()
        self.following = False
        """Somebody reads the log for us, or tries to."""
        self.reader: Reader | None = None
        self.rebuilds = 0
        self._changes = 0
        self._epoch = os.urandom(6).hex()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    def connected(self, client: LogClient) -> None:
        """There is a connection to the log, which comes back by itself whenever it is lost."""
        self._client = client
        self.log = EventLog(client)

    async def log_info(self, seconds: float) -> StreamInfo:
        """The state of the stream. Raises NoStream, LogUnreachable."""
        if self._client is None:
            raise LogUnreachable("there has been no connection to NATS yet")
        try:
            async with asyncio.timeout(seconds):
                return await stream_info(self._client)
        except TimeoutError:
            raise LogUnreachable("STREAM.INFO: no answer in time") from None

    @property
    def phase(self) -> Phase:
        """How the lists stand to the log."""
        if not self.following:
            return "alone" if self.log is None else "live"
        if self.reader is None:
            return "starting"
        if not self.reader.connected:
            return "disconnected"
        return "live" if self.reader.caught_up.is_set() else "replaying"

    @property
    def cursor(self) -> int:
        """Sequence of the last event that the lists contain."""
        return self.projection.cursor

    def apply(self, sequence: int, subject: str, payload: bytes, *, stored_ns: int | None = None) -> None:
        """The next event of the log: to the projection, to whoever waits for it, to all WebSockets. `stored_ns`: when the log took it."""
        outcome = self.projection.apply(sequence, subject, payload, stored_ns=stored_ns, verify=self.verify)
        if outcome.kind == "applied":
            self._changes += 1
        elif outcome.kind == "rejected":
            _log.warning("event not applied", extra={"fields": {"seq": sequence, "subject": subject, "reason": outcome.reason}})
        if not self.hub.push(sequence, subject, payload):
            _log.warning("event not sent to WebSockets: no JSON object in UTF-8", extra={"fields": {"seq": sequence, "subject": subject}})
        while self._waiting and self._waiting[0][0] <= sequence:
            _, _, waiter = heapq.heappop(self._waiting)
            if not waiter.done():
                waiter.set_result(None)

    def replace(self, projection: Projection) -> None:
        """Go on with another projection: of a snapshot, or an empty one that everything is read into again."""
        self.projection = projection
        self.stories = Stories()
        self.hub.start_at(projection.cursor)
        self.changed()

    def changed(self) -> None:
        """Records changed otherwise than by an event."""
        self._changes += 1

    def etag(self, *, cursor: bool) -> bytes:
        """Of a list: it is the same as long as no record changed, and, where it names it, the cursor. Never the same in another process."""
        position = f"-{self.cursor}" if cursor else ""
        return f'"{self._epoch}-{self._changes}{position}"'.encode()

    async def applied(self, sequence: int) -> None:
        """Until the event of this sequence is in the lists. Raises Refused after APPLIED_SECONDS."""
        if sequence <= self.cursor:
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        heapq.heappush(self._waiting, (sequence, next(self._order), waiter))
        timer = loop.call_later(APPLIED_SECONDS, _give_up, waiter)
        try:
            await waiter
        except TimeoutError:
            raise unavailable("the event log is read with a delay; retry later") from None
        finally:
            timer.cancel()

    def required_log(self) -> EventLog:
        """The log, to write to. Raises Refused where there has been no connection to it yet."""
        if self.log is None:
            raise unavailable()
        return self.log

    def required_client(self) -> LogClient:
        """The connection to NATS, for what lies beside the log. Raises Refused where there has been none yet."""
        if self._client is None:
            raise unavailable()
        return self._client

    def new_event(self) -> tuple[str, str]:
        """An event id and its time."""
        now = self.clock()
        return uuid7(now // 1_000_000, os.urandom(UUID_RANDOM_BYTES)), rfc3339(now)


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


def unavailable(detail: str | None = None) -> Refused:
    """503: nothing was done, or it is not known whether it was."""
    problem = event_store_unavailable(detail) if detail is not None else event_store_unavailable()
    return Refused(problem, headers=RETRY_AFTER)
