"""The controller: reads the log to its end and on, folds each formation, decides, writes, waits.

One task reads, another decides; nothing is decided before the log was read to its end once. Of each formation one decision is carried out
at a time, and the next one is made when its writes have come back through the log: state is the fold of what was read, and of nothing else.
A write that was refused because another came first is no error, as the news come by the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from cellos import __version__
from cellos.controller.acts import Acts
from cellos.controller.config import Config
from cellos.controller.lives import Lives
from cellos.core.events import parse_event
from cellos.core.evidence.sign import Signer
from cellos.core.formation.decide import Action, Ask, Close, Void, Write, decide
from cellos.core.formation.events import FORMATION_PREFIX
from cellos.core.formation.runs import RUN_PREFIX, WORK_PREFIX
from cellos.core.formation.state import FormationState
from cellos.core.formation.transitions import PHASES, TERMINAL, status_of
from cellos.core.ids import rfc3339
from cellos.errors import EventLogError, EvidenceError, LogTooOld, LogUnreachable, OutcomeUnknown, Rebuild, WrongSequence
from cellos.eventlog.batch import Message
from cellos.eventlog.connect import LogClient, pause
from cellos.eventlog.leases import CONTROLLERS, ControllerLease, Leases, ensure_leases
from cellos.eventlog.log import EventLog
from cellos.eventlog.reader import Reader
from cellos.eventlog.stored import Stored
from cellos.eventlog.stream import StreamSettings, ensure_stream

FIRST_RETREAT_MS = 20
LONGEST_RETREAT_MS = 250
"""How long a controller that came second leaves a formation to the one that came first."""
RETURN_MS = 5_000
"""After this, a write that did not come back through the log is no longer waited for."""
SET_ASIDE_MS = 60_000
"""How long a formation is left alone that nothing could be decided about."""
LONGEST_WAIT_SECONDS = 1.0
MOST_STALE_TIMERS = 1_000
WRITES_AT_ONCE = 24
"""Decisions of all formations, so that one of them is soon through."""
CONSIDERED_AT_ONCE = 50
"""Formations, before whatever else waits gets its turn."""
_TYPE = b'"type":"'
_OBSERVED = b'"type":"dev.cellos.events.cell.observability.'
"""None of these changes what is to be done, as a run tells of its start by itself; they are half of all events. Signed ones are read."""
_ENDS = tuple(f".{phase}" for phase in PHASES if status_of(phase) in TERMINAL)
_log = logging.getLogger("cellos.controller")


def steady_clock() -> Callable[[], int]:
    """The wall clock at this moment, and on by the monotonic one: nanoseconds since 1970 that never jump."""
    begin = time.time_ns() - time.monotonic_ns()
    return lambda: begin + time.monotonic_ns()


class _Formation:
    """One that has not ended."""

    __slots__ = ("busy", "due_ms", "failures", "hold", "hold_until_ms", "losses", "news", "not_before_ms", "state")

    def __init__(self, formation_id: str) -> None:
        self.state = FormationState(formation_id)
        self.news: list[Stored] = []
        """What was read and not applied yet: of formations that ended long ago, nothing is ever applied."""
        self.busy = False
        """Writes are under way."""
        self.hold = 0
        """Sequence of our last write: what is decided before it was read would be decided again."""
        self.hold_until_ms = 0
        self.not_before_ms = 0
        self.losses = self.failures = 0
        self.due_ms: int | None = None


class Controller:
    """`run` it as a task; cancel it to end. `clock` gives nanoseconds since 1970, `monotonic` seconds."""

    def __init__(
        self,
        config: Config,
        client: LogClient,
        *,
        stream: StreamSettings | None = None,
        signer: Signer | None = None,
        clock: Callable[[], int] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._client = client
        self._stream = stream or StreamSettings()
        self._clock = clock or steady_clock()
        self._acts = Acts(EventLog(client), signer=signer, now_ns=self._clock, random=os.urandom)
        self._leases = Leases(client, replicas=self._stream.replicas)
        self.lives = Lives(self._leases, monotonic=monotonic, on_gone=self._life_is_gone)
        self._formations: dict[str, _Formation] = {}
        self._settled: set[str] = set()
        """Formations that ended, or that others drive: what else the log has of them means nothing to us."""
        self._changed: set[str] = set()
        self._timers: list[tuple[int, str]] = []
        self._awake = asyncio.Event()
        self._position = 0
        self._live = False
        self._acting: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(WRITES_AT_ONCE)
        self._told = ""

    @property
    def formations(self) -> int:
        """How many are followed."""
        return len(self._formations)

    async def run(self) -> None:
        """Raises LogTooOld."""
        await self._make_streams()
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self.lives.run(), self._keep_lease(), self._decide(), self._read()):
                    tasks.create_task(work)
        finally:
            for task in self._acting:
                task.cancel()
            if self._acting:
                await asyncio.wait(self._acting)

    async def leave(self) -> None:
        """Take back the sign of life, where that is possible at once."""
        with contextlib.suppress(EventLogError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._leases.delete(CONTROLLERS + self._config.id, None)

    # --- reading ------------------------------------------------------------------------------------------------------------------------

    async def _make_streams(self) -> None:
        attempt = 0
        while True:
            try:
                await ensure_stream(self._client, replicas=self._stream.replicas, max_bytes=self._stream.max_bytes)
                await ensure_leases(self._client, replicas=self._stream.replicas)
            except LogTooOld:
                raise
            except EventLogError as error:
                self._trouble(error.text)
                attempt += 1
                await asyncio.sleep(pause(attempt))
            else:
                return

    async def _read(self) -> None:
        while True:
            name = f"cellos-controller-{self._config.id}"
            async with Reader(self._client, name=name, on_trouble=self._trouble, on_missing=self._make_streams) as reader:
                caught_up = asyncio.create_task(self._go_live(reader))
                try:
                    while True:
                        self._take(await reader.read())
                except Rebuild as error:
                    _log.warning("reading the log anew", extra={"fields": {"reason": error.reason, "error": error.text}})
                    self._forget()
                finally:
                    caught_up.cancel()

    async def _go_live(self, reader: Reader) -> None:
        await reader.caught_up.wait()
        self._live = True
        self._told = ""
        self._awake.set()
        _log.info("follows the log", extra={"fields": {"cursor": self._position, "formations": len(self._formations)}})

    def _take(self, batch: Sequence[Stored]) -> None:
        """Sort by formation. Runs for every event of the log: most are of no formation, or of one that ended."""
        formations, settled, changed = self._formations, self._settled, self._changed
        for stored in batch:
            subject = stored.subject
            if subject.startswith(RUN_PREFIX):
                if stored.data.startswith(_OBSERVED, stored.data.find(_TYPE)):
                    continue
                formation_id = subject.split(".", 4)[3]
            elif subject.startswith(FORMATION_PREFIX):
                formation_id = subject.split(".", 4)[3]
                if subject.endswith(_ENDS):
                    formations.pop(formation_id, None)
                    settled.add(formation_id)
            elif subject.startswith(WORK_PREFIX):
                formation_id = subject.split(".", 6)[5] if subject.count(".") > 5 else ""
            else:
                continue
            if formation_id in settled:
                continue
            formation = formations.get(formation_id)
            if formation is None:
                formation = formations[formation_id] = _Formation(formation_id)
            formation.news.append(stored)
            changed.add(formation_id)
        self._position = batch[-1].sequence
        self._told = ""
        if changed and self._live:
            self._awake.set()

    def _forget(self) -> None:
        """The log is another one."""
        self._live = False
        self._position = 0
        self._formations = {}
        self._settled = set()
        self._changed = set()
        self._timers = []

    def _life_is_gone(self, life: str) -> None:
        for formation_id, formation in self._formations.items():
            if life in formation.state.lives:
                self._consider_again(formation_id)

    # --- deciding -----------------------------------------------------------------------------------------------------------------------

    async def _decide(self) -> None:
        while True:
            seconds = LONGEST_WAIT_SECONDS
            if self._timers:
                seconds = min(seconds, max(0.0, (self._timers[0][0] - self._now_ms()) / 1000))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._awake.wait()
            self._awake.clear()
            if not self._live:
                continue
            now_ms = self._now_ms()
            while self._timers and self._timers[0][0] <= now_ms:
                due_ms, formation_id = heapq.heappop(self._timers)
                formation = self._formations.get(formation_id)
                if formation is not None and formation.due_ms == due_ms:
                    formation.due_ms = None
                    self._changed.add(formation_id)
            changed, self._changed = self._changed, set()
            for number, formation_id in enumerate(changed, 1):
                found = self._formations.get(formation_id)
                if found is not None:
                    self._consider_safely(found)
                if number % CONSIDERED_AT_ONCE == 0:
                    await asyncio.sleep(0)

    def _consider_safely(self, formation: _Formation) -> None:
        try:
            self._consider(formation)
        except Exception:  # noqa: BLE001  # a fault of ours that one formation brings out must not stop the others
            _log.exception("cannot decide about a formation", extra={"fields": {"formation": formation.state.id}})
            formation.not_before_ms = self._now_ms() + SET_ASIDE_MS
            self._wake_at(formation, formation.not_before_ms)

    def _consider(self, formation: _Formation) -> None:
        state = formation.state
        news, formation.news = formation.news, []
        for stored in news:
            try:
                event = parse_event(stored.data)
            except EvidenceError:
                _log.warning("event not applied: it is none", extra={"fields": {"seq": stored.sequence, "subject": stored.subject}})
                continue
            state.apply(stored.sequence, stored.subject, event, stored_ns=stored.time)
        if state.terminal or (state.created_ms is not None and not state.has_specs):
            self._settled.add(state.id)
            self._formations.pop(state.id, None)
            return
        if formation.busy:
            return
        now_ms = self._now_ms()
        if self._position < formation.hold and now_ms < formation.hold_until_ms:
            self._wake_at(formation, formation.hold_until_ms)
            return
        if now_ms < formation.not_before_ms:
            self._wake_at(formation, formation.not_before_ms)
            return
        self.lives.look_at(state.lives)
        decision = decide(state, now_ms, self.lives.gone, in_flight=self._config.in_flight)
        if decision.wake_at_ms is not None:
            self._wake_at(formation, decision.wake_at_ms)
        if decision.actions:
            formation.busy = True
            writes = [self._write(state, action) for action in decision.actions]
            task = asyncio.create_task(self._act(formation, writes))
            self._acting.add(task)
            task.add_done_callback(self._acting.discard)

    def _wake_at(self, formation: _Formation, due_ms: int) -> None:
        if formation.due_ms is None or due_ms < formation.due_ms:
            formation.due_ms = due_ms
            if len(self._timers) > MOST_STALE_TIMERS + 2 * len(self._formations):
                self._timers = [(each.due_ms, name) for name, each in self._formations.items() if each.due_ms is not None]
                heapq.heapify(self._timers)
            else:
                heapq.heappush(self._timers, (due_ms, formation.state.id))
            if self._timers[0][0] == due_ms:
                self._awake.set()

    def _consider_again(self, formation_id: str) -> None:
        self._changed.add(formation_id)
        self._awake.set()

    def _now_ms(self) -> int:
        return self._clock() // 1_000_000

    # --- writing ------------------------------------------------------------------------------------------------------------------------

    def _write(self, state: FormationState, action: Action) -> Callable[[], Awaitable[int]]:
        """The write that the action asks for, as of now; it gives the sequence that it got."""
        match action:
            case Write():
                messages = self._acts.messages(state, action)
                return lambda: self._tell_and_write(state.id, action, messages)
            case Ask():
                work = self._acts.work(state, action.dispatch)
                return lambda: self._acts.ask(work)
            case Void():
                return lambda: self._acts.void(action)
            case Close():
                spec = state.members[action.attempt.member_id].member.spec
                ttl_seconds = spec.lifetime.ttl_seconds if spec is not None else 0
                return lambda: self._acts.close(action, ttl_seconds=ttl_seconds)

    async def _tell_and_write(self, formation_id: str, action: Write, messages: list[Message]) -> int:
        sequence = await self._acts.write(messages)
        is_notable = status_of(action.phase) in TERMINAL or action.phase == "cancelling"
        fields = {"formation": formation_id, "phase": action.phase, "dispatched": len(action.dispatch)}
        fields |= {"reason": action.reason} if action.reason is not None else {}
        _log.log(logging.INFO if is_notable else logging.DEBUG, "told a phase", extra={"fields": fields})
        return sequence

    async def _act(self, formation: _Formation, writes: Sequence[Callable[[], Awaitable[int]]]) -> None:
        """Do all of it, and look again."""
        results = await asyncio.gather(*map(self._one, writes), return_exceptions=True)
        formation.busy = False
        now_ms = self._now_ms()
        lost = failed = False
        for result in results:
            match result:
                case int():
                    formation.hold = max(formation.hold, result)
                    formation.hold_until_ms = now_ms + RETURN_MS
                case WrongSequence():
                    lost = True
                case LogUnreachable() | OutcomeUnknown():  # whoever reads says so, once
                    failed = True
                case EventLogError():
                    failed = True
                    fields = {"formation": formation.state.id, "error": result.text}
                    _log.warning("a write was refused; trying again", extra={"fields": fields})
                case asyncio.CancelledError():
                    raise result
                case BaseException():
                    failed = True
                    _log.error("cannot write about a formation", exc_info=result, extra={"fields": {"formation": formation.state.id}})
        formation.losses = formation.losses + 1 if lost else 0
        formation.failures = formation.failures + 1 if failed else 0
        if lost:
            formation.not_before_ms = now_ms + min(LONGEST_RETREAT_MS, FIRST_RETREAT_MS << min(formation.losses - 1, 8))
        if failed:
            formation.not_before_ms = now_ms + int(pause(formation.failures) * 1000)
        self._consider_again(formation.state.id)

    async def _one(self, write: Callable[[], Awaitable[int]]) -> int:
        async with self._room:
            return await write()

    # --- the sign of life ---------------------------------------------------------------------------------------------------------------

    async def _keep_lease(self) -> None:
        started_at = rfc3339(self._clock())
        while True:
            lease = ControllerLease(
                controller=self._config.id,
                host=self._config.host,
                pid=os.getpid(),
                lease_ms=self._config.lease_ms,
                started_at=started_at,
                formations=len(self._formations),
                version=__version__,
            )
            with contextlib.suppress(EventLogError):  # whoever reads the log says why
                await self._leases.put(CONTROLLERS + self._config.id, msgspec.json.encode(lease), None)
            await asyncio.sleep(self._config.lease_ms / 3000)

    def _trouble(self, text: str) -> None:
        if text != self._told:
            _log.warning("no event log; trying again", extra={"fields": {"error": text}})
        self._told = text
