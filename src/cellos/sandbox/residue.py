"""What is left of a cell: a look at the kernel's own lists, not at our bookkeeping.

Cost: three readlinks per process of this host, kernel threads left out, and one fstat per descriptor of ours.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping

Identities = dict[tuple[int, int], str]
"""(device, inode) of a descriptor that belonged to the cell, to its name."""

Finding = tuple[str, str]
"""(kind, detail): process, namespace, mount or descriptor."""

_PF_KTHREAD = 0x00200000


def look(namespaces: Mapping[str, int], identities: Identities, *, ours: Collection[int]) -> Iterator[Finding]:
    """Everything of a dead cell that is still there.

    `namespaces`: name to a descriptor that keeps its number from being given to another. `ours`: descriptors of this process that its
    caller is about to close.
    """
    inodes = {name: os.fstat(descriptor).st_ino for name, descriptor in namespaces.items()}
    yield from _processes(inodes)
    yield from _mounts(inodes, _work_devices(identities))
    yield from _descriptors(inodes, identities, ours)


def _processes(inodes: Mapping[str, int]) -> Iterator[Finding]:
    # Of a pid namespace whose process 1 is reaped nobody is left, and nobody can join it any more (pid_namespaces(7)).
    wanted = [(name, f"{name}:[{inode}]") for name, inode in inodes.items() if name != "pid"]
    threads = _kernel_threads()
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or pid in threads:
            continue
        try:
            held = [link for name, link in wanted if os.readlink(f"/proc/{pid}/ns/{name}") == link]
        except OSError:
            continue  # it ended, or it belongs to another user and cannot be ours
        if held:
            yield "process", f"pid {pid} ({_name_of(pid)})"
            for link in held:
                yield "namespace", f"{link} held by pid {pid}"


def _kernel_threads() -> frozenset[str]:
    """They are in no namespace but the first, and most of what /proc lists. All are children of kthreadd, which is process 2 (proc(5))."""
    try:
        with open("/proc/2/stat", "rb") as file:
            flags = int(file.read().rpartition(b") ")[2].split()[6])
        if not flags & _PF_KTHREAD:
            return frozenset()
        with open("/proc/2/task/2/children") as file:
            return frozenset(file.read().split())
    except (OSError, ValueError, IndexError):  # none can be seen from here
        return frozenset()


def _name_of(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "ended"


def _work_devices(identities: Identities) -> dict[int, str]:
    """Device numbers of whole file systems that belonged to the cell."""
    return {device: name for (device, _), name in identities.items() if name == "work directory"}


def _mounts(inodes: Mapping[str, int], devices: Mapping[int, str]) -> Iterator[Finding]:
    """A namespace that somebody bound to a file lives on without any process, and a work directory that is mounted elsewhere stays."""
    roots = {f"{name}:[{inode}]" for name, inode in inodes.items()}
    with open("/proc/self/mountinfo") as file:
        text = file.read()
    file_systems = {f"{os.major(device)}:{os.minor(device)}": name for device, name in devices.items()}
    if "nsfs" not in text and not any(f" {number} " in text for number in file_systems):
        return
    for line in text.splitlines():
        fields = line.split(" ")
        if fields[2] in file_systems:
            yield "mount", f"{file_systems[fields[2]]} on {_unescaped(fields[4])}"
        if fields[3] in roots:
            place = _unescaped(fields[4])
            yield "mount", f"{fields[3]} on {place}"
            yield "namespace", f"{fields[3]} held by the mount {place}"


def _unescaped(path: str) -> str:
    """The kernel writes blanks and the like in octal there (proc_pid_mountinfo(5))."""
    for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(escaped, character)
    return path


def _descriptors(inodes: Mapping[str, int], identities: Identities, ours: Collection[int]) -> Iterator[Finding]:
    """Descriptors of this process that lead into the cell: its sockets, its namespaces, any file of its work directory."""
    devices = _work_devices(identities)
    links = {inode: f"{name}:[{inode}]" for name, inode in inodes.items()}
    for entry in os.listdir("/proc/self/fd"):
        descriptor = int(entry)
        if descriptor in ours:
            continue
        try:
            status = os.fstat(descriptor)
            name = identities.get((status.st_dev, status.st_ino)) or devices.get(status.st_dev)
            if not name and status.st_ino in links and os.readlink(f"/proc/self/fd/{descriptor}") == links[status.st_ino]:
                name = links[status.st_ino]
        except OSError:
            continue  # closed meanwhile, by the listing or another thread
        if name:
            yield "descriptor", f"{descriptor} ({name})"
