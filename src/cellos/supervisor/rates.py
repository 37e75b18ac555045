"""How many cells a subject has started on this host in the last hour.

A directory holds one file per subject, named by a digest of it, 57,616 bytes at most, mode 0600. A file is a ring of 3,601 slots, one per
second: the second, and how many were admitted in it, as two 64-bit numbers. To admit is to write one slot under the file's lock. A slot
lies within one page, so a process that is killed has written all of it or nothing: what was admitted stays counted, and a dead process
holds no lock. A power cut may lose the last seconds.
"""

import fcntl
import os
import struct

from cellos.errors import ConfigError, os_error_text

WINDOW_SECONDS = 3600
_SLOTS = WINDOW_SECONDS + 1  # the window begins within its oldest second, which counts as a whole
_SLOT = struct.Struct("<QQ")
_RING_BYTES = _SLOTS * _SLOT.size


class HourlyLimit:
    """Counts per subject, shared by all processes that use the same directory, which is made when needed. Threads may share one."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def admit(self, subject: str, most: int, now: float) -> bool:
        """Count one more cell of `subject`, unless `most` were counted in the hour before `now` (seconds of the wall clock).

        What is refused is not counted. An hour is exact to one second, never shorter. Counts from the future, after a clock was set back,
        stay counted if they are less than an hour ahead; nobody is locked out for longer than two hours. Raises ConfigError where the count
        cannot be kept: who is not counted is not admitted.
        """
        path = f"{self._directory}/{_file_name(subject)}"
        try:
            descriptor = self._open(path)
            try:
                return _admit(descriptor, most, int(now // 1))
            finally:
                os.close(descriptor)  # and with it the lock
        except OSError as error:
            raise ConfigError(
                f"cannot count the cells of this hour in {path}: {os_error_text(error)}; is CELLOS_STATE_DIR writable?"
            ) from error

    def _open(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            try:
                os.mkdir(self._directory, 0o700)
            except FileExistsError:
                pass
            return os.open(path, flags, 0o600)


def _file_name(subject: str) -> str:
    """A subject is any text; a digest of it is a file name."""
    from cellos.core.sha256 import sha256

    return sha256(subject.encode(errors="surrogatepass")).hexdigest()


def _admit(descriptor: int, most: int, second: int) -> bool:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ring = os.pread(descriptor, _RING_BYTES, 0)
    # The end of the file may be missing: slots that were never written.
    written = len(ring) // _SLOT.size
    numbers = struct.unpack_from(f"<{2 * written}Q", ring)
    seconds, counts = numbers[::2], numbers[1::2]
    if sum(count for when, count in zip(seconds, counts, strict=True) if count and abs(second - when) <= WINDOW_SECONDS) >= most:
        return False
    place = second % _SLOTS
    when, count = (seconds[place], counts[place]) if place < written else (second, 0)
    # What is overwritten is more than an hour away: two seconds that share a slot are 3,601 apart.
    slot = _SLOT.pack(second, count + 1 if when == second else 1)
    if os.pwrite(descriptor, slot, place * _SLOT.size) != len(slot):
        raise OSError(28, os.strerror(28))
    return True
