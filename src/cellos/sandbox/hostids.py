"""One unprivileged host id for each live cell of root: two cells, or a cell and a service, never share one.

An id is taken by a lock on a file named after it, so that a killed supervisor gives its ids back. The files lie in /run, which a reboot
clears; one that nobody holds is as good as none.
"""

from __future__ import annotations

import errno
import fcntl
import os

FIRST, COUNT = 2_000_000, 65_536
DIRECTORY = "/run/cellos/ids"
_MOST_LOOKED_AT = 256


class HostId:
    """A taken id: its number, and the locked descriptor of its file. The lock goes with the descriptor, also to another process."""

    __slots__ = ("_directory", "descriptor", "number")

    def __init__(self, number: int, descriptor: int, directory: str = DIRECTORY) -> None:
        self.number = number
        self.descriptor = descriptor
        self._directory = directory

    def release(self) -> str | None:
        """Give it back; a text when its file could not be removed."""
        problem = None
        path = f"{self._directory}/{self.number}"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            problem = f"{path}: {error.strerror}"
        os.close(self.descriptor)
        return problem


class HostIds:
    """The range to take from: `first` to `first + count - 1`, none of which may belong to a user of this host."""

    def __init__(self, *, first: int = FIRST, count: int = COUNT, directory: str = DIRECTORY) -> None:
        self._first = first
        self._count = count
        self._directory = directory

    def exists(self, number: int) -> bool:
        """Whether an id has a file: it is taken, or was by somebody who died."""
        return os.path.exists(f"{self._directory}/{number}")

    def remove_if_free(self, number: int) -> None:
        """Remove the file of an id whose holder died."""
        try:
            descriptor = os.open(f"{self._directory}/{number}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return  # somebody else removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return
        if os.fstat(descriptor).st_nlink:
            HostId(number, descriptor, self._directory).release()
        else:  # its holder removed it between our open and our lock: what bears the name now is another's
            os.close(descriptor)

    def remove_abandoned(self) -> None:
        """Remove the files of ids whose holders died together with their launcher; a part of them where there are many."""
        try:
            names = os.listdir(self._directory)
        except OSError:
            return  # there is none yet, or it is another root's
        for name in names[:_MOST_LOOKED_AT]:
            if name.isdigit():
                self.remove_if_free(int(name))

    def acquire(self) -> HostId:
        """Take a free id. Raises OSError, with ENOSPC when all are in use."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        start = int.from_bytes(os.urandom(4)) % self._count
        for offset in range(self._count):
            number = self._first + (start + offset) % self._count
            path = f"{self._directory}/{number}"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno in (errno.EISDIR, errno.ELOOP):
                    continue  # not a file of ours
                raise
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:  # else its last holder removed it between our open and our lock
                    return HostId(number, descriptor, self._directory)
            except BlockingIOError:
                os.close(descriptor)
            else:
                os.close(descriptor)
        raise OSError(errno.ENOSPC, "every host id of the range is in use", self._directory)
