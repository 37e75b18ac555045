"""What a control plane answers, and how it is addressed: pure functions, tolerant of older servers.

The paths are those of the server's reference; every byte of a name that is no ASCII letter or digit is escaped.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Literal

import msgspec

from cellos.core.problem import MEDIA_TYPE, RETENTION_EXHAUSTED, Problem
from cellos.errors import CellosError, CursorExpired, ServerError, ServerUnreachable

Record = dict[str, Any]
Kind = Literal["cells", "formations"]

GOES_ON_ELSEWHERE = 4410
"""Close code of a WebSocket whose cursor is not one of the stream as it is now."""
POLICY = 1008
NOT_YET = "no upstream broker configured"
"""Reason of a close 1008 that is no refusal: the server has no NATS at the moment."""
CANNOT_SUBSCRIBE = "subscribe failed"
"""Another one: the subject is wrong, or the log could not be read just then."""
_LONGEST_TEXT = 500
_HYPHENATED = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ID = re.compile(rf"[0-9a-f]{{32}}|{_HYPHENATED}|\{{{_HYPHENATED}\}}|urn:uuid:{_HYPHENATED}", re.IGNORECASE)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An event and its place in the log. `event` holds the bytes that its producer wrote."""

    seq: int
    event: msgspec.Raw


class Expired(msgspec.Struct, frozen=True, kw_only=True):
    """The last frame before a close 4410. `oldest_seq` is the first event that is still there."""

    type: str
    oldest_seq: int | None = None


def quoted(text: str) -> str:
    """One segment of a path."""
    escaped = (chr(byte) if chr(byte).isalnum() and byte < 0x80 else f"%{byte:02X}" for byte in text.encode(errors="surrogateescape"))
    return "".join(escaped)


def is_id(ident: str) -> bool:
    """Whether a formation is meant by its id: a UUID in any of its usual forms."""
    return _ID.fullmatch(ident) is not None


def formation_path(ident: str) -> str:
    """The path of a formation that is named by its id or its name."""
    return f"/v1/formations/{ident}" if is_id(ident) else f"/v1/formations/by-name/{quoted(ident)}"


def status_of(record: Record) -> str:
    """The status of a formation, or the state of a cell, under the name that the server has for it; empty where there is none."""
    word = record.get("status", record.get("state"))
    return word if isinstance(word, str) else ""


def records(body: bytes, kind: Kind) -> list[Record]:
    """The records of a list: an array, or an object that holds one under the name of the kind or `items`. Raises ServerError."""
    try:
        value = msgspec.json.decode(body)
        if isinstance(value, dict):
            present = [name for name in ("formations", "cells", "items") if name in value]
            if len(present) > 1:
                raise ServerError(f"the list of {kind} is not clear: the answer has {' and '.join(present)}")
            value = next((value[name] for name in (kind, "items") if name in value), [])
        return msgspec.convert(value, list[Record])
    except msgspec.MsgspecError as error:
        raise ServerError(f"cannot read the list of {kind}: {error}") from error


def problem_of(status: int, media_type: str, body: bytes) -> Problem:
    """What is wrong, of an answer that is no success: its problem document, else what can be said without one."""
    if media_type.partition(";")[0].strip().lower() == MEDIA_TYPE:
        try:
            return msgspec.json.decode(body, type=Problem)
        except msgspec.DecodeError:
            pass
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    text = body.decode(errors="replace") if media_type.startswith("text/plain") else ""
    return Problem(type="about:blank", title=f"HTTP {status} {phrase}".rstrip(), status=status, detail=text.strip()[:_LONGEST_TEXT])


def read_frame(frame: bytes) -> Entry | Expired:
    """A frame of /ws/events. Raises ServerError."""
    try:
        return msgspec.json.decode(frame, type=Entry)
    except msgspec.DecodeError as error:
        try:
            expired = msgspec.json.decode(frame, type=Expired)
        except msgspec.DecodeError:
            expired = None
        if expired is None or expired.type != RETENTION_EXHAUSTED:
            raise ServerError(f"/ws/events: cannot read a frame: {error}") from error
        return expired


def after_close(code: int | None, reason: str, *, cursor: int, expired: Expired | None, subject_is_right: bool) -> CellosError:
    """What the end of a stream of events means; ServerUnreachable where another connection may go on at the cursor."""
    if code == GOES_ON_ELSEWHERE:
        oldest = expired.oldest_seq if expired is not None else None
        what = f"the oldest that is left is {oldest}" if oldest is not None and oldest > cursor else "the log was made anew"
        return CursorExpired(f"no events follow {cursor}: {what}", oldest=oldest)
    if code == POLICY and reason != NOT_YET and not (reason == CANNOT_SUBSCRIBE and subject_is_right):
        return ServerError(f"/ws/events was closed: {reason or 'no reason given'}")
    why = f"closed with {code}" if code is not None else "lost"
    return ServerUnreachable(f"the stream of events was {why}{f' ({reason})' if reason else ''}")
