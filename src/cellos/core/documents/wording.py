"""How errors about documents are worded: values quoted, members named, what was given described. Every answer is one line of plain text."""

from __future__ import annotations

_SHORT_ESCAPES = {"\0": "\\0", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"}
_LONG = 80


def quoted(value: str, *, most: int = 300) -> str:
    r"""A string in double quotes, as the texts of the rules show it: `\"`, `\\`, `\n`, `\r`, `\t`, `\0`, `\u{7f}` for all else unseen.

    Beyond `most` characters it is cut, and `…` follows the closing quote.
    """
    text = "".join('\\"' if char == '"' else _escaped(char) for char in value[:most])
    return f'"{text}"' if len(value) <= most else f'"{text}"…'


def quoted_char(char: str) -> str:
    r"""One character in single quotes, escaped as in `quoted`, save that `'` is escaped and `"` is not."""
    return "'" + ("\\'" if char == "'" else _escaped(char)) + "'"


def _escaped(char: str) -> str:
    return _SHORT_ESCAPES.get(char) or (char if char.isprintable() else f"\\u{{{ord(char):x}}}")


def member(path: str, name: str) -> str:
    """The path of a member of the object at `path`: `spec.run`, or `labels["two words"]` where a name is not a plain word."""
    if not (len(name) <= _LONG and name.isascii() and name.replace("-", "_").isidentifier()):
        return f"{path}[{quoted(name, most=_LONG)}]"
    return f"{path}.{name}" if path else name


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
            return f"the string {quoted(value, most=_LONG)}"
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return str(value)


def one_of(words: tuple[str, ...]) -> str:
    """The admissible words of a member."""
    return f'"{words[0]}"' if len(words) == 1 else "one of " + ", ".join(words)
