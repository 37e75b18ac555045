"""What a message of the stream says that matters to the state: one of a few types of event, signed or not, or nothing.

Most messages of a run change no record. They are checked to be JSON, which costs less than a microsecond, and nothing is built from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from cellos.core.events import COMMAND_COMPLETED, DESTROYED, SIGNED_ENVELOPE, STARTED, Event, SignedEnvelope, parse_signed
from cellos.core.formation.events import FORMATION_TYPE, LEGACY_FORMATION_TYPE, NAME_RESERVED
from cellos.core.formation.transitions import PHASES, Phase
from cellos.errors import EvidenceError

MAX_EVENT_BYTES = 1 << 20
"""Longer messages are no events: no sink of ours writes them."""

Kind = Literal["cell", "name"] | Phase
"""Whose record a type of event changes. Of formations, the phase."""
KINDS: dict[str, Kind] = {
    STARTED: "cell",
    COMMAND_COMPLETED: "cell",
    DESTROYED: "cell",
    NAME_RESERVED: "name",
    **{prefix + phase: phase for prefix in (FORMATION_TYPE, LEGACY_FORMATION_TYPE) for phase in PHASES},
}

Signature = Literal["verified", "unsigned", "invalid"]
"""What the signature of an event is worth: it holds; there is none; it does not hold, or nobody is known by its key id."""
Verify = Callable[[SignedEnvelope], object]
"""Raises EvidenceError where the event in the envelope was not signed by who it says, as `core.evidence.sign.verify` does."""


class Message(NamedTuple):
    """An event that acts, and the envelope that it came in."""

    kind: Kind
    event: Event
    envelope: SignedEnvelope | None


class _Head(msgspec.Struct, gc=False):
    """What decides whether the rest is looked at."""

    type: str


class _Inner(msgspec.Struct, gc=False):
    event: _Head


class _Wrapper(msgspec.Struct, gc=False):
    data: _Inner


class _WithSubject(msgspec.Struct):
    subject: Any = None


_head = msgspec.json.Decoder(_Head).decode
_wrapper = msgspec.json.Decoder(_Wrapper).decode
_event = msgspec.json.Decoder(Event).decode
_with_subject = msgspec.json.Decoder(_WithSubject).decode

_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch
_ANY_UUID = re.compile(
    r"(?:urn:uuid:|(\{))?([0-9a-f]{8})(-?)([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{12})(?(1)\})", re.ASCII | re.IGNORECASE
).fullmatch


def read_message(payload: bytes) -> Message | None:
    """The event in a message; None where its type changes no record. Raises EvidenceError for what is not an event."""
    if len(payload) > MAX_EVENT_BYTES:
        raise EvidenceError(f"longer than {MAX_EVENT_BYTES} bytes")
    try:
        if not payload.isascii():
            payload.decode()  # the decoder does not look into the texts that it skips
        type = _head(payload).type
        kind = KINDS.get(type)
        if kind is not None:
            return Message(kind, _event(payload), None)
        # Nor is the signature of an event looked at that changes nothing.
        if type != SIGNED_ENVELOPE or KINDS.get(_wrapper(payload).data.event.type) is None:
            return None
    except msgspec.ValidationError:
        pass  # no event: it may be the envelope alone
    except UnicodeDecodeError:
        raise EvidenceError("not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise EvidenceError(f"not JSON: {error}") from None
    event, envelope = parse_signed(payload)
    kind = KINDS.get(event.type)
    return None if kind is None else Message(kind, event, envelope)


def envelope_subject(payload: bytes) -> object:
    """The member `subject` of an event, by which older events name their formation. No signature covers it."""
    return _with_subject(payload).subject


def signature_of(envelope: SignedEnvelope | None, verify: Verify) -> Signature:
    if envelope is None:
        return "unsigned"
    try:
        verify(envelope)
    except EvidenceError:
        return "invalid"
    return "verified"


def canonical_uuid(text: object) -> str | None:
    """The lower-case, hyphenated form of a UUID in any of its usual spellings; None for anything else."""
    if not isinstance(text, str):
        return None
    if _CANONICAL_UUID(text):
        return text
    match = _ANY_UUID(text)
    return "-".join(match.group(2, 4, 5, 6, 7)).lower() if match else None
