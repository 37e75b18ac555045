"""Strict JSON: bytes to objects, or one clear error with its place.

Two readers must never see two documents, so everything that JSON libraries answer differently is refused: duplicate members, NaN and
infinities, lone surrogates, bytes that are not UTF-8, a byte order mark, text after the end. Size and nesting have limits. An integer that
no 64-bit reader could hold becomes `OutOfRange`, which no member accepts.

A document that is plainly right is read by msgspec, which is loaded anyway. Whatever needs a closer look goes to careful.py: it has the
same answer for all others too, and loads in 2 ms more.
"""

from __future__ import annotations

from typing import NoReturn

from msgspec import DecodeError, json

from cellos.errors import SpecSyntaxError

MAX_DOCUMENT_BYTES = 1024 * 1024
"""A reader of a file or stream need not read more than one byte beyond this: what is longer is refused unread."""

MAX_NESTING = 128


class OutOfRange:
    """An integer beyond 64 bits."""

    def __init__(self, digits: str) -> None:
        self.digits = digits

    def __str__(self) -> str:
        return f"the integer {self.digits}" if len(self.digits) <= 40 else f"an integer of {len(self.digits)} digits"


def decode(raw: bytes) -> object:
    """The value of one JSON document. Raises SpecSyntaxError."""
    # Without \u no surrogate can be half a pair, and in ASCII there is no wrong UTF-8 and no byte order mark.
    if len(raw) <= MAX_DOCUMENT_BYTES and raw.isascii() and b"\\u" not in raw:
        try:
            value: object = json.decode(raw)
        except (DecodeError, RecursionError):
            pass  # msgspec's words for it have no line and column
        else:
            if _is_plain(value, _members_in(raw)):
                return value
    from cellos.core.documents import careful

    return careful.decode(raw)


def _members_in(raw: bytes) -> int:
    """How many members the objects of a well-formed document have, duplicates counted: each has one colon outside of strings."""
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return sum(outside.count(b":") for outside in unescaped.split(b'"')[::2])


def _is_plain(value: object, members: int) -> bool:
    """Whether a value has so many members, nests no deeper than it may, and every reader of JSON has the same numbers of it."""
    level = [value]
    for _ in range(MAX_NESTING):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                members -= len(item)
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) or (isinstance(item, int) and not -(2**63) <= item < 2**64):
                return False
        if not below:
            return members == 0
        level = below
    return False


def document_text(raw: bytes) -> str:
    """A document of any syntax as text. Raises SpecSyntaxError where it is too large, empty or no UTF-8."""
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise SpecSyntaxError(f"the document is larger than {MAX_DOCUMENT_BYTES} bytes, the most that is read")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise SpecSyntaxError("line 1 column 1: the document starts with a byte order mark: save it as UTF-8 without one", line=1, column=1)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        refuse(before, len(before), f"byte 0x{raw[error.start]:02x} is not UTF-8")
    if not text.strip(" \t\r\n"):
        raise SpecSyntaxError("the document is empty")
    return text


def refuse(text: str, at: int, reason: str) -> NoReturn:
    """Raises SpecSyntaxError, with line and column of a place in the document's text."""
    line = text.count("\n", 0, at) + 1
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    raise SpecSyntaxError(f"line {line} column {column}: {reason}", line=line, column=column) from None
