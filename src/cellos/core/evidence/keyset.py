"""Signed trust keysets: a payload, who vouches for it, and the chain from one keyset to the next.

An envelope is accepted when enough different keys have signed the bytes of its payload. A chain is a list of envelopes, oldest first, each
naming the digest of the payload before it; its last one is the keyset. Only the payload is signed: the windows of signatures, the number
of signers that are asked for and the link to the envelope before are claims of whoever wrote the envelope.

A window says when a signature may be relied on, so it is looked at in the envelope that is to be relied on now, the last of a chain. The
older ones only show how one keyset led to the next, and they stay true after their windows. A signature whose window cannot be read does
not count, as one of an unknown key does not; the others of its envelope do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from cellos.core.documents import strict
from cellos.core.documents.execution_cell import U32
from cellos.core.documents.shape import to_struct
from cellos.core.documents.wording import quoted
from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import Base64Error, decode_url
from cellos.core.ids import TimeSyntaxError, unix_ns
from cellos.core.sha256 import sha256
from cellos.errors import EvidenceError, SpecSyntaxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.cellos.trust-keyset-v1+json"
UNKNOWN_KEYSET = "(unknown)"
_ENVELOPE = "signed trust keyset envelope"
_CHAIN = "signed trust keyset chain"


class Signature(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    signer_kid: str
    algorithm: str
    signature: str
    not_before: str | None = None
    not_after: str | None = None


class Envelope(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The envelope as it is written. Members beyond these are dropped: nothing but the payload is signed, so nothing depends on them."""

    schema_version: str
    payload_type: str
    payload: str
    signatures: tuple[Signature, ...]
    payload_digest: str
    produced_at: str
    replaces_envelope_digest: str | None = None
    required_signer_count: U32 | None = None


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A keyset that holds. `signer_kid` is the first of the envelope's signers whose signature does."""

    keyset_id: str
    payload_digest: str
    signer_kid: str
    payload: bytes


def read_envelope(raw: bytes) -> Envelope:
    """The envelope in a file. Raises EvidenceError; its `text` says what is wrong with the JSON, for the caller to say where."""
    try:
        return to_struct(strict.decode(raw), Envelope, allow_unknown_fields=True)
    except SpecSyntaxError as error:
        raise EvidenceError(error.text) from None


def verify_envelope(envelope: Envelope, keys: Mapping[str, Ed25519PublicKey], now_ns: int) -> Verified:
    """One keyset on its own. `now_ns`: nanoseconds since 1970. Raises EvidenceError."""
    return _verify(envelope, keys, now_ns)


def verify_chain(envelopes: Sequence[Envelope], keys: Mapping[str, Ed25519PublicKey], now_ns: int) -> Verified:
    """The last keyset of a chain, oldest first. Raises EvidenceError."""
    if not envelopes:
        raise EvidenceError(f"{_CHAIN}: empty chain")
    last = len(envelopes) - 1
    verified: Verified | None = None
    for index, envelope in enumerate(envelopes):
        before = verified
        try:
            verified = _verify(envelope, keys, now_ns if index == last else None)
        except EvidenceError as error:
            raise EvidenceError(f"{_CHAIN}: envelope at index {index} failed verification: {error.text}") from None
        if before is not None:
            _check_link(envelope, before, index)
    assert verified is not None
    return verified


def _check_link(envelope: Envelope, before: Verified, index: int) -> None:
    declared = envelope.replaces_envelope_digest
    where = f"{_CHAIN}: envelope at index {index}"
    if declared is None:
        raise EvidenceError(f"{where} missing replacesEnvelopeDigest (only the genesis envelope at index 0 may omit it)")
    if declared != before.payload_digest:
        raise EvidenceError(f"{where} replacesEnvelopeDigest mismatch: declared={_plain(declared)}, expected={before.payload_digest}")


def _verify(envelope: Envelope, keys: Mapping[str, Ed25519PublicKey], now_ns: int | None) -> Verified:
    """`now_ns` None: whatever the windows say."""
    if envelope.payload_type != PAYLOAD_TYPE:
        raise EvidenceError(f"{_ENVELOPE} payloadType must be {PAYLOAD_TYPE}, got '{_plain(envelope.payload_type)}'")
    try:
        payload = decode_url(envelope.payload)
    except Base64Error as error:
        raise EvidenceError(f"{_ENVELOPE} payload is not valid base64url: {error}") from None
    computed = f"sha256:{sha256(payload).hexdigest()}"
    if envelope.payload_digest != computed:
        raise EvidenceError(f"{_ENVELOPE} payload digest mismatch: declared={_plain(envelope.payload_digest)}, computed={computed}")
    if not envelope.signatures:
        raise EvidenceError(f"{_ENVELOPE} has no signatures")
    signers: dict[str, None] = {}
    doubts = []
    for signature in envelope.signatures:
        key = keys.get(signature.signer_kid)
        if signature.algorithm != "ed25519" or key is None or signature.signer_kid in signers:
            continue
        try:
            if (now_ns is None or _is_open(signature, now_ns)) and _holds(signature, key, payload):
                signers[signature.signer_kid] = None
        except _WindowError as error:
            doubts.append(str(error))
    needed = max(1, envelope.required_signer_count or 1)
    if len(signers) < needed:
        why = "no signature verified" if needed == 1 else f"only {len(signers)} distinct signers verified, need {needed}"
        raise EvidenceError("; ".join([f"{_ENVELOPE}: {why}", *doubts]))
    return Verified(keyset_id=_keyset_id(payload), payload_digest=computed, signer_kid=next(iter(signers)), payload=payload)


class _WindowError(ValueError):
    """A window that cannot be read."""


def _is_open(signature: Signature, now_ns: int) -> bool:
    """Both ends belong to the window."""
    after = _bound("notBefore", signature.not_before)
    until = _bound("notAfter", signature.not_after)
    return (after is None or after <= now_ns) and (until is None or now_ns <= until)


def _bound(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return unix_ns(text)
    except TimeSyntaxError:
        raise _WindowError(f"{_ENVELOPE} {name} '{_plain(text)}' is not RFC3339: write it like 2026-01-31T12:00:00Z") from None


def _holds(signature: Signature, key: Ed25519PublicKey, payload: bytes) -> bool:
    try:
        raw = decode_url(signature.signature)
    except Base64Error:
        return False
    return len(raw) == ed25519.SIGNATURE_BYTES and ed25519.signature_fault(key, raw, payload) is None


def _keyset_id(payload: bytes) -> str:
    """What the payload calls itself, where it does."""
    try:
        value = strict.decode(payload)
    except SpecSyntaxError:
        return UNKNOWN_KEYSET
    keyset_id = value.get("keysetId") if isinstance(value, dict) else None
    return keyset_id if isinstance(keyset_id, str) else UNKNOWN_KEYSET


def _plain(text: str) -> str:
    """What an envelope says, on one line whatever it holds: the texts show it in their own quotes."""
    return text if text.isprintable() and len(text) <= 300 else quoted(text)
