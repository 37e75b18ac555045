from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.events import DESTROYED, SIGNED_ENVELOPE, Draft, canonical_bytes, parse_signed
from cellos.core.evidence import ed25519
from cellos.core.evidence.chain import Chain, digest
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import ED25519, HMAC_SHA256, Signer
from cellos.core.evidence.verify import verify
from cellos.errors import EventSinkError
from cellos.supervisor.emitter import MAX_EVENT_BYTES, Emitter
from cellos.testing.sink import RecordingSink

RUN = {"cellId": "c", "specId": "c", "runId": "r", "specHash": "0" * 64}
NONCE = "1" * 64


SEED = bytes(range(32))
SIGNERS = {ED25519: Signer("k1", ED25519, SEED), HMAC_SHA256: Signer("k2", HMAC_SHA256, b"shared")}
RING = Keyring(ed25519={"k1": ed25519.public_key(ed25519.private_key(SEED).public_key().public_bytes_raw())}, hmac={"k2": b"shared"})


def emitter(
    spool: RecordingSink,
    *sinks: RecordingSink,
    redacted: frozenset[str] = frozenset(),
    signer: Signer | None = None,
    chain: bool = True,
) -> Emitter:
    ticks = itertools.count(1_700_000_000_000_000_000, 1_000_000)
    return Emitter(
        chain=Chain.first("r", "0" * 64, NONCE) if chain else None,
        spool=spool,
        sinks=sinks,
        redacted_fields=redacted,
        signer=signer,
        now_ns=lambda: next(ticks),
        random=bytes,
    )


def draft(kind: str = "dev.cellos.events.cell.lifecycle.v1.started", **data: object) -> Draft:
    return Draft(kind, {**RUN, **data})


END = draft(DESTROYED)


def sound(lines: list[bytes]) -> bool:
    return verify(lines).verified


def test_every_sink_gets_the_bytes_of_the_spool() -> None:
    spool, first, second = RecordingSink(), RecordingSink(), RecordingSink()
    events = emitter(spool, first, second)
    ids = [events.emit(draft()), events.emit(END)]
    assert spool.lines == first.lines == second.lines
    assert spool.ids == ids == [event["id"] for event in spool.events]
    assert events.count == 2
    assert events.complete
    assert sound(spool.lines)


def test_an_event_has_identity_time_and_link() -> None:
    spool = RecordingSink()
    emitter(spool).emit(draft())
    event = spool.events[0]
    assert list(event) == ["specversion", "id", "source", "type", "datacontenttype", "data", "time", "traceparent"]
    assert event["id"] == "018bcfe5-6800-7000-8000-000000000000"
    assert event["time"] == "2023-11-14T22:13:20.000000000+00:00"
    assert event["data"]["chain"] == {"seq": 0, "prev": Chain.first("r", "0" * 64, NONCE).prev, "nonce": NONCE}


def test_redaction_comes_before_everything() -> None:
    spool, sink = RecordingSink(), RecordingSink()
    events = emitter(spool, sink, redacted=frozenset({"argv", "chain"}))
    events.emit(draft(argv=["--password", "hunter2"]))
    assert b"hunter2" not in spool.lines[0] + sink.lines[0]
    assert spool.events[0]["data"]["argv"] == ["[redacted]"]
    assert spool.events[0]["data"]["chain"]["seq"] == 0


@pytest.mark.parametrize("algorithm", SIGNERS)
def test_redacted_then_linked_then_signed(algorithm: str) -> None:
    """The one order in which nothing secret is kept anywhere and every signature holds."""
    spool, first, second = RecordingSink(), RecordingSink(), RecordingSink()
    events = emitter(spool, first, second, redacted=frozenset({"argv"}), signer=SIGNERS[algorithm])
    ids = [events.emit(draft(argv=["--password", "hunter2"])), events.emit(END)]
    assert spool.lines == first.lines == second.lines
    assert b"hunter2" not in b"".join(spool.lines)
    previous = Chain.first("r", "0" * 64, NONCE).prev
    for line, event_id in zip(spool.lines, ids, strict=True):
        wrapper = json.loads(line)
        assert (wrapper["type"], wrapper["id"]) == (SIGNED_ENVELOPE, event_id)
        event, envelope = parse_signed(line)
        assert envelope is not None
        assert envelope.algorithm == algorithm
        assert event.members["chain"]["prev"] == previous, "the chain is one of events, not of their envelopes"
        previous = digest(canonical_bytes(event))
    assert json.loads(spool.lines[0])["data"]["event"]["data"]["argv"] == ["[redacted]"]
    assert events.head == previous
    report = verify(spool.lines, ring=RING, require_signed=True)
    assert report.verified
    assert report.runs[0].signature == "verified"


def test_a_secret_on_the_command_line_is_hidden_where_that_is_quoted() -> None:
    spool = RecordingSink()
    events = emitter(spool)
    events.hide(["hunter2", os.fsdecode(b"\xa4bytes")])
    events.emit(draft(argv=["--password=hunter2", "\xe4bytes", 1], program="hunter2", path="hunter2"))
    assert {name: spool.events[0]["data"][name] for name in ("argv", "program", "path")} == {
        "argv": ["--password=***", "\ufffd***", 1],
        "program": "***",
        "path": "hunter2",
    }
    events.emit(END)
    assert sound(spool.lines)


def test_a_redacted_event_that_somebody_fills_in_again_is_named() -> None:
    spool = RecordingSink()
    events = emitter(spool, redacted=frozenset({"argv"}), signer=SIGNERS[ED25519])
    events.emit(draft(argv=["x"]))
    events.emit(END)
    forged = [line.replace(b"[redacted]", b"/bin/true!") for line in spool.lines]
    assert forged != spool.lines
    [run] = verify(forged, ring=RING, require_signed=True).runs
    assert run.signature == "broken"


def test_the_signature_counts_for_the_size() -> None:
    """What goes to the sinks is the envelope: that must fit, not only the event in it."""
    size = len(spooled("x")) - 1
    assert len(spooled("x" * (MAX_EVENT_BYTES - size))) == MAX_EVENT_BYTES
    with pytest.raises(EventSinkError, match=f"event too large: {MAX_EVENT_BYTES + 1} bytes"):
        spooled("x" * (MAX_EVENT_BYTES - size + 1))


def spooled(text: str) -> bytes:
    spool = RecordingSink()
    emitter(spool, signer=SIGNERS[ED25519]).emit(draft(text=text))
    return spool.lines[0]


class TestWithoutAChain:
    """Events that belong to no run."""

    def test_they_are_not_linked(self) -> None:
        spool, sink = RecordingSink(), RecordingSink()
        events = emitter(spool, sink, chain=False)
        events.emit(Draft("dev.cellos.events.cell.trust.v1.keyset_verified", {"keysetId": "k"}))
        assert spool.lines == sink.lines
        assert spool.events[0]["data"] == {"keysetId": "k"}
        assert (events.count, events.head, events.complete) == (1, "", False)

    def test_but_redacted_and_signed(self) -> None:
        spool = RecordingSink()
        events = emitter(spool, chain=False, redacted=frozenset({"reason"}), signer=SIGNERS[ED25519])
        events.emit(Draft("dev.cellos.events.cell.policy.v1.rejected", {"specId": "c", "reason": "secret"}))
        assert spool.events[0]["data"]["event"]["data"] == {"reason": "[redacted]", "specId": "c"}
        report = verify(spool.lines, ring=RING, require_signed=True)
        assert (report.loose, report.faults) == (1, ())


def test_what_the_spool_refused_never_happened() -> None:
    spool, sink = RecordingSink(), RecordingSink()
    events = emitter(spool, sink)
    events.emit(draft())
    spool.refuse = lambda _: True
    with pytest.raises(EventSinkError):
        events.emit(draft())
    spool.refuse = lambda _: False
    events.emit(END)
    assert (events.count, events.lost) == (2, 1)
    assert spool.lines == sink.lines
    assert [event["data"]["chain"]["seq"] for event in spool.events] == [0, 1]
    assert sound(spool.lines)


def test_what_a_later_sink_refused_is_sent_before_the_next_event() -> None:
    spool, sink, other = RecordingSink(), RecordingSink(), RecordingSink()
    events = emitter(spool, sink, other)
    events.emit(draft())
    sink.refuse = lambda _: True
    with pytest.raises(EventSinkError):
        events.emit(draft())
    assert len(spool.lines) == len(other.lines) == 2
    assert not events.complete
    sink.refuse = lambda _: False
    events.emit(END)
    assert spool.lines == sink.lines == other.lines
    assert events.complete


def test_a_run_without_its_end_in_every_sink_is_not_complete() -> None:
    spool, sink = RecordingSink(), RecordingSink(refuse=lambda _: True)
    events = emitter(spool, sink)
    with pytest.raises(EventSinkError):
        events.emit(END)
    assert sound(spool.lines)
    assert not events.complete


def test_an_event_that_no_sink_could_take_is_refused_before_the_spool() -> None:
    spool = RecordingSink()
    events = emitter(spool)
    with pytest.raises(EventSinkError, match=rf"event too large: \d+ bytes exceeds MAX_EVENT_BYTES \({MAX_EVENT_BYTES} bytes\)"):
        events.emit(draft(argv=["x" * MAX_EVENT_BYTES]))
    events.emit(END)
    assert sound(spool.lines)


def test_nothing_follows_the_end() -> None:
    spool = RecordingSink()
    events = emitter(spool)
    events.emit(END)
    with pytest.raises(EventSinkError, match="after the end of the run"):
        events.emit(draft())
    assert sound(spool.lines)


def test_threads_make_one_chain() -> None:
    spool, sink = RecordingSink(), RecordingSink()
    events = emitter(spool, sink)
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(25):
            events.emit(draft())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events.emit(END)
    assert spool.lines == sink.lines
    assert [json.loads(line)["data"]["chain"]["seq"] for line in spool.lines] == list(range(201))
    assert sound(spool.lines)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_whatever_fails_when_the_spool_is_sound_and_the_sink_a_beginning_of_it(faults: list[tuple[bool, bool]]) -> None:
    spool, sink = RecordingSink(), RecordingSink()
    events = emitter(spool, sink)

    def attempt(one: Draft, spool_fails: bool, sink_fails: bool) -> None:
        spool.refuse, sink.refuse = refusing(spool_fails), refusing(sink_fails)
        try:
            events.emit(one)
        except EventSinkError:
            assert spool_fails or sink_fails
        else:
            assert not spool_fails
            assert not sink_fails
        assert sink.lines == spool.lines[: len(sink.lines)]

    for spool_fails, sink_fails in faults:
        attempt(draft(), spool_fails, sink_fails)
    attempt(END, False, False)
    assert sink.lines == spool.lines
    assert sound(spool.lines)


def refusing(answer: bool) -> Callable[[str], bool]:
    return lambda _: answer
