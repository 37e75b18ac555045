"""The one place where a run's events become final: redacted, linked, signed, written down, sent.

Whoever has something to report hands a draft to `Emitter.emit`. The final bytes are computed once and appended to the run's spool before
anything else; then the same bytes go to every other sink, in order.

The spool is the truth. An event that it did not take does not exist: the chain stays where it was, and the next event follows the last
one that was taken. An event that a later sink did not take does exist: it is kept and sent before the next one, so that what a sink
holds is always a beginning of what the spool holds. Either way the caller learns of it by EventSinkError.
"""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cellos.core import ids
from cellos.core.events import DESTROYED, Draft, Event, canonical_bytes, finished
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.redact import redact
from cellos.errors import EventSinkError
from cellos.ports import EventSink

if TYPE_CHECKING:
    from cellos.supervisor.output import Masker

MASKED = frozenset({"argv", "program", "spawnError", "reason"})
"""Members in which a secret can stand because the document's author put it on the command line."""
MAX_EVENT_BYTES = 1_048_576
"""What every sink takes. Checked before the spool: an event that could never be delivered must not become part of the chain."""


class Signer(Protocol):
    """Signs events (`cellos.core.evidence.sign.Signer`)."""

    algorithm: str

    def wrap(self, event: Event, line: bytes) -> bytes:
        """The bytes of the envelope around an event; `line` are its canonical bytes."""
        ...


class Emitter:
    """The events of one run. Thread-safe. `now_ns` is the wall clock, `random` gives that many random bytes.

    Without a chain the events belong to no run: they are not linked, and none is the last.
    """

    def __init__(
        self,
        *,
        chain: Chain | None,
        spool: EventSink,
        sinks: Sequence[EventSink] = (),
        redacted_fields: frozenset[str] = frozenset(),
        signer: Signer | None = None,
        now_ns: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> None:
        self._chain = chain
        self._signer = signer
        self._spool = spool
        self._outlets = tuple(_Outlet(sink) for sink in sinks)
        self._redacted_fields = redacted_fields
        self._masker: Masker | None = None
        self._now_ns = now_ns
        self._random = random
        self._lock = _thread.allocate_lock()
        self._count = 0
        self._ended = False
        self._lost = 0

    @property
    def count(self) -> int:
        """Events that the spool took."""
        return self._count

    @property
    def head(self) -> str:
        """Digest of the last event that the spool took: noted elsewhere, it makes a cut or rewritten end of the record show."""
        return self._chain.prev if self._chain else ""

    @property
    def lost(self) -> int:
        """Events that the spool did not take."""
        return self._lost

    @property
    def complete(self) -> bool:
        """The last event, `destroyed`, was taken by the spool and by every sink."""
        return self._ended and not any(outlet.waiting for outlet in self._outlets)

    def hide(self, secrets: Iterable[str]) -> None:
        """From now on `***` stands for each of them in what quotes the command line."""
        words = tuple(secrets)
        if words:
            from cellos.supervisor.output import Masker

            self._masker = Masker(words)

    def masked(self, value: Any) -> Any:
        """A text, or a list of them, without what is to be hidden."""
        if self._masker is None or not isinstance(value, str | list):
            return value
        if isinstance(value, list):
            return [self.masked(each) for each in value]
        return (self._masker.feed(value.encode()) + self._masker.finish()).decode(errors="replace")

    def emit(self, draft: Draft) -> str:
        """Record one event; its id. Raises EventSinkError: for what that leaves behind see above."""
        with self._lock:
            if self._ended:
                raise EventSinkError(f"{draft.type} after the end of the run")
            now = self._now_ns()
            event_id = ids.uuid7(now // 1_000_000, self._random(ids.UUID_RANDOM_BYTES))
            ends = draft.type == DESTROYED
            data = redact(draft.data, self._redacted_fields)
            if self._masker is not None:
                data = {name: self.masked(value) if name in MASKED else value for name, value in data.items()}
            if self._chain is not None:
                data = self._chain.link(data, final=ends)
            event = finished(Draft(draft.type, data), event_id=event_id, time=ids.rfc3339(now))
            canonical = canonical_bytes(event)
            line = self._signer.wrap(event, canonical) if self._signer else canonical
            try:
                if len(line) > MAX_EVENT_BYTES:
                    raise EventSinkError(f"event too large: {len(line)} bytes exceeds MAX_EVENT_BYTES ({MAX_EVENT_BYTES} bytes)")
                self._spool.emit(event_id, line)
            except EventSinkError:
                self._lost += 1
                raise
            if self._chain is not None:
                self._chain.advance(canonical)
            self._count += 1
            self._ended = ends
            failure = None
            for outlet in self._outlets:
                failure = outlet.send(event_id, line) or failure
            if failure is not None:
                raise failure
            return event_id


class _Outlet:
    """A sink and what it still has to be given."""

    def __init__(self, sink: EventSink) -> None:
        self.sink = sink
        self.waiting: deque[tuple[str, bytes]] = deque()

    def send(self, event_id: str, line: bytes) -> EventSinkError | None:
        self.waiting.append((event_id, line))
        try:
            while self.waiting:
                self.sink.emit(*self.waiting[0])
                self.waiting.popleft()
        except EventSinkError as error:
            return error
        return None
