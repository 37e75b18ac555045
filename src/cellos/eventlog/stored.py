"""A message of the log, and the place of a reader in it. Pure."""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256

from msgspec import Struct

_MESSAGE_ID = b"\r\nNats-Msg-Id:"


class Stored(Struct, frozen=True, gc=False):
    """A message as the log has it."""

    sequence: int
    subject: str
    headers: bytes
    """The header block as it came, empty where there is none."""
    data: bytes
    time: int
    """When the log took it, in nanoseconds since 1970."""

    @property
    def message_id(self) -> str | None:
        """Its Nats-Msg-Id."""
        _, found, rest = self.headers.partition(_MESSAGE_ID)
        return rest.partition(b"\r\n")[0].strip().decode("utf-8", "replace") if found else None

    @property
    def digest(self) -> str:
        """SHA-256 over what whoever published it said: subject, headers, data."""
        found = sha256(self.subject.encode())
        for part in (self.headers, self.data):
            found.update(b"\0%d\0" % len(part))
            found.update(part)
        return found.hexdigest()


class Cursor(Struct, frozen=True, kw_only=True):
    """The last message that was read, of which stream, and what it was: sequence numbers alone come again after a power cut.

    Before the first message, `sequence` is 0 and `digest` empty.
    """

    stream_created: str
    sequence: int
    digest: str


def nanoseconds(text: str) -> int:
    """Since 1970, of a time as a NATS server writes it: RFC 3339 in UTC, up to nine places."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 1_000_000_000 + int(fraction.ljust(9, "0") or 0)


def read_headers(block: bytes) -> dict[str, str]:
    """A header block as a mapping; of a name that comes twice, the last."""
    found: dict[str, str] = {}
    for line in block.decode("utf-8", "replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            found[name] = value.strip()
    return found
