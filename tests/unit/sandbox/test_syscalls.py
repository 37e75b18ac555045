"""System calls of our own: the kernel's errno, nothing left open, nothing followed that must not be."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellos.sandbox import syscalls


def test_errors_are_the_kernels_and_name_the_call() -> None:
    with pytest.raises(OSError, match="open_tree") as caught:
        syscalls.clone_tree("/nowhere", 0)
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)  # EPERM: not root
    with pytest.raises(OSError, match="close_range") as caught:
        syscalls.call("close_range", 5, 4, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "close_range")


def test_numbers_are_those_of_the_kernel_headers() -> None:
    import re

    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"{header} is not installed (linux-libc-dev)")
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())}
    assert {name: known[name] for name in syscalls.NUMBERS} == syscalls.NUMBERS


# -- open_beneath -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[int]:
    """A directory with everything that somebody might be led astray by."""
    (tmp_path / "outside").write_text("secret")
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "file").write_text("text")
    (root / "below" / "deep").write_text("deep")
    (root / "link").symlink_to("file")
    (root / "out").symlink_to("../outside")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "down").symlink_to("below")
    (root / "magic").symlink_to("/proc/self/root")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    (root / "b\xe4h \udcff").write_text("odd")
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(("path", "text"), [("file", "text"), ("below/deep", "deep"), ("./below/./deep", "deep"), ("b\xe4h \udcff", "odd")])
def test_opens_what_lies_beneath(yard: int, path: str, text: str) -> None:
    descriptor = syscalls.open_beneath(yard, path)
    assert not os.get_inheritable(descriptor)
    with open(descriptor) as file:
        assert file.read() == text


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("missing", errno.ENOENT),
        ("", errno.ENOENT),
        ("below/missing", errno.ENOENT),
        ("file/x", errno.ENOTDIR),
        ("link", errno.ELOOP),
        ("out", errno.ELOOP),
        ("absolute", errno.ELOOP),
        ("down/deep", errno.ELOOP),
        ("magic/etc/passwd", errno.ELOOP),
        ("loop", errno.ELOOP),
        ("..", errno.EXDEV),
        ("../outside", errno.EXDEV),
        ("below/../../outside", errno.EXDEV),
        ("/etc/passwd", errno.EXDEV),
        ("socket", errno.ENXIO),
        ("file\0x", errno.EINVAL),
        ("x" * 300, errno.ENAMETOOLONG),
    ],
)
def test_refuses_every_other_way(yard: int, path: str, number: int) -> None:
    with pytest.raises(OSError, match="openat2") as caught:
        syscalls.open_beneath(yard, path)
    assert caught.value.errno == number


def test_a_fifo_does_not_block(yard: int) -> None:
    os.close(syscalls.open_beneath(yard, "fifo"))


def test_another_mount_is_refused() -> None:
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="openat2") as caught:
            syscalls.open_beneath(root, "proc/self/status")
        assert caught.value.errno == errno.EXDEV
    finally:
        os.close(root)


# -- processes --------------------------------------------------------------------------------------------------------------------------


def in_a_child(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_clone3_is_a_fork_with_a_pidfd() -> None:
    program = (
        "import os, select; from cellos.sandbox.syscalls import clone3\n"
        "pid, pidfd = clone3(0)\n"
        "if pid == 0: os._exit(7 if pidfd == -1 else 1)\n"
        "select.select([pidfd], [], [], 20)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.get_inheritable(pidfd))\n"
    )
    assert in_a_child(program) == "7 False\n"


def test_a_failing_clone3_leaves_the_interpreter_whole() -> None:
    """The hooks around a fork hold the locks of the import system, among others."""
    program = (
        "import errno, threading; from cellos.sandbox import seccomp, syscalls\n"
        "syscalls.no_new_privileges(); seccomp.install(seccomp.denying({435: errno.ENOSYS}))\n"
        "try: syscalls.clone3(0)\nexcept OSError as error: print(error.errno)\n"
        "import colorsys\n"
        "thread = threading.Thread(target=print, args=['thread'])\nthread.start(); thread.join(10)\n"
    )
    assert in_a_child(program) == "38\nthread\n"


def test_close_range_closes_from_to() -> None:
    program = (
        "import os; from cellos.sandbox.syscalls import close_range\n"
        "kept = [os.dup(0) for _ in range(6)]; a, *_, z = kept\n"
        "close_range(a + 1, z - 1); close_range(9, 8)\n"
        "print([kept.index(fd) for fd in kept if os.path.exists(f'/proc/self/fd/{fd}')])\n"
    )
    assert in_a_child(program) == "[0, 5]\n"


def test_capabilities_are_gone_for_good() -> None:
    """In a user namespace of its own, where any user has them all at first."""
    program = (
        "import ctypes, os; from cellos.sandbox import syscalls\n"
        "user = os.geteuid()\n"
        "if ctypes.CDLL(None).unshare(0x1000_0000): raise SystemExit('no user namespaces')\n"
        "for name, text in (('setgroups', 'deny'), ('uid_map', f'{user} {user} 1')):\n"
        "    open(f'/proc/self/{name}', 'w').write(text)\n"
        "last = int(open('/proc/sys/kernel/cap_last_cap').read())\n"
        "read = lambda: [int(line.split()[1], 16) for line in open('/proc/self/status') if line.startswith('Cap')]\n"
        "before = read(); syscalls.drop_capabilities(last); after = read()\n"
        "print(max(before) > 0, after)\n"
        "print(os.popen(\"grep ^Cap /proc/self/status | cut -f2 | sort -u\").read(), end='')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    if "no user namespaces" in done.stderr:
        pytest.skip("this host allows no user namespaces")
    assert (done.stdout, done.stderr) == ("True [0, 0, 0, 0, 0]\n0000000000000000\n", "")


def test_dumpable_decides_who_may_look() -> None:
    program = (
        "import os; from cellos.sandbox.syscalls import set_dumpable\n"
        "before = os.stat('/proc/self/environ').st_uid; set_dumpable(False)\n"
        "hidden = os.stat('/proc/self/environ').st_uid; set_dumpable(True)\n"
        "print(before == os.geteuid(), hidden, os.stat('/proc/self/environ').st_uid == before)\n"
    )
    assert in_a_child(program) == "True 0 True\n"
