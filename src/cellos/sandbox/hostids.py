"""One unprivileged host id for each live cell of root: two cells, or a cell and a service, never share one.

An id is taken by a lock on a file named after it, so that a killed supervisor gives its ids back. The files lie in /run, which a reboot
clears; one that nobody holds is as good as none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random

FIRST, COUNT = 2_000_000, 65_536
DIRECTORY = "/run/cellos/ids"


class HostId:
    """A taken id."""

    __slots__ = ("_descriptor", "_path", "number")

    def __init__(self, number: int, path: str, descriptor: int) -> None:
        self.number = number
        self._path = path
        self._descriptor = descriptor

    def release(self) -> str | None:
        """Give it back; a text when its file could not be removed."""
        problem = None
        try:
            os.unlink(self._path)
        except OSError as error:
            problem = f"{self._path}: {error.strerror}"
        os.close(self._descriptor)
        return problem


class HostIds:
    """The range to take from: `first` to `first + count - 1`, none of which may belong to a user of this host."""

    def __init__(self, *, first: int = FIRST, count: int = COUNT, directory: str = DIRECTORY) -> None:
        self._first = first
        self._count = count
        self._directory = directory

    def acquire(self) -> HostId:
        """Take a free id. Raises OSError, with ENOSPC when all are in use."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        start = random.randrange(self._count)
        for offset in range(self._count):
            number = self._first + (start + offset) % self._count
            path = f"{self._directory}/{number}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:  # else its last holder removed it between our open and our lock
                    return HostId(number, path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
            else:
                os.close(descriptor)
        raise OSError(errno.ENOSPC, "every host id of the range is in use", self._directory)
