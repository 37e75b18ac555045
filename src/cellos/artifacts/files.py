"""Artifact stores on the local file system. An artifact appears under its name whole or not at all.

Both write a file without a name in the destination's directory, and name it at the end. `DirectoryStore` never replaces anything and
follows no link below its root; `PlacedFiles` puts each artifact where its owner said, replacing what is there. A content type has no place
in a file system: it is in the document, and not kept here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from io import RawIOBase
from typing import BinaryIO

from cellos.errors import ExportError, os_error_text
from cellos.ports import Receipt

_CHUNK = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_UNNAMED = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class DirectoryStore:
    """ArtifactStore: `<root>/<cell id>/<name>`. The root and the cell's directory are made when needed; an existing artifact is refused."""

    kind = "local"
    target: str | None = None

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)

    def destination(self, cell_id: str, name: str) -> str:
        """`<cell id>/<name>`: where the root lies is the operator's matter."""
        return f"{cell_id}/{name}"

    def put(self, cell_id: str, name: str, source: BinaryIO, *, content_type: str | None = None) -> Receipt:
        """Store one artifact."""
        check_cell_segment(cell_id)
        check_artifact_name(name)
        directory = self._open_directory(cell_id)
        try:
            written = _copy(source, directory, name, shown=f"{self._root}/{cell_id}/{name}", mode=0o640, replace=False)
        finally:
            os.close(directory)
        return Receipt(target_kind=self.kind, target_name=None, destination=self.destination(cell_id, name), bytes_written=written)

    def _open_directory(self, cell_id: str) -> int:
        try:
            os.makedirs(self._root, mode=0o750, exist_ok=True)
            root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                try:
                    os.mkdir(cell_id, 0o750, dir_fd=root)
                except FileExistsError:
                    pass
                return os.open(cell_id, _DIRECTORY, dir_fd=root)
            finally:
                os.close(root)
        except OSError as error:
            raise ExportError(f"export mkdir: {os_error_text(error)}") from error


class PlacedFiles:
    """ArtifactStore: each artifact name has a path of its own, whose directory must exist. What is there is replaced."""

    kind = "local"
    target: str | None = None

    def __init__(self, destinations: Mapping[str, str]) -> None:
        self._destinations = dict(destinations)

    def destination(self, cell_id: str, name: str) -> str | None:
        """The path that was given for the name, as it was given."""
        return self._destinations.get(name)

    def put(self, cell_id: str, name: str, source: BinaryIO, *, content_type: str | None = None) -> Receipt:
        """Store one artifact at the path given for its name, which is also the receipt's `destination`."""
        path = self._destinations.get(name)
        if path is None:
            raise ExportError(f'no destination was given for artifact "{name}"')
        parent, base = os.path.split(os.path.abspath(path))
        if not base or os.path.isdir(path):
            raise ExportError(f"export copy -> {path}: Is a directory (os error 21)")
        try:
            directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ExportError(f"export copy -> {path}: {os_error_text(error)}") from error
        try:
            written = _copy(source, directory, base, shown=path, mode=0o666, replace=True)
        finally:
            os.close(directory)
        return Receipt(target_kind=self.kind, target_name=None, destination=path, bytes_written=written)


def check_cell_segment(cell_id: str) -> None:
    """A cell id that becomes a directory name is one path segment. Raises ExportError."""
    if not cell_id or cell_id in (".", "..") or "/" in cell_id or "\\" in cell_id or "\0" in cell_id:
        raise ExportError("export cell_id must be a single path segment (no '/', '\\', or '..')")


def check_artifact_name(name: str) -> None:
    """An artifact name that becomes a file name names a file in its directory and nothing else. Raises ExportError."""
    if not name:
        raise ExportError("artifact name must not be empty")
    if "\0" in name:
        raise ExportError("artifact name must not contain a NUL byte")
    if name.startswith("/"):
        raise ExportError("artifact name must not be an absolute path")
    if "/" in name or "\\" in name:
        raise ExportError("artifact name must not contain path separators ('/' or '\\')")
    if name in (".", ".."):
        raise ExportError("artifact name would traverse outside the export directory")
    if name.startswith("~"):
        raise ExportError("artifact name must not start with '~'")


def _copy(source: BinaryIO, directory: int, name: str, *, shown: str, mode: int, replace: bool) -> int:
    """Copy to a file of the directory that has no name yet, then give it one. Links fail on an existing name, which renames replace.

    Whoever is killed in the middle of it leaves nothing (open(2), O_TMPFILE). Some file systems do not have that: there the file is named
    from the beginning.
    """
    temporary = f".cellos-{os.urandom(8).hex()}"
    try:
        try:
            descriptor, unnamed = os.open(".", _UNNAMED, mode, dir_fd=directory), True
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
            descriptor, unnamed = os.open(temporary, _NEW, mode, dir_fd=directory), False
        try:
            with open(descriptor, "wb", buffering=0) as target:
                written = _pump(source, target)
                whole = f"/proc/self/fd/{descriptor}" if unnamed else temporary
                if not replace:
                    os.link(whole, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=unnamed)
                    return written
                if unnamed:
                    os.link(whole, temporary, dst_dir_fd=directory)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                return written
        finally:
            _remove(temporary, directory)
    except OSError as error:
        raise ExportError(f"export copy -> {shown}: {os_error_text(error)}") from error


def _pump(source: BinaryIO, target: RawIOBase) -> int:
    written = 0
    while chunk := source.read(_CHUNK):
        view = memoryview(chunk)
        while view:
            count = target.write(view) or 0
            written += count
            view = view[count:]
    return written


def _remove(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
