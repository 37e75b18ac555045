"""Check a record of events against its chains and its signatures, and name what is wrong with it.

A record is JSON lines, possibly of several runs, interleaved; each run is checked on its own. Lines are read once and in order, and a run
takes the same small memory however long it is.

What a chain shows: any change to an event that another one follows, and any event that was left out, moved, repeated or added. What it
cannot show alone: a change to the last event and a tail that was cut off, since nothing follows them; and a record that was rewritten from
its first line on. The first two show when the digest of the last event is known from elsewhere (`heads`), all but the cut by signatures.

Signatures are checked where there are keys to check them with (`ring`). Then a run is signed from its first event to its last, in one
algorithm, or not at all; another key of the ring may take over, as when somebody else ends the run of a supervisor that died. Whether it
has to be signed is for the caller to say: a record from which all signatures were taken away looks like one that never had any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

import msgspec

from cellos.core.documents.wording import quoted
from cellos.core.events import DESTROYED, PREFIX, STARTED, Event, SignedEnvelope, canonical_bytes, read_line
from cellos.core.evidence.chain import digest, genesis
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import signature_fault
from cellos.errors import EvidenceError

MAX_LINE_BYTES = 1 << 20
"""Longer lines are no events: no sink of ours writes them."""
_RECENT = 64
"""How many runs are searched for the one that a stray event was taken from. It only serves a better text, so it must stay cheap."""
_HEX = frozenset("0123456789abcdef")
_OF_NO_RUN = tuple(
    PREFIX + kind
    for kind in ("trust.v1.", "authz.v1.rejected", "policy.v1.rejected", "name.v1.", "formation.v1.", "run.v1.dispatched", "run.v1.void")
)
"""How the types of events begin that need no chain. Whatever else has no run is not a record's."""
_TELL_SPEC_HASH = frozenset({STARTED, PREFIX + "run.v1.claimed"})
_MOST_SIGNERS = 16
"""How many key ids of a run are told. Without keys anybody may have written any number of them."""
NOT_SIGNED = "CELLOS_EVENT_REQUIRE_SIGNED=1 but payload is not a SignedEventEnvelopeV1"

Kind = Literal[
    "malformed",  # not an event, or a link that no writer of ours makes
    "truncated",  # the record stops within its last line, or before the event that `heads` names
    "edited",  # an event is not the one that was recorded
    "deleted",  # events are missing
    "reordered",  # an event stands later than it was written
    "duplicated",  # an event number comes twice
    "spliced",  # an event of a run that is otherwise not in this record
    "forged start",  # event 0 was not made for this run and this spec
    "after the end",  # an event follows `destroyed`
    "wrong count",  # `destroyed` counts other than its place says
    "unsigned",  # an event without a signature where there has to be one
    "unknown key",  # nobody is known by this key id
    "bad signature",  # the event is not what was signed, or not by this key
    "key swap",  # a run that was signed with a known key goes on with an unknown one
    "algorithm change",  # a run goes on in another algorithm
]
State = Literal[
    "verified",  # complete, every link fits
    "unfinished",  # every link fits, but there is no `destroyed` (yet)
    "broken",
    "unchained",  # no event carries a link: nothing can be checked
]
SignatureState = Literal[
    "none",  # no event is signed
    "unchecked",  # there are signatures, but no keys were given
    "verified",  # every event is signed, and every signature holds
    "broken",
]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong. `line` counts from 1; `text` is a clause about that line."""

    kind: Kind
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What is known of one run. `first` and `last` are the digests of its first and last event; `fault` is the first one."""

    cell_id: str
    run_id: str
    spec_id: str | None
    spec_hash: str | None
    state: State
    events: int
    first: str | None
    last: str | None
    start_checked: bool
    """Event 0 fits the run id and the spec hash. False also where the record has no spec hash to check it with."""
    signature: SignatureState
    signers: tuple[str, ...]
    """Key ids in the order in which they come. Only where `signature` is verified do they say who it was."""
    fault: Fault | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of a whole record. `faults` are of lines that belong to no run; `loose` counts the events that are of no run and carry no chain."""

    runs: tuple[RunReport, ...]
    faults: tuple[Fault, ...]
    loose: int

    @property
    def verified(self) -> bool:
        """Every run is complete, every link fits, and there is nothing else in the record."""
        return bool(self.runs) and not self.faults and all(run.state == "verified" for run in self.runs)


def verify(
    lines: Iterable[bytes], *, heads: Mapping[str, str] | None = None, ring: Keyring | None = None, require_signed: bool = False
) -> Report:
    """Check a record. `heads`: run id to the digest of its last event, where it is known from elsewhere.

    `ring`: the keys that signatures are checked with. `require_signed`: every event, also one of no run, has to be signed.
    """
    verifier = Verifier(ring=ring, require_signed=require_signed)
    for line in lines:
        verifier.feed(line)
    return verifier.finish(heads=heads)


class Verifier:
    """`verify`, a line at a time."""

    def __init__(self, *, ring: Keyring | None = None, require_signed: bool = False) -> None:
        # Signatures that must be there can only be checked; without a key all of them are of unknown keys.
        self._ring = Keyring() if ring is None and require_signed else ring
        self._require_signed = require_signed
        self._line = 0
        self._runs: list[_Run] = []
        self._current: dict[tuple[str, str], list[_Run]] = {}
        self._faults: list[Fault] = []
        self._loose = 0
        self._unended_bad_line = False

    def feed(self, line: bytes) -> int | None:
        """Take the next line, with or without its line feed. Gives the index in `Report.runs` of the run it was counted to, if any."""
        self._line += 1
        ended = line.endswith(b"\n")
        body = line[:-1] if ended else line
        self._unended_bad_line = False
        try:
            if len(body) > MAX_LINE_BYTES:
                raise EvidenceError(f"not an event: longer than {MAX_LINE_BYTES} bytes")
            event, envelope, ours = read_line(body)
        except EvidenceError as error:
            self._unended_bad_line = not ended
            self._bad_line(error.text)
            return None
        cell_id, run_id = event.members.get("cellId"), event.members.get("runId")
        link = event.members.get("chain")
        if not isinstance(cell_id, str) or not isinstance(run_id, str):
            if link is not None:
                self._bad_line("an event with a chain, but without the cellId and runId it belongs to")
            elif not event.type.startswith(_OF_NO_RUN):
                self._bad_line(f"an event of type {quoted(event.type)}, but without the cellId and runId it belongs to")
            else:
                self._loose += 1
                self._check_loose(event, envelope)
                if not ours:
                    self._fail("edited", self._line, _why_not_ours(body, event, envelope))
            return None
        canonical = body if ours and envelope is None else canonical_bytes(event)
        read = _Read(line=self._line, event=event, link=_parse_link(link, event), digest=digest(canonical))
        run = self._run_of(cell_id, run_id, read)
        run.signatures.take(read.line, envelope, canonical, run.fail)
        if not ours:
            run.fail("edited", self._line, _why_not_ours(body, event, envelope))
        if link is None:
            run.note_unlinked(read)
        else:
            run.take(read, bad_line=self._faults[-1].line if self._faults else 0)
        return run.index

    def finish(self, *, heads: Mapping[str, str] | None = None) -> Report:
        """There are no more lines."""
        faults = list(self._faults)
        if self._unended_bad_line:
            faults[-1] = replace(faults[-1], kind="truncated", text=f"the record stops within this line ({faults[-1].text})")
        known = heads or {}
        several = len(self._runs) > 1
        return Report(
            runs=tuple(run.report(head=known.get(run.run_id), several=several) for run in self._runs),
            faults=tuple(faults),
            loose=self._loose,
        )

    def _bad_line(self, text: str) -> None:
        self._fail("malformed", self._line, text)

    def _fail(self, kind: Kind, line: int, text: str) -> None:
        self._faults.append(Fault(kind=kind, line=line, text=text))

    def _check_loose(self, event: Event, envelope: SignedEnvelope | None) -> None:
        """An event of no run is signed or not, whatever others are."""
        if envelope is not None or self._require_signed:
            canonical = b"" if envelope is None else canonical_bytes(event)
            _Signatures(self._ring, required=self._require_signed).take(self._line, envelope, canonical, self._fail)

    def _run_of(self, cell_id: str, run_id: str, read: _Read) -> _Run:
        key = (cell_id, run_id)
        runs = self._current.get(key, [])
        for run in runs:
            if read.link is not None and run.head == read.link.prev:
                return run
        # A run id may be used again, since people set it; the second run has an event 0 of its own.
        again = bool(runs) and read.link is not None and read.link.seq == 0 and runs[-1].is_other_start(read)
        if runs and not again:
            return runs[-1]
        new = _Run(len(self._runs), cell_id, run_id, _Signatures(self._ring, required=self._require_signed))
        if read.link is not None and read.link.seq > 0:
            for other in self._runs[-_RECENT:]:
                if other.head == read.link.prev and not other.closed:
                    other.fail("edited", read.line, f"follows this run by its chain, but says it is of cell {cell_id}, run {run_id}")
        self._runs.append(new)
        self._current[key] = [run for run in runs[-1:] if not run.closed] + [new]
        return new


@dataclass(frozen=True, slots=True)
class _Link:
    seq: int
    prev: str
    nonce: str | None
    count: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    line: int
    event: Event
    link: _Link | None
    digest: str


class _Signatures:
    """The signatures of one run. `ring` None: they are counted, not checked."""

    def __init__(self, ring: Keyring | None, *, required: bool) -> None:
        self._ring = ring
        self._required = required
        self._broken = False
        self._algorithm: str | None = None
        self._unsigned_line = 0
        self.signers: tuple[str, ...] = ()

    @property
    def state(self) -> SignatureState:
        if self._broken:
            return "broken"
        if self._algorithm is None:
            return "none"
        return "unchecked" if self._ring is None else "verified"

    def take(self, line: int, envelope: SignedEnvelope | None, canonical: bytes, fail: Callable[[Kind, int, str], None]) -> None:
        """The next event, with the envelope it came in."""
        fault = self._fault(line, envelope, canonical)
        if fault is not None:
            self._broken = True
            fail(fault.kind, fault.line, fault.text)
        if envelope is None:
            self._unsigned_line = self._unsigned_line or line
            return
        self._algorithm = self._algorithm or envelope.algorithm
        if envelope.signer_kid not in self.signers and len(self.signers) < _MOST_SIGNERS:
            self.signers = (*self.signers, envelope.signer_kid)

    def _fault(self, line: int, envelope: SignedEnvelope | None, canonical: bytes) -> Fault | None:
        if self._ring is None:
            return None
        if envelope is None:
            if self._required:
                return Fault(kind="unsigned", line=line, text=NOT_SIGNED)
            if self._algorithm is not None:
                return Fault(kind="unsigned", line=line, text="carries no signature, although the events of its run before it do")
            return None
        if self._unsigned_line and self._algorithm is None:
            text = f"carries no signature, although an event of its run does, in line {line}"
            return Fault(kind="unsigned", line=self._unsigned_line, text=text)
        if self._algorithm not in (None, envelope.algorithm):
            text = f"is signed in {quoted(envelope.algorithm)}, the events of its run before it in {quoted(str(self._algorithm))}"
            return Fault(kind="algorithm change", line=line, text=text)
        refused = signature_fault(envelope, canonical, self._ring)
        if refused is None:
            return None
        if refused.kind == "unknown key" and self.signers and envelope.signer_kid not in self.signers:
            text = f"{refused.text}; the events of its run before it are signed by {quoted(self.signers[-1])}"
            return Fault(kind="key swap", line=line, text=text)
        return Fault(kind=refused.kind, line=line, text=refused.text)


class _Run:
    """The checks of one run, in a fixed amount of memory."""

    def __init__(self, index: int, cell_id: str, run_id: str, signatures: _Signatures) -> None:
        self.index, self.cell_id, self.run_id = index, cell_id, run_id
        self.signatures = signatures
        self.spec_id: str | None = None
        self.spec_hash: str | None = None
        self._unlinked_line = 0
        self.head: str | None = None
        self.closed_line = 0
        self._fault: Fault | None = None
        self._events = 0
        self._chained = 0
        self._first: tuple[_Link | None, str, str, int] | None = None
        self._next = 0
        self._last_line = 0
        self._missing = range(0)
        self._start_checked = False
        self._doubted = False

    @property
    def closed(self) -> bool:
        return self.closed_line > 0

    def is_other_start(self, read: _Read) -> bool:
        """An event 0 that is not this run's, while this run has one."""
        if self._first is None or self._first[0] is None or self._first[0].seq != 0:
            return False
        return read.event.id != self._first[1] and read.link is not None and read.link.nonce != self._first[0].nonce

    def fail(self, kind: Kind, line: int, text: str) -> None:
        """Note a fault. The first one stays: what comes after it may only be its consequence."""
        if self._fault is None:
            self._fault = Fault(kind=kind, line=line, text=text)

    def take(self, read: _Read, *, bad_line: int) -> None:
        """The next event that claims to be of this run. `bad_line`: the last line of the record that belongs to nobody."""
        event, link = read.event, read.link
        self._chained += 1
        self._note(event)
        if self._first is None:
            self._first = (link, event.id, read.digest, read.line)
        if link is None:
            self.fail("malformed", read.line, "its chain is not one that we write")
            self._follow(read, self._next)
        elif self._place(read, link, bad_line):
            self._follow(read, link.seq if link.prev != self.head else self._next)
        if event.type in _TELL_SPEC_HASH:
            self._check_start(event)
        if event.type == DESTROYED and not self.closed:
            self.closed_line = read.line
            if link is not None and link.count != link.seq + 1:
                self.fail("wrong count", read.line, f"destroyed says there are {link.count} events, but is number {link.seq + 1}")

    def note_unlinked(self, read: _Read) -> None:
        """An event of this run without a chain."""
        self._unlinked_line = self._unlinked_line or read.line
        self._note(read.event)

    def report(self, *, head: str | None, several: bool) -> RunReport:
        if self._chained and self._unlinked_line:
            self.fail("edited", self._unlinked_line, "carries no chain, although other events of its run do")
        if head is not None and self._chained and head != self.head:
            if self.closed:
                self.fail("edited", self._last_line, f"the last event has the digest {_short(self.head)}, not {_short(head)}")
            else:
                self.fail(
                    "truncated", self._last_line, f"the record stops after this line, before the event with the digest {_short(head)}"
                )
        fault = self._fault
        if fault is not None and fault.kind == "deleted" and self._events == 1 and several and fault.line > 1:
            fault = replace(fault, kind="spliced", text=f"{fault.text}: of this run, there is nothing else in the record")
        state: State = "unchained"
        if fault is not None:
            state = "broken"
        elif self._chained:
            state = "verified" if self.closed else "unfinished"
        return RunReport(
            cell_id=self.cell_id,
            run_id=self.run_id,
            spec_id=self.spec_id,
            spec_hash=self.spec_hash,
            state=state,
            events=self._events,
            first=self._first[2] if self._first else None,
            last=self.head,
            start_checked=self._start_checked,
            signature=self.signatures.state,
            signers=self.signatures.signers,
            fault=fault,
        )

    def _note(self, event: Event) -> None:
        self._events += 1
        spec_id = event.members.get("specId")
        if self.spec_id is None and isinstance(spec_id, str):
            self.spec_id = spec_id

    def _follow(self, read: _Read, seq: int) -> None:
        self._next, self.head, self._last_line = seq + 1, read.digest, read.line

    def _place(self, read: _Read, link: _Link, bad_line: int) -> bool:
        """Compare the link with where the run stands. True: the run goes on from this event."""
        line, seq, expected = read.line, link.seq, self._next
        doubted, self._doubted = self._doubted, False
        if seq in self._missing:
            if self._fault is not None and self._fault.kind == "deleted":
                self._fault = Fault(kind="reordered", line=line, text=f"event {seq} comes after event {expected - 1}")
            return False
        if self.closed:
            if seq < expected:
                self.fail("duplicated", line, f"event {seq} was there before")
            else:
                self.fail("after the end", line, f"event {seq} comes after destroyed, which is in line {self.closed_line}")
            return False
        if self.head is None:
            if seq > 0:
                self._missing = range(seq)
                self.fail("deleted", line, f"the run begins with event {seq}: {_events(0, seq - 1)} missing")
            return True
        if link.prev == self.head:
            if seq != expected:
                self.fail("edited", line, f"says it is event {seq}, but is event {expected} by its chain")
            return True
        if seq == expected:
            if doubted:
                # Neither what is before it nor what is after it fits: it is the odd one out, not the event before it.
                text = f"fits neither the event before it nor the one after it, line {line}"
                self._fault = Fault(kind="edited", line=self._last_line, text=text)
            elif self._fault is None:
                self.fail(
                    "edited",
                    self._last_line,
                    f"is not what line {line} was written after: its digest is {_short(self.head)}, not {_short(link.prev)}",
                )
                self._doubted = True
            return True
        if seq > expected:
            if bad_line > self._last_line:
                self.fail("malformed", bad_line, f"is not an event, and {_events(expected, seq - 1)} missing before line {line}")
            else:
                self.fail("deleted", line, f"{_events(expected, seq - 1)} missing before it")
            self._missing = range(expected, seq)
            return True
        self.fail("duplicated", line, f"event {seq} was there before")
        return False

    def _check_start(self, event: Event) -> None:
        spec_hash = event.members.get("specHash")
        if self.spec_hash is not None or not _is_digest(spec_hash) or self._first is None:
            return
        self.spec_hash = spec_hash
        link, _, _, line = self._first
        if link is None or link.seq != 0:
            return
        if link.nonce is None or link.prev != genesis(self.run_id, spec_hash, link.nonce):
            self.fail("forged start", line, f"event 0 was not made for run {self.run_id} and spec hash {spec_hash}")
        else:
            self._start_checked = True


def _parse_link(link: object, event: Event) -> _Link | None:
    """None for anything that `Chain.link` does not make."""
    if not isinstance(link, dict):
        return None
    seq, prev, nonce, count = link.get("seq"), link.get("prev"), link.get("nonce"), link.get("count")
    if type(seq) is not int or seq < 0 or not _is_digest(prev) or link.keys() - {"seq", "prev", "nonce", "count"}:
        return None
    if (seq == 0) != ("nonce" in link) or ("nonce" in link and not _is_digest(nonce)):
        return None
    if ("count" in link and type(count) is not int) or ("count" in link and event.type != DESTROYED):
        return None
    return _Link(seq, prev, nonce, count)


class _Wrapper(msgspec.Struct):
    """What an envelope that is a CloudEvent says of the event in it."""

    id: str


def _why_not_ours(body: bytes, event: Event, envelope: SignedEnvelope | None) -> str:
    if envelope is not None and (outer := msgspec.json.decode(body, type=_Wrapper).id) != event.id:
        return f"its envelope has the id {quoted(outer)}, the event in it the id {quoted(event.id)}"
    return "not in the form in which events are written, so it was rewritten since"


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


def _events(first: int, last: int) -> str:
    return f"event {first} is" if first == last else f"events {first} to {last} are"


def _short(value: str | None) -> str:
    return f"{value[:12]}…" if value else "?"
