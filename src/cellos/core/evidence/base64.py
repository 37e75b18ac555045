"""Base64 that has one text per value: keys and signatures are compared, listed and signed as text.

Common decoders skip foreign characters and ignore the bits behind the last byte, so many texts stand for one key. Here both are refused.
No reason ever repeats a character of the text, which may be a key.
"""

from __future__ import annotations

import binascii

_STANDARD = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
_URL = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_TO_URL = bytes.maketrans(b"+/", b"-_")


class Base64Error(ValueError):
    """Not the text of any bytes. Its message is a clause without a subject's name: `character 3 is not in the alphabet`."""


def decode_standard(text: str) -> bytes:
    """RFC 4648, section 4: `+` and `/`, padded with `=`. Raises Base64Error."""
    if len(text) % 4:
        raise Base64Error(f"its length is {len(text)} characters, not a multiple of four")
    return _decode(text, _STANDARD)


def decode_url(text: str) -> bytes:
    """RFC 4648, section 5: `-` and `_`, padded with `=` or not padded at all. Raises Base64Error."""
    if text.endswith("=") and len(text) % 4:
        raise Base64Error("its padding does not fit its length")
    return _decode(text, _URL)


def encode_url(raw: bytes) -> str:
    """Without padding."""
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode()


def _decode(text: str, alphabet: frozenset[int]) -> bytes:
    body = text.encode(errors="surrogatepass")
    if body.endswith(b"="):
        body = body[: -2 if body.endswith(b"==") else -1]
    if not alphabet.issuperset(body):
        at = next(index for index, byte in enumerate(body) if byte not in alphabet)
        characters = len(body[:at].decode(errors="surrogatepass"))
        raise Base64Error(f"character {characters + 1} is not in the alphabet")
    if len(body) % 4 == 1:
        raise Base64Error(f"no bytes have a text of {len(body)} characters")
    body = body.translate(_TO_STANDARD)
    raw = binascii.a2b_base64(body + b"=" * (-len(body) % 4))
    if binascii.b2a_base64(raw, newline=False).rstrip(b"=") != body:
        raise Base64Error("its last character has bits that belong to no byte")
    return raw
