"""Artifact stores on the local file system. An artifact appears under its name whole or not at all.

Both write a temporary file beside the destination and give it its name at the end. `DirectoryStore` never replaces anything and follows
no link below its root; `PlacedFiles` puts each artifact where its owner said, replacing what is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

from cellos.errors import ExportError, os_error_text
from cellos.ports import Receipt

_CHUNK = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class DirectoryStore:
    """ArtifactStore: `<root>/<cell id>/<name>`. The root and the cell's directory are made when needed; an existing artifact is refused."""

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)

    def put(self, cell_id: str, name: str, source: BinaryIO) -> Receipt:
        """Store one artifact; `destination` of the receipt is `<cell id>/<name>`."""
        check_cell_segment(cell_id)
        check_artifact_name(name)
        directory = self._open_directory(cell_id)
        try:
            written = _copy(source, directory, name, shown=f"{self._root}/{cell_id}/{name}", mode=0o640, replace=False)
        finally:
            os.close(directory)
        return Receipt(target_kind="local", target_name=None, destination=f"{cell_id}/{name}", bytes_written=written)

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

    def __init__(self, destinations: Mapping[str, str]) -> None:
        self._destinations = dict(destinations)

    def put(self, cell_id: str, name: str, source: BinaryIO) -> Receipt:
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
        return Receipt(target_kind="local", target_name=None, destination=path, bytes_written=written)


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
    """Copy to a temporary file of the directory, then rename or link it. Links fail on an existing name, which renames would replace."""
    temporary = f".cellos-{os.urandom(8).hex()}"
    try:
        descriptor = os.open(temporary, _NEW, mode, dir_fd=directory)
        try:
            with open(descriptor, "wb", buffering=0) as target:
                written = 0
                while chunk := source.read(_CHUNK):
                    view = memoryview(chunk)
                    while view:
                        count = target.write(view)
                        written += count
                        view = view[count:]
            if replace:
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                return written
            os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except BaseException:
            os.unlink(temporary, dir_fd=directory)
            raise
        os.unlink(temporary, dir_fd=directory)
        return written
    except OSError as error:
        raise ExportError(f"export copy -> {shown}: {os_error_text(error)}") from error
