"""Strict JSON with a closer look: what is wrong with a document, and where. The promises are those of strict.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NoReturn

from cellos.core.documents.strict import MAX_NESTING, OutOfRange, document_text, refuse
from cellos.core.documents.wording import member
from cellos.errors import SpecSyntaxError

# Possessive, so that an unterminated string costs one pass.
_LEXEME = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]|-?Infinity|NaN', re.DOTALL)


class _DuplicateError(Exception):
    """A member occurs twice. Where is found by a second look, which only a faulty document pays for."""


class _ConstantError(Exception):
    """NaN or an infinity."""


class _Members(list[tuple[str, object]]):
    """The members of an object as written, duplicates included."""


def decode(raw: bytes) -> object:
    """The value of one JSON document. Raises SpecSyntaxError."""
    text = document_text(raw)
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        refuse(text, error.pos, _reason(text, error))
    except _DuplicateError:
        _refuse_duplicate(text)
    except _ConstantError:
        at, word = next((found.start(), found[0]) for found in _LEXEME.finditer(text) if found[0].endswith(("Infinity", "NaN")))
        refuse(text, at, f"{word} is not a JSON value")
    except RecursionError:
        _refuse_deep_nesting(text)
    if _is_deep(value):
        _refuse_deep_nesting(text)
    _refuse_lone_surrogates(text)
    return value


def _is_deep(value: object) -> bool:
    """Whether lists and objects nest too deep; level by level, without recursion of our own."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [inner for container in level for inner in _items(container) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _items(container: object) -> Iterable[object]:
    match container:
        case dict():
            return container.values()
        case _Members():
            return (item for _, item in container)
        case list():
            return container
        case _:
            return ()


def _refuse_deep_nesting(text: str) -> NoReturn:
    reason = f"the document is nested more than {MAX_NESTING} levels deep"
    depth = 0
    for found in _LEXEME.finditer(text):
        lexeme = found[0]
        if lexeme in "[{":
            depth += 1
            if depth > MAX_NESTING:
                refuse(text, found.start(), reason)
        elif lexeme in "]}":
            depth -= 1
    # The stack of our caller was nearly full; the document itself is not at fault, yet cannot be read.
    raise SpecSyntaxError(reason)


def _refuse_lone_surrogates(text: str) -> None:
    if "\\ud" not in text and "\\uD" not in text:
        return
    for found in _LEXEME.finditer(text):
        lexeme = found[0]
        if lexeme.startswith('"') and any("\ud800" <= char <= "\udfff" for char in json.loads(lexeme)):
            refuse(text, found.start(), "a string holds half of a surrogate pair, which is no character")


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _DuplicateError
    return members


def _integer(digits: str) -> int | OutOfRange:
    # 20 digits hold every 64-bit number; far longer ones int() would refuse in its own words.
    if len(digits) <= 20 and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    return OutOfRange(digits)


def _constant(_word: str) -> NoReturn:
    raise _ConstantError


_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_int=_integer, parse_constant=_constant)
_EVERY_MEMBER = json.JSONDecoder(object_pairs_hook=_Members, parse_int=_integer, parse_constant=lambda _word: None)


def _refuse_duplicate(text: str) -> NoReturn:
    try:
        value = _EVERY_MEMBER.decode(text)
    except json.JSONDecodeError as error:
        # The first look did not come as far as this.
        refuse(text, error.pos, _reason(text, error))
    except RecursionError:
        _refuse_deep_nesting(text)
    if _is_deep(value):
        _refuse_deep_nesting(text)
    path = _duplicate(value, "")
    raise SpecSyntaxError(f"{path} is given more than once", path=path or "") from None


def _duplicate(value: object, path: str) -> str | None:
    """The path of the first member that occurs twice in its object."""
    if isinstance(value, _Members):
        seen: set[str] = set()
        for name, inner in value:
            here = member(path, name)
            if name in seen:
                return here
            seen.add(name)
            if (found := _duplicate(inner, here)) is not None:
                return found
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            if (found := _duplicate(inner, f"{path}[{index}]")) is not None:
                return found
    return None


def _reason(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text):
        return "the document ends too early"
    if error.msg == "Extra data":
        return "there is text after the end of the document"
    return (error.msg[:1].lower() + error.msg[1:]).removesuffix(" starting at").removesuffix(" at").rstrip(": ")
