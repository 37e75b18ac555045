"""The snapshot on disk: one file in a directory that one server uses at a time, replaced as a whole.

What cannot be used is set aside under another name and said in the log; the server then reads the event log from its beginning.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time

from cellos.core import snapshot
from cellos.core.projection import Projection
from cellos.core.rows import Contents
from cellos.errors import ConfigError, SnapshotError, os_error_text
from cellos.eventlog.stored import Cursor
from cellos.server.config import STATE_DIR

FILE = "projection.snapshot"
_log = logging.getLogger("cellos.server.snapshot")


class SnapshotStore:
    """`keys` names the keys that signatures are checked with: records say what came of it."""

    def __init__(self, directory: str, *, keys: str = "") -> None:
        """Make the directory, for us alone, and lock it. Raises ConfigError."""
        self.path = f"{directory}/{FILE}"
        self._directory = directory
        self._keys = keys
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self._lock = os.open(f"{directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"{STATE_DIR}={directory}: {os_error_text(error)}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"{STATE_DIR}={directory}: another server uses it; give each a directory of its own") from error

    def close(self) -> None:
        """Release the directory."""
        os.close(self._lock)

    def load(self) -> tuple[Projection, Cursor] | None:
        """What was kept last; None where there is nothing that can be used."""
        try:
            with open(self.path, "rb") as file:
                raw = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("cannot read the snapshot", extra={"fields": {"path": self.path, "error": os_error_text(error)}})
            return None
        try:
            projection, position = snapshot.read(raw, keys=self._keys)
        except SnapshotError as error:
            self.set_aside(error.text, error.code.removeprefix("snapshot_"))
            return None
        return projection, Cursor(stream_created=position.stream_created, sequence=position.sequence, digest=position.digest)

    def save(self, contents: Contents, cursor: Cursor) -> int:
        """Replace what is kept. Gives its size. May run in another thread. Raises OSError: the old one is still there."""
        position = snapshot.Position(stream_created=cursor.stream_created, sequence=cursor.sequence, digest=cursor.digest)
        raw = snapshot.write(contents, position, keys=self._keys)
        temporary = f"{self.path}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, self.path)
        self._sync_directory()
        return len(raw)

    def set_aside(self, why: str, word: str) -> None:
        """Keep a snapshot for people to look at, where no start finds it."""
        aside = f"{self.path}.{word}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:
            return
        except OSError as error:
            why = f"{why}; and it cannot be renamed: {os_error_text(error)}"
        _log.warning("snapshot set aside; the log is read from its beginning", extra={"fields": {"path": aside, "reason": why}})

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
