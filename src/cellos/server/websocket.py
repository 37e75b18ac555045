"""/ws/events: a client is brought from its `since` to the present, by the log, and then fed by the hub like all others."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import cast

from starlette.types import Message, Receive, Scope, Send
from websockets.http11 import Response

from cellos.core.problem import problem_of_status, retention_exhausted
from cellos.errors import EventLogError
from cellos.eventlog.log import EventLog
from cellos.server.filters import EVERYTHING, matcher, meets
from cellos.server.hub import EXHAUSTED, NO_LOG, SLOW, SUBSCRIBE_FAILED, CloseReason, Frame, Member, Outlet, encode_frame
from cellos.server.protocol import HANDSHAKE, OUTLET
from cellos.server.query import read_query, unsigned
from cellos.server.replies import CORS, Header, Refused, Reply, problem_reply
from cellos.server.state import ServerState

PAGE = 256
STALL_SECONDS = 50.0
"""A client that takes nothing of its past for so long is dropped."""
INFO_SECONDS = 2.0
LOW_WATER_BYTES = 1 << 20
_log = logging.getLogger("cellos.server.websocket")


class EventStream:
    """The endpoint, as an ASGI application."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        extensions = scope.get("extensions") or {}
        try:
            query = read_query(scope["query_string"], ("subject", "since"))
            since = unsigned(query, "since")
        except Refused as error:
            return await problem_reply(error.problem)(scope, receive, send)
        if extensions.get(HANDSHAKE) is not None:
            return await _refusal(extensions[HANDSHAKE])(scope, receive, send)
        await receive()  # websocket.connect
        await send({"type": "websocket.accept", "headers": list(CORS)})
        outlet: Outlet | None = extensions.get(OUTLET)
        self._state.hub.clients += 1
        try:
            if outlet is not None:
                await self._serve(outlet, query.get("subject") or EVERYTHING, since, receive)
            else:
                async with asyncio.TaskGroup() as tasks:
                    queue = QueueOutlet()
                    sender = tasks.create_task(queue.run(send))
                    await self._serve(queue, query.get("subject") or EVERYTHING, since, receive)
                    if not queue.closed:
                        sender.cancel()
        finally:
            self._state.hub.clients -= 1

    async def _serve(self, outlet: Outlet, subject: str, since: int | None, receive: Receive) -> None:
        log = self._state.log
        if log is None:
            return outlet.close(NO_LOG)
        if not meets(subject):
            return outlet.close(SUBSCRIBE_FAILED)
        try:
            member = await _Past(self._state, log, outlet, subject).lead(since)
        except EventLogError as error:
            _log.warning("cannot read the event log", extra={"fields": {"error": str(error)}})
            return outlet.close(SUBSCRIBE_FAILED)
        if member is None:
            return None
        try:
            while (await receive())["type"] != "websocket.disconnect":
                continue  # what clients say means nothing
        finally:
            self._state.hub.leave(member)


class _Past:
    """Brings a client to where the hub can take over."""

    def __init__(self, state: ServerState, log: EventLog, outlet: Outlet, subject: str) -> None:
        self._state = state
        self._hub = state.hub
        self._log = log
        self._outlet = outlet
        self._subject = subject
        self._matches = matcher(subject)
        self._generation = state.hub.generation

    async def lead(self, since: int | None) -> Member | None:
        """The client as a member of the hub; None where it was closed or is gone. Raises EventLogError."""
        if since is None:
            # While the projection is behind, what the hub passes on is not new.
            position = None if self._state.phase == "live" else (await self._state.log_info(INFO_SECONDS)).last_seq
            return self._join(position)
        if not self._hub.remembers(since):
            info = await self._state.log_info(INFO_SECONDS)
            if not info.first_seq - 1 <= since <= info.last_seq:
                self._exhausted(info.first_seq)
                return None
        position = since
        while not self._outlet.closed:
            if self._hub.generation != self._generation:
                self._exhausted(None)
                return None
            member = self._join(position)
            if member is not None:
                return member
            here = self._hub.position
            page = await self._log.read(position, PAGE)
            if (not page or page[0].sequence > position + 1) and (oldest := await self._oldest()) > position + 1:
                self._exhausted(oldest)
                return None
            frames = [
                frame
                for stored in page
                if self._matches(stored.subject) and (frame := encode_frame(stored.sequence, stored.subject, stored.data)) is not None
            ]
            if frames:
                self._outlet.write(frames, b"".join([frame.wire for frame in frames]))
                self._hub.delivered += len(frames)
            position = page[-1].sequence if page else max(position, here)
            if not await self._drained():
                return None
        return None

    def _join(self, position: int | None) -> Member | None:
        return self._hub.join(self._outlet, self._subject, position)

    async def _oldest(self) -> int:
        return (await self._state.log_info(INFO_SECONDS)).first_seq

    async def _drained(self) -> bool:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self._outlet.drained()
        except TimeoutError:
            self._hub.slow += 1
            self._outlet.close(SLOW)
            return False
        return True

    def _exhausted(self, oldest: int | None) -> None:
        self._outlet.say(retention_exhausted(oldest))
        self._outlet.close(EXHAUSTED)


class QueueOutlet:
    """An outlet over ASGI's own messages, for servers that do not know our protocol: a queue, and a task that empties it."""

    def __init__(self) -> None:
        self._queue: deque[Message] = deque()
        self._size = 0
        self._closed = False
        self._filled = asyncio.Event()
        self._low = asyncio.Event()
        self._low.set()

    async def run(self, send: Send) -> None:
        """Send what waits, until the last of it is a Close frame or the client is gone."""
        try:
            while True:
                await self._filled.wait()
                while self._queue:
                    message = self._queue.popleft()
                    await send(message)
                    if message["type"] == "websocket.close":
                        return
                    self._size -= len(message["text"])
                    if self._size <= LOW_WATER_BYTES:
                        self._low.set()
                self._filled.clear()
        except (OSError, RuntimeError):  # ASGI 2.4: a client that is gone
            self._closed = True
            self._low.set()

    def write(self, frames: Sequence[Frame], wire: bytes) -> None:
        """Their messages, one after the other."""
        for frame in frames:
            self.say(frame.text)

    def say(self, text: bytes) -> None:
        if self._closed:
            return
        self._queue.append({"type": "websocket.send", "text": text.decode()})
        self._size += len(text)
        if self._size > LOW_WATER_BYTES:
            self._low.clear()
        self._filled.set()

    def close(self, why: CloseReason) -> None:
        if not self._closed:
            self._closed = True
            self._queue.append({"type": "websocket.close", "code": why.code, "reason": why.reason})
            self._filled.set()

    @property
    def waiting(self) -> int:
        return self._size

    @property
    def closed(self) -> bool:
        return self._closed

    async def drained(self) -> None:
        await self._low.wait()


def _refusal(handshake: Response) -> Reply:
    """A faulty handshake as a problem, with the headers that belong to its status."""
    text = cast("bytes", handshake.body).decode(errors="replace").strip().split("\n")[0]
    kept: list[Header] = [
        (name.lower().encode(), value.encode()) for name, value in handshake.headers.raw_items() if name in {"Upgrade", "Allow"}
    ]
    return problem_reply(problem_of_status(handshake.status_code, text), headers=kept)
