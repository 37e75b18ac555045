"""Attacks on other processes: their memory, their files, their lives."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
from typing import Any

from attempt import beside_sibling, in_child, main, outcome, syscall

F_SETSIG = 10
PTRACE_TRACEME, PTRACE_ATTACH, PTRACE_SEIZE = 0, 16, 0x4206
KEPT = ctypes.create_string_buffer(b"sibling secret")


def look_into(pid: str) -> object:
    """Every way of /proc into a process."""

    def content(name: str) -> bool:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return bool(file.read(64))

    def memory() -> bool:
        with open(f"/proc/{pid}/maps") as file:
            start = next(int(line.split("-")[0], 16) for line in file if " r" in line)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            return len(os.pread(file.fileno(), 16, start)) == 16

    return {
        "cmdline": outcome(content, "cmdline"),
        "environ": outcome(content, "environ"),
        "auxv": outcome(content, "auxv"),
        "mem": outcome(lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))),
        "maps": outcome(memory),
        "fd": outcome(lambda: len(os.listdir(f"/proc/{pid}/fd")) > 0),
        "open fd": outcome(lambda: os.close(os.open(f"/proc/{pid}/fd/0", os.O_RDONLY))),
        "root": outcome(lambda: len(os.listdir(f"/proc/{pid}/root/")) > 0),
        "cwd": outcome(lambda: len(os.listdir(f"/proc/{pid}/cwd/")) > 0),
        "exe": outcome(lambda: len(os.readlink(f"/proc/{pid}/exe")) > 0),
        "namespace": outcome(lambda: os.close(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY))),
    }


def find(text: str) -> object:
    """Which processes carry `text` in what /proc shows of them, but for ourselves and who started us."""
    found, seen = [], 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        seen += 1
        for name in ("cmdline", "environ", "comm", "cgroup", "mountinfo", "stat"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    # Our own command line holds the text because we were told it.
                    if text.encode() in file.read() and not (int(pid) in {os.getpid(), os.getppid()} and name == "cmdline"):
                        found.append(name)
            except OSError:
                continue
    return {"found": sorted(set(found)), "few": seen < 10}


def end(pid: str) -> None:
    os.kill(int(pid), signal.SIGKILL)


def end_by_pidfd(pid: str) -> None:
    signal.pidfd_send_signal(os.pidfd_open(int(pid)), signal.SIGKILL)


def end_by_descriptor(pid: str) -> None:
    """Let the kernel send it, as news of a socket: to whom and what is for us to say (F_SETOWN, F_SETSIG of fcntl(2))."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fcntl.fcntl(ours, fcntl.F_SETOWN, int(pid))
        fcntl.fcntl(ours, F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)
        theirs.send(b"x")


def end_all() -> object:
    """SIGKILL to everything in reach but ourselves; how a process of ours fared."""
    child = os.fork()
    if child == 0:
        signal.pause()
    os.kill(-1, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trace_me() -> object:
    return in_child(lambda: syscall(101, PTRACE_TRACEME, 0, 0, 0))


def trace(pid: str) -> object:
    def attach(target: int) -> object:
        # Each in a process of its own: a tracer's end sets the traced one free.
        return {
            "attach": in_child(lambda: syscall(101, PTRACE_ATTACH, target, 0, 0)),
            "seize": in_child(lambda: syscall(101, PTRACE_SEIZE, target, 0, 0)),
        }

    return beside_sibling(attach) if pid == "sibling" else attach(int(pid))


def _vectors(local: object, address: int, length: int) -> tuple[bytes, bytes]:
    return struct.pack("2Q", ctypes.addressof(local), length), struct.pack("2Q", address, length)  # type: ignore[arg-type]


def read_memory(pid: str, address: str) -> object:
    """process_vm_readv: of a fork of ours ("sibling"), or of any process at a known address."""
    secret = bytes(KEPT)

    def steal(target: int) -> str:
        KEPT.value = b""
        ours, theirs = _vectors(KEPT, int(address) or ctypes.addressof(KEPT), len(secret))
        syscall(310, target, ours, 1, theirs, 1, 0)
        return KEPT.value.decode(errors="replace")

    return beside_sibling(steal) if pid == "sibling" else steal(int(pid))


def write_memory() -> object:
    """process_vm_writev to a fork of ours."""

    def plant(target: int) -> int:
        ours, theirs = _vectors(KEPT, ctypes.addressof(KEPT), 8)
        return syscall(311, target, ours, 1, theirs, 1, 0)

    return beside_sibling(plant)


def take_descriptor(pid: str) -> object:
    """pidfd_getfd: a copy of another process's standard input."""

    def take(target: int) -> bool:
        return syscall(438, os.pidfd_open(target), 0, 0) > 2

    return beside_sibling(take) if pid == "sibling" else take(int(pid))


SCHED_IDLE = 5
IOPRIO_IDLE = 3 << 13


def hold_up(pid: str) -> object:
    """Every way to keep another process of our user ("sibling": a fork of ours) from the processor, or to limit what it may have."""

    def all_ways(target: int) -> object:
        group = os.getpgid(target)
        nothing, idle, lowest = struct.pack("i", 0), struct.pack("IIQiIQQQ", 48, SCHED_IDLE, 0, 0, 0, 0, 0, 0), 19
        calls: dict[str, tuple[Any, ...]] = {
            "sched_setparam": (142, target, nothing),
            "sched_setscheduler": (144, target, SCHED_IDLE, nothing),
            "the same, high bits set": (144, target | 1 << 32, SCHED_IDLE, nothing),
            "sched_setattr": (314, target, idle, 0),
            "sched_setaffinity": (203, target, 8, struct.pack("Q", 1 << min(os.sched_getaffinity(target)))),
            "setpriority": (141, os.PRIO_PROCESS, target, lowest),
            "setpriority of its group": (141, os.PRIO_PGRP, group, lowest),
            "setpriority of its user": (141, os.PRIO_USER, 0, lowest),
            "setpriority of its user by number": (141, os.PRIO_USER, os.getuid(), lowest),
            "ioprio_set": (251, 1, target, IOPRIO_IDLE),
            "ioprio_set of its group": (251, 2, group, IOPRIO_IDLE),
            "ioprio_set of its user": (251, 3, os.getuid(), IOPRIO_IDLE),
            "prlimit64": (302, target, resource.RLIMIT_NOFILE, bytes(16), None),
        }
        return {name: outcome(syscall, number, *arguments) for name, (number, *arguments) in calls.items()}

    def with_its_own_group(target: int) -> object:
        os.setpgid(target, target)
        return all_ways(target)

    return beside_sibling(with_its_own_group) if pid == "sibling" else all_ways(int(pid))


def hold_up_and_exhaust(seconds: str) -> None:
    """Do that to process 1, then take every processor with more processes than it could be beside, for that long at most."""
    hold_up("1")
    for _ in range(60):
        if os.fork() == 0:
            signal.alarm(int(seconds))
            while True:
                pass
    os._exit(5)


def descriptors() -> object:
    """Our descriptors, what they are, and what can be read from those above standard error."""
    # The descriptor that the listing itself used is closed again by then.
    numbers = sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}"))
    extra = {}
    for number in numbers:
        if number > 2:
            extra[str(number)] = outcome(lambda number=number: os.pread(number, 64, 0).decode(errors="replace"))
    kinds = [os.readlink(f"/proc/self/fd/{number}").split(":")[0] for number in numbers[:3]]
    return {"numbers": numbers, "extra": extra, "standard": kinds}


if __name__ == "__main__":
    main(globals())
