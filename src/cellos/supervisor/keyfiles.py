"""Key files from the disk. What is in them is parsed in core; here is how they are opened.

A link in the last place of the path is not followed: whoever may write to the directory of a key file, but not to the file, must not be
able to put other keys in its place.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cellos.core.documents.strict import MAX_DOCUMENT_BYTES
from cellos.errors import ConfigError, os_error_text

if TYPE_CHECKING:
    from cellos.core.evidence.keys import Keyring


def read_unlinked(path: str) -> bytes:
    """The bytes of a file that is no link, and one byte more than any document may have where it is longer. Raises OSError."""
    # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        return file.read(MAX_DOCUMENT_BYTES + 1) or b""  # None: a pipe that somebody holds open and has written nothing to


def load_keyring(verify_keys: str | None, hmac_keys: str | None) -> Keyring:
    """The keys of both files, where there are any. Raises ConfigError."""
    from cellos.core.evidence.keys import HMAC_KEYS, VERIFY_KEYS, Keyring, read_hmac_keys, read_verify_keys

    return Keyring(
        ed25519=read_verify_keys(_load(verify_keys, VERIFY_KEYS)) if verify_keys is not None else {},
        hmac=read_hmac_keys(_load(hmac_keys, HMAC_KEYS)) if hmac_keys is not None else {},
    )


def _load(path: str, what: str) -> bytes:
    try:
        raw = read_unlinked(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        why = os_error_text(error) if isinstance(error, OSError) else str(error)
        link = "; it is a link, and key files are not opened through links" if os.path.islink(path) else ""
        raise ConfigError(f"{what}: cannot open {path}: {why}{link}") from None
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: cannot read {path}: byte {error.start} is not UTF-8") from None
    return raw
