"""What a daemon that runs cells has to give: slots, memory and processor time, and what its cells were promised of it.

Only what a document declares is subtracted: a cell that declares nothing gets the default limits, and shares what is left as processes of
a host do.
"""

from __future__ import annotations

import os

from cellos.core.need import MICROS_PER_PROCESSOR, Need

_CGROUPS = "/sys/fs/cgroup"
_NO_LIMIT = 1 << 60
"""Version 1 writes a number beyond this where there is no limit."""


class Capacity:
    """Slots and resources. Owned by one thread."""

    def __init__(self, *, slots: int, memory_bytes: int, cpu_micros: int) -> None:
        self.slots = self.slots_free = slots
        self.memory_bytes = self.memory_free = memory_bytes
        self.cpu_micros = self.cpu_free = cpu_micros

    def could_hold(self, need: Need) -> bool:
        """Whether it would fit if nothing else were here."""
        return need.memory_bytes <= self.memory_bytes and need.cpu_micros <= self.cpu_micros

    def take(self, need: Need) -> bool:
        """Set it aside, if it fits now; whether it did."""
        if self.slots_free < 1 or need.memory_bytes > self.memory_free or need.cpu_micros > self.cpu_free:
            return False
        self.slots_free -= 1
        self.memory_free -= need.memory_bytes
        self.cpu_free -= need.cpu_micros
        return True

    def give_back(self, need: Need) -> None:
        """What was taken."""
        self.slots_free += 1
        self.memory_free += need.memory_bytes
        self.cpu_free += need.cpu_micros


def host_memory_bytes(root: str = "") -> int:
    """What the host has, or our control group lets us have of it."""
    total = next((int(line.split()[1]) << 10 for line in _read(f"{root}/proc/meminfo").splitlines() if line.startswith("MemTotal:")), 0)
    limits = [_count(text) for text in _in_groups(root, "memory.max", "memory", "memory.limit_in_bytes")]
    return min(limit for limit in (total or _NO_LIMIT, *limits) if limit is not None)


def host_cpu_micros(root: str = "") -> int:
    """The processors that we may use, or what our control group lets us have of them, in microseconds per second."""
    found = len(os.sched_getaffinity(0)) * MICROS_PER_PROCESSOR
    for text in _in_groups(root, "cpu.max", "", ""):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            found = min(found, int(quota) * MICROS_PER_PROCESSOR // int(period))
    quotas = _in_groups(root, "", "cpu", "cpu.cfs_quota_us")
    periods = _in_groups(root, "", "cpu", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            found = min(found, int(quota) * MICROS_PER_PROCESSOR // int(period))
    return max(1, found)


def _in_groups(root: str, name: str, controller: str, name_v1: str) -> list[str]:
    """The content of a file of our control group and of all above it: of version 2 `name`, of the hierarchy `controller` `name_v1`."""
    found = []
    for line in _read(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and name:
            mount, file = f"{root}{_CGROUPS}", name
        elif controller and controller in controllers.split(","):
            mount, file = f"{root}{_CGROUPS}/{controller}", name_v1
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            text = _read("/".join([mount, *parts[:depth], file]))
            if text:
                found.append(text)
    return found


def _count(text: str) -> int | None:
    digits = text.strip()
    return int(digits) if digits.isdigit() and int(digits) < _NO_LIMIT else None


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
