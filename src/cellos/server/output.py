"""GET /v1/cells/{id}/output: what a cell wrote, from the stream of outputs, wherever the cell ran and whether its node still is there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from cellos.core.cell import CellRecord
from cellos.core.formation.views import place_of
from cellos.core.ids import TimeSyntaxError, unix_ns
from cellos.core.output import NDJSON, STREAMS, OutputEnd, OutputState, Piece, line
from cellos.core.problem import cell_not_found, problem
from cellos.errors import EventLogError
from cellos.eventlog.output import MAX_AGE_SECONDS, Chunk, read_output
from cellos.server.query import bad_query, read_query, unsigned
from cellos.server.replies import Header, Refused, Reply, StreamedReply
from cellos.server.state import ServerState

QUIET_SECONDS = 15.0
"""A follower in lines of JSON gets a blank one after so long without any."""
GRACE_SECONDS = 2.0
"""A run's `destroyed` may come before the end of its output; no longer than this."""
_SECOND = 1_000_000_000
_PARAMETERS = ("run", "stream", "follow", "format", "after")
_RUN = re.compile(r"[A-Za-z0-9_-]{1,128}")  # one token of a subject
_FLAGS = {"0": False, "false": False, "1": True, "true": True, "": True}
_RAW: Header = (b"content-type", b"application/octet-stream")
_LINES: Header = (b"content-type", NDJSON.encode())


class _Wanted(msgspec.Struct, frozen=True):
    """What is asked for."""

    run: str | None
    stream: str | None
    follow: bool
    raw: bool
    after: int

    def shows(self, chunk: Chunk) -> bool:
        return bool(chunk.data) and self.stream in {None, chunk.stream}


async def get_output(state: ServerState, scope: Scope, receive: Receive) -> Reply:
    """All that is there, or with `follow` what comes until the run has ended."""
    wanted = _read(scope["query_string"])
    cell_id: str = scope["path_params"]["id"]
    row = state.projection.cell(cell_id)
    record = msgspec.json.decode(row, type=CellRecord) if row is not None else None
    if record is None and not _is_member(state, cell_id):
        raise Refused(cell_not_found(cell_id))
    run = wanted.run or (record.run_id if record is not None else None)
    if run is None or not _RUN.fullmatch(run):  # not begun, or a run of somebody who writes no output
        end = OutputEnd(run_id=run, state="none" if record is not None and record.state == "destroyed" else "open")
        return _whole([], end, wanted)
    client = state.required_client()
    place = _Place(state, cell_id, run)
    if record is not None and record.run_id == run:
        place.ended_at = _nanoseconds(record.destroyed_at)
    elif not await place.look() and not place.is_over:
        raise Refused(problem("not-found", f"cell {cell_id} has no run {run}"))
    if wanted.follow and not place.is_over:
        chunks = read_output(client, run, wanted.after, follow=True, ended=place.may_end)
        return StreamedReply(_followed(state, chunks, place, wanted), headers=_headers(OutputEnd(run_id=run, state="open"), wanted))
    chunks = read_output(client, run, wanted.after, follow=place.is_over, ended=place.may_end)
    found = [chunk async for chunk in chunks]
    return _whole(found, place.end(found, wanted.after), wanted)


def _read(raw: bytes) -> _Wanted:
    query = read_query(raw, _PARAMETERS, strict=True)
    run, stream, follow, form = query.get("run"), query.get("stream"), query.get("follow", "0").lower(), query.get("format", "raw")
    if run is not None and not _RUN.fullmatch(run):
        raise bad_query("run: not the id of a run")
    if stream not in {None, *STREAMS}:
        raise bad_query("stream: want stdout or stderr, or leave it out for both")
    if follow not in _FLAGS:
        raise bad_query("follow: want 1 or 0")
    if form not in {"raw", "ndjson"}:
        raise bad_query("format: want raw or ndjson")
    return _Wanted(run, stream, _FLAGS[follow], form == "raw", unsigned(query, "after") or 0)


def _is_member(state: ServerState, cell_id: str) -> bool:
    """Whether it is the cell of a member that has not begun."""
    place = place_of(cell_id)
    record = state.projection.formation(place[0]) if place is not None else None
    if place is None or record is None:
        return False
    members = msgspec.json.decode(record)["document"].get("members", ())
    return any(isinstance(each, dict) and each.get("id") == place[1] for each in members)


class _Place:
    """A run of a cell, as far as it is known."""

    def __init__(self, state: ServerState, cell_id: str, run: str) -> None:
        self._state = state
        self._cell_id = cell_id
        self.run = run
        self.ended_at: int | None = None
        """In nanoseconds since 1970, where it is known."""
        # Nobody but a node writes output.
        self._waits = place_of(cell_id) is not None
        self._first_over: float | None = None

    async def look(self) -> bool:
        """Ask the events of its formation: whether there is such a run, and whether it has ended. Raises EventLogError.

        A run that is claimed and has not begun is in no list yet, and one by whose node's clock it began before an earlier one never is.
        """
        place = place_of(self._cell_id)
        if place is None:
            return False
        story = await self._state.stories.story(place[0], self._state.required_log())
        attempt = next((each for each in story.attempts(place[1]) if each.run_id == self.run), None)
        if attempt is not None:
            self.ended_at = _nanoseconds(attempt.ended_at)
        return attempt is not None

    @property
    def is_over(self) -> bool:
        return self.ended_at is not None or self._state.projection.has_ended(self._cell_id, self.run)

    def may_end(self) -> bool:
        """Whether there is no output to come any more."""
        if not self.is_over:
            return False
        if not self._waits or (self.ended_at is not None and self._age > GRACE_SECONDS):
            return True
        now = asyncio.get_running_loop().time()
        if self._first_over is None:
            self._first_over = now
        return now - self._first_over >= GRACE_SECONDS

    @property
    def _age(self) -> float:
        """Seconds since its end."""
        return 0.0 if self.ended_at is None else (self._state.clock() - self.ended_at) / _SECOND

    def end(self, chunks: Sequence[Chunk], after: int) -> OutputEnd:
        return OutputEnd(run_id=self.run, state=self._output(chunks, after), truncated=any(chunk.truncated for chunk in chunks))

    def _output(self, chunks: Sequence[Chunk], after: int) -> OutputState:
        if any(chunk.end for chunk in chunks):
            return "complete" if after or _is_whole(chunks) else "partial"
        if not self.is_over:
            return "open"
        if chunks or after:
            return "partial"
        return "gone" if self._age > MAX_AGE_SECONDS else "none"


def _is_whole(chunks: Sequence[Chunk]) -> bool:
    """Whether nothing before or between is missing."""
    places = dict.fromkeys(STREAMS, 0)
    for chunk in chunks:
        if chunk.data:
            if chunk.offset != places[chunk.stream]:
                return False
            places[chunk.stream] += len(chunk.data)
    return True


def _whole(chunks: Sequence[Chunk], end: OutputEnd, wanted: _Wanted) -> Reply:
    shown = [chunk for chunk in chunks if wanted.shows(chunk)]
    if wanted.raw:
        body = b"".join(chunk.data for chunk in shown)
    else:
        body = b"".join([*(line(_piece(chunk, end.run_id)) for chunk in shown), line(end)])
    return Reply(body, headers=_headers(end, wanted))


async def _followed(state: ServerState, chunks: AsyncIterator[Chunk], place: _Place, wanted: _Wanted) -> AsyncGenerator[bytes]:
    """Ends without a last line where the log is away, or the server ends: the client comes again."""
    kept: list[Chunk] = []
    ending = asyncio.ensure_future(state.ending.wait())
    following: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(chunks, None))
            waiting: set[asyncio.Future[Any]] = {following, ending}
            done, _ = await asyncio.wait(waiting, timeout=QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if ending in done:
                return
            try:
                if not done:
                    if not wanted.raw:
                        yield b"\n"
                    if not place.is_over:
                        await place.look()
                    continue
                chunk = following.result()
            except EventLogError:
                return
            following = None
            if chunk is None:
                if not wanted.raw:
                    yield line(place.end(kept, wanted.after))
                return
            kept.append(chunk)
            if wanted.shows(chunk):
                yield chunk.data if wanted.raw else line(_piece(chunk, place.run))
    finally:
        ending.cancel()
        if following is not None:
            following.cancel()
            await asyncio.wait({following})
        await chunks.aclose()  # type: ignore[attr-defined]  # it is a generator


def _piece(chunk: Chunk, run: str | None) -> Piece:
    return Piece(run_id=run, sequence=chunk.sequence, stream=chunk.stream, offset=chunk.offset, data=chunk.data)


def _headers(end: OutputEnd, wanted: _Wanted) -> tuple[Header, ...]:
    found = [_RAW if wanted.raw else _LINES, (b"cellos-output", end.state.encode()), (b"cache-control", b"no-store")]
    if end.run_id is not None and _RUN.fullmatch(end.run_id):
        found.append((b"cellos-run", end.run_id.encode()))
    if end.truncated:
        found.append((b"cellos-truncated", b"true"))
    return tuple(found)


def _nanoseconds(time: str | None) -> int | None:
    try:
        return None if time is None else unix_ns(time)
    except TimeSyntaxError:
        return None
