"""Events of no run: what is to be said of the operator's files, and documents that a policy refused. No chain links them."""

from __future__ import annotations

from collections.abc import Sequence

from cellos.core.events import Draft
from cellos.eventlog.log import EventLog
from cellos.supervisor.compose import Host, make_emitter

SUBJECT = "cellos.events.v1"
"""Where a supervisor's go by default."""


async def tell_alone(host: Host, log: EventLog, drafts: Sequence[Draft]) -> None:
    """Write them into the log. Raises EventLogError, EventSinkError."""
    lines = _Lines()
    emitter = make_emitter(host, None, lines, ())
    for draft in drafts:
        emitter.emit(draft)
    for event_id, line in lines.taken:
        await log.publish(SUBJECT, line, message_id=event_id)


class _Lines:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []

    def emit(self, event_id: str, line: bytes) -> None:
        self.taken.append((event_id, line))

    def close(self) -> None:
        """Nothing is open."""
