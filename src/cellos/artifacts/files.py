"""Artifact stores on the local file system. An artifact appears under its name whole or not at all.

Both write a file without a name in the destination's directory, and name it at the end. `DirectoryStore` never replaces anything and
follows no link below its root; `PlacedFiles` puts each artifact where its owner said, replacing a regular file and nothing else. A content
type has no place in a file system: it is in the document, and not kept here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from io import RawIOBase
from typing import BinaryIO

from cellos.errors import ConfigError, ExportError, os_error_text
from cellos.ports import Receipt

_CHUNK = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_UNNAMED = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_MOST_LINKS = 40
"""As many as the kernel follows (path_resolution(7))."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}


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
    """ArtifactStore: each artifact name has a path of its own, whose directory must exist.

    A regular file that is there is replaced (its other hard links keep the old content), and the new one gets its owner and permissions. As
    with cp, a symbolic link stays and the file that it leads to is replaced; but one that belongs to neither us nor root is refused, in
    every directory (the kernel's fs.protected_symlinks does that in /tmp): whoever else may write there would choose a file of ours.
    Everything else is refused.
    """

    kind = "local"
    target: str | None = None

    def __init__(self, destinations: Mapping[str, str]) -> None:
        self._destinations = dict(destinations)

    def check(self) -> None:
        """Whether each path, as things stand, is one that `put` can use, and is not another one's, too. Raises ConfigError."""
        taken: dict[tuple[int, int, str], str] = {}
        for path in self._destinations.values():
            try:
                directory, name, _ = _find(path)
            except ExportError as error:
                raise ConfigError(f"out: cannot copy to {path}: {error.text}") from error
            where = os.fstat(directory)
            os.close(directory)
            key = (where.st_dev, where.st_ino, name)
            if key in taken:
                raise ConfigError(f"out: two files would go to one place, {_both(taken[key], path)}; give each a destination of its own")
            taken[key] = path

    def destination(self, cell_id: str, name: str) -> str | None:
        """The path that was given for the name, as it was given."""
        return self._destinations.get(name)

    def put(self, cell_id: str, name: str, source: BinaryIO, *, content_type: str | None = None) -> Receipt:
        """Store one artifact at the path given for its name, which is also the receipt's `destination`."""
        path = self._destinations.get(name)
        if path is None:
            raise ExportError(f'no destination was given for artifact "{name}"')
        try:
            directory, base, there = _find(path)
        except ExportError as error:
            raise ExportError(f"export copy -> {path}: {error.text}") from error
        try:
            mode = 0o666 if there is None else there.st_mode & 0o777
            written = _copy(source, directory, base, shown=path, mode=mode, replace=True)
        finally:
            os.close(directory)
        return Receipt(target_kind=self.kind, target_name=None, destination=path, bytes_written=written)


def _both(one: str, other: str) -> str:
    return one if one == other else f"{one} and {other}"


def _find(path: str) -> tuple[int, str, os.stat_result | None]:
    """Where an artifact for `path` goes: the directory, opened, the name in it, and the regular file that has it now.

    Each link is read by what was opened and looked at, so that nobody can exchange it in between. Raises ExportError with the reason alone.
    """
    parent, name = os.path.split(path)
    directory = _enter(parent, None)
    try:
        for count in range(_MOST_LINKS):
            there, link = _look(directory, name)
            if link is None:
                if there is None and count:
                    raise ExportError("it is a symbolic link that leads to nothing; name the file itself")
                _check_place(directory, there)
                return directory, name, there
            parent, name = os.path.split(link)
            left, directory = directory, _enter(parent, directory)
            os.close(left)
        raise ExportError("too many symbolic links")
    except BaseException:
        os.close(directory)
        raise


def _enter(path: str, relative_to: int | None) -> int:
    try:
        return os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=relative_to)
    except OSError as error:
        raise ExportError(f"its directory: {os_error_text(error)}") from error


def _look(directory: int, name: str) -> tuple[os.stat_result | None, str | None]:
    """What has the name in the directory; of a symbolic link, which must be one that is followed, where it leads. Raises ExportError."""
    try:
        descriptor = os.open(name or ".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise ExportError(os_error_text(error)) from error
    try:
        there = os.fstat(descriptor)
        if not stat.S_ISLNK(there.st_mode):
            return there, None
        if there.st_dev == os.lstat("/proc/self").st_dev:  # /dev/stdout leads here, too
            raise ExportError("it stands for an open file of a process; name a file, or let the command print what it makes")
        if there.st_uid not in (0, os.geteuid()):
            raise ExportError(f"it is a symbolic link of another user (uid {there.st_uid}), which is not followed; name the file itself")
        return there, os.readlink("", dir_fd=descriptor)
    except OSError as error:
        raise ExportError(os_error_text(error)) from error
    finally:
        os.close(descriptor)


def _check_place(directory: int, there: os.stat_result | None) -> None:
    """Raises ExportError where nothing may be put in the place of what is there, or can be."""
    if there is not None and not stat.S_ISREG(there.st_mode):
        kind = stat.S_IFMT(there.st_mode)
        cure = "name a file in it" if kind == stat.S_IFDIR else "name a file, or let the command print what it makes"
        raise ExportError(f"it is {_KINDS.get(kind, 'no file')}, and only a regular file is replaced; {cure}")
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory):
        raise ExportError("nothing can be written in its directory; choose another one")
    if there is not None and os.geteuid() not in (0, there.st_uid):
        around = os.fstat(directory)
        if around.st_mode & stat.S_ISVTX and around.st_uid != os.geteuid():
            raise ExportError(f"it belongs to another user (uid {there.st_uid}), in a directory with the sticky bit; choose another name")


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
                _take_after(descriptor, directory, name)
                if unnamed:
                    os.link(whole, temporary, dst_dir_fd=directory)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                return written
        finally:
            _remove(temporary, directory)
    except OSError as error:
        raise ExportError(f"export copy -> {shown}: {os_error_text(error)}") from error
    except ExportError as error:
        raise ExportError(f"export copy -> {shown}: {error.text}") from error


def _take_after(descriptor: int, directory: int, name: str) -> None:
    """Give a new file the owner and the permissions of the one that it is about to replace.

    Not set-user-ID and the like: they were given to another content. An owner that we cannot give it is not kept.
    """
    there, _ = _look(directory, name)
    if there is None:
        return
    _check_place(directory, there)
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (there.st_uid, there.st_gid):
        try:
            os.fchown(descriptor, there.st_uid, there.st_gid)
        except OSError:
            pass
    if (made.st_mode ^ there.st_mode) & 0o777:
        os.fchmod(descriptor, there.st_mode & 0o777)


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
