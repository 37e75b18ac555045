"""The arguments of `cellos.run`, looked at before anything is done with them.

A wrong type is a TypeError, as in the standard library; a wrong value is a ConfigError. Both name the parameter, and hold no secret.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from cellos.client.local import take_secrets
from cellos.errors import ConfigError

_PATH = "str or os.PathLike"


def texts(name: str, given: object, *, takes: str = f"a sequence of {_PATH}", why: str = "") -> tuple[str, ...]:
    """Many texts or paths. One alone is many, too, letter by letter, and never what was meant."""
    if isinstance(given, str | bytes | os.PathLike | Mapping) or not isinstance(given, Iterable):
        raise _wrong_type(name, takes, given, why)
    return tuple(text(f"{name}[{position}]", each) for position, each in enumerate(given))


def text(name: str, given: Any) -> str:
    """A text, or a path as text."""
    path = given.__fspath__() if isinstance(given, os.PathLike) else given
    if not isinstance(path, str):
        raise _wrong_type(name, _PATH, given)
    if not _can_be_encoded(path):
        raise ConfigError(f"{name} has characters that no text in UTF-8 can have: {path!a}")
    return path


def secrets(given: object) -> dict[str, str]:
    """Name to value: those of a mapping, or names with the values that the environment has."""
    if not isinstance(given, Mapping):
        return take_secrets(texts("secrets", given, takes="a mapping, or a sequence of str"), os.environ)
    values = {}
    for key, value in given.items():
        name = text("a name in secrets", key)
        if not isinstance(value, str):
            raise _wrong_type(f"secrets[{name!r}]", "str", value)
        if not value or "\0" in value or not _can_be_encoded(value):
            raise ConfigError(f"secrets[{name!r}] is empty, has a NUL byte or is no text: no variable of the command can have that value")
        values[name] = value
    return values


def milliseconds(timeout: Any) -> int | None:
    """A time-out, which is given in seconds."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not (hasattr(type(timeout), "__float__") or hasattr(type(timeout), "__index__")):
        raise _wrong_type("timeout", "a number of seconds, or None", timeout)
    if not 0 < timeout < 10**9:
        raise ConfigError(f"timeout is above 0 and below 10^9 seconds, not {timeout}")
    return max(1, round(float(timeout) * 1000))


def memory(given: Any) -> int | None:
    """A limit in bytes."""
    if given is None:
        return None
    number = _whole("memory", given)
    if not 0 < number < 1 << 63:
        raise ConfigError(f"memory is above 0 and below 2^63 bytes, not {number}")
    return number


def capture(given: Any) -> int | None:
    """How many bytes are kept."""
    if given is None:
        return None
    number = _whole("capture", given)
    if number < 0:
        raise ConfigError(f"capture is a number of bytes, 0 or more, or None, not {number}")
    return number


def flag(name: str, given: object) -> bool:
    """A bool, and nothing that is only as good as one: `here="dir"` means something else."""
    if not isinstance(given, bool):
        raise _wrong_type(name, "True or False", given)
    return given


def directories(given: object) -> tuple[str, ...]:
    """Those of `read_only`, which exist."""
    found = texts("read_only", given)
    for position, path in enumerate(found):
        if not os.path.exists(path):
            raise ConfigError(f"read_only[{position}]: {path!r}: no such directory")
    return found


def places(out: object) -> tuple[tuple[str, str], ...]:
    """Files of the work directory, and where each goes."""
    if isinstance(out, Mapping):
        return tuple((text("a file in out", path), text(f"out[{path!r}]", place)) for path, place in out.items())
    return tuple((path, os.path.basename(path)) for path in texts("out", out, takes=f"a mapping, or a sequence of {_PATH}"))


def content(stdin: object) -> bytes:
    """What the command reads."""
    if not isinstance(stdin, bytes | bytearray | memoryview):
        raise _wrong_type("stdin", "bytes, or None", stdin)
    return bytes(stdin)


def _whole(name: str, given: Any) -> int:
    if isinstance(given, bool) or not hasattr(type(given), "__index__"):
        raise _wrong_type(name, "a number of bytes, or None", given)
    return int(given.__index__())


def _wrong_type(name: str, takes: str, given: object, why: str = "") -> TypeError:
    return TypeError(f"{name} must be {takes}, not {type(given).__name__}{why and f': {why}'}")


def _can_be_encoded(text: str) -> bool:
    """Whether the bytes that it stands for can be told. Its error would hold the text, so it ends here."""
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
