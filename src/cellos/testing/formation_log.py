"""The event log of one formation, in memory: it takes and refuses what NATS does, and time stands still until a test moves it.

Writers are those of the real system, as far as the log sees them: a server that admits and deletes, controllers that do what `decide`
says, nodes whose runs begin with `claimed` and go on as long as nobody else wrote to the run's subject.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from cellos.core.events import COMMAND_COMPLETED, DESTROYED, STARTED, Event
from cellos.core.formation.decide import Action, Ask, Close, Dispatch, Void, Write
from cellos.core.formation.documents import parse_formation
from cellos.core.formation.events import DELETED, created, phase_event, phase_of, subject_of, subjects_of
from cellos.core.formation.members import cell_id
from cellos.core.formation.runs import CLAIMED, NODE_LOST, Attempt, dispatched, run_subject, void, work_subject
from cellos.core.formation.state import FormationState
from cellos.core.formation.transitions import TERMINAL, Phase, status_of
from cellos.core.ids import rfc3339

FORMATION_ID = "018f6f0e-0000-7000-8000-000000000001"
START_MS = 1_800_000_000_000
SPEC: Mapping[str, Any] = {"run": {"argv": ["/bin/true"]}, "authority": {}, "lifetime": {"ttlSeconds": 60}}


def document(members: Mapping[str, Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
    """A formation whose first member is the coordinator. `members`: what each says beside its spec."""
    lead = next(iter(members))
    entries = [{"id": id, **({} if id == lead else {"authorizedBy": lead}), "use": "true", **more} for id, more in members.items()]
    return {"name": "demo", "coordinator": lead, "members": entries, "templates": {"true": SPEC}, **settings}


class Entry(NamedTuple):
    """A message as the log has it."""

    sequence: int
    subject: str
    event: Event
    stored_ns: int

    def apply(self, state: FormationState) -> bool:
        return state.apply(self.sequence, self.subject, self.event, stored_ns=self.stored_ns)


class Message(NamedTuple):
    """`last`: what the writer expects to be the last sequence under `filter`, or on the subject."""

    subject: str
    event: Event
    last: int | None = None
    filter: str | None = None


class FormationLog:
    """Begins with the event that admits the formation."""

    def __init__(self, document: Mapping[str, Any], *, formation_id: str = FORMATION_ID) -> None:
        self.id = formation_id
        self.now_ms = START_MS
        self.entries: list[Entry] = []
        self.formation = parse_formation(msgspec.json.encode(document))
        self._lasts: dict[str, int] = {}
        admitted = created(self.id, self.formation, **self._stamp())
        self.commit(Message(subject_of(self.id, "created"), admitted, 0, subjects_of(self.id)))

    # --- the log ------------------------------------------------------------------------------------------------------------------------

    def last(self, subject: str) -> int:
        """The last sequence of a subject, or under the filter of the formation's own events; 0 where there is none."""
        return self._lasts.get(subject, 0)

    def events(self, subject: str) -> list[Event]:
        return [entry.event for entry in self.entries if entry.subject == subject]

    def phases(self) -> list[Phase]:
        """Of the formation's own events."""
        return [phase for entry in self.entries if (phase := phase_of(entry.event.type)) is not None]

    def state(self) -> FormationState:
        """All of it, in order."""
        state = FormationState(self.id)
        for entry in self.entries:
            entry.apply(state)
        return state

    def commit(self, *messages: Message) -> bool:
        """All or none."""
        if any(each.last is not None and each.last != self.last(each.filter or each.subject) for each in messages):
            return False
        for each in messages:
            self.entries.append(Entry(len(self.entries) + 1, each.subject, each.event, self.now_ms * 1_000_000))
            self._lasts[each.subject] = len(self.entries)
            if phase_of(each.event.type) is not None:
                self._lasts[subjects_of(self.id)] = len(self.entries)
        return True

    def _stamp(self) -> dict[str, str]:
        return {"event_id": f"{len(self.entries) + 1}", "time": rfc3339(self.now_ms * 1_000_000)}

    def run_event(self, attempt: Attempt, kind: str, data: Mapping[str, Any]) -> Event:
        stamp = self._stamp()
        whole = {"cellId": cell_id(self.id, attempt.member_id), "specId": attempt.member_id, **data}
        return Event(id=stamp["event_id"], source="cellos-node", type=kind, data=whole, time=stamp["time"])

    # --- writers ------------------------------------------------------------------------------------------------------------------------

    def delete(self) -> None:
        """As the server does it: at once where nothing was dispatched."""
        phases = self.phases()
        if status_of(phases[-1]) in TERMINAL or phases[-1] == "cancelling":
            return
        self.append_phase("cancelling", reason=DELETED)
        if phases == ["created"]:
            self.append_phase("cancelled", reason=DELETED)

    def append_phase(self, phase: Phase, **more: Any) -> None:
        """Whatever anybody says of the formation."""
        more |= self._stamp()
        event = phase_event(self.id, phase, name="demo", cell_count=len(self.formation.members), **more)
        self.commit(Message(subject_of(self.id, phase), event))

    def act(self, action: Action, last_sequence: int, *, asks: bool = True) -> bool:
        """What a controller does that saw the formation's events up to `last_sequence`. False where the log did not take it.

        Without `asks` it dies as soon as it has told what it dispatches.
        """
        match action:
            case Write():
                return self._write(action, last_sequence, asks=asks)
            case Ask(dispatch):
                return self._ask(dispatch)
            case Void(attempt, reason):
                return self.commit(Message(run_subject(attempt), void(attempt, reason=reason, **self._stamp()), 0))
            case Close(attempt, run_id, life):
                # A controller reads the subject first: the events of the run have to be linked.
                before = self.events(run_subject(attempt))
                if not before or before[-1].type == DESTROYED:
                    return False
                data = {"outcome": "failed", "reason": NODE_LOST, "runId": run_id, "life": life}
                return self.commit(Message(run_subject(attempt), self.run_event(attempt, DESTROYED, data)))

    def _write(self, write: Write, last_sequence: int, *, asks: bool) -> bool:
        stamp = self._stamp()
        event = phase_event(
            self.id,
            write.phase,
            name="demo",
            cell_count=len(self.formation.members),
            failed_cell_ids=write.failed_cell_ids,
            reason=write.reason,
            dispatched=[each.attempt for each in write.dispatch],
            event_id=stamp["event_id"],
            time=stamp["time"],
        )
        if not self.commit(Message(subject_of(self.id, write.phase), event, last_sequence, subjects_of(self.id))):
            return False
        for each in write.dispatch if asks else ():
            self._ask(each)
        return True

    def _ask(self, dispatch: Dispatch) -> bool:
        event = dispatched(
            dispatch.attempt,
            name="demo",
            pool=dispatch.pool,
            work=dispatch.work,
            spec=dispatch.spec,
            on_disconnect=self.formation.on_disconnect,
            **self._stamp(),
        )
        return self.commit(Message(work_subject(dispatch.pool, dispatch.work, dispatch.attempt), event, 0))

    def claim(self, attempt: Attempt, *, life: str = "life", node: str = "node") -> Run | None:
        """None where somebody has it, or nobody may."""
        run_id = f"run-{attempt.member_id}-{attempt.number}-{life}"
        event = self.run_event(attempt, CLAIMED, {"life": life, "node": node, "runId": run_id})
        return Run(self, attempt, life, run_id) if self.commit(Message(run_subject(attempt), event, 0)) else None


class Run:
    """A run as its node knows it: the node has seen the events of it that it wrote itself."""

    def __init__(self, log: FormationLog, attempt: Attempt, life: str, run_id: str) -> None:
        self.attempt = attempt
        self.life = life
        self.run_id = run_id
        self.started = False
        self._log = log
        self._last = log.last(run_subject(attempt))

    def emit(self, kind: str, **data: Any) -> bool:
        """False where somebody else wrote to the run: it is closed."""
        event = self._log.run_event(self.attempt, kind, {"runId": self.run_id, **data})
        taken = self._log.commit(Message(run_subject(self.attempt), event, self._last))
        self._last = self._log.last(run_subject(self.attempt)) if taken else self._last
        return taken

    def start(self) -> bool:
        self.started = True
        return self.emit(STARTED)

    def end(self, *, outcome: str = "succeeded", exit_code: int = 0, reason: str | None = None) -> bool:
        if not self.emit(COMMAND_COMPLETED, exitCode=exit_code):
            return False
        return self.emit(DESTROYED, outcome=outcome, **({} if reason is None else {"reason": reason}))
