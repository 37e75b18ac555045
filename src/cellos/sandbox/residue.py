"""What is left of a cell: a look at the kernel's own lists, not at our bookkeeping.

Cost: one readlink per namespace and process of this host, and one fstat per descriptor of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

Identities = dict[tuple[int, int], str]
"""(device, inode) of a descriptor that belonged to the cell, to its name."""

Finding = tuple[str, str]
"""(kind, detail): process, namespace, mount or descriptor."""

_LOOKED_AT = ("user", "mnt", "net", "pid")
"""Namespaces that a process can be in. The other three belong to the same user namespace and hold nothing that outlives a process."""


def look(namespaces: Mapping[str, int], identities: Identities) -> Iterator[Finding]:
    """Everything of a destroyed cell that is still there. `namespaces`: name to inode, as they were while it lived."""
    yield from _processes(namespaces)
    yield from _mounts(namespaces)
    yield from _descriptors(namespaces, identities)


def _processes(namespaces: Mapping[str, int]) -> Iterator[Finding]:
    wanted = [(name, f"{name}:[{namespaces[name]}]") for name in _LOOKED_AT]
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        held = []
        try:
            held = [link for name, link in wanted if os.readlink(f"/proc/{pid}/ns/{name}") == link]
        except OSError:
            continue  # it ended, or it belongs to another user and cannot be ours
        if held:
            yield "process", f"pid {pid} ({_name_of(pid)})"
            for link in held:
                yield "namespace", f"{link} held by pid {pid}"


def _name_of(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "ended"


def _mounts(namespaces: Mapping[str, int]) -> Iterator[Finding]:
    """A namespace that somebody bound to a file lives on without any process."""
    roots = {f"{name}:[{inode}]" for name, inode in namespaces.items()}
    with open("/proc/self/mountinfo") as file:
        text = file.read()
    if "nsfs" not in text:
        return
    for line in text.splitlines():
        fields = line.split(" ")
        if fields[3] in roots:
            yield "mount", f"{fields[3]} on {fields[4]}"
            yield "namespace", f"{fields[3]} held by the mount {fields[4]}"


def _descriptors(namespaces: Mapping[str, int], identities: Identities) -> Iterator[Finding]:
    """Descriptors of this process that still lead into the cell: its sockets, its namespaces, any file of its work directory."""
    devices = {device: name for (device, _), name in identities.items() if name == "work directory"}
    inodes = set(namespaces.values())
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(descriptor))
        except OSError:
            continue  # the one that listed them
        name = identities.get((status.st_dev, status.st_ino)) or devices.get(status.st_dev)
        if name:
            yield "descriptor", f"{descriptor} ({name})"
        elif status.st_ino in inodes and os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"[{status.st_ino}]"):
            yield "descriptor", f"{descriptor} (namespace {status.st_ino})"
