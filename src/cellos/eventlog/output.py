"""What cells wrote: the stream CELLOS_OUTPUT, one subject per run, at most 1 MiB of each run, for a week.

A message is a piece of one of the two outputs (`Cellos-Stream`), and says where in it the piece begins (`Cellos-Offset`). Where more came
than is kept, one message with `Cellos-Truncated` says so. The last message of a run is empty and has `Cellos-End`; of a run whose node died
it may be missing. Output is not evidence: it is in no event, and a full stream forgets the oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from nats import errors as nats_errors
from nats.aio.client import Client

from cellos.errors import EventLogError, LogUnreachable, MessageRefused, NoStream
from cellos.eventlog.api import NO_MESSAGE, NO_STREAM, ask, read_ack, without_prefix
from cellos.eventlog.connect import pause
from cellos.eventlog.log import read_message
from cellos.eventlog.pages import read_page
from cellos.eventlog.side_stream import NANO, ensure_side_stream
from cellos.eventlog.stored import Stored, read_headers

STREAM = "CELLOS_OUTPUT"
PREFIX = "cellos.output."
NEWS_PREFIX = "cellos.news.output."
"""Where the server tells what was stored. (Followers of the subject itself would be taken for a stream that answers.)"""
MAX_RUN_BYTES = 1 << 20
MAX_AGE_SECONDS = 7 * 24 * 3600
DEFAULT_MAX_BYTES = 1 << 30
MAX_PIECE_BYTES = 64 << 10
POLL_SECONDS = 1.0
ACK_SECONDS = 5.0
_PAGE_MESSAGES = 64
_BEHIND_SECONDS = 0.02
_INSUFFICIENT_STORAGE = (10047, 10028, 10023)
OutputStream = Literal["stdout", "stderr"]


class Chunk(Struct, frozen=True, kw_only=True):
    """A message of a run. `sequence` is a place to read on from. `truncated` and `end` come with no data."""

    sequence: int
    stream: OutputStream = "stdout"
    offset: int = 0
    data: bytes = b""
    truncated: bool = False
    end: bool = False


def output_config(*, replicas: int = 1, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Any]:
    """As STREAM.CREATE takes it."""
    return {
        "name": STREAM,
        "subjects": [f"{PREFIX}>"],
        "storage": "file",
        "num_replicas": replicas,
        "max_age": MAX_AGE_SECONDS * NANO,
        "max_bytes": max_bytes,
        "discard": "old",
        "allow_direct": True,
        "republish": {"src": f"{PREFIX}>", "dest": f"{NEWS_PREFIX}>", "headers_only": True},  # followers hear what is stored
    }


async def ensure_output(client: Client, *, replicas: int = 1, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Make the stream unless it is there; smaller where the server has not that much room. Raises EventLogError."""
    while True:
        config = output_config(replicas=replicas, max_bytes=max_bytes)
        try:
            await ensure_side_stream(client, config, needed=("subjects", "allow_direct"))
        except EventLogError as error:
            if error.number not in _INSUFFICIENT_STORAGE or max_bytes <= 2 * MAX_RUN_BYTES:
                raise
            max_bytes //= 2
        else:
            return


class OutputWriter:
    """Of one run, in the loop. What is added is written in the background, in order; without connection it waits, and is tried for ever.

    Memory is bounded by what is kept of a run. `on_trouble` is told, once per reason, why something has to wait.
    """

    def __init__(
        self, client: Client, run_id: str, *, replicas: int = 1, most: int = MAX_RUN_BYTES, on_trouble: Callable[[str], None] | None = None
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._replicas = replicas
        self._left = most
        self._on_trouble = on_trouble
        self._told = ""
        self._offsets: dict[OutputStream, int] = {"stdout": 0, "stderr": 0}
        self._waiting: deque[_Piece] = deque()
        self._number = 0
        self._truncated = False
        self._ended = False
        self._writing: asyncio.Task[None] | None = None

    def add(self, stream: OutputStream, data: bytes) -> None:
        """A piece of an output, secrets masked. What is more than is kept is counted and dropped."""
        if self._ended:
            return
        offset = self._offsets[stream]
        self._offsets[stream] = offset + len(data)
        kept = data[: self._left]
        self._left -= len(kept)
        for begin in range(0, len(kept), MAX_PIECE_BYTES):
            self._append(stream, offset + begin, kept[begin : begin + MAX_PIECE_BYTES])
        if len(kept) < len(data) and not self._truncated:
            self._truncated = True
            self._queue(_Piece(stream, offset + len(kept), bytearray(), "Cellos-Truncated"))
        self._wake()

    def end(self) -> None:
        """There will be no more. Idempotent."""
        if not self._ended:
            self._ended = True
            self._queue(_Piece("stdout", self._offsets["stdout"], bytearray(), "Cellos-End"))
            self._wake()

    async def drained(self) -> None:
        """Until everything that was added is acknowledged (or will never be taken)."""
        while self._writing is not None:
            await asyncio.wait({self._writing})

    async def close(self) -> None:
        """Give up what is not acknowledged. Idempotent."""
        self._ended = True
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait({self._writing})

    def _append(self, stream: OutputStream, offset: int, data: bytes) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.may_grow(stream, len(data)):
            last.data += data
        else:
            self._queue(_Piece(stream, offset, bytearray(data)))

    def _queue(self, piece: _Piece) -> None:
        self._number += 1
        piece.message_id = f"{self._run_id}.{self._number}"
        self._waiting.append(piece)

    def _wake(self) -> None:
        if self._writing is None and self._waiting:
            self._writing = asyncio.get_running_loop().create_task(self._write())
            self._writing.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing = None
        if not task.cancelled():
            task.result()
            self._wake()

    async def _write(self) -> None:
        attempt = 0
        while self._waiting:
            pieces = list(self._waiting)
            for piece in pieces:
                piece.is_final = True
            try:
                await self._send(pieces)
            except MessageRefused as error:
                self._tell(error.text)  # it will never be taken, and nobody is helped by a run that waits for it
            except EventLogError as error:
                attempt += 1
                self._tell(error.text)
                await asyncio.sleep(pause(attempt))
                continue
            attempt = 0
            for _ in pieces:
                self._waiting.popleft()

    async def _send(self, pieces: list[_Piece]) -> None:
        """All of them, in order; the ack of the last one stands for all. Message ids make it harmless to send them again."""
        subject = PREFIX + self._run_id
        connections = self._client.stats["reconnects"]
        last = pieces[-1]
        try:
            for piece in pieces[:-1]:
                await self._client.publish(subject, bytes(piece.data), headers=piece.headers)
            if self._client.stats["reconnects"] != connections:  # some of them may be lost, and must not come after the last
                raise nats_errors.StaleConnectionError
            answer = await self._client.request(subject, bytes(last.data), timeout=ACK_SECONDS, headers=last.headers)
        except nats_errors.NoRespondersError as error:
            await ensure_output(self._client, replicas=self._replicas)
            raise NoStream(f"{subject}: there was no stream {STREAM}") from error
        except (nats_errors.Error, OSError) as error:
            raise LogUnreachable(f"{subject}: {without_prefix(error)}") from error
        read_ack(answer.data, what=subject)

    def _tell(self, text: str) -> None:
        if self._on_trouble is not None and text != self._told:
            self._on_trouble(text)
        self._told = text


@dataclass(slots=True)
class _Piece:
    """A message that is not acknowledged yet. It grows until it is sent."""

    stream: OutputStream
    offset: int
    data: bytearray
    mark: str = ""
    message_id: str = ""
    is_final: bool = False

    def may_grow(self, stream: OutputStream, size: int) -> bool:
        return not (self.is_final or self.mark) and self.stream == stream and len(self.data) + size <= MAX_PIECE_BYTES

    @property
    def headers(self) -> dict[str, str]:
        block = {"Nats-Msg-Id": self.message_id, "Cellos-Stream": self.stream, "Cellos-Offset": str(self.offset)}
        return block | {self.mark: "true"} if self.mark else block


async def read_output(
    client: Client, run_id: str, after: int = 0, *, follow: bool = False, ended: Callable[[], bool] | None = None
) -> AsyncIterator[Chunk]:
    """What a run wrote, from after a sequence on, to its end; with `follow`, as it comes.

    A follower of a run that never says its end (its node died) goes on for ever, unless `ended` says that nothing will come any more.
    Raises LogUnreachable and other EventLogErrors; a stream that is not there holds nothing.
    """
    heard = asyncio.Event()

    async def hear(_message: object) -> None:
        heard.set()

    subject = PREFIX + run_id
    try:
        subscription = await client.subscribe(NEWS_PREFIX + run_id, cb=hear) if follow else None
    except (nats_errors.Error, OSError) as error:
        raise LogUnreachable(f"{subject}: {without_prefix(error)}") from error
    try:
        while True:
            heard.clear()
            is_over = not follow or (ended is not None and ended())  # asked before the page is read, so that nothing falls between
            page = await _page(client, subject, after)
            for stored in page:
                after = stored.sequence
                chunk = read_chunk(stored)
                yield chunk
                if chunk.end:
                    return
            if page:
                continue
            if is_over:
                if await _last(client, subject) <= after:
                    return
                await asyncio.sleep(_BEHIND_SECONDS)  # a page comes from any replica, and this one is behind
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await heard.wait()
    finally:
        if subscription is not None:
            with contextlib.suppress(nats_errors.Error, OSError):
                await subscription.unsubscribe()


async def _last(client: Client, subject: str) -> int:
    """The sequence of the last message, as the leader of the stream has it; 0 where there is none."""
    try:
        return read_message(await ask(client, f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": subject})).sequence
    except EventLogError as error:
        if error.number in {NO_MESSAGE, NO_STREAM}:
            return 0
        raise


async def _page(client: Client, subject: str, after: int) -> list[Stored]:
    try:
        return await read_page(client, STREAM, {"seq": after + 1, "next_by_subj": subject, "batch": _PAGE_MESSAGES})
    except NoStream as error:
        if error.number != NO_STREAM:
            raise
        return []


def read_chunk(stored: Stored) -> Chunk:
    """Of a message of the stream; what its headers do not say is taken for the beginning of stdout."""
    block = read_headers(stored.headers)
    offset = block.get("Cellos-Offset", "")
    return Chunk(
        sequence=stored.sequence,
        stream="stderr" if block.get("Cellos-Stream") == "stderr" else "stdout",
        offset=int(offset) if offset.isascii() and offset.isdigit() else 0,
        data=stored.data,
        truncated="Cellos-Truncated" in block,
        end="Cellos-End" in block,
    )
