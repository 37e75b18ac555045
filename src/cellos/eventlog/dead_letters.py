"""Dead letters: events that a sink did not take, one file each, in a directory that an operator chose (CELLOS_DLQ_DIR).

`<unix ms>-<event id>.jsonl` (characters of the id other than letters, digits, `.`, `_`, `-` become `_`; where a name is taken, `-2`, `-3` …
follow the id) holds one line, `{"error":"<why>","event":<the event's final bytes>}`: redacted, linked and signed as every sink gets it, so
that `cellos spool replay` sends the very same bytes. Files have mode 0600. Nothing of ours removes them but a replay.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

import msgspec
from msgspec import Struct

from cellos.errors import EventSinkError, os_error_text
from cellos.ports import EventSink

SUFFIX = ".jsonl"
_MOST_NAMES = 1000
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_LONGEST_ID = 200
"""Characters of an id in a file name, which may have 255 bytes."""


class DeadLetter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file holds. `event` is taken and given byte for byte."""

    error: str
    event: msgspec.Raw


def directory_fault(path: str) -> str | None:
    """Why dead letters cannot be kept in `path`; None where they can. Leaves nothing behind.

    Nothing is made: that the directory is missing may be a mistake in its name.
    """
    probe = f"{path}/.cellos-dlq-probe-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        if not os.path.isdir(path):
            return "not a directory" if os.path.lexists(path) else "no such directory; make it, or correct the name"
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.close(descriptor)
        os.unlink(probe)
    except OSError as error:
        return f"cannot be written: {os_error_text(error)}"
    except ValueError:  # a NUL byte
        return "not a path"
    return None


class DeadLetters:
    """A directory of dead letters. May be used from several threads and processes."""

    def __init__(self, directory: str, *, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        """Raises EventSinkError, with nothing but the reason, where nothing can be kept there."""
        fault = directory_fault(directory)
        if fault is not None:
            raise EventSinkError(fault)
        self.directory = directory
        self._now_ms = now_ms

    def store(self, event_id: str, line: bytes, error: str) -> str:
        """Keep one event; the path of its file. Raises EventSinkError: nothing of it is left there."""
        content = msgspec.json.encode(DeadLetter(error=error, event=msgspec.Raw(line))) + b"\n"
        stem = f"{self.directory}/{self._now_ms()}-{_UNSAFE.sub('_', event_id)[:_LONGEST_ID] or '_'}"
        try:
            path, descriptor = _create(stem)
            try:
                written = 0
                while written < len(content):
                    written += os.write(descriptor, content[written:])
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(descriptor)
        except OSError as failure:
            raise EventSinkError(f"dead letter {stem}{SUFFIX}: {os_error_text(failure)}") from failure
        return path


class DlqSink:
    """EventSink that keeps as a dead letter what the sink within does not take. Only what cannot be kept either is an error."""

    def __init__(self, inner: EventSink, dead_letters: DeadLetters) -> None:
        self.stored = 0
        """Events that are dead letters now."""
        self._inner = inner
        self._dead_letters = dead_letters

    def emit(self, event_id: str, line: bytes) -> None:
        """Raises the inner sink's EventSinkError where the event could not be kept."""
        try:
            self._inner.emit(event_id, line)
        except EventSinkError as error:
            try:
                self._dead_letters.store(event_id, line, str(error))
            except EventSinkError:
                raise error from None
            self.stored += 1

    def close(self) -> None:
        """Idempotent where the inner one is."""
        self._inner.close()


def _create(stem: str) -> tuple[str, int]:
    """A file of its own: two sinks that fail on one event within a millisecond ask for the same name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    for number in range(1, _MOST_NAMES):
        path = f"{stem}{SUFFIX}" if number == 1 else f"{stem}-{number}{SUFFIX}"
        try:
            return path, os.open(path, flags, 0o600)
        except FileExistsError:
            continue
    raise FileExistsError(17, os.strerror(17))
