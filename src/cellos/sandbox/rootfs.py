"""The root that a cell sees: built on a fresh tmpfs, holding nothing of the host but the system below /usr and what was asked for.

`build` runs inside the cell's own user and mount namespaces, before pivot_root. It tells its `step` callback what it is about to do, so
that a failure can be named.
"""

from __future__ import annotations

import errno
import os
import stat

from cellos.sandbox import syscalls
from cellos.sandbox.layout import INOTIFY_INSTANCES, INOTIFY_WATCHES, SHM_BYTES, TMP_BYTES, TMP_INODES, WORK_BYTES, WORK_INODES
from cellos.sandbox.syscalls import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable  # the launcher would load `collections` for it

    Step = Callable[[str], None]

CELL_ID = 1000
"""User and group id inside every cell."""

BUILDING_PLACE = "/sys"
"""Where the new root is mounted until it takes over: a directory that every host has and nobody mounts into a cell."""

_SEALED = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
_SCRATCH = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
_DEVICE = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC
"""Read-only is the node, a file of the host with its times; the device behind it can be written to all the same. Not nodev, of course."""

OF_THE_USER = {"max_user_namespaces": 0, "max_inotify_instances": INOTIFY_INSTANCES, "max_inotify_watches": INOTIFY_WATCHES}
"""How much of what the kernel counts for each user a cell may have: an ordinary user's cells would take all that this user may have."""

DIRECTORIES = (
    "usr", "etc", "dev", "dev/shm", "proc", "sys", "sys/devices", "sys/devices/system", "sys/devices/system/cpu", "work", "tmp", "var",
    "var/tmp", "run", "run/cellos", "home", "root", "mnt", "opt", ".empty",
)  # fmt: skip
MERGED_USR = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}

ETC_FILES = {
    "passwd": "cell:x:1000:1000::/work:/bin/sh\n",
    "group": "cell:x:1000:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "hosts": "127.0.0.1 localhost cell\n::1 localhost\n",
    "resolv.conf": "nameserver 127.0.0.1\n",
    "hostname": "cell\n",
}
ETC_COPIED = ("ld.so.cache", "localtime", "ssl/openssl.cnf")
ETC_BOUND = ("alternatives", "ssl/certs", "pki/tls/certs", "pki/ca-trust/extracted", "crypto-policies")
ETC_OF_JAVA = "java-"
"""How directories begin that are bound as well: /usr/lib/jvm of Debian has links into them."""
CPU_LIST = "sys/devices/system/cpu/online"
"""The one file of /sys that libc reads, to count processors."""

# The masked and read-only paths of the OCI runtime defaults, and the host's boot line and symbols.
PROC_MASKED_FILES = (
    "kcore", "keys", "key-users", "latency_stats", "timer_list", "timer_stats", "sched_debug", "kmsg", "kallsyms", "cmdline", "bootconfig",
    "interrupts",
)  # fmt: skip
PROC_MASKED_DIRECTORIES = ("asound", "acpi", "scsi")
PROC_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")


def build(step: Step) -> int:
    """Build what every cell's root has; returns the descriptor of the work directory's mount, which outlives the cell.

    The root stays at BUILDING_PLACE, beside the host's files, until `finish`. Raises OSError.
    """
    step("stop mount propagation")
    syscalls.stop_propagation()
    cpus = _read("/" + CPU_LIST)
    step("new root")
    _attach(syscalls.new_mount("tmpfs", _SCRATCH, size="4m", nr_inodes="2048", mode="755"), BUILDING_PLACE)
    os.chdir(BUILDING_PLACE)
    for path in DIRECTORIES:
        os.mkdir(path)
    for link in MERGED_USR:
        if os.path.islink("/" + link):
            os.symlink("usr/" + link, link)
    if cpus is not None:
        _touch(CPU_LIST, cpus)
    step("mount /usr")
    syscalls.bind("/usr", "usr", _SEALED)
    _build_etc(step)
    step("make /dev")
    for name in DEVICES:
        _touch("dev/" + name)
        syscalls.bind("/dev/" + name, "dev/" + name, _DEVICE)
    for name, target in DEVICE_LINKS.items():
        os.symlink(target, "dev/" + name)
    _mount_proc(step)
    step("mount /work, /tmp, /dev/shm")
    work = syscalls.new_mount("tmpfs", _SCRATCH, size=str(WORK_BYTES), nr_inodes=str(WORK_INODES), mode="700")
    syscalls.attach_mount(work, "work")
    _attach(syscalls.new_mount("tmpfs", _SCRATCH, size=str(TMP_BYTES), nr_inodes=str(TMP_INODES), mode="1777"), "tmp")
    _attach(syscalls.new_mount("tmpfs", _SCRATCH, size=str(SHM_BYTES), nr_inodes=str(TMP_INODES), mode="1777"), "dev/shm")
    os.rmdir("var/tmp")
    os.symlink("../tmp", "var/tmp")  # relative: a mount point below it is made while "/" is still the host's
    return work


def finish(mounts: list[tuple[str, str, int]], step: Step) -> None:
    """Add what was asked for, forbid user namespaces and much of what is the user's, and make the new root `/`, read-only. Raises OSError.

    `mounts`: (source, target, tree) read-only mounts; `tree` is a detached mount made by someone who may look up the source, or -1.
    """
    for source, target, opened in mounts:
        step(f"mount {source} at {target}")
        tree = opened if opened >= 0 else syscalls.clone_tree(source, _SEALED)
        _make_mount_point(tree, target)
        _attach(tree, target[1:])
    step("forbid user namespaces")  # through the old /proc: the new one is read-only there
    for name, most in OF_THE_USER.items():
        with open("/proc/sys/user/" + name, "w") as file:
            file.write(str(most))
    step("pivot_root")
    syscalls.pivot_here()
    syscalls.make_read_only("/")
    os.chdir("/work")


def _attach(mount: int, path: str) -> None:
    try:
        syscalls.attach_mount(mount, path)
    finally:
        os.close(mount)


def _touch(path: str, content: bytes = b"") -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        if content:
            os.write(descriptor, content)
    finally:
        os.close(descriptor)


def _build_etc(step: Step) -> None:
    step("build /etc")
    for name in ("etc/ssl", "etc/pki", "etc/pki/tls", "etc/pki/ca-trust"):
        os.mkdir(name)
    for name, text in ETC_FILES.items():
        _touch("etc/" + name, text.encode())
    for name in ETC_COPIED:
        content = _read("/etc/" + name)
        if content is not None:
            _touch("etc/" + name, content)
    for name in etc_bound():
        if os.path.isdir("/etc/" + name):
            os.mkdir("etc/" + name)
            syscalls.bind("/etc/" + name, "etc/" + name, _SEALED)


def etc_bound() -> list[str]:
    """What a cell sees of the host's /etc itself, where it is there."""
    return [*ETC_BOUND, *(name for name in os.listdir("/etc") if name.startswith(ETC_OF_JAVA))]


def _read(path: str) -> bytes | None:
    """The content of a public file of the host, or None where it has none."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _mount_proc(step: Step) -> None:
    step("mount /proc")
    # Who may not be traced is not listed: process 1, whose command line tells of the host.
    _attach(syscalls.new_mount("proc", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC, hidepid="invisible"), "proc")
    step("mask parts of /proc")
    for name in PROC_READ_ONLY:
        path = "proc/" + name
        if os.path.exists(path):
            syscalls.bind(path, path, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)
    for name in PROC_MASKED_FILES:
        path = "proc/" + name
        if os.path.exists(path):
            syscalls.bind("dev/null", path, 0)  # read-only as that is
    for name in PROC_MASKED_DIRECTORIES:
        path = "proc/" + name
        if os.path.isdir(path):
            syscalls.bind(".empty", path, _SEALED)


def _make_mount_point(tree: int, target: str) -> None:
    """Below /usr the place must exist already; elsewhere it is made, as the kind of thing that will be mounted."""
    place = target[1:]
    if os.path.islink(place):
        raise OSError(errno.ELOOP, "this place is a symbolic link in the cell: name the place that it leads to")
    if os.path.exists(place):
        return
    try:
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            os.mkdir(place)
        else:
            _touch(place)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise OSError(errno.EROFS, "there is no such place, and none can be made: what it would lie in is read-only") from None
