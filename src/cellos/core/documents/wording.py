"""How errors about documents are worded: values quoted, members named, what was given described. Every answer is one line of plain text."""

from __future__ import annotations

_SHORT_ESCAPES = {"\0": "\\0", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"}
_LONGEST = 80


def quoted(value: str) -> str:
    r"""A string in double quotes, as the texts of the rules show it: `\"`, `\\`, `\n`, `\r`, `\t`, `\0`, `\u{7f}` for all else unseen."""
    return '"' + "".join('\\"' if char == '"' else _escaped(char) for char in value) + '"'


def quoted_char(char: str) -> str:
    r"""One character in single quotes, escaped as in `quoted`, save that `'` is escaped and `"` is not."""
    return "'" + ("\\'" if char == "'" else _escaped(char)) + "'"


def _escaped(char: str) -> str:
    return _SHORT_ESCAPES.get(char) or (char if char.isprintable() else f"\\u{{{ord(char):x}}}")


def member(path: str, name: str) -> str:
    """The path of a member of the object at `path`: `spec.run`, or `labels["two words"]` where a name is not a plain word."""
    if not (name.isascii() and name.replace("-", "_").isidentifier()):
        return f"{path}[{clipped(name)}]"
    return f"{path}.{name}" if path else name


def clipped(value: str) -> str:
    """`quoted`, cut where it would fill the screen."""
    return quoted(value) if len(value) <= _LONGEST else f"{quoted(value[:_LONGEST])}…"


def given(value: object) -> str:
    """What somebody wrote, for the end of `must be …, given …`."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return f"the integer {value}"
        case float():
            return f"the number {value!r}"
        case str():
            return f"the string {clipped(value)}"
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return str(value)


def one_of(words: tuple[str, ...]) -> str:
    """The admissible words of a member."""
    return f'"{words[0]}"' if len(words) == 1 else "one of " + ", ".join(words)
