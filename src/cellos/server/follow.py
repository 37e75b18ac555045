"""The way from NATS to the projection: connect, make the stream, read it from the snapshot's place or its beginning, and go on for ever.

Replay and tail are one reader, so nothing falls between them. Where the log turns out to be another one than was read, or no longer has
what was not read yet, the projection is dropped and read anew, and every WebSocket is told to do the same.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from functools import partial

from cellos.core.problem import retention_exhausted
from cellos.core.projection import Projection
from cellos.core.rows import Contents
from cellos.errors import EventLogError, LogTooOld, Rebuild, os_error_text
from cellos.eventlog.connect import LogClient, Settings, connect, pause, require_version
from cellos.eventlog.reader import Reader
from cellos.eventlog.stored import Cursor, Stored
from cellos.eventlog.stream import MAX_AGE_SECONDS, StreamSettings, ensure_stream
from cellos.server.hub import EXHAUSTED
from cellos.server.state import ServerState
from cellos.server.store import SnapshotStore

SNAPSHOT_SECONDS = 60.0
RETENTION_SECONDS = 3600.0
_log = logging.getLogger("cellos.server.projector")


class Follower:
    """`run` it as a task; cancel it to end. `settled` is set when the lists are up to date, or cannot be made so for now."""

    def __init__(
        self, state: ServerState, settings: Settings, *, stream: StreamSettings | None = None, store: SnapshotStore | None = None
    ) -> None:
        self._state = state
        self._settings = settings
        self._stream = stream or StreamSettings()
        self._store = store
        self._kept = 0
        """Sequence that the snapshot on disk is at."""
        self._saving = threading.Lock()
        self.settled = asyncio.Event()

    async def run(self) -> None:
        """Raises ConfigError and LogTooOld: it will never work."""
        state = self._state
        state.following = True
        start = self._load()
        client = await connect(self._settings, name="cellos-server", on_trouble=self._trouble)
        try:
            require_version(client)
            _log.info("connected to NATS", extra={"fields": {"url": self._settings.shown}})
            await self._ensure_stream(client)
            state.connected(client)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._forget())
                if self._store is not None:
                    tasks.create_task(self._keep(self._store))
                while True:
                    start = await self._read(client, start)
        finally:
            await client.close()

    def save(self) -> None:
        """Write the snapshot now. What fails is logged: the next start reads the log instead."""
        found = self._consistent()
        if self._store is not None and found is not None:
            self._save(self._store, *found)

    def _load(self) -> Cursor | None:
        if self._store is None or self._state.skip_replay:
            return None
        found = self._store.load()
        if found is None:
            return None
        projection, cursor = found
        self._state.replace(projection)
        self._kept = cursor.sequence
        _log.info("snapshot loaded", extra={"fields": {"cursor": cursor.sequence, **projection.counts()}})
        return cursor

    async def _ensure_stream(self, client: LogClient) -> None:
        told, attempt = "", 0
        while True:
            try:
                info = await ensure_stream(client, replicas=self._stream.replicas, max_bytes=self._stream.max_bytes)
            except LogTooOld:
                raise
            except EventLogError as error:
                if error.text != told:
                    self._trouble(error.text)
                told = error.text
                attempt += 1
                await asyncio.sleep(pause(attempt))
            else:
                if info.differences:
                    text = "the stream is not as this server would have made it"
                    _log.warning(text, extra={"fields": {"differences": list(info.differences)}})
                return

    async def _read(self, client: LogClient, start: Cursor | None) -> Cursor | None:
        """Until it has to begin anew; gives where."""
        state = self._state
        if state.skip_replay:
            start = await self._tail()
            state.replace(Projection(cursor=start.sequence))
        # A store that was wiped while we ran has no stream any more.
        make = partial(self._ensure_stream, client)
        async with Reader(client, start=start, name="cellos-server-reader", on_trouble=self._trouble, on_missing=make) as reader:
            state.reader = reader
            watch = asyncio.create_task(self._watch(reader))
            try:
                while True:
                    self._apply(await reader.read())  # which waits for the connection each time, so a replay keeps no request waiting
            except Rebuild as error:
                await self._begin_anew(error)
            finally:
                watch.cancel()
        return None

    def _apply(self, batch: Sequence[Stored]) -> None:
        state = self._state
        if state.cursor == 0 and batch[0].sequence > 1:
            state.hub.start_at(batch[0].sequence - 1)  # what stood before it is gone
        for stored in batch:
            state.apply(stored.sequence, stored.subject, stored.data, stored_ns=stored.time)

    async def _watch(self, reader: Reader) -> None:
        """Says when a replay is through; once per reader."""
        state = self._state
        await reader.caught_up.wait()
        projection = state.projection
        seen = projection.applied + projection.ignored + projection.rejected
        fields = {"cursor": state.cursor, "events_seen": seen, "events_applied": projection.applied, **projection.counts()}
        _log.info("replay_complete", extra={"fields": fields})
        self._drop_old()
        self.settled.set()

    async def _tail(self) -> Cursor:
        attempt = 0
        while True:
            log = self._state.log
            assert log is not None
            try:
                return await log.tail()
            except EventLogError as error:
                self._trouble(error.text)
                attempt += 1
                await asyncio.sleep(pause(attempt))

    async def _begin_anew(self, error: Rebuild) -> None:
        state = self._state
        _log.warning("reading the log anew", extra={"fields": {"reason": error.reason, "error": error.text}})
        if self._store is not None and self._kept:
            self._store.set_aside(error.text, "foreign")
        self._kept = 0
        state.rebuilds += 1
        state.reader = None
        state.replace(Projection())
        try:
            oldest = (await state.log_info(1.0)).first_seq
        except EventLogError:
            oldest = None
        state.hub.close_all(EXHAUSTED, text=retention_exhausted(oldest))

    def _trouble(self, text: str) -> None:
        _log.warning("no event log; trying again", extra={"fields": {"error": text}})
        self.settled.set()

    # --- what happens from time to time -------------------------------------------------------------------------------------------------

    async def _forget(self) -> None:
        while True:
            await asyncio.sleep(RETENTION_SECONDS)
            self._drop_old()

    def _drop_old(self) -> None:
        """By the rule that the stream forgets by."""
        dropped = self._state.projection.drop_before(self._state.clock() - MAX_AGE_SECONDS * 1_000_000_000)
        if dropped:
            self._state.changed()
            _log.info("old records dropped", extra={"fields": {"records": dropped}})

    async def _keep(self, store: SnapshotStore) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_SECONDS)
            found = self._consistent()
            if found is not None:
                await asyncio.to_thread(self._save, store, *found)

    def _save(self, store: SnapshotStore, contents: Contents, cursor: Cursor) -> None:
        with self._saving:  # at the end one may be under way in a thread
            try:
                size = store.save(contents, cursor)
            except OSError as error:
                _log.warning("cannot write the snapshot", extra={"fields": {"path": store.path, "error": os_error_text(error)}})
                return
            self._kept = cursor.sequence
            _log.debug("snapshot written", extra={"fields": {"cursor": cursor.sequence, "bytes": size}})

    def _consistent(self) -> tuple[Contents, Cursor] | None:
        """What the lists hold and its place in the log, where there is news and both are known to belong together."""
        reader, projection = self._state.reader, self._state.projection
        if reader is None or self._state.skip_replay:
            return None
        cursor = reader.cursor
        if cursor.sequence != projection.cursor or cursor.sequence == self._kept or not cursor.stream_created:
            return None
        return projection.freeze(), cursor


async def replay(state: ServerState, client: LogClient) -> int:
    """Read what the log has now into a state that is fresh. Gives the cursor. Raises Rebuild where the log changes meanwhile.

    For whoever embeds the application and wants no task; `Follower` goes on reading.
    """
    async with Reader(client, name="cellos-replay") as reader:
        caught_up = asyncio.create_task(reader.caught_up.wait())
        try:
            while True:
                reading = asyncio.create_task(reader.read())
                await asyncio.wait({reading, caught_up}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    return state.cursor
                for stored in reading.result():
                    state.apply(stored.sequence, stored.subject, stored.data, stored_ns=stored.time)
        finally:
            caught_up.cancel()
