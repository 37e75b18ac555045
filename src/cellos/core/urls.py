"""URLs as they may be shown: what lets anybody in is taken out before they reach an event, an error, a receipt or a log.

These functions read text that may be no URL at all, and never fail. What looks wrong loses too much rather than too little.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REDACTED = "<redacted>"

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\x00-\x20\x7f<>\"\\^`{|}%:@\[\]]+)(?::([0-9]*))?")
# A URL in the middle of a text ends at a blank only: a password may hold what should have been encoded.
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")


def without_credentials(url: str) -> str:
    """Scheme, host, port and path: no user, password, query or fragment. A presigned URL is a credential by its query alone."""
    found = _URL.fullmatch(url)
    if found is None:
        return redact_url(re.split(r"[?#]", url, maxsplit=1)[0])
    scheme, authority, path = found.group(1, 2, 3)
    bare = authority.rpartition("@")[2]
    # Where the host is in doubt, an `@` further on may end a password that holds a slash.
    return f"{scheme}{bare}{path}" if _is_host(bare) or "@" not in path else f"{scheme}{REDACTED}{path.rpartition('@')[2]}"


def redact_url(text: str) -> str:
    """`text` without the user and password of a URL.

    One that is a URL as a whole just loses them. In any other text each URL with an `@` keeps what follows the `@`:
    `connect nats://u:p@host` becomes `connect nats://<redacted>host`. A URL without credentials is left as it is. Idempotent.
    """
    found = _URL.fullmatch(text)
    if found is not None:
        authority = found[2]
        user, at, bare = authority.rpartition("@")
        if _is_host(bare) or (not bare and not user):
            return text if not at else f"{found[1]}{bare}{text[found.end(2) :]}"
    return _IN_TEXT.sub(_redact_match, text)


def redact_known(text: str, secrets: Iterable[str]) -> str:
    """`text` with every occurrence of these URLs and other secret texts replaced: a URL by its bare form, anything else by `<redacted>`."""
    # The longest first: a token may be part of a URL.
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, without_credentials(secret) if "://" in secret else REDACTED)
    return text


def _is_host(text: str) -> bool:
    found = _HOST_AND_PORT.fullmatch(text)
    return found is not None and int(found[1] or 0) <= 65535


def _redact_match(found: re.Match[str]) -> str:
    scheme, separator, rest = found[0].partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = REDACTED + rest[authority.rindex("@") + 1 :]
    elif "@" in rest and not _is_host(authority):
        rest = REDACTED + rest[rest.rindex("@") + 1 :]
    return f"{scheme}{separator}{rest}"
