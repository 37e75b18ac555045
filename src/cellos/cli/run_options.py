"""The options of `cellos run`: one table, and a reader for command lines without a fault.

To load click takes 20 ms, a quarter of what a small command takes in all. So `read` takes a command line that is plainly right. Where it
gives up (a mistake, a call for help, a form that is rare) click reads the line again: its command is made from the same table, and it alone
words help and errors.
"""

import os
from collections.abc import Callable

from msgspec import Struct

MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def duration(text: str) -> int:
    """`30s`, `1500ms`, `5m`, `1h`; a bare number is seconds. In milliseconds. Raises ValueError."""
    number = text.rstrip("hms")
    whole, point, fraction = number.partition(".")
    unit = MILLISECONDS.get(text[len(number) :] or "s", 0)
    right = _is_number(whole, 9) and (not point or _is_number(fraction, 3))
    milliseconds = round(float(number) * unit) if right else 0
    if milliseconds <= 0:
        raise ValueError(f"{text!r} is not a time above 0, like 30s, 1500ms, 5m or 1h")
    return milliseconds


def size(text: str) -> int:
    """`512M`, `1G`, `65536`; B or iB may follow, in upper or lower case. In bytes. Raises ValueError."""
    upper = text.upper().removesuffix("B")
    if upper != text.upper():
        upper = upper.removesuffix("I")
    number = upper.rstrip("KMGT")
    value = int(number) * BYTES.get(upper[len(number) :], 0) if _is_number(number, 15) else 0
    if not 0 < value < 1 << 63:
        raise ValueError(f"{text!r} is not a size above 0, like 512M or 1G")
    return value


def _is_number(text: str, digits: int) -> bool:
    return text.isdecimal() and text.isascii() and len(text) <= digits


def file_and_place(text: str) -> tuple[str, str]:
    """`FILE` or `FILE:DEST`. Raises ValueError."""
    file, separator, place = text.partition(":")
    if not os.path.basename(file):
        raise ValueError(f"{text!r} is not FILE or FILE:DEST")
    return file, place if separator and place else os.path.basename(file)


class Option(Struct, frozen=True, kw_only=True):
    """`name` is the parameter that it sets. Without `metavar` it is a flag; `convert` makes the value of its text, or raises ValueError."""

    flag: str
    name: str
    metavar: str | None = None
    many: bool = False
    convert: Callable[[str], object] = str
    help: str


OPTIONS = (
    Option(flag="-i", name="interactive", help="Relay our standard input to the command; else it reads /dev/null."),
    Option(flag="--here", name="here", help="The current directory, read-only, is the working directory (else the cell's empty /work)."),
    Option(flag="--ro", name="read_only", metavar="DIR", many=True, help="Show that directory, read-only, at the same path."),
    Option(
        flag="--out", name="out", metavar="FILE[:DEST]", many=True, convert=file_and_place, help="Copy FILE out of /work after success."
    ),
    Option(flag="--allow", name="allow", metavar="HOST[:PORT]", many=True, help="Let the command reach that host (not built yet)."),
    Option(flag="--secret", name="secrets", metavar="KEY", many=True, help="Hand KEY of our environment to the command."),
    Option(
        flag="--timeout",
        name="timeout_ms",
        metavar="TIME",
        convert=duration,
        help="End the command after that time: 30s, 1500ms, 5m, 1h [1h].",
    ),
    Option(flag="--mem", name="memory_bytes", metavar="SIZE", convert=size, help="Memory limit: 512M, 1G."),
    Option(flag="--json", name="as_json", help="One JSON object on standard output, the command's output in it, instead of all else."),
    Option(flag="--print-spec", name="print_spec", help="Print the document that would be run, and run nothing."),
)


def read(arguments: list[str]) -> dict[str, object] | None:
    """What the options and the command of a command line set, as click would tell it; None where click must read it."""
    options = {option.flag: option for option in OPTIONS}
    given: dict[str, list[object]] = {option.name: [] for option in OPTIONS}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("-") or argument in ("-", "--"):
            break
        position += 1
        flag, equals, text = argument.partition("=")
        option = options.get(flag)
        if option is None or (equals and (option.metavar is None or not flag.startswith("--"))):
            return None
        if option.metavar is None:
            given[option.name].append(True)
            continue
        if not equals:
            if position == len(arguments) or arguments[position].startswith("-"):
                return None
            text, position = arguments[position], position + 1
        try:
            given[option.name].append(option.convert(text))
        except ValueError:
            return None
    command = tuple(arguments[position + (arguments[position : position + 1] == ["--"]) :])
    if not command:
        return None
    values = {option.name: _value(option, given[option.name]) for option in OPTIONS}
    return {**values, "command": command}


def asks_for_json(arguments: list[str]) -> bool:
    """Whether --json stands before the command, in a command line that may be wrong."""
    valued = {option.flag for option in OPTIONS if option.metavar is not None}
    words = iter(arguments)
    for word in words:
        if word == "--json":
            return True
        if not word.startswith("-") or word in ("-", "--"):
            return False
        if word in valued:
            next(words, None)
    return False


def _value(option: Option, given: list[object]) -> object:
    """Of a value that is given twice the last one counts."""
    if option.many:
        return tuple(given)
    if option.metavar is None:
        return bool(given)
    return given[-1] if given else None
