"""What the attack programs share: raw system calls, and one line of JSON that says what came of an attempt.

The programs run with the system's Python alone, in a cell and outside of one; the tests hand their text over with `python3 -c`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x0002_0000, 0x0400_0000, 0x1000_0000, 0x4000_0000

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


def syscall(number: int, *args: object) -> int:
    """Make a system call (x86_64 numbers). Raises OSError with the kernel's errno."""
    result: int = _LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def outcome(action: Callable[..., Any], *args: object) -> Any:
    """What `action` returns, "done" where that is nothing, or the name of the errno that it failed with."""
    try:
        answer = action(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done" if answer is None else answer


def in_child(action: Callable[..., Any], *args: object) -> Any:
    """The `outcome` of `action` in a fork of ours, or "signal n" where one ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(outcome(action, *args)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else json.loads(answer)


def beside_sibling(action: Callable[[int], Any]) -> Any:
    """The outcome of `action(pid)` on a process of ours that waits."""
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        return outcome(action, child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def empower(flags: int) -> None:
    """Get the privileges of the namespaces `flags`: as root by new ones, else by way of a new user namespace that makes us root in it."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        syscall(272, flags)  # unshare
        return
    syscall(272, flags | CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def main(attacks: dict[str, Any]) -> None:
    """Do the attack named on the command line, with the arguments that follow it."""
    sys.stdout.write(json.dumps(outcome(attacks[sys.argv[1]], *sys.argv[2:])) + "\n")
