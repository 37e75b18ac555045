"""Key files: who may have signed what. One JSON object, key id to key in base64url; a key id stands in it once.

The file of public keys holds Ed25519 keys of 32 bytes. The file of HMAC keys has the same form; its keys are secrets, of any length but
none. Nothing in here opens a file: the caller opens it without following links and hands over its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cellos.core.documents import strict
from cellos.core.documents.wording import given, quoted
from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import Base64Error, decode_url
from cellos.errors import ConfigError, SpecSyntaxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

VERIFY_KEYS = "trust verify keys"
HMAC_KEYS = "HMAC verify keys"


@dataclass(frozen=True, kw_only=True)
class Keyring:
    """The keys that signatures are checked with, by algorithm and key id."""

    ed25519: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    hmac: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return bool(self.ed25519 or self.hmac)


def read_verify_keys(raw: bytes) -> dict[str, Ed25519PublicKey]:
    """The public keys of a file. Raises ConfigError."""
    return {kid: _public_key(kid, key) for kid, key in _read(raw, VERIFY_KEYS).items()}


def read_hmac_keys(raw: bytes) -> dict[str, bytes]:
    """The shared keys of a file. Raises ConfigError, which never holds one."""
    keys = _read(raw, HMAC_KEYS)
    for kid, key in keys.items():
        if not key:
            raise ConfigError(f"{HMAC_KEYS}: kid {quoted(kid)} has an empty key")
    return keys


def _public_key(kid: str, raw: bytes) -> Ed25519PublicKey:
    if len(raw) != ed25519.KEY_BYTES:
        raise ConfigError(f"{VERIFY_KEYS}: kid {quoted(kid)} decoded to {len(raw)} bytes, expected {ed25519.KEY_BYTES}")
    try:
        return ed25519.public_key(raw)
    except ed25519.KeyRefusedError as error:
        raise ConfigError(f"{VERIFY_KEYS}: kid {quoted(kid)} is not a valid Ed25519 verifying key: {error}") from None


def _read(raw: bytes, what: str) -> dict[str, bytes]:
    members = _members(raw, what)
    keys = {}
    for kid, text in members.items():
        if not isinstance(text, str):
            # What stands there instead is not shown: it may be a key.
            kind = given(text) if text is None or isinstance(text, (bool, list, dict)) else "a number"
            raise ConfigError(f"{what}: value for kid {quoted(kid)} must be a base64url string, got {kind}")
        try:
            keys[kid] = decode_url(text)
        except Base64Error as error:
            raise ConfigError(f"{what}: kid {quoted(kid)} value is not valid base64url: {error}") from None
    return keys


def _members(raw: bytes, what: str) -> dict[str, object]:
    try:
        value = strict.decode(raw)
    except SpecSyntaxError as error:
        if (kid := _duplicate(raw)) is not None:
            raise ConfigError(f"{what}: duplicate kid {quoted(kid)} in keys file") from None
        raise ConfigError(f"{what}: JSON parse error: {error.text}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: top-level value must be a JSON object mapping kid -> base64url-pubkey")
    return value


class _Pairs(list[tuple[str, object]]):
    """An object as written."""


def _duplicate(raw: bytes) -> str | None:
    """The first key id that a well-formed file gives twice, however it is escaped."""
    import json

    try:
        pairs = json.loads(raw, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None
    seen: set[str] = set()
    for kid, _ in pairs if isinstance(pairs, _Pairs) else ():
        if kid in seen:
            return kid
        seen.add(kid)
    return None
