"""Attacks on what the host has only so much of. Each is bounded, so that it harms nobody where nothing stops it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
from collections.abc import Callable

from attempt import in_child, main, syscall


def fork_bomb(most: str) -> object:
    """How many processes can live at once, and what the next fork met."""
    children: list[int] = []
    reading, writing = os.pipe()
    stopped: str | None = "nothing"
    try:
        while len(children) < int(most):
            child = os.fork()
            if child == 0:
                os.close(writing)
                os.read(reading, 1)  # until the bomb is over
                os._exit(0)
            children.append(child)
    except OSError as error:
        stopped = error.strerror
    finally:
        os.close(writing)
        for child in children:
            os.waitpid(child, 0)
    return {"processes": len(children), "stopped by": stopped}


def memory_bomb(mebibytes: str) -> object:
    """Bytes that are really written to. The kernel ends who takes too many."""

    def fill() -> int:
        return len(bytearray(b"x") * (int(mebibytes) << 20)) >> 20

    return in_child(fill)


def fill_sockets(mebibytes: str) -> object:
    """MiB that wait in TCP connections with ourselves, which nobody reads. They are not in the memory of any program, but of the kernel."""
    block, waiting, kept = bytes(1 << 16), 0, []
    listener = socket.create_server(("127.0.0.1", 0))
    while waiting >> 20 < int(mebibytes) and len(kept) < 200:
        sender = socket.create_connection(listener.getsockname())
        kept += [sender, listener.accept()[0]]
        sender.setblocking(False)
        try:
            while True:
                waiting += sender.send(block)
        except BlockingIOError:
            continue
    return min(waiting >> 20, int(mebibytes))


def fill_bytes(place: str, mebibytes: str) -> object:
    """Write files of 4 MiB until something stops us, else the MiB that were written. They stay: they go with their directory."""
    block, written = bytes(4 << 20), 0
    for number in range(int(mebibytes) // 4):
        with open(f"{place}/block.{number}", "wb", buffering=0) as file:
            while file.tell() < len(block):
                file.write(block[file.tell() :])
        written += 4
    return written


def fill_inodes(place: str, most: str) -> object:
    """Make empty files until something stops us, else how many were made."""
    for number in range(int(most)):
        os.mknod(f"{place}/empty.{number}")
    return int(most)


def big_file(place: str, mebibytes: str) -> object:
    """One file that is larger than a file may be. It is sparse: it takes no room."""
    path = f"{place}/big"
    with open(path, "wb", buffering=0) as file:
        try:
            file.seek((int(mebibytes) << 20) - 1)
            return file.write(b"x") == 1
        finally:
            os.unlink(path)


def open_files(most: str) -> object:
    """Hold as many descriptors as we can, after raising our own limit as far as it goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[int] = []
    try:
        while len(held) < int(most):
            held.append(os.open("/dev/null", os.O_RDONLY))
        return len(held)
    finally:
        for descriptor in held:
            os.close(descriptor)


def inotify_instances(most: str) -> object:
    """How many we can have at once, which the kernel counts for each user."""
    return _how_many(int(most), lambda: syscall(294, os.O_CLOEXEC))


def timers(most: str) -> object:
    """The same of timers: each is a signal that may be pending one day."""
    return _how_many(int(most), lambda: syscall(222, 1, None, ctypes.create_string_buffer(4)))


def _how_many(most: int, make: Callable[[], int]) -> int:
    made = 0
    try:
        while made < most:
            make()
            made += 1
    except OSError:
        return made
    return made


def hold_descriptors() -> object:
    """Say "up" once as many descriptors wait in our sockets as may (unix(7)), up to 4096 of them, and hold them until we are ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    pairs = []
    try:
        while True:
            sender, _ = pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            pairs.append(pair)
            for _ in range(8):
                socket.send_fds(sender, [b"x"], [0] * 250)
    except OSError:
        os.write(1, b"up\n")
    signal.pause()
    return len(pairs)


def pass_descriptor() -> object:
    """Hand one descriptor to ourselves, with the limit of open files that most programs have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))
    sender, _ = socket.socketpair()
    return socket.send_fds(sender, [b"x"], [0])


def dump_core(place: str) -> object:
    """Die so that the kernel writes a memory image or hands one to its handler (core(5)), with a limit as high as we can get."""
    os.chdir(place)

    def allow() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    try:
        allow()
        raised = True
    except (OSError, ValueError):  # Python has its own error for a limit above the hard one
        raised = False
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()
    status = os.waitpid(child, 0)[1]
    return {"raised": raised, "signal": os.WTERMSIG(status), "dumped": os.WCOREDUMP(status), "files": os.listdir(".")}


def leave_orphan(*argv: str) -> object:
    """Start a program twice removed, in a session of its own and deaf to SIGTERM and SIGHUP, and end before it does."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            for deaf_to in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(deaf_to, signal.SIG_IGN)
            null = os.open("/dev/null", os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            os.execv(argv[0], argv)
        os._exit(0)
    os.waitpid(child, 0)
    return "left"


if __name__ == "__main__":
    main(globals())
