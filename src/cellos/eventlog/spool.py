"""The spool: one run's final event bytes in a file of its own, written before anything is sent anywhere.

It is the truth about what a run emitted: other sinks are behind it, never ahead. After a crash `recover` tells where the run stopped,
so that whoever finishes the run can continue its chain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from msgspec import Struct

from cellos.errors import EventSinkError, os_error_text
from cellos.eventlog.append import Appender

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_BLOCK = 1 << 16


class Spool:
    """EventSink over a run's own file, mode 0600."""

    def __init__(self, path: str, *, resume: bool = False) -> None:
        """A new file, which must not exist yet, or (`resume`) the one of a run that is continued. Raises EventSinkError."""
        self.path = path
        try:
            descriptor = os.open(path, _FLAGS if resume else _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise EventSinkError(f"spool open {path}: {os_error_text(error)}") from error
        self._file = Appender(descriptor, path)

    def emit(self, event_id: str, line: bytes) -> None:
        """Append one event."""
        self._file.append(line)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


class Recovered(Struct, frozen=True, kw_only=True):
    """What a spool holds after a crash."""

    last: bytes | None
    """The last whole line, without its line feed."""
    torn_bytes: int
    """Length of the half line that was cut off."""


def recover(path: str) -> Recovered:
    """Cut off a torn last line and give the last whole one. A missing file is an empty spool. Raises EventSinkError.

    Reads backwards in blocks: a long run's spool costs no more than its last event.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        return Recovered(last=None, torn_bytes=0)
    except OSError as error:
        raise EventSinkError(f"spool open {path}: {os_error_text(error)}") from error
    try:
        size = os.fstat(descriptor).st_size
        end = _feed_before(descriptor, size) + 1
        if end < size:
            os.ftruncate(descriptor, end)
        if end == 0:
            return Recovered(last=None, torn_bytes=size)
        begin = _feed_before(descriptor, end - 1) + 1
        return Recovered(last=os.pread(descriptor, end - 1 - begin, begin), torn_bytes=size - end)
    except OSError as error:
        raise EventSinkError(f"spool recover {path}: {os_error_text(error)}") from error
    finally:
        os.close(descriptor)


def read_lines(path: str, *, offset: int = 0) -> Iterator[bytes]:
    """The whole lines of an event file from `offset` on, without their line feeds. A missing file has none. Raises EventSinkError."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
    except FileNotFoundError:
        return
    except OSError as error:
        raise EventSinkError(f"event file {path}: {os_error_text(error)}") from error


def _feed_before(descriptor: int, end: int) -> int:
    """Offset of the last line feed before `end`, -1 where there is none."""
    while end > 0:
        begin = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found
        end = begin
    return -1
