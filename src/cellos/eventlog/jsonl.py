"""The JSONL sink: one compact CloudEvent per line in a file that several runs, also of several processes, may share.

Opened when the run is put together, so that a file that cannot be written refuses the run before a cell exists. A new file gets mode
0600 (events carry argv); an existing one keeps its own. The parent directory is not made. Never synced: the page cache survives the
death of the process, not a power cut.
"""

from __future__ import annotations

import errno
import os
import stat

from cellos.errors import EventSinkError, os_error_text
from cellos.eventlog.append import Appender

MAX_EVENT_BYTES = 1_048_576
"""Longest line without its line feed: what an event log's default message limit takes, too."""

_NO_READER = {
    stat.S_IFIFO: "; it is a FIFO that nobody reads: start its reader first",
    stat.S_IFSOCK: "; it is a socket, which nobody can open: name a file or a FIFO",
}


def open_jsonl(path: str) -> int:
    """A descriptor that appends to `path`. Raises EventSinkError.

    Reading a regular file is asked for only to see how it ends. A FIFO without a reader is an error (ENXIO), not a wait: opened for
    both, it would have one in ourselves. It stays non-blocking (this opening of the file is ours alone): a reader that does not read must
    not hold up the run for ever.
    """
    flags = os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, flags | (os.O_RDWR if _kind(path) == stat.S_IFREG else os.O_WRONLY), 0o600)
        except PermissionError:
            descriptor = os.open(path, flags | os.O_WRONLY, 0o600)
    except OSError as error:
        why = _NO_READER.get(_kind(path), "") if error.errno == errno.ENXIO else ""
        raise EventSinkError(f"jsonl open {path}: {os_error_text(error)}{why}") from error
    except ValueError as error:  # a NUL byte in the name
        raise EventSinkError(f"jsonl open {path!r}: {error}") from error
    return descriptor


def _kind(path: str) -> int:
    """What `stat.S_IFMT` says; what is not there yet will be a regular file."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return stat.S_IFREG


class JsonlSink:
    """EventSink over one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = Appender(open_jsonl(path), path)

    @property
    def size(self) -> int:
        """Bytes in the file now; 0 where it is no regular one."""
        return self._file.size

    @property
    def removed(self) -> bool:
        """Somebody deleted the file, and with it what was written. A renamed one is where its owner wants it."""
        return self._file.removed

    def emit(self, event_id: str, line: bytes) -> None:
        """Append one event."""
        if len(line) > MAX_EVENT_BYTES:
            raise EventSinkError(f"jsonl event too large: {len(line)} bytes exceeds MAX_EVENT_BYTES ({MAX_EVENT_BYTES} bytes)")
        self._file.append(line)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()
