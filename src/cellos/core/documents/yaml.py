"""Strict YAML: bytes to the objects that the same document in JSON would give, or one clear error with its place.

What is read is the part of YAML 1.2 that says what JSON can say, with its core schema: `yes`, `no`, `on`, `off`, dates and `1:30` are
strings, `0o17` is an integer. What readers answer differently or nobody needs is refused: duplicate members, anchors and aliases, tags,
merge keys, directives, names that are not strings, a second document, NaN and infinities, lone surrogates, a byte order mark, line breaks
that only YAML 1.1 knows. Size, nesting and integers have the limits of `strict`.

PyYAML's scanner and parser are used (in C where they were built so), none of its resolvers and constructors: values are made from events,
without recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from cellos.core.documents.strict import MAX_NESTING, OutOfRange, document_text, refuse
from cellos.core.documents.wording import member
from cellos.errors import SpecSyntaxError

if TYPE_CHECKING:
    from yaml import MarkedYAMLError
    from yaml._yaml import Mark as CMark
    from yaml.error import Mark as PythonMark
    from yaml.events import AliasEvent, CollectionStartEvent, Event, ScalarEvent

    Mark = CMark | PythonMark | None
    Node = AliasEvent | ScalarEvent | CollectionStartEvent

# The core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2).
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"(?P<decimal>[-+]?[0-9]+)|0o(?P<octal>[0-7]+)|0x(?P<hexadecimal>[0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_BASES = {"octal": 8, "hexadecimal": 16, "decimal": 10}

# Characters that YAML has only as escapes, and line breaks of YAML 1.1 that are none in YAML 1.2.
_UNWRITABLE = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

_TABS = "tabs cannot indent; use blanks"
_TOO_EARLY = "the document ends too early"
_TEXT_AFTER = "there is text after the end of the document"
_NO_CHARACTER = "a \\ escape stands for no character (half of a surrogate pair, or beyond Unicode); write the character itself"
_ESCAPE = "unknown \\ escape in double quotes; in single quotes there are none"
_DIRECTIVES = "directives are not read; documents are YAML 1.2"
_UNEXPECTED = "unexpected here, or the indentation does not fit the lines above"

# Parts of what the parsers, in C and in Python, say, and what tells a reader more. The first that occurs wins.
_CLEARER: tuple[tuple[str, str], ...] = (
    ("tab character", _TABS),
    ("cannot start any token", "this character cannot start a value; put text that begins with it into quotes"),
    ("mapping values are not allowed", "a second ': ' on one line, or a wrong indentation; put text that holds ': ' into quotes"),
    ("find expected ':'", "expected ': ' after a member's name"),
    ("sequence entries are not allowed", "the '- ' of a list must begin a line of its own"),
    ("Unicode character", _NO_CHARACTER),
    ("unknown escape character", _ESCAPE),
    ("expected escape sequence", _ESCAPE),
    ("expected hexdecimal", _ESCAPE),  # as libyaml spells it
    ("unexpected end of stream", _TOO_EARLY),
    ("<stream end>", _TOO_EARLY),
    ("%YAML", _DIRECTIVES),
    ("incompatible", _DIRECTIVES),
    ("<document start>", _TEXT_AFTER),
    ("node content", "expected a value"),
    ("expected ',' or", "expected ',' or the closing bracket"),
    ("<block end>", _UNEXPECTED),
    ("expected key", _UNEXPECTED),
    ("expected '-' indicator", _UNEXPECTED),
)


class _Open:
    """A list or an object that is not complete yet. `name` is that of its latest member, the value of which may still be to come."""

    def __init__(self, container: list[object] | dict[str, object]) -> None:
        self.container = container
        self.name = ""
        self.awaits_name = isinstance(container, dict)

    def add_name(self, name: str) -> None:
        self.name, self.awaits_name = name, False

    def add(self, value: object) -> None:
        if isinstance(self.container, list):
            self.container.append(value)
        else:
            self.container[self.name] = value
            self.awaits_name = True

    def latest(self, path: str) -> str:
        """The path of the latest member, from that of the container."""
        return f"{path}[{len(self.container) - 1}]" if isinstance(self.container, list) else member(path, self.name)


def decode(raw: bytes) -> object:
    """The value of one YAML document. Raises SpecSyntaxError."""
    text = document_text(raw)
    if found := _UNWRITABLE.search(text):
        refuse(text, found.start(), f"the character U+{ord(found[0]):04X} can only be written as an escape, in double quotes")
    return _value(_events(text))


def _events(text: str) -> Iterator[Event]:
    """The events of PyYAML's parser; its errors in our words."""
    import yaml

    try:
        yield from yaml.parse(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # A name is known to lack its ':' only where the next line begins.
        mark = error.context_mark if "find expected ':'" in (error.problem or "") else error.problem_mark
        _refuse_at(mark, _clearer(text, mark, error))
    except (ValueError, OverflowError):
        # The parser in Python makes a character of any number in an escape.
        raise SpecSyntaxError(_NO_CHARACTER) from None


def _clearer(text: str, mark: Mark, error: MarkedYAMLError) -> str:
    problem = error.problem or "this is not YAML"
    if mark is not None and text.startswith("\t", mark.index):
        return _TABS
    if mark is not None and "expected ',' or" in problem and not text[mark.index :].strip():
        return _TOO_EARLY
    return next((clear for words, clear in _CLEARER if words in problem), " ".join(problem.split()))


def _value(events: Iterator[Event]) -> object:
    from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

    whole: list[object] = []
    opened = [_Open(whole)]
    for event in events:
        if isinstance(event, (ScalarEvent, CollectionStartEvent, AliasEvent)):
            value = _node(event)
            if opened[-1].awaits_name:
                opened[-1].add_name(_name(value, event, opened))
                continue
            opened[-1].add(value)
            if isinstance(value, (list, dict)):
                # `opened` holds one more than there are levels, which is the one that begins here.
                if len(opened) > MAX_NESTING:
                    _refuse_at(event.start_mark, f"the document is nested more than {MAX_NESTING} levels deep")
                opened.append(_Open(value))
        elif isinstance(event, CollectionEndEvent):
            opened.pop()
        elif isinstance(event, DocumentStartEvent):
            if whole:
                _refuse_at(event.start_mark, _TEXT_AFTER)
            if event.version or event.tags:
                _refuse_at(event.start_mark, _DIRECTIVES)
    if not whole:
        raise SpecSyntaxError("the document is empty")
    return whole[0]


def _node(event: Node) -> object:
    """A scalar's value, or a new list or object."""
    from yaml.events import AliasEvent, ScalarEvent, SequenceStartEvent

    if isinstance(event, AliasEvent) or event.anchor is not None:
        _refuse_at(event.start_mark, "anchors (&) and aliases (*) are not read; write the value out, or put it into quotes")
    if event.tag is not None:
        _refuse_at(event.start_mark, "tags (!) are not read; put text that begins with ! into quotes")
    if not isinstance(event, ScalarEvent):
        return [] if isinstance(event, SequenceStartEvent) else {}
    if event.implicit[0]:
        # Without quotes, and not a block of text.
        return _plain(event.value, event.start_mark)
    if _SURROGATE.search(event.value):
        _refuse_at(event.start_mark, _NO_CHARACTER)
    return event.value


def _plain(text: str, mark: Mark) -> object:
    """What text without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if found := _INTEGER.fullmatch(text):
        return _integer(found)
    if text == "<<":
        _refuse_at(mark, "merge keys (<<) are not read; write the members out, or put << into quotes")
    if _NOT_FINITE.fullmatch(text):
        _refuse_at(mark, f"{text} is not a finite number")
    if not _FLOAT.fullmatch(text):
        return text
    if abs(number := float(text)) == float("inf"):
        _refuse_at(mark, "the number is too large")
    return number


def _integer(found: re.Match[str]) -> int | OutOfRange:
    kind = found.lastgroup or ""
    digits = found[kind].lstrip("-+0") or "0"
    # The longest that 64 bits have: 22 octal digits. Far longer ones int() would refuse in its own words.
    if len(digits) <= 22:
        value = int(digits, _BASES[kind]) * (-1 if found[0].startswith("-") else 1)
        if -(2**63) <= value < 2**64:
            return value
    return OutOfRange(found[0])


def _name(value: object, event: Node, opened: list[_Open]) -> str:
    """A value as the name of a member of the innermost object."""
    if not isinstance(value, str):
        _refuse_at(event.start_mark, "the name of a member must be a string: put it into quotes")
    if value in opened[-1].container:
        path = ""
        for outer in opened[1:-1]:
            path = outer.latest(path)
        path = member(path, value)
        _refuse_at(event.start_mark, f"{path} is given more than once", path)
    return value


def _refuse_at(mark: Mark, reason: str, path: str = "") -> NoReturn:
    if mark is None:
        raise SpecSyntaxError(reason, path=path) from None
    line, column = mark.line + 1, mark.column + 1
    raise SpecSyntaxError(f"line {line} column {column}: {reason}", path=path, line=line, column=column) from None
