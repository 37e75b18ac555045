"""The events of one run on their way into the log: in order, each once, and none after somebody else closed the run.

All events of a run go to one subject, each write expecting the one before it. Where many wait (NATS was away), they go together in one
atomic batch, whose first message carries the guard. While NATS is away, it tries again for ever; a write whose outcome is not known is
settled before anything follows it. When the log has an event that is not ours where ours belongs, the publisher is refused: it takes
nothing any more, and tells its owner, who has to end the run.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from cellos.errors import DuplicateInBatch, EventLogError, MessageRefused, OutcomeUnknown, WrongSequence
from cellos.eventlog.batch import Message
from cellos.eventlog.connect import pause
from cellos.eventlog.log import EventLog

MIN_GROUP_MESSAGES = 48
"""An atomic batch costs a NATS server (2.12) as much processor time as 35 single writes, and ten times their time on the disk."""
MAX_GROUP_MESSAGES = 100
MAX_GROUP_BYTES = 512 << 10


class RunPublisher:
    """Of one run. `last_sequence` is that of the last event on the subject, 0 for a run that is yet to be claimed.

    `on_refused` is called once, in the loop, when the run is no longer ours: WrongSequence; MessageRefused for an event that the log will
    never take. `on_trouble` is told, once per reason, why a write has to wait.
    """

    def __init__(
        self,
        log: EventLog,
        subject: str,
        *,
        last_sequence: int,
        on_refused: Callable[[EventLogError], None] | None = None,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        self.subject = subject
        self.last_sequence = last_sequence
        """Of the last event that the log has acknowledged."""
        self.refused: EventLogError | None = None
        self._log = log
        self._on_refused = on_refused
        self._on_trouble = on_trouble
        self._told = ""
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def pending(self) -> int:
        """Events that are not acknowledged yet."""
        return len(self._waiting)

    def add(self, event_id: str, line: bytes) -> None:
        """Queue an event, from any thread. After a refusal or `close` it goes nowhere."""
        self._waiting.append((event_id, line))
        self._loop.call_soon_threadsafe(self._wake)

    async def drained(self) -> None:
        """Until everything that was added is acknowledged. Raises what the publisher was refused with."""
        while self.refused is None and (self._waiting or self._writing is not None):
            self._wake()
            if self._writing is None:
                break
            await asyncio.wait({self._writing})
        if self.refused is not None:
            raise self.refused

    async def close(self) -> None:
        """Give up what is not acknowledged. Idempotent."""
        self._closed = True
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait({self._writing})

    def _wake(self) -> None:
        if self._writing is None and self._waiting and self.refused is None and not self._closed:
            self._writing = self._loop.create_task(self._write())
            self._writing.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing = None
        if not task.cancelled():
            task.result()
        self._wake()

    async def _write(self) -> None:
        while self._waiting:
            group = self._group()
            try:
                await self._write_group(group)
            except (WrongSequence, MessageRefused) as error:
                self.refused = error
                self._waiting.clear()
                if self._on_refused is not None:
                    self._on_refused(error)
                return
            for _ in group:
                self._waiting.popleft()

    def _group(self) -> list[Message]:
        """What goes into the next write: the guard is on its first message."""
        most = MAX_GROUP_MESSAGES if len(self._waiting) >= MIN_GROUP_MESSAGES else 1
        group: list[Message] = []
        size = 0
        for event_id, line in self._waiting:
            size += len(line)
            if group and (size > MAX_GROUP_BYTES or len(group) == most):
                break
            expected = None if group else self.last_sequence
            group.append(Message(subject=self.subject, payload=line, message_id=event_id, expected_last=expected))
        return group

    async def _write_group(self, group: list[Message]) -> None:
        """Raises WrongSequence, MessageRefused."""
        attempt = 0
        while True:
            try:
                self.last_sequence = await self._try(group)
            except (WrongSequence, MessageRefused):
                raise
            except EventLogError as error:
                attempt += 1
                self._tell(error.text)
                await asyncio.sleep(pause(attempt))
            else:
                self._told = ""
                return

    async def _try(self, group: list[Message]) -> int:
        """Write, or find out that it was written. Raises EventLogError: WrongSequence only where another's event is in the place."""
        try:
            if len(group) == 1:
                only = group[0]
                ack = await self._log.publish(self.subject, only.payload, message_id=only.message_id, expected_last=only.expected_last)
            else:
                ack = await self._log.publish_batch(group)
        except (OutcomeUnknown, WrongSequence, DuplicateInBatch) as error:
            found = await self._log.last(self.subject)
            if found is not None and found.message_id == group[-1].message_id:
                return found.sequence
            if (found.sequence if found is not None else 0) != self.last_sequence:
                raise WrongSequence(f"{self.subject}: the run was closed by somebody else") from error
            if isinstance(error, DuplicateInBatch):
                raise MessageRefused(f"{self.subject}: an event of this id is in the log, and not where it belongs") from error
            raise OutcomeUnknown(error.text) from error  # it is not there: it may still come, or be written again
        return ack.sequence

    def _tell(self, text: str) -> None:
        if self._on_trouble is not None and text != self._told:
            self._on_trouble(text)
        self._told = text
