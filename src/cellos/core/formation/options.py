"""What a member says beside its spec: what it waits for, whether it matters, and what becomes of it when a run fails or its node is lost.

Everything has a default. Members that are not known are carried along unread, but for those that look like a misspelt one of ours: a
`retires: 3` that does nothing would be found out when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import msgspec

from cellos.core.documents.wording import given, member, one_of
from cellos.core.formation.names import shown
from cellos.errors import SpecSyntaxError

OnNodeLost = Literal["fail", "retry"]
OnDisconnect = Literal["kill", "finish"]

MOST_RETRIES = 100
MOST_LOST_NODES = 10
"""How often a member is tried again because its node was lost."""
MOST_DEADLINE_SECONDS = 30 * 24 * 3600
MOST_BACKOFF_MS = 24 * 3600 * 1000
MOST_FACTOR = 100

MEMBER_OPTIONS = ("id", "authorizedBy", "spec", "use", "pool", "after", "critical", "retries", "onNodeLost", "backoff")
FORMATION_OPTIONS = ("templates", "deadlineSeconds", "onDisconnect")
BACKOFF_OPTIONS = ("initialMs", "maxMs", "factor")

_Object = Mapping[str, Any]
_Word = TypeVar("_Word", bound=str)


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """How long a member waits before it is tried again: longer with each attempt, up to `max_ms`."""

    initial_ms: int = 1000
    max_ms: int = 60_000
    factor: float = 2

    def delay_ms(self, ended: int) -> int:
        """The time between the end of an attempt and the next one, after `ended` attempts, at least one."""
        return int(min(self.max_ms, self.initial_ms * self.factor ** (ended - 1)))


def read_after(entry: _Object) -> tuple[str, ...]:
    """The ids of the members that must succeed first. Raises SpecSyntaxError, as all of these do, with the path in the entry."""
    value = entry.get("after")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _fault("after", f"must be a list of member ids, given {given(value)}")
    for index, each in enumerate(value):
        if not isinstance(each, str):
            raise _fault(f"after[{index}]", f"must be the id of a member, given {given(each)}")
    if len(set(value)) < len(value):
        index = next(index for index, each in enumerate(value) if each in value[:index])
        raise _fault(f"after[{index}]", f"names {shown(value[index])} a second time")
    return tuple(value)


def read_critical(entry: _Object) -> bool:
    value = entry.get("critical")
    if value is None:
        return True
    if not isinstance(value, bool):
        raise _fault("critical", f"must be true or false, given {given(value)}")
    return value


def read_retries(entry: _Object) -> int:
    return _integer(entry, "retries", 0, MOST_RETRIES, default=0)


def read_on_node_lost(entry: _Object) -> OnNodeLost:
    return _word(entry, "onNodeLost", get_args(OnNodeLost))


def read_on_disconnect(document: _Object) -> OnDisconnect:
    return _word(document, "onDisconnect", get_args(OnDisconnect))


def read_deadline_seconds(document: _Object) -> int:
    return _integer(document, "deadlineSeconds", 1, MOST_DEADLINE_SECONDS, default=MOST_DEADLINE_SECONDS)


def read_backoff(entry: _Object) -> Backoff:
    value = entry.get("backoff")
    if value is None:
        return Backoff()
    if not isinstance(value, dict):
        raise _fault("backoff", f"must be an object, given {given(value)}")
    if unknown := next((name for name in value if name not in BACKOFF_OPTIONS), None):
        raise _fault(member("backoff", unknown), f"is not known; known here: {', '.join(BACKOFF_OPTIONS)}")
    initial = _integer(value, "initialMs", 0, MOST_BACKOFF_MS, default=1000, path="backoff.")
    longest = _integer(value, "maxMs", 0, MOST_BACKOFF_MS, default=max(initial, 60_000), path="backoff.")
    if longest < initial:
        raise _fault("backoff.maxMs", f"must not be less than initialMs: {longest} is less than {initial}")
    factor = value.get("factor")
    if factor is None:
        factor = 2
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= MOST_FACTOR:
        raise _fault("backoff.factor", f"must be a number from 1 to {MOST_FACTOR}, given {given(factor)}")
    return Backoff(initial_ms=initial, max_ms=longest, factor=float(factor))


def refuse_misspelt(value: _Object, known: Sequence[str]) -> None:
    """Raises SpecSyntaxError for a member that is not known, but looks like one that is."""
    for name in value:
        if name not in known and (meant := _meant(name, known)):
            raise _fault(member("", name), f"is not known; did you mean {meant}?")


def _meant(name: str, known: Sequence[str]) -> str | None:
    plain = _plain(name)
    if plain == "retry":
        plain = "retries"
    return next((each for each in known if _is_near(plain, _plain(each))), None)


def _plain(name: str) -> str:
    return name[:64].lower().replace("_", "").replace("-", "")


def _is_near(written: str, known: str) -> bool:
    """A letter more, a letter less, two that changed places; in a long word also two slips. `tool` is no `pool`, `user` is no `use`."""
    if written == known:
        return True
    if len(known) < 4 or written[:1] != known[:1] or abs(len(written) - len(known)) > 2:
        return False
    if len(known) >= 7:
        return _distance(written, known) <= 2
    return sorted(written) == sorted(known) or _is_one_shorter(written, known) or _is_one_shorter(known, written)


def _is_one_shorter(short: str, long: str) -> bool:
    return len(short) + 1 == len(long) and any(long[:at] + long[at + 1 :] == short for at in range(len(long)))


def _distance(one: str, other: str) -> int:
    """How many letters to insert, to remove or to replace."""
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        last, row[0] = row[0], at
        for place, wanted in enumerate(other, 1):
            last, row[place] = row[place], min(last + (letter != wanted), row[place] + 1, row[place - 1] + 1)
    return row[-1]


def _integer(value: _Object, name: str, least: int, most: int, *, default: int, path: str = "") -> int:
    found = value.get(name)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise _fault(path + name, f"must be an integer from {least} to {most}, given {given(found)}")
    return found


def _word(value: _Object, name: str, words: tuple[_Word, ...]) -> _Word:
    """The first word is the default."""
    found = value.get(name)
    if found is None:
        return words[0]
    for word in words:
        if found == word:
            return word
    raise _fault(name, f"must be {one_of(words)}, given {given(found)}")


def _fault(path: str, what: str) -> SpecSyntaxError:
    return SpecSyntaxError(f"{path} {what}", path=path)
