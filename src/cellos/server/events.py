"""GET /v1/events: a page of the log itself, the events' bytes as they are in it."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import Receive, Scope

from cellos.errors import EventLogError
from cellos.eventlog.api import STREAM
from cellos.eventlog.log import EventLog
from cellos.eventlog.stored import Stored
from cellos.server.filters import EVERYTHING, meets
from cellos.server.hub import is_event
from cellos.server.query import MAX_U64, bad_query, read_query, unsigned
from cellos.server.replies import Reply, json_reply
from cellos.server.state import ServerState, unavailable

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
STAGE_SECONDS = 1.5
PAGE_BYTES = 8 << 20
"""A page of large events ends early; `cursor` leads on."""
_CHUNK = 100
_log = logging.getLogger("cellos.server.events")


async def list_events(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """What follows `since`, and where to go on."""
    query = read_query(scope["query_string"], ("since", "limit", "subject"))
    since = unsigned(query, "since") or 0
    subject = query.get("subject") or None
    if subject is not None and not meets(subject):
        raise bad_query(f"subject: `{subject[:80]}` is no NATS filter of events, for example {EVERYTHING}")
    limit = min(unsigned(query, "limit") or DEFAULT_LIMIT, MAX_LIMIT)
    if state.phase == "alone":
        return json_reply(page_body([], max(state.cursor, since)))
    log = state.log
    if log is None:
        _log.warning("no connection to the event log yet", extra={"fields": {"stream": STREAM, "stage": "connect"}})
        raise unavailable()
    read, info = await asyncio.gather(_read(log, since, limit, subject), state.log_info(STAGE_SECONDS), return_exceptions=True)
    if isinstance(read, EventLogError):
        _log.warning("cannot read the event log", extra={"fields": {"stream": STREAM, "stage": "read", "error": str(read)}})
        raise unavailable()
    if isinstance(read, BaseException):
        raise read
    if isinstance(info, BaseException) and not isinstance(info, EventLogError):
        raise info
    tail = None if isinstance(info, EventLogError) else info.last_seq
    cursor = read[-1].sequence if read else clamp(since, tail)
    readable = [stored for stored in read if _is_readable(stored)]
    return json_reply(page_body(readable, cursor))


def clamp(cursor: int, tail: int | None) -> int:
    """No cursor leads beyond the end of the log, where that is known."""
    return cursor if tail is None else min(cursor, tail)


def page_body(events: list[Stored], cursor: int) -> bytes:
    """The events in their own bytes."""
    rows = b",".join([b'{"seq":%d,"event":%s}' % (each.sequence, each.data) for each in events])
    return b'{"events":[%s],"cursor":%d}' % (rows, cursor)


async def _read(log: EventLog, since: int, limit: int, subject: str | None) -> list[Stored]:
    """In pieces, so that no page of large events fills the memory. Raises EventLogError."""
    found: list[Stored] = []
    size = 0
    try:
        async with asyncio.timeout(STAGE_SECONDS):
            while len(found) < limit and size < PAGE_BYTES and since < MAX_U64:
                piece = await log.read(since, min(_CHUNK, limit - len(found)), subject=subject, seconds=STAGE_SECONDS)
                if not piece:
                    break
                found += piece
                size += sum(len(stored.data) for stored in piece)
                since = piece[-1].sequence
    except TimeoutError:
        if not found:
            raise EventLogError("no answer in time") from None
    except EventLogError:
        if not found:
            raise
    return found


def _is_readable(stored: Stored) -> bool:
    if is_event(stored.data):
        return True
    _log.warning("event left out: no JSON object in UTF-8", extra={"fields": {"stream": STREAM, "seq": stored.sequence}})
    return False
