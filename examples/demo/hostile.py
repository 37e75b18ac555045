"""A program that means no good: tries to leave its cell in many ways, and tells what each attempt got.

Usage: hostile.py [LOOPBACK_PORT [DAEMON_NAME]]

Every attempt is bounded and undoes itself, so nothing is destroyed where it is run without a cell by accident. Exit status: 0 where every
attempt was held, 1 where one got through.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.restype = ctypes.c_long

CLONE_NEWUSER = 0x10000000
PTRACE_SEIZE = 0x4206
MAX_PROCESSES = 1000
MAX_BYTES = 1 << 30


class HeldError(Exception):
    """The attempt was not refused, but got nothing that matters."""


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def in_child(attempt: Callable[[], str]) -> str:
    """The answer of an attempt that is made in a process of its own, because it changes or may end it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                answer = "+" + attempt()
            except (OSError, HeldError) as error:
                answer = "-" + reason(error)
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise HeldError(f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
    if answer.startswith("+"):
        return answer[1:]
    raise HeldError(answer[1:])


@contextlib.contextmanager
def waiting_child() -> Iterator[int]:
    """A process of ours that does nothing, and ends with us whatever happens."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        yield child
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def read_shadow() -> str:
    with open("/etc/shadow", encoding="utf-8") as file:
        return f"{len(file.readlines())} lines"


def read_homes() -> str:
    """Files of any home directory, save the directory that was given to us on purpose."""
    homes = ["/root", *(entry.path for entry in os.scandir("/home"))]
    found = []
    for home in homes:
        for directory, _, names in os.walk(home):
            if directory != HERE and not directory.startswith(HERE + "/"):
                found += [path for name in names if os.access(path := os.path.join(directory, name), os.R_OK)]
            if len(found) >= 100:
                break
    if not found:
        raise HeldError("no file of anybody's home is there")
    return f"{len(found)} files or more, {found[0]} is one"


def read_parent_environment() -> str:
    with open(f"/proc/{os.getppid()}/environ", "rb") as file:
        return f"{file.read().count(0)} variables"


def find_processes() -> str:
    mine = {os.getpid(), os.getppid()}
    others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in mine]
    if not others:
        raise HeldError("no process but mine and my parent is there")
    return f"{len(others)} processes, {others[0]} is one"


def signal_processes() -> str:
    """Signal 0 asks for permission and does nothing."""
    mine = {os.getpid(), os.getppid()}
    reached = []
    for process in range(1, 5000):
        if process not in mine:
            with contextlib.suppress(OSError):
                os.kill(process, 0)
                reached.append(process)
    if not reached:
        raise HeldError("no process outside answers")
    return f"{len(reached)} processes"


def trace() -> str:
    with waiting_child() as child:
        check(LIBC.ptrace(PTRACE_SEIZE, child, None, None))
        return "attached"


def connect(address: str, port: int) -> str:
    with socket.create_connection((address, port), timeout=3):
        return "connected"


def raw_socket() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP):
        return "opened"


def mount() -> str:
    with tempfile.TemporaryDirectory() as directory:
        check(LIBC.mount(b"none", directory.encode(), b"tmpfs", 0, None))
        check(LIBC.umount2(directory.encode(), 0))
    return "mounted"


def nested_namespace() -> str:
    check(LIBC.unshare(CLONE_NEWUSER))
    return "root in a namespace of its own"


def become_root() -> str:
    os.setuid(0)
    return "uid 0"


def write_system() -> str:
    """A file without a name: it is gone when it is closed."""
    os.close(os.open("/usr", os.O_TMPFILE | os.O_WRONLY))
    return "written"


def write_kernel_setting() -> str:
    """Only opened: nothing is changed."""
    os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    return "opened for writing"


def fork_bomb() -> str:
    reading, writing = os.pipe()
    children: list[int] = []
    try:
        while len(children) < MAX_PROCESSES:
            child = os.fork()
            if child == 0:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            children.append(child)
    except OSError as error:
        raise HeldError(f"{len(children)} processes, then: {error.strerror}") from error
    finally:
        os.close(reading)
        os.close(writing)
        for child in children:
            os.waitpid(child, 0)
    return f"{len(children)} processes, and no end"


def fill_disk() -> str:
    with tempfile.TemporaryFile() as file:
        size = 0
        try:
            while size < MAX_BYTES:
                os.posix_fallocate(file.fileno(), size, 1 << 20)
                size += 1 << 20
        except OSError as error:
            raise HeldError(f"{size >> 20} MiB, then: {error.strerror}") from error
    return f"{size >> 20} MiB, and no end"


def attempts(port: int) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "read /etc/shadow", read_shadow
    yield "read the files of a home directory", read_homes
    yield "read the environment of whoever started me", read_parent_environment
    yield "see other processes", find_processes
    yield "signal other processes", signal_processes
    yield "trace a process", trace
    yield "reach the internet", lambda: connect("1.1.1.1", 443)
    yield f"reach the host's loopback, port {port}", lambda: connect("127.0.0.1", port)
    yield "open a raw socket", raw_socket
    yield "mount a file system", mount
    yield "make a namespace of my own", lambda: in_child(nested_namespace)
    yield "become root", lambda: in_child(become_root)
    yield "write to /usr", write_system
    yield "open a kernel setting for writing", write_kernel_setting
    yield "fork without end", lambda: in_child(fork_bomb)
    yield "fill the disk", lambda: in_child(fill_disk)


def leave_daemon(name: str) -> None:
    """A process in a session of its own that would outlive us by a minute."""
    code = "import time; time.sleep(60)"
    subprocess.Popen(
        [sys.executable, "-c", code, name],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> int:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 22
    through = 0
    for name, attempt in attempts(port):
        try:
            got = attempt()
        except (OSError, HeldError) as error:
            print(f"  held  {name:44} {reason(error)}", flush=True)
        else:
            through += 1
            print(f"  GOT   {name:44} {got}", flush=True)
    if len(sys.argv) > 2:
        leave_daemon(sys.argv[2])
        print("  …     left a daemon behind, to live on after me", flush=True)
    return 1 if through else 0


if __name__ == "__main__":
    sys.exit(main())
