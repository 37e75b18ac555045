"""System calls that Python does not offer, errno-faithful: each returns what the kernel returned or raises OSError.

Numbers are those of x86_64; calls from 424 on have the same number on every architecture. See syscalls(2) and the page of each call.
"""

import ctypes
import errno
import os
import struct

# PyDLL keeps the interpreter lock during a call: clone3 must not let another thread in between.
_LIBC = ctypes.PyDLL(None, use_errno=True)
_SYSCALL = _LIBC.syscall
_SYSCALL.restype = ctypes.c_long

NUMBERS = {
    "pivot_root": 155, "mount": 165, "umount2": 166, "sethostname": 170, "capset": 126, "keyctl": 250, "unshare": 272, "seccomp": 317,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "clone3": 435, "close_range": 436, "openat2": 437,
    "mount_setattr": 442, "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
}  # fmt: skip

CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
CLONE_PIDFD = 0x1000
CLONE_INTO_CGROUP = 0x2_0000_0000

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8

PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 4, 24, 38, 47, 4

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_MS_REC, _MS_PRIVATE = 0x4000, 0x4_0000
_MNT_DETACH = 2
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8


def call(name: str, *args: int | bytes | None) -> int:
    """Make the system call `name`. Raises OSError with the kernel's errno; its `filename` is the call's name."""
    result: int = _SYSCALL(ctypes.c_long(NUMBERS[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def architecture_fits() -> bool:
    """Whether NUMBERS, and the filter of seccomp.py, are those of this machine and of this process."""
    return os.uname().machine == "x86_64" and struct.calcsize("P") == 8


def error_text(error: OSError, step: str) -> str:
    """What the kernel said, with the call or file it said it of, where that is not the step itself."""
    named = f"{error.filename}: " if error.filename and error.filename != step else ""
    return named + (error.strerror or str(error))


def prctl(option: int, argument: int = 0) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl({option})")


def set_dumpable(on: bool) -> None:
    """Whether same-user processes may look into us (ptrace, /proc/PID/mem, environ, fd). Also decides who owns our files in /proc."""
    prctl(PR_SET_DUMPABLE, int(on))


def clone3(flags: int, *, cgroup: int = -1) -> tuple[int, int]:
    """Fork with `flags`; returns (pid, pidfd) in the parent and (0, -1) in the child.

    `cgroup`: descriptor of a cgroup v2 directory that the child is born in. Only for a process with one thread.
    """
    pidfd = ctypes.c_int(-1)
    flags |= CLONE_PIDFD
    if cgroup >= 0:
        flags |= CLONE_INTO_CGROUP
    sigchld = 17
    args = struct.pack("11Q", flags, ctypes.addressof(pidfd), 0, 0, sigchld, 0, 0, 0, 0, 0, max(cgroup, 0))
    ctypes.pythonapi.PyOS_BeforeFork()
    try:
        pid = call("clone3", args, len(args))
    except OSError:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        raise
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid, pidfd.value


def new_mount(kind: str, attributes: int, **options: str) -> int:
    """A new, detached mount of a file system of type `kind`. Its descriptor still reads the files when every namespace with it is gone."""
    context = call("fsopen", kind.encode(), _CLOEXEC)
    try:
        for key, value in options.items():
            call("fsconfig", context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        call("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return call("fsmount", context, _CLOEXEC, attributes)
    finally:
        os.close(context)


def clone_tree(source: str, attributes: int) -> int:
    """A detached copy of the mounts at `source`, all of them with `attributes` added.

    Always recursive: a part of a tree with mounts below is EINVAL in a user namespace, as those are locked together.
    """
    tree = call("open_tree", _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)
    try:
        if attributes:
            _set_attributes(tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes)
    except OSError:
        os.close(tree)
        raise
    return tree


def attach_mount(mount: int, path: str) -> None:
    call("move_mount", mount, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)


def bind(source: str, target: str, attributes: int) -> None:
    tree = clone_tree(source, attributes)
    try:
        attach_mount(tree, target)
    finally:
        os.close(tree)


def make_read_only(path: str) -> None:
    """The one mount at `path`, not those below."""
    _set_attributes(_AT_FDCWD, path.encode(), 0, MOUNT_ATTR_RDONLY)


def _set_attributes(directory: int, path: bytes, flags: int, attributes: int) -> None:
    size = 32
    call("mount_setattr", directory, path, flags, struct.pack("4Q", attributes, 0, 0, 0), size)


def stop_propagation() -> None:
    """Nothing that is mounted from here on reaches the namespace we came from."""
    call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)


def pivot_here() -> None:
    """The current directory becomes the root; the old root is gone."""
    call("pivot_root", b".", b".")
    call("umount2", b".", _MNT_DETACH)


def sethostname(name: str) -> None:
    call("sethostname", name.encode(), len(name.encode()))


def new_session_keyring() -> None:
    """An empty session keyring instead of the one we inherited (keyctl(2) KEYCTL_JOIN_SESSION_KEYRING)."""
    call("keyctl", 1, None)


def close_range(first: int, last: int = 0x7FFF_FFFF) -> None:
    if first <= last:
        call("close_range", first, last, 0)


def drop_capabilities(last: int) -> None:
    """Empty the ambient, bounding and all process sets. In this order: without CAP_SETPCAP the bounding set cannot be changed any more."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(last + 1):
        prctl(PR_CAPBSET_DROP, capability)
    version_3 = 0x2008_0522
    call("capset", struct.pack("Ii", version_3, 0), bytes(24))


def no_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def open_beneath(directory: int, path: str) -> int:
    """Open `path` for reading below `directory`: no links, no way up, no other mount, never blocking (openat2(2))."""
    if "\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "openat2")  # the kernel would take what stands before it
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    how = struct.pack("3Q", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, resolve)
    return call("openat2", directory, os.fsencode(path), how, len(how))
