import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.events import SIGNED_ENVELOPE, STARTED, Event, SignedEnvelope, canonical_bytes
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import HMAC_SHA256, Signer, verify
from cellos.core.formation.transitions import PHASES
from cellos.core.messages import KINDS, MAX_EVENT_BYTES, canonical_uuid, envelope_subject, read_message, signature_of
from cellos.errors import EvidenceError

UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
SIGNER = Signer("k", HMAC_SHA256, b"secret")
RING = Keyring(hmac={"k": b"secret"})


def event(kind: str = STARTED, data: object = None) -> Event:
    return Event(id="e", source="s", type=kind, data={"cellId": "c"} if data is None else data, time="2026-01-01T00:00:00Z")


def signed(some: Event) -> bytes:
    return SIGNER.wrap(some, canonical_bytes(some))


def bare(some: Event) -> bytes:
    wrapper = msgspec.json.decode(signed(some), type=Event)
    return msgspec.json.encode(wrapper.data)


def with_type(kind: str, filler: bytes) -> bytes:
    return b'{"specversion":"1.0","id":"e","source":"s","type":"%s","x":%s}' % (kind.encode(), filler)


class TestReading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_types_that_act_in_all_three_forms(self, kind: str) -> None:
        some = event(kind)
        plain = read_message(canonical_bytes(some))
        assert plain is not None
        assert (plain.kind, plain.event, plain.envelope) == (KINDS[kind], some, None)
        for line in (signed(some), bare(some)):
            message = read_message(line)
            assert message is not None
            assert (message.kind, message.event) == (KINDS[kind], some)
            assert message.envelope is not None
            assert message.envelope.signer_kid == "k"

    def test_phases_of_both_families(self) -> None:
        families = ("dev.cellos.events.cell.formation.v1.", "io.cellos.formation.v1.")
        assert {kind for kind in KINDS if kind.startswith(families)} == {family + phase for family in families for phase in PHASES}

    @pytest.mark.parametrize(
        "kind", ["dev.cellos.events.cell.observability.v1.fs_touch", "dev.cellos.events.cell.formation.v1.odd", "", "x"]
    )
    def test_other_types_say_nothing(self, kind: str) -> None:
        some = event(kind)
        assert [read_message(line) for line in (canonical_bytes(some), signed(some), bare(some))] == [None] * 3

    def test_white_space_escapes_and_foreign_members_do_not_matter(self) -> None:
        line = canonical_bytes(event())
        spaced = b' { "extension" : {"a":[1,"\\u00e9"]} , \n' + line[1:].replace(b"started", b"star\\u0074ed")
        assert read_message(spaced) == read_message(line)

    @pytest.mark.parametrize("kind", [STARTED, "other"])
    @pytest.mark.parametrize(
        ("filler", "why"),
        [
            (b'"\xff"', "not UTF-8"),
            (b'"\xed\xa0\x80"', "not UTF-8"),
            (b"1,", "not JSON"),
            (b"NaN", "not JSON"),
            (b"01", "not JSON"),
            (b'"\\ud800"', "not JSON"),
            (b'"\x01"', "not JSON"),
            (b'"', "not JSON"),
            (b"1} {", "not JSON"),
            (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
            (b'"' + b"x" * MAX_EVENT_BYTES + b'"', "longer than 1048576 bytes"),
        ],
    )
    def test_what_is_no_event(self, kind: str, filler: bytes, why: str) -> None:
        with pytest.raises(EvidenceError, match=f"evidence: {why}"):
            read_message(with_type(kind, filler))

    @pytest.mark.parametrize(
        "payload",
        [
            b"[]",
            b"1",
            b"null",
            b"{}",
            b'{"type":1}',
            b'{"type":"%s"}' % STARTED.encode(),
            b'{"type":"%s","data":{}}' % SIGNED_ENVELOPE.encode(),
            b'{"event":{},"signerKid":"k","algorithm":"a","signature":""}',
        ],
    )
    def test_json_that_is_no_event(self, payload: bytes) -> None:
        with pytest.raises(EvidenceError, match="not an event"):
            read_message(payload)

    def test_an_envelope_in_an_envelope_says_nothing(self) -> None:
        assert read_message(signed(event(SIGNED_ENVELOPE, {"event": {}}))) is None

    def test_the_longest_event_is_read(self) -> None:
        line = with_type(STARTED, b'""')
        line = line.replace(b'""', b'"' + b"x" * (MAX_EVENT_BYTES - len(line)) + b'"')
        assert len(line) == MAX_EVENT_BYTES
        assert read_message(line) is not None

    @given(st.binary(max_size=200))
    def test_it_raises_nothing_else(self, payload: bytes) -> None:
        try:
            read_message(payload)
        except EvidenceError:
            pass


class TestSignatures:
    def verify(self, envelope: SignedEnvelope) -> None:
        verify(envelope, RING)

    def test_words(self) -> None:
        true = read_message(signed(event()))
        false = read_message(signed(event()).replace(b'"cellId":"c"', b'"cellId":"d"'))
        assert true is not None
        assert false is not None
        assert [signature_of(envelope, self.verify) for envelope in (true.envelope, false.envelope, None)] == [
            "verified",
            "invalid",
            "unsigned",
        ]

    def test_nobody_is_known(self) -> None:
        message = read_message(signed(event()))
        assert message is not None
        assert signature_of(message.envelope, lambda envelope: verify(envelope, Keyring())) == "invalid"


class TestUuids:
    @pytest.mark.parametrize(
        "text", [UUID, UUID.upper(), UUID.replace("-", ""), "{" + UUID + "}", "urn:uuid:" + UUID, "URN:UUID:" + UUID.upper()]
    )
    def test_spellings(self, text: str) -> None:
        assert canonical_uuid(text) == UUID

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "x",
            UUID[:-1],
            UUID + "0",
            UUID + "\n",
            "{" + UUID,
            UUID + "}",
            "urn:uuid:{" + UUID + "}",
            UUID.replace("-", "", 1),
            UUID.replace("0", "\uff10"),
            None,
            5,
            [UUID],
        ],
    )
    def test_anything_else(self, text: object) -> None:
        assert canonical_uuid(text) is None


@pytest.mark.parametrize(("line", "subject"), [(b"{}", None), (b'{"subject":"x"}', "x"), (b'{"subject":5}', 5)])
def test_subject_of_an_envelope(line: bytes, subject: object) -> None:
    assert envelope_subject(line) == subject
