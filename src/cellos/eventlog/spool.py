"""The spool: one run's final event bytes in a file of its own, written before anything is sent anywhere.

It is the truth about what a run emitted: other sinks are behind it, never ahead. After a crash `recover` tells where the run stopped,
so that whoever finishes the run can continue its chain.

What NATS has not acknowledged by the end of a run waits here for `cellos spool replay`. A spool directory that is full takes no new runs:
a run whose events could not be kept anywhere must not begin.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from msgspec import Struct

from cellos.errors import EventSinkError, os_error_text
from cellos.eventlog.append import Appender

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_BLOCK = 1 << 16
_SUFFIX = ".jsonl"

SPOOL_LIMIT_BYTES = 256 << 20


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

    @property
    def in_place(self) -> bool:
        """Nobody took the file away."""
        return self._file.in_place

    def emit(self, event_id: str, line: bytes) -> None:
        """Append one event."""
        self._file.append(line)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def require_room(directory: str, *, limit: int = SPOOL_LIMIT_BYTES) -> None:
    """Raises EventSinkError where the spools of a directory have reached `limit` bytes. Costs one listing."""
    try:
        total = spooled_bytes(directory)
    except OSError as error:
        raise EventSinkError(f"spool {directory}: {os_error_text(error)}") from error
    if total >= limit:
        raise EventSinkError(
            f"spool full: {directory} holds {total / (1 << 20):.1f} MiB of events that wait for NATS, and no run begins above "
            f"{limit / (1 << 20):g} MiB; send them: cellos spool replay {directory}"
        )


def spooled_bytes(directory: str) -> int:
    """Bytes in the spools of a directory. Raises OSError."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(_SUFFIX):
                try:
                    total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # a run has just ended
                    continue
    return total


def keep_only(path: str, lines: Iterable[bytes]) -> None:
    """Put these lines, what still waits of a spool that nobody writes any more, in the place of its content; without any, remove it.

    At once: whoever opens the file sees the old or the new content. Raises EventSinkError; then it is as it was.
    """
    waiting = list(lines)
    new = f"{path}.new"
    try:
        if not waiting:
            os.unlink(path)
            return
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            file = Appender(descriptor, new)
            try:
                for line in waiting:
                    file.append(line)
            finally:
                file.close()
            os.rename(new, path)
        except BaseException:
            os.unlink(new)
            raise
    except FileNotFoundError:
        return
    except OSError as error:
        raise EventSinkError(f"spool {path}: {os_error_text(error)}") from error


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
