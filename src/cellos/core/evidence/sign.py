"""Signed events: the envelope around an event, who made it, and whether that is so.

What is signed are the canonical bytes of the event (`core.events`), so white space, the order of members and what else stands in the
envelope do not matter on the way. The envelope, a CloudEvent with the event in it, is the line that every sink gets. Key id and
algorithm are not signed: they only say which key to try.

A process has one key, from three variables. One that is set and not usable is fatal: events must not go out unsigned because of a typing
error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from cellos.core.documents.wording import quoted
from cellos.core.events import SIGNED_ENVELOPE, SIGNING_SOURCE, Event, SignedEnvelope, canonical_bytes
from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import Base64Error, decode_url, encode_url
from cellos.errors import ConfigError, EvidenceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cellos.core.evidence.keys import Keyring

MODE = "CELLOS_EVENT_SIGNING"
KID = "CELLOS_EVENT_SIGNING_KID"
KEY = "CELLOS_EVENT_SIGNING_KEY_BASE64"

ED25519 = "ed25519"
HMAC_SHA256 = "hmac-sha256"
MAC_BYTES = 32
_OFF = ("", "off")
_ALGORITHMS = {"ed25519": ED25519, "hmac": HMAC_SHA256, "hmac-sha256": HMAC_SHA256}
_MAKE_A_KEY = "give 32 random bytes, a seed, as base64url"


class Signer:
    """One key and its id. `key` is a seed of 32 bytes for ed25519, a shared secret for hmac-sha256."""

    __slots__ = ("_sign", "algorithm", "kid")

    def __init__(self, kid: str, algorithm: str, key: bytes) -> None:
        self.kid = kid
        self.algorithm = algorithm
        self._sign = ed25519.private_key(key).sign if algorithm == ED25519 else _mac(key)

    def wrap(self, event: Event, line: bytes) -> bytes:
        """The line of a signed event. `line` are the canonical bytes of `event`."""
        # Inside `data` every object has its members sorted, the event too: that is the form of a line, not of what is signed.
        inside = {name: getattr(event, name) for name in _MEMBERS}
        envelope = {"algorithm": self.algorithm, "event": inside, "signature": encode_url(self._sign(line)), "signerKid": self.kid}
        return canonical_bytes(
            Event(
                specversion="1.0",
                id=event.id,
                source=SIGNING_SOURCE,
                type=SIGNED_ENVELOPE,
                datacontenttype="application/json",
                data=envelope,
                time=event.time,
                traceparent=event.traceparent,
            )
        )


_MEMBERS = tuple(sorted(Event.__struct_fields__))


def _mac(key: bytes) -> Callable[[bytes], bytes]:
    from hmac import digest

    return lambda message: digest(key, message, "sha256")


def read_signing(environment: Mapping[str, str]) -> Signer | None:
    """Who signs the events of this process; None where it is off. Raises ConfigError, which never holds a key."""
    given = environment.get(MODE, "")
    mode = given.strip().lower()
    if mode in _OFF:
        return None
    algorithm = _ALGORITHMS.get(mode)
    if algorithm is None:
        raise _refused(MODE, given, "unknown algorithm (expected off|ed25519|hmac)", "set one of them, or unset it to run unsigned")
    kid = environment.get(KID)
    if kid is None:
        reason = f"{MODE}={mode} requires a kid but {KID} is unset"
        raise _refused(KID, "<unset>", reason, "set it to the name of the key in the verifiers' key files")
    kid = kid.strip()
    if not kid or not _is_text(kid):
        why = "kid is not UTF-8" if kid else "kid is empty"
        raise _refused(KID, "<not UTF-8>" if kid else "<empty>", why, "set it to the name of the key in the verifiers' key files")
    return Signer(kid, algorithm, _key(environment.get(KEY), mode, algorithm))


def _key(text: str | None, mode: str, algorithm: str) -> bytes:
    if text is None:
        raise _refused(KEY, "<unset>", f"{MODE}={mode} requires a key but {KEY} is unset", _MAKE_A_KEY)
    try:
        key = decode_url(text.strip())
    except Base64Error as error:
        raise _refused(KEY, "<base64 decode failed>", f"invalid base64url: {error}", _MAKE_A_KEY) from None
    if algorithm == ED25519 and len(key) != ed25519.KEY_BYTES:
        reason = f"{MODE}={mode} requires a {ed25519.KEY_BYTES}-byte key, got {len(key)}"
        raise _refused(KEY, f"<{len(key)} bytes>" if key else "<empty>", reason, _MAKE_A_KEY)
    if not key:
        raise _refused(KEY, "<empty>", f"{MODE}={mode} requires a non-empty key", _MAKE_A_KEY)
    return key


def _refused(variable: str, shown: str, reason: str, cure: str) -> ConfigError:
    return ConfigError(f"{variable}={quoted(shown, most=40)}: {reason}; {cure}")


def _is_text(value: str) -> bool:
    """A variable that is not UTF-8 comes with lone surrogates, which no event can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- the reader -------------------------------------------------------------------------------------------------------------------------


class SignatureFault(NamedTuple):
    """Why an envelope proves nothing: its key is not known, or it was not signed with it."""

    kind: Literal["unknown key", "bad signature"]
    text: str


def verify(envelope: SignedEnvelope, ring: Keyring) -> None:
    """Raises EvidenceError where the event in the envelope was not signed with the key of its key id. Windows are not looked at."""
    fault = signature_fault(envelope, canonical_bytes(envelope.event), ring)
    if fault is not None:
        raise EvidenceError(fault.text)


def signature_fault(envelope: SignedEnvelope, line: bytes, ring: Keyring) -> SignatureFault | None:
    """As `verify`; `line` are the canonical bytes of the event in the envelope."""
    try:
        signature = decode_url(envelope.signature)
    except Base64Error as error:
        return _bad(f"signature is not valid base64url: {error}")
    if envelope.algorithm == ED25519:
        return _ed25519_fault(envelope.signer_kid, signature, line, ring)
    if envelope.algorithm == HMAC_SHA256:
        return _hmac_fault(envelope.signer_kid, signature, line, ring)
    return _bad(f"unknown algorithm {quoted(envelope.algorithm)} (expected {ED25519} or {HMAC_SHA256})")


def _ed25519_fault(kid: str, signature: bytes, line: bytes, ring: Keyring) -> SignatureFault | None:
    key = ring.ed25519.get(kid)
    if key is None:
        return _unknown(ED25519, kid)
    if len(signature) != ed25519.SIGNATURE_BYTES:
        return _bad(f"ed25519 signature must be {ed25519.SIGNATURE_BYTES} bytes, got {len(signature)}")
    why = ed25519.signature_fault(key, signature, line)
    return None if why is None else _bad(f"ed25519 verify failed: {why}")


def _hmac_fault(kid: str, mac: bytes, line: bytes, ring: Keyring) -> SignatureFault | None:
    from hmac import compare_digest, digest

    key = ring.hmac.get(kid)
    if key is None:
        return _unknown(HMAC_SHA256, kid)
    if len(mac) != MAC_BYTES:
        return _bad(f"hmac-sha256 mac must be {MAC_BYTES} bytes, got {len(mac)}")
    return None if compare_digest(mac, digest(key, line, "sha256")) else _bad("hmac-sha256 verify failed")


def _unknown(algorithm: str, kid: str) -> SignatureFault:
    return SignatureFault("unknown key", f"signed event envelope: unknown {algorithm} signer kid {quoted(kid)}")


def _bad(text: str) -> SignatureFault:
    return SignatureFault("bad signature", f"signed event envelope: {text}")
