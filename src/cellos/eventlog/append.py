"""Appending whole lines to a file: one write per line, and no half line is left behind.

A line that does not fit (full disk, quota, file size limit) is cut off again, so that whoever reads the file sees whole events only.
Several processes may append to one file: every write holds a shared lock and cutting holds an exclusive one, so a cut never takes
another writer's line.

A pipe or device that takes nothing is waited for, but not for ever: who writes events also watches a deadline. What it took of such a line
stays; the next one begins on a new line, so that no half of one is taken for an event.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from cellos.errors import EventSinkError, os_error_text

FULL = (errno.ENOSPC, errno.EDQUOT)
STALL_SECONDS = 5.0
"""How long a line waits for a reader. After that, until a line went through, none waits."""


class Appender:
    """An open file that takes lines. Not thread-safe: a run's emitter is the one caller.

    A regular file whose last byte is no line feed was left by a writer that died: the next line starts on a new one.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        self._descriptor = descriptor
        self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._torn = self._regular and self._ends_torn()
        self._patience = STALL_SECONDS

    @property
    def size(self) -> int:
        """Bytes in the file now; 0 where it is no regular one."""
        return os.fstat(self._descriptor).st_size if self._regular else 0

    @property
    def removed(self) -> bool:
        """Nobody will ever find what is written: the file has no name any more. One that was only renamed, as logs are, has."""
        return self._regular and os.fstat(self._descriptor).st_nlink == 0

    @property
    def in_place(self) -> bool:
        """The file is found under the name that it was opened by."""
        try:
            named, ours = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)

    def append(self, line: bytes) -> None:
        """Add `line` and a line feed. Raises EventSinkError; then a regular file has nothing of it, unless another writer came after."""
        data = (b"\n" if self._torn else b"") + line + b"\n"
        written = 0
        try:
            self._lock(fcntl.LOCK_SH)
            try:
                while written < len(data):  # a short write is what a nearly full disk answers before it says so
                    try:
                        written += os.write(self._descriptor, data[written:] if written else data)
                    except BlockingIOError:
                        self._await_reader()
            finally:
                self._lock(fcntl.LOCK_UN)
        except OSError as error:
            if written and self._regular:
                self._cut(written)
            elif written:
                self._torn = True
            if error.errno in FULL:
                raise EventSinkError(f"sink full: {self.path} ({os_error_text(error)})") from error
            raise EventSinkError(f"jsonl write {self.path}: {os_error_text(error)}") from error
        self._torn = False
        self._patience = STALL_SECONDS

    def _await_reader(self) -> None:
        """Raises TimeoutError."""
        import select
        import time

        began = time.monotonic()
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        ready = room.poll(self._patience * 1000)
        self._patience = max(0.0, self._patience - (time.monotonic() - began)) if ready else 0.0
        if not ready:
            raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")

    def close(self) -> None:
        """Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _cut(self, written: int) -> None:
        end = os.lseek(self._descriptor, 0, os.SEEK_CUR)  # with O_APPEND: where our own bytes ended
        try:
            self._lock(fcntl.LOCK_EX)
            try:
                if os.fstat(self._descriptor).st_size == end:
                    os.ftruncate(self._descriptor, end - written)
                else:
                    self._torn = True
            finally:
                self._lock(fcntl.LOCK_UN)
        except OSError:
            self._torn = True

    def _ends_torn(self) -> bool:
        """Whether somebody died in the middle of a line. Writers hold the lock shared: alone, we see none of them in the middle of one."""
        self._lock(fcntl.LOCK_EX)
        try:
            size = os.fstat(self._descriptor).st_size
            return size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError:  # opened for writing only, because reading is not allowed
            return False
        finally:
            self._lock(fcntl.LOCK_UN)

    def _lock(self, how: int) -> None:
        if not self._regular:
            return
        try:
            fcntl.flock(self._descriptor, how)
        except OSError:  # a file system without locks: several writers share it at their own risk
            pass
