"""NKeys and credential files: how a client proves who it is to NATS without sending a secret.

A seed is an Ed25519 private key in base32 with a prefix and a checksum; the server sends a nonce, the client signs it. A credential file
holds a seed and a JWT that somebody signed for it. No error quotes what it read.
Source: https://docs.nats.io/reference/reference-protocols/nkeys
"""

from __future__ import annotations

import base64
import binascii
import re

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import Struct

from cellos.errors import ConfigError, os_error_text

_SEED_PREFIX = 18 << 3
"""Base32 of it begins with S."""
_USER_PREFIX = 20 << 3
"""Base32 of it begins with U."""
_MAX_FILE_BYTES = 1 << 20
_JWT = re.compile(r"-+BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT-+")
_SEED = re.compile(r"-+BEGIN USER NKEY SEED-+\s+(\S+)\s+-+END USER NKEY SEED-+")


class Nkey:
    """A user's key."""

    def __init__(self, seed: str, *, where: str) -> None:
        """Raises ConfigError, which names `where` the seed came from."""
        self._key = Ed25519PrivateKey.from_private_bytes(_decoded(seed.strip(), where))

    @property
    def public(self) -> str:
        """U…"""
        raw = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return _encoded(bytes([_USER_PREFIX]) + raw)

    def sign(self, nonce: str) -> str:
        """The signature as CONNECT takes it."""
        return base64.urlsafe_b64encode(self._key.sign(nonce.encode())).rstrip(b"=").decode()


class Credentials(Struct, frozen=True):
    """The two parts of a credential file."""

    jwt: str
    key: Nkey


def read_seed_file(path: str) -> Nkey:
    """A file with a seed alone, or with one in the frame of a credential file. Raises ConfigError."""
    text = _text(path, "CELLOS_NATS_NKEY_SEED_FILE")
    framed = _SEED.search(text)
    return Nkey(framed[1] if framed else text, where=f"CELLOS_NATS_NKEY_SEED_FILE {path}")


def read_credentials_file(path: str) -> Credentials:
    """What `nsc` writes as .creds. Raises ConfigError."""
    text = _text(path, "CELLOS_NATS_CREDS_FILE")
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise ConfigError(f"CELLOS_NATS_CREDS_FILE {path}: holds no {'user JWT' if jwt is None else 'NKey seed'}; is this a .creds file?")
    return Credentials(jwt=jwt[1], key=Nkey(seed[1], where=f"CELLOS_NATS_CREDS_FILE {path}"))


def _text(path: str, variable: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("ascii")
    except OSError as error:
        raise ConfigError(f"{variable} {path}: {os_error_text(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{variable} {path}: is no text") from error


def _decoded(seed: str, where: str) -> bytes:
    try:
        raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
    except ValueError:  # binascii.Error is one
        raw = b""
    # Five bits say "seed", the next eight which kind of key.
    kind = ((raw[0] & 7) << 5) | (raw[1] >> 3) if len(raw) == 36 else 0
    if len(raw) != 36 or raw[0] & 0xF8 != _SEED_PREFIX or _checksum(raw[:-2]) != raw[-2:]:
        raise ConfigError(f"{where}: is no NKey seed (SU… and 56 more characters)")
    if kind != _USER_PREFIX:
        raise ConfigError(f"{where}: is the seed of another kind of key; a user's begins with SU")
    return raw[2:-2]


def _encoded(raw: bytes) -> str:
    return base64.b32encode(raw + _checksum(raw)).rstrip(b"=").decode()


def _checksum(raw: bytes) -> bytes:
    return binascii.crc_hqx(raw, 0).to_bytes(2, "little")
