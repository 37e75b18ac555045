"""Attacks on files that are not ours."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import stat
import subprocess

from attempt import main, outcome, syscall


def read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(4096).decode(errors="replace")


def search(name: str, *roots: str) -> int:
    """How many files of that name lie below `roots`, also reached by the ways that /proc offers out of them.

    The system's own files are passed over.
    """
    doors = [f"/proc/{pid}/{door}" for pid in os.listdir("/proc") if pid.isdigit() for door in ("root", "cwd")] if "/" in roots else []
    found = 0
    for root in [*roots, *doors]:
        # A trailing slash makes a door a directory instead of a link.
        for _, directories, files in os.walk(root.rstrip("/") + "/"):
            found += name in files
            directories[:] = [directory for directory in directories if directory not in {"usr", "task"}]
    return found


def by_handle(path: str) -> object:
    """Open a file by its inode, past every directory above it (open_by_handle_at)."""
    handle, mount = ctypes.create_string_buffer(b"\x80\0\0\0", 8 + 128), ctypes.c_int()
    at_fdcwd = -100
    syscall(303, at_fdcwd, path.encode(), handle, ctypes.byref(mount), 0)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    return {"opened": outcome(lambda: os.path.isfile(f"/proc/self/fd/{syscall(304, directory, handle, os.O_RDONLY)}"))}


def create_in(*directories: str) -> object:
    def create(path: str) -> None:
        with open(path, "w"):
            pass
        os.unlink(path)

    return {directory: outcome(create, f"{directory}/planted") for directory in directories}


def write_back(*paths: str) -> object:
    """Write to each file what it holds. Whoever may do that may also write something else."""

    def again(path: str) -> None:
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text)

    return {path: outcome(again, path) for path in paths}


def open_to_write(*paths: str) -> object:
    return {path: outcome(lambda path=path: os.close(os.open(path, os.O_WRONLY))) for path in paths}


def set_times(*paths: str) -> object:
    return {path: outcome(os.utime, path) for path in paths}


def content(*paths: str) -> object:
    """Whether each file has something to read."""

    def has(path: str) -> bool:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return bool(os.read(descriptor, 64))
        finally:
            os.close(descriptor)

    return {path: outcome(has, path) for path in paths}


def block_device(place: str, like: str) -> object:
    """Make a node for the disk that `like` lies on, as the kernel numbers it, and open it."""
    node = f"{place}/disk"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.stat(like).st_dev)
    os.unlink(node)
    return "done"


def run_as_owner(program: str) -> str:
    """The effective user that a set-user-id copy of `id` gets."""
    return subprocess.run([program, "-u"], check=True, capture_output=True, text=True).stdout.strip()


def lease(path: str) -> object:
    """Be asked before anybody writes to a file that we only read: for 45 seconds the other waits (fcntl(2))."""
    with open(path) as file:
        return fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)


def notify(place: str) -> object:
    """Be told what becomes of the files in a directory."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    modified = 2
    return fcntl.fcntl(os.open(place, os.O_RDONLY), fcntl.F_NOTIFY, modified)


if __name__ == "__main__":
    main(globals())
