"""Signed streams: what keys add to what `test_verify` shows of chains."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core import events
from cellos.core.events import DESTROYED, PREFIX, Draft, Event, RunIdentity, canonical_bytes, finished, parse_event
from cellos.core.evidence import ed25519
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import Signer
from cellos.core.evidence.verify import Report, verify

SPEC_HASH = "5e" * 32
K1, K2, OUTSIDER = (Signer(kid, "ed25519", bytes([seed]) * 32) for kid, seed in (("k1", 1), ("k2", 2), ("k3", 3)))
IMPOSTOR = Signer("k1", "ed25519", b"\x09" * 32)
SHARED = Signer("k1", "hmac-sha256", b"shared secret")


def public(seed: int) -> Any:
    return ed25519.public_key(ed25519.private_key(bytes([seed]) * 32).public_key().public_bytes_raw())


RING = Keyring(ed25519={"k1": public(1), "k2": public(2)}, hmac={"k1": b"shared secret"})


def plain(run: str = "run-1", *, middle: int = 3, nonce: str = "0f" * 32) -> list[bytes]:
    """The lines of one run, not signed."""
    identity = RunIdentity(cell_id="cell", spec_id="spec", run_id=run, spec_hash=SPEC_HASH)
    about = {"cellId": "cell", "specId": "spec", "runId": run}
    drafts = [events.started(identity, ttl_seconds=60, isolation={})]
    drafts += [Draft(f"{events.PREFIX}observability.v1.process_spawned", {**about, "argc": number}) for number in range(middle)]
    drafts.append(events.destroyed(identity, ttl_seconds=60, outcome="succeeded", residue_class="none"))
    chain = Chain.first(run, SPEC_HASH, nonce)
    lines = []
    for number, draft in enumerate(drafts):
        linked = Draft(draft.type, chain.link(draft.data, final=draft.type == DESTROYED))
        line = canonical_bytes(finished(linked, event_id=f"{run}-{number}", time=f"2026-01-01T00:00:{number:02d}.000000000+00:00"))
        chain.advance(line)
        lines.append(line)
    return lines


def wrapped(line: bytes, by: Signer = K1) -> bytes:
    return by.wrap(parse_event(line), line)


def signed(run: str = "run-1", by: Signer = K1, **shape: Any) -> list[bytes]:
    return [wrapped(line, by) for line in plain(run, **shape)]


def edit(line: bytes, change: Callable[[dict[str, Any]], None], *, inside: bool = True) -> bytes:
    """A signed line as an editor who knows our form, but has no key, would write it."""
    outer = json.loads(line)
    change(outer["data"]["event"] if inside else outer)
    if inside:
        outer |= {name: outer["data"]["event"][name] for name in ("id", "time", "traceparent")}
    return canonical_bytes(Event(**outer))


def check(lines: list[bytes], **options: Any) -> Report:
    return verify(lines, ring=RING, require_signed=True, **options)


def only(report: Report) -> tuple[str, int]:
    (run,) = report.runs
    assert (run.state, report.verified) == ("broken", False)
    assert run.fault is not None
    return run.fault.kind, run.fault.line


def text(report: Report) -> str:
    fault = report.runs[0].fault
    assert fault is not None
    return fault.text


STREAMS = st.builds(signed, middle=st.integers(1, 5))


class TestGood:
    @given(STREAMS)
    def test_a_whole_run(self, lines: list[bytes]) -> None:
        report = check(lines)
        (run,) = report.runs
        assert (report.verified, run.state, run.signature, run.signers) == (True, "verified", "verified", ("k1",))

    def test_shared_keys(self) -> None:
        assert check(signed(by=SHARED)).verified

    def test_bare_envelopes(self) -> None:
        lines = [json.dumps(json.loads(line)["data"]).encode() for line in signed()]
        assert check(lines).runs[0].signature == "verified"

    def test_without_keys_nothing_is_checked(self) -> None:
        (run,) = verify(signed(by=OUTSIDER)).runs
        assert (run.state, run.signature, run.signers) == ("verified", "unchecked", ("k3",))

    def test_an_unsigned_run_where_none_has_to_be(self) -> None:
        report = verify(plain(), ring=RING)
        assert (report.verified, report.runs[0].signature, report.runs[0].signers) == (True, "none", ())
        assert [run.signature for run in verify([*plain(), *signed("run-2")], ring=RING).runs] == ["none", "verified"]

    def test_a_known_key_takes_over(self) -> None:
        """As when a supervisor dies and somebody else ends its run."""
        lines = plain()
        report = check([*(wrapped(line) for line in lines[:3]), *(wrapped(line, K2) for line in lines[3:])])
        assert report.verified
        assert report.runs[0].signers == ("k1", "k2")

    def test_events_of_no_run(self) -> None:
        loose = canonical_bytes(Event(id="1", source="s", type=PREFIX + "trust.v1.keyset_verified", data={"keysetId": "x"}))
        assert check([wrapped(loose), *signed()]).verified
        assert verify([loose, *signed()], ring=RING).verified


class TestFaults:
    @pytest.mark.parametrize("member", ["source", "datacontenttype", "specversion"])
    def test_an_envelope_that_is_not_the_one_that_was_written(self, member: str) -> None:
        envelope = json.loads(signed()[0]) | {member: "forged"}
        assert only(check([json.dumps(envelope, separators=(",", ":")).encode(), *signed()[1:]])) == ("edited", 1)

    @given(STREAMS, st.data())
    def test_any_edit(self, lines: list[bytes], data: st.DataObject) -> None:
        """Of the last event, too, and without any witness."""
        place = data.draw(st.integers(0, len(lines) - 1))
        member = data.draw(st.sampled_from(["id", "time", "source", "type", "data", "seq", "traceparent"]))

        def change(event: dict[str, Any]) -> None:
            if member == "data":
                event["data"]["new"] = 1
            elif member == "seq":
                event["data"]["chain"]["seq"] += 1
            else:
                event[member] = f"{event[member]}x"

        lines[place] = edit(lines[place], change)
        assert only(check(lines)) == ("bad signature", place + 1)

    @given(STREAMS, st.data())
    def test_any_changed_byte(self, lines: list[bytes], data: st.DataObject) -> None:
        """It is named, or it is of the envelope's own attributes, which say nothing: every event is the one that was signed."""
        before = [parse_event(line) for line in lines]
        place = data.draw(st.integers(0, len(lines) - 1))
        at = data.draw(st.integers(0, len(lines[place]) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda byte: byte not in (lines[place][at], 10)))
        lines[place] = lines[place][:at] + bytes([byte]) + lines[place][at + 1 :]
        report = check(lines)
        if report.verified:
            assert [parse_event(line) for line in lines] == before
            return
        assert place + 1 in {fault.line for fault in [*report.faults, *(run.fault for run in report.runs)] if fault}

    @given(STREAMS, st.data())
    def test_any_deletion(self, lines: list[bytes], data: st.DataObject) -> None:
        gone = data.draw(st.integers(0, len(lines) - 2))
        assert only(check(lines[:gone] + lines[gone + 1 :])) == ("deleted", gone + 1)

    @given(STREAMS, st.integers(1, 2))
    def test_a_cut_end_is_no_verified_run(self, lines: list[bytes], cut: int) -> None:
        report = check(lines[:-cut])
        assert ([run.state for run in report.runs], report.verified) == (["unfinished"], False)

    @given(STREAMS, st.data())
    def test_any_reorder(self, lines: list[bytes], data: st.DataObject) -> None:
        source, target = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True))
        lines.insert(target, lines.pop(source))
        assert only(check(lines))[0] == "reordered"

    @given(STREAMS, st.data())
    def test_any_repetition(self, lines: list[bytes], data: st.DataObject) -> None:
        again = data.draw(st.integers(0, len(lines) - 1))
        assert only(check([*lines, lines[again]])) == ("duplicated", len(lines) + 1)

    @given(STREAMS, st.data())
    def test_any_splice(self, lines: list[bytes], data: st.DataObject) -> None:
        """From another run that the same key has signed; as it is, and given to this run."""
        other = signed("run-2", nonce="1f" * 32)
        stray, place = data.draw(st.integers(1, len(other) - 1)), data.draw(st.integers(1, len(lines)))
        report = check([*lines[:place], other[stray], *lines[place:]])
        faults = [run.fault for run in report.runs if run.fault]
        assert [(fault.kind, fault.line) for fault in faults] == [("spliced", place + 1)]
        moved = edit(other[stray], lambda event: event["data"].update(runId="run-1"))
        assert only(check([*lines[:place], moved, *lines[place:]])) == ("bad signature", place + 1)

    def test_a_splice_from_a_run_of_the_same_id(self) -> None:
        ours, theirs = signed(), signed(nonce="1f" * 32)
        assert only(check(ours[:3] + theirs[3:])) == ("edited", 3)

    @given(st.data())
    def test_any_key_swap(self, data: st.DataObject) -> None:
        lines = plain()
        first = data.draw(st.integers(1, len(lines) - 1))
        last = data.draw(st.integers(first + 1, len(lines)))
        kind, by = data.draw(st.sampled_from([("key swap", OUTSIDER), ("bad signature", IMPOSTOR), ("algorithm change", SHARED)]))
        mixed = [wrapped(line, by if first <= number < last else K1) for number, line in enumerate(lines)]
        assert only(check(mixed)) == (kind, first + 1)

    def test_a_run_signed_by_nobody_known(self) -> None:
        assert only(check(signed(by=OUTSIDER))) == ("unknown key", 1)
        assert text(check(signed(by=OUTSIDER))) == 'signed event envelope: unknown ed25519 signer kid "k3"'

    def test_the_texts(self) -> None:
        lines = plain()
        mixed = [*signed()[:2], *(wrapped(line, OUTSIDER) for line in lines[2:])]
        assert text(check(mixed)) == (
            'signed event envelope: unknown ed25519 signer kid "k3"; the events of its run before it are signed by "k1"'
        )
        mixed = [*signed()[:2], *(wrapped(line, SHARED) for line in lines[2:])]
        assert text(check(mixed)) == 'is signed in "hmac-sha256", the events of its run before it in "ed25519"'
        assert text(check(lines)) == "CELLOS_EVENT_REQUIRE_SIGNED=1 but payload is not a SignedEventEnvelopeV1"

    @given(STREAMS, st.data())
    def test_the_names_on_the_envelope(self, lines: list[bytes], data: st.DataObject) -> None:
        """Key id and algorithm are not signed; only the right ones fit."""
        place = data.draw(st.integers(0, len(lines) - 1))
        name, value, kind = data.draw(
            st.sampled_from(
                [
                    ("signerKid", "k2", "bad signature"),
                    ("signerKid", "k9", "key swap" if place else "unknown key"),
                    ("algorithm", "hmac-sha256", "algorithm change" if place else "bad signature"),
                    ("algorithm", "rsa", "algorithm change" if place else "bad signature"),
                    ("signature", "", "bad signature"),
                ]
            )
        )
        lines[place] = edit(lines[place], lambda outer: outer["data"].update({name: value}), inside=False)
        # What the first event says is what the rest is compared with; it is at fault itself.
        assert only(check(lines)) == (kind, place + 1)

    def test_an_envelope_with_another_id(self) -> None:
        lines = signed()
        lines[1] = edit(lines[1], lambda outer: outer.update(id="other"), inside=False)
        assert only(check(lines)) == ("edited", 2)
        assert text(check(lines)) == 'its envelope has the id "other", the event in it the id "run-1-1"'

    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_one_unsigned_event_in_a_signed_run(self, place: int) -> None:
        lines, bare = signed(), plain()
        lines[place] = bare[place]
        assert only(check(lines)) == ("unsigned", place + 1)
        assert only(verify(lines, ring=RING)) == ("unsigned", place + 1)
        assert verify(lines).verified, "without keys signatures are not looked at"

    def test_all_signatures_taken_away(self) -> None:
        assert only(check(plain())) == ("unsigned", 1)

    def test_signatures_without_keys_are_of_unknown_keys(self) -> None:
        assert only(verify(signed(), require_signed=True)) == ("unknown key", 1)
        assert only(verify(signed(), ring=Keyring())) == ("unknown key", 1)

    def test_events_of_no_run(self) -> None:
        loose = canonical_bytes(Event(id="1", source="s", type=PREFIX + "trust.v1.keyset_verified", data={"keysetId": "x"}))
        forged = edit(wrapped(loose), lambda event: event["data"].update(keysetId="y"))
        for line, kind in ((loose, "unsigned"), (wrapped(loose, OUTSIDER), "unknown key"), (forged, "bad signature")):
            report = check([*signed(), line])
            assert ([(fault.kind, fault.line) for fault in report.faults], report.verified) == ([(kind, 6)], False)

    def test_many_key_ids_cost_little(self) -> None:
        lines = [wrapped(line, Signer(f"k{number}", "ed25519", bytes(32))) for number, line in enumerate(plain(middle=40))]
        assert len(verify(lines).runs[0].signers) == 16
