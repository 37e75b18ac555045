"""Ed25519 that is strict: a signature holds for one key and one message, and nobody but the key's owner can make another one.

RFC 8032 leaves room that libraries fill differently, and the usual one accepts public keys under which anybody can sign anything. Refused
here, before the library is asked:

- public keys that are no point of the curve, are not written in the one canonical way, or have small order (under such a key the same
  signature holds for many messages);
- signatures whose R has small order or is not canonical, and whose S is not below the order of the group (S + L would hold, too).

The library checks the equation without the cofactor and compares R byte by byte, so a point of small order added to R does not pass.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64
ORDER = 2**252 + 27742317777372353535851937790883648493
"""L, the order of the base point."""

_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_Y_BITS = (1 << 255) - 1
_Y_OF_ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_SMALL_ORDER_Y = {1: 1, _P - 1: 2, 0: 4, _Y_OF_ORDER_8: 8, _P - _Y_OF_ORDER_8: 8}
"""The y of the eight points of small order, and what that order is. Two points have the same y, but for the first two, where x is 0."""


class KeyRefusedError(ValueError):
    """Not a public key that signatures are checked with; the message is a clause that says why."""


def public_key(raw: bytes) -> Ed25519PublicKey:
    """The key that `raw`, 32 bytes, is the encoding of. Raises KeyRefusedError."""
    why = _point_fault(raw)
    y = int.from_bytes(raw, "little") & _Y_BITS
    if why is None and not _is_on_curve(y):
        why = "it is not a point of the curve"
    if why is not None:
        raise KeyRefusedError(why)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(raw)


def private_key(seed: bytes) -> Ed25519PrivateKey:
    """The key that is derived from 32 random bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed)


def signature_fault(key: Ed25519PublicKey, signature: bytes, message: bytes) -> str | None:
    """Why 64 bytes are not the signature of a message, as a clause; None where they are. `key` comes from `public_key`."""
    from cryptography.exceptions import InvalidSignature

    if (why := _point_fault(signature[:32])) is not None:
        return f"R of the signature: {why}"
    if int.from_bytes(signature[32:], "little") >= ORDER:
        return "S of the signature is not below the order of the group"
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return "it is not the signature of these bytes by this key"
    return None


def _point_fault(raw: bytes) -> str | None:
    """What the encoding of a point alone shows. (x = 0 with a sign, the other form that is not canonical, has small order.)"""
    y = int.from_bytes(raw, "little") & _Y_BITS
    if (order := _SMALL_ORDER_Y.get(y % _P)) is not None:
        return f"it has small order ({order})"
    return "it is not in canonical form" if y >= _P else None


def _is_on_curve(y: int) -> bool:
    """Whether x² = (y² - 1) / (d y² + 1) has a solution (RFC 8032, 5.1.3); by Euler's criterion, with a product for the quotient."""
    square = y * y % _P
    product = (square - 1) * (_D * square + 1) % _P
    return pow(product, (_P - 1) // 2, _P) <= 1
