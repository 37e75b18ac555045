"""Attacks by system calls: mounts, namespaces, and the parts of the kernel that most ways out went through."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct

from attempt import CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWUTS, empower, in_child, main, outcome, syscall

MS_REC, MS_PRIVATE, MS_REMOUNT, MS_BIND = 0x4000, 0x4_0000, 0x20, 0x1000
TIOCSTI, TIOCSCTTY = 0x5412, 0x540E
KEYCTL_SEARCH, KEYCTL_READ, SESSION_KEYRING = 10, 11, -3


# ---------------------------------------------------------------- mounts


def mount(place: str) -> object:
    """In a mount namespace of our own, so that the control changes nothing: a tmpfs, old and new way, and /usr made writable."""
    steps = {"namespace": outcome(empower, CLONE_NEWNS)}
    steps["private"] = outcome(lambda: _done(syscall(165, None, b"/", None, MS_REC | MS_PRIVATE, None)))
    steps["mount"] = outcome(lambda: _done(syscall(165, b"none", place.encode(), b"tmpfs", 0, None)))
    steps["fsopen"] = outcome(lambda: os.close(syscall(430, b"tmpfs", 0)))
    steps["open_tree"] = outcome(lambda: os.close(syscall(428, -100, b"/usr", 1 | 0x8000)))
    steps["remount"] = outcome(lambda: _done(syscall(165, None, place.encode(), None, MS_REMOUNT, None)))
    steps["mount_setattr"] = outcome(lambda: _done(syscall(442, -100, place.encode(), 0, struct.pack("4Q", 1, 0, 0, 0), 32)))
    steps["umount2"] = outcome(lambda: _done(syscall(166, place.encode(), 2)))
    steps["chroot"] = outcome(lambda: _done(syscall(161, place.encode())))
    return steps


def _done(_: int) -> None:
    """The result of a call that only says that it worked."""


# ---------------------------------------------------------------- namespaces


def unshare_user() -> object:
    return in_child(lambda: _done(syscall(272, CLONE_NEWUSER)))


def clone_user() -> object:
    """clone(2) with a new user namespace; the child ends at once."""
    return _new_process(lambda: syscall(56, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0))


def clone3_user() -> object:
    return _new_process(lambda: syscall(435, struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64))


def _new_process(clone: object) -> object:
    def go() -> object:
        child = clone()  # type: ignore[operator]
        if child == 0:
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return outcome(go)


def enter_namespace() -> object:
    def enter() -> object:
        return {
            "namespace": outcome(empower, CLONE_NEWUTS),
            "setns": outcome(lambda: _done(syscall(308, os.open("/proc/self/ns/uts", os.O_RDONLY), CLONE_NEWUTS))),
            "hostname": outcome(lambda: _done(syscall(170, b"taken", 5))),
        }

    return in_child(enter)


# ---------------------------------------------------------------- interfaces


def io_uring() -> object:
    return syscall(425, 4, ctypes.create_string_buffer(120)) > 2


def bpf_map() -> object:
    array, create = 2, 0
    return syscall(321, create, struct.pack("5I", array, 4, 4, 1, 0) + bytes(100), 72) > 2


def user_fault() -> object:
    user_mode_only = 1
    return syscall(323, user_mode_only | os.O_CLOEXEC) > 2


def perf_event() -> object:
    """A counter of our own task clock, without the kernel's part of it."""
    software, task_clock, exclude_kernel = 1, 1, 1 << 5
    attributes = struct.pack("IIQQQQQ", software, 112, task_clock, 0, 0, 0, exclude_kernel | 1 << 6) + bytes(64)
    return syscall(298, attributes, 0, -1, -1, 0) > 2


def huge_pages() -> object:
    """Whether we get as far as the huge pages of the host. ENOMEM is the kernel's answer where it has none to spare."""
    private, anonymous, hugetlb = 0x2, 0x20, 0x4_0000
    return {
        "mmap": outcome(lambda: syscall(9, 0, 2 << 20, 3, private | anonymous | hugetlb, -1, 0) > 0) in {True, "ENOMEM"},
        "memfd_create": outcome(lambda: syscall(319, b"huge", 4) > 2) in {True, "ENOMEM"},
    }


def write_all() -> object:
    """Have a file system write what it has (syncfs). EBADF is the kernel's answer to who names none."""
    return syscall(306, -1)


def cached_pages(path: str) -> object:
    """How much of a file is in memory."""
    return syscall(451, os.open(path, os.O_RDONLY), struct.pack("2Q", 0, 0), ctypes.create_string_buffer(40), 0)


def message_queue() -> object:
    """A POSIX message queue, gone at once."""
    name = b"cellos-%d" % os.getpid()
    queue = syscall(240, name, os.O_CREAT | os.O_RDWR, 0o600, None)
    syscall(241, name)
    return queue > 2


def reboot() -> object:
    """A reboot with a command that does not exist: EINVAL is the answer to somebody who may reboot."""
    return syscall(169, 0xFEE1DEAD, 672274793, 0x0BADC0DE, None)


def int80() -> object:
    """The 32-bit gate for system calls, here for getpid: it numbers calls differently."""

    def call() -> None:
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\xb8\x14\0\0\0\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()

    return in_child(call)


# ---------------------------------------------------------------- keys


def find_key(name: str) -> object:
    """Look a key up in the session keyring that our caller gave us, and read it."""

    def read() -> str:
        key = syscall(250, KEYCTL_SEARCH, SESSION_KEYRING, b"user", name.encode(), 0)
        buffer = ctypes.create_string_buffer(64)
        size = syscall(250, KEYCTL_READ, key, buffer, 64, 0)
        return buffer.raw[:size].decode()

    def listed() -> bool:
        with open("/proc/keys") as file:
            return name in file.read()

    return {
        "read": outcome(read),
        "request_key": outcome(lambda: syscall(249, b"user", name.encode(), None, 0) > 0),
        "listed": outcome(listed),
    }


def add_key() -> object:
    return syscall(248, b"user", b"planted", b"x", 1, SESSION_KEYRING) > 0


# ---------------------------------------------------------------- terminals


def type_for_user(text: str) -> object:
    """Put `text` into the input of every terminal in reach (TIOCSTI), as if its user had typed it."""

    def type_on(descriptor: int, request: int) -> None:
        for character in text:
            # By the system call: fcntl.ioctl would cut the request to 32 bits.
            syscall(16, descriptor, request, character.encode())

    steps = {f"descriptor {number}": outcome(type_on, number, TIOCSTI) for number in (0, 1, 2)}
    steps["/dev/tty"] = outcome(lambda: type_on(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY), TIOCSTI))
    steps["high bits"] = outcome(type_on, 0, TIOCSTI | 1 << 32)  # a filter that compares 64 bits lets this pass
    steps["become session leader"] = outcome(lambda: _done(fcntl.ioctl(0, TIOCSCTTY, 0)))
    return steps


if __name__ == "__main__":
    main(globals())
