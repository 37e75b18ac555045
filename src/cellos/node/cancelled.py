"""Which formations are to end: followed in the log, so that their runs are killed and none of them is begun.

A formation that is to end gets no dispatch any more, so `cancelling` stands behind every dispatch in the log. What was written before this
node began to read is looked up, once per formation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cellos.core.formation.events import FORMATION_PREFIX, subject_of
from cellos.errors import EventLogError, Rebuild
from cellos.eventlog.connect import LogClient, pause
from cellos.eventlog.log import EventLog
from cellos.eventlog.reader import Reader

FILTER = f"{FORMATION_PREFIX}*.cancelling"
MOST_REMEMBERED = 100_000
_log = logging.getLogger("cellos.node.cancelled")


class Cancelled:
    """`run` it as a task. `on_cancelled` gets the id of each formation that is to end.

    `begun` is set once the place in the log is fixed from which on they are heard.
    """

    def __init__(self, client: LogClient, on_cancelled: Callable[[str], None]) -> None:
        self._client = client
        self._log = EventLog(client)
        self._on_cancelled = on_cancelled
        self._known: dict[str, bool] = {}
        """Formation to whether it is to end, as far as that was looked up or heard; the oldest go first."""
        self._reader: Reader | None = None
        self.begun = asyncio.Event()

    async def _begin(self) -> None:
        """Fix the place in the log from which on everything is heard. Raises EventLogError."""
        tail = await self._log.tail()
        self._known.clear()
        self._reader = Reader(self._client, start=tail, name="cellos-node-reader", subjects=FILTER, on_trouble=self._trouble)
        self.begun.set()

    async def run(self) -> None:
        """For ever."""
        attempt = 0
        while True:
            try:
                if self._reader is None:
                    await self._begin()
                assert self._reader is not None
                async with self._reader as reader:
                    async for stored in reader:
                        attempt = 0
                        self._hear(stored.subject.split(".")[-2])
            except Rebuild as error:
                _log.warning("following the log anew", extra={"fields": {"reason": error.reason, "error": error.text}})
                self._reader = None
            except EventLogError as error:
                self._trouble(error.text)
                attempt += 1
                await asyncio.sleep(pause(attempt))

    def is_known(self, formation_id: str) -> bool:
        """Whether it is known to be to end."""
        return self._known.get(formation_id, False)

    async def is_to_end(self, formation_id: str) -> bool:
        """Whether it was to end when this was asked. Raises EventLogError."""
        known = self._known.get(formation_id)
        if known is None:
            known = await self._log.last(subject_of(formation_id, "cancelling")) is not None
            known = self._known.setdefault(formation_id, known)  # it may have been heard meanwhile
            self._forget()
        return known

    def _hear(self, formation_id: str) -> None:
        self._known[formation_id] = True
        self._forget()
        self._on_cancelled(formation_id)

    def _forget(self) -> None:
        while len(self._known) > MOST_REMEMBERED:
            del self._known[next(iter(self._known))]

    def _trouble(self, text: str) -> None:
        _log.warning("the log cannot be followed; trying again", extra={"fields": {"error": text}})
