"""Names: what a formation may be called, what its members may be called where they have specs, and how errors show either."""

from __future__ import annotations

from cellos.core.documents.identifiers import matches
from cellos.core.documents.wording import quoted
from cellos.core.problem import problem
from cellos.errors import FormationRejected

LONGEST_NAME = 253
MEMBER_ID_PATTERN = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""A portable identifier, but of at most 64 characters: a cell id is a UUID, a dot and a member id, and has at most 128."""
MEMBER_ID_RULE = "must match [A-Za-z0-9][A-Za-z0-9._-]{0,63} and must not contain '..'"

NAME_PATTERN = r"(?![.-])[A-Za-z0-9._-]{1,253}(?<![.-])"
"""The same rules for readers of the JSON Schema."""

_RESERVED = (".", "..")
_ALLOWED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_LONGEST_SHOWN = 300


def refuse_name(name: str) -> None:
    """Raises FormationRejected where a formation cannot be called `name`. The first broken rule is the answer."""
    if fault := _name_fault(name):
        raise FormationRejected(problem("bad-request", f"formation name {fault}"))


def _name_fault(name: str) -> str | None:
    raw = name.encode()
    if not raw:
        return "must not be empty"
    if len(raw) > LONGEST_NAME:
        return f"length {len(raw)} exceeds maximum of {LONGEST_NAME} bytes"
    if name in _RESERVED:
        return f"'{name}' is reserved"
    for at, byte in enumerate(raw):
        if byte not in _ALLOWED:
            shown = f"'{chr(byte)}'" if 0x21 <= byte <= 0x7E else f"\\x{byte:02x}"
            return f"contains disallowed character {shown} at byte offset {at} (allowed: A-Z a-z 0-9 . - _)"
    if name.startswith(("-", ".")):
        return f"'{name}' must not start with '-' or '.'"
    if name.endswith(("-", ".")):
        return f"'{name}' must not end with '-' or '.'"
    return None


def is_member_id(member_id: str) -> bool:
    """Whether a member with a spec may be called so."""
    return matches(MEMBER_ID_PATTERN, member_id)


def shown(value: str) -> str:
    """A value of a document inside a text, quoted: as it is, or escaped and cut, so that every text stays one line that a log can hold."""
    return f"'{value}'" if value.isprintable() and len(value) <= _LONGEST_SHOWN else quoted(value)
