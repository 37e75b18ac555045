"""Taking a file out of a work directory that hostile code has filled."""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import BinaryIO

from cellos.errors import ExportError

_REASONS = {
    errno.ENOENT: "no such file in the work directory",
    errno.ELOOP: "symbolic links are not followed",
    errno.EXDEV: "it lies outside the work directory",
    errno.ENXIO: "not a regular file",
    errno.EACCES: "permission denied",
}


def open_regular(directory: str, path: str, *, relative_to: int | None = None) -> BinaryIO:
    """Open the regular file `path` (relative) below `directory` for reading; nothing else, and never blocking. Raises ExportError.

    `directory` is looked up from the descriptor `relative_to`, where given: one of a mount only names it, and openat2 wants one that was
    opened.
    """
    from cellos.sandbox import syscalls

    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=relative_to)
    try:
        descriptor = syscalls.open_beneath(opened, path)
    except OSError as error:
        raise ExportError(f"{path}: {_REASONS.get(error.errno or 0, error.strerror)}") from error
    finally:
        os.close(opened)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ExportError(f"{path}: not a regular file")
    return io.open(descriptor, "rb")  # noqa: UP020  # a bare `open` would read as os.open here
