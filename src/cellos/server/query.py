"""Query strings, read strictly: a number is a number, a key is given once, and where a route says so, no other key is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from cellos.core.problem import problem
from cellos.server.replies import Refused

MAX_U64 = (1 << 64) - 1
_PREFIX = "Failed to deserialize query string: "
_MAX_FIELDS = 32


def read_query(raw: bytes, known: Sequence[str], *, strict: bool = False) -> Mapping[str, str]:
    """The known parameters. Raises Refused: a known one is repeated, or `strict` and there is another."""
    if not raw:
        return {}
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError as error:  # not ASCII, not UTF-8 behind the percent signs, too many
        raise bad_query("not a query string") from error
    found: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            if strict:
                raise bad_query(f"unknown field `{_shown(name)}`, expected one of {', '.join(f'`{each}`' for each in known)}")
            continue
        if name in found:
            raise bad_query(f"duplicate field `{name}`")
        found[name] = value
    return found


def unsigned(query: Mapping[str, str], name: str) -> int | None:
    """An integer from 0 to 2^64 - 1, None where it is not given. Raises Refused."""
    text = query.get(name)
    if text is None:
        return None
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 40 and int(digits) <= MAX_U64):
        raise bad_query(f"{name}: `{_shown(text)}` is not an integer from 0 to {MAX_U64}")
    return int(digits)


def bad_query(text: str) -> Refused:
    """400, with the words that clients of CellOS 0.5 know it by."""
    return Refused(problem("bad-request", _PREFIX + text))


def _shown(text: str) -> str:
    return text[:80].encode("unicode_escape").decode()
