import json
from hashlib import sha256
from itertools import pairwise
from typing import Any

import pytest

from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import encode_url
from cellos.core.evidence.keyset import PAYLOAD_TYPE, Envelope, Verified, read_envelope, verify_chain, verify_envelope
from cellos.core.ids import unix_ns
from cellos.errors import EvidenceError

PRIVATE = {kid: ed25519.private_key(bytes([number]) * 32) for number, kid in enumerate(("a", "b", "c"), start=1)}
KEYS = {kid: ed25519.public_key(key.public_key().public_bytes_raw()) for kid, key in PRIVATE.items()}
NOW = unix_ns("2026-06-01T12:00:00Z")
PAYLOAD = b'{"keysetId": "set-1", "keys": []}'


def digest(payload: bytes) -> str:
    return f"sha256:{sha256(payload).hexdigest()}"


def signature(kid: str, payload: bytes = PAYLOAD, **members: Any) -> dict[str, Any]:
    return {"signerKid": kid, "algorithm": "ed25519", "signature": encode_url(PRIVATE[kid].sign(payload)), **members}


def wire(content: bytes = PAYLOAD, *, signatures: list[dict[str, Any]] | None = None, **members: Any) -> bytes:
    document = {
        "schemaVersion": "1.0.0",
        "payloadType": PAYLOAD_TYPE,
        "payload": encode_url(content),
        "signatures": [signature("a", content)] if signatures is None else signatures,
        "payloadDigest": digest(content),
        "producedAt": "2026-01-01T00:00:00Z",
    }
    return json.dumps({**document, **members}).encode()


def envelope(content: bytes = PAYLOAD, **members: Any) -> Envelope:
    return read_envelope(wire(content, **members))


def refusal(made: Envelope) -> str:
    with pytest.raises(EvidenceError) as caught:
        verify_envelope(made, KEYS, NOW)
    return caught.value.text


class TestEnvelope:
    def test_one_signature(self) -> None:
        assert verify_envelope(envelope(), KEYS, NOW) == Verified(
            keyset_id="set-1", payload_digest=digest(PAYLOAD), signer_kid="a", payload=PAYLOAD
        )

    def test_padding_is_tolerated(self) -> None:
        made = json.loads(wire(b"{}!!"))
        made["payload"] += "=="
        made["signatures"][0]["signature"] += "=="
        assert verify_envelope(read_envelope(json.dumps(made).encode()), KEYS, NOW).signer_kid == "a"

    @pytest.mark.parametrize("payload", [b"", b"[]", b"no json", b'{"keysetId": 1}', b'{"keysetId": "a", "keysetId": "b"}'])
    def test_a_payload_that_does_not_name_itself(self, payload: bytes) -> None:
        assert verify_envelope(envelope(payload), KEYS, NOW).keyset_id == "(unknown)"

    @pytest.mark.parametrize(
        ("members", "text"),
        [
            ({"payloadType": "x"}, f"signed trust keyset envelope payloadType must be {PAYLOAD_TYPE}, got 'x'"),
            ({"payload": "!"}, "signed trust keyset envelope payload is not valid base64url: character 1 is not in the alphabet"),
            (
                {"payloadDigest": "sha256:00"},
                f"signed trust keyset envelope payload digest mismatch: declared=sha256:00, computed={digest(PAYLOAD)}",
            ),
            (
                {"payloadDigest": digest(PAYLOAD).upper()},
                f"signed trust keyset envelope payload digest mismatch: declared={digest(PAYLOAD).upper()}, computed={digest(PAYLOAD)}",
            ),
            ({"signatures": []}, "signed trust keyset envelope has no signatures"),
        ],
    )
    def test_refused_before_signatures_are_looked_at(self, members: dict[str, Any], text: str) -> None:
        assert refusal(envelope(**members)) == text

    @pytest.mark.parametrize(
        "bad",
        [
            signature("a", algorithm="hmac-sha256"),
            {**signature("a"), "signerKid": "nobody"},
            {**signature("a"), "signerKid": "b"},
            signature("a", b"another payload"),
            signature("a", signature="AA"),
            signature("a", signature="!"),
            signature("a", notBefore="2026-06-01T12:00:01Z"),
            signature("a", notAfter="2026-06-01T11:59:59.999999999Z"),
        ],
        ids=["algorithm", "unknown kid", "other kid", "other payload", "length", "base64", "too early", "too late"],
    )
    def test_signatures_that_do_not_count(self, bad: dict[str, Any]) -> None:
        assert refusal(envelope(signatures=[bad])) == "signed trust keyset envelope: no signature verified"
        assert verify_envelope(envelope(signatures=[bad, signature("c")]), KEYS, NOW).signer_kid == "c"

    @pytest.mark.parametrize("bound", ["2026-06-01T12:00:00Z", "2026-06-01T14:00:00+02:00"])
    def test_the_ends_of_a_window_belong_to_it(self, bound: str) -> None:
        assert verify_envelope(envelope(signatures=[signature("a", notBefore=bound, notAfter=bound)]), KEYS, NOW)

    @pytest.mark.parametrize("name", ["notBefore", "notAfter"])
    def test_a_window_that_cannot_be_read(self, name: str) -> None:
        """It takes only its own signature away."""
        bad = signature("a", **{name: "soon"})
        assert refusal(envelope(signatures=[bad])).startswith(
            f"signed trust keyset envelope: no signature verified; signed trust keyset envelope {name} 'soon' is not RFC3339: "
        )
        assert verify_envelope(envelope(signatures=[bad, signature("b")]), KEYS, NOW).signer_kid == "b"

    @pytest.mark.parametrize("needed", [None, 0, 1])
    def test_one_signer_is_always_needed(self, needed: int | None) -> None:
        assert verify_envelope(envelope(requiredSignerCount=needed), KEYS, NOW)
        assert "no signature verified" in refusal(envelope(requiredSignerCount=needed, signatures=[signature("a", b"other")]))

    def test_signers_are_counted_once(self) -> None:
        text = "signed trust keyset envelope: only 2 distinct signers verified, need 3"
        several = [signature("b"), signature("b"), signature("a"), signature("a")]
        assert refusal(envelope(requiredSignerCount=3, signatures=several)) == text
        assert verify_envelope(envelope(requiredSignerCount=3, signatures=[*several, signature("c")]), KEYS, NOW).signer_kid == "b"

    def test_no_keys(self) -> None:
        with pytest.raises(EvidenceError, match="no signature verified"):
            verify_envelope(envelope(), {}, NOW)

    def test_a_key_that_signed_badly_may_sign_again(self) -> None:
        assert verify_envelope(envelope(signatures=[signature("a", b"other"), signature("a")]), KEYS, NOW)

    def test_texts_stay_on_one_line(self) -> None:
        assert refusal(envelope(payloadType="a\nb\x1b")).endswith(r"""got '"a\nb\u{1b}"'""")


class TestReading:
    @pytest.mark.parametrize(
        ("raw", "text"),
        [
            (b"{", "line 1 column 2: the document ends too early"),
            (b"[]", "the document must be an object, given a list"),
            (b"{}", "schemaVersion is required"),
            (wire(requiredSignerCount=-1), "requiredSignerCount must be an integer"),
            (wire(requiredSignerCount=2**32), "requiredSignerCount"),
            (wire(requiredSignerCount=2**70), "requiredSignerCount must be an integer"),
            (wire().replace(b'"payload":', b'"payload": "", "payload":'), "payload is given more than once"),
        ],
    )
    def test_refused(self, raw: bytes, text: str) -> None:
        with pytest.raises(EvidenceError) as caught:
            read_envelope(raw)
        assert text in caught.value.text

    def test_what_nobody_signed_may_be_there(self) -> None:
        assert read_envelope(wire(comment="new")) == read_envelope(wire())


def chain(*payloads: bytes, **first: Any) -> list[Envelope]:
    made = [envelope(payloads[0], **first)]
    for before, payload in pairwise(payloads):
        made.append(envelope(payload, replacesEnvelopeDigest=digest(before)))
    return made


def chain_refusal(envelopes: list[Envelope]) -> str:
    with pytest.raises(EvidenceError) as caught:
        verify_chain(envelopes, KEYS, NOW)
    return caught.value.text


class TestChain:
    def test_the_last_one_counts(self) -> None:
        verified = verify_chain(chain(b'{"keysetId":"1"}', b'{"keysetId":"2"}', b'{"keysetId":"3"}'), KEYS, NOW)
        assert (verified.keyset_id, verified.payload) == ("3", b'{"keysetId":"3"}')
        assert verify_chain(chain(PAYLOAD), KEYS, NOW).keyset_id == "set-1"

    def test_empty(self) -> None:
        assert chain_refusal([]) == "signed trust keyset chain: empty chain"

    def test_nothing_comes_before_the_first(self) -> None:
        assert verify_chain(chain(b"1", b"2", replacesEnvelopeDigest="sha256:of something older"), KEYS, NOW).payload == b"2"

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_every_envelope_must_hold(self, index: int) -> None:
        envelopes = chain(b"1", b"2", b"3")
        envelopes[index] = envelope(b"x", signatures=[signature("a", b"other")])
        assert chain_refusal(envelopes) == (
            f"signed trust keyset chain: envelope at index {index} failed verification: signed trust keyset envelope: no signature verified"
        )

    def test_a_link_that_is_missing(self) -> None:
        assert chain_refusal([envelope(b"1"), envelope(b"2")]) == (
            "signed trust keyset chain: envelope at index 1 missing replacesEnvelopeDigest "
            "(only the genesis envelope at index 0 may omit it)"
        )

    def test_a_link_to_something_else(self) -> None:
        one, _, three = chain(b"1", b"2", b"3")
        assert chain_refusal([one, three]) == (
            f"signed trust keyset chain: envelope at index 1 replacesEnvelopeDigest mismatch: declared={digest(b'2')}, "
            f"expected={digest(b'1')}"
        )
        assert "mismatch" in chain_refusal(list(reversed(chain(b"1", b"2", replacesEnvelopeDigest="sha256:x"))))

    def test_a_rotation_outlives_the_windows_of_old_signatures(self) -> None:
        old = signature("a", b"1", notAfter="2020-01-01T00:00:00Z")
        envelopes = chain(b"1", b"2", signatures=[old])
        assert verify_chain(envelopes, KEYS, NOW).payload == b"2"
        assert "no signature verified" in chain_refusal(envelopes[:1])
