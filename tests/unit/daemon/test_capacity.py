from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.core.need import Need, need_of
from cellos.daemon.capacity import Capacity, host_cpu_micros, host_memory_bytes


def spec(limits: dict[str, Any] | None) -> CellSpec:
    run = {"argv": ["true"], **({"limits": limits} if limits is not None else {})}
    body = {"id": "c", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": run}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


@pytest.mark.parametrize(
    ("limits", "need"),
    [
        (None, Need()),
        ({}, Need()),
        ({"memoryMaxBytes": 1 << 20}, Need(memory_bytes=1 << 20)),
        ({"cpuMax": {"quotaMicros": 50_000}}, Need(cpu_micros=500_000)),
        ({"cpuMax": {"quotaMicros": 50_000, "periodMicros": 25_000}}, Need(cpu_micros=2_000_000)),
    ],
)
def test_only_what_is_declared_is_needed(limits: dict[str, Any] | None, need: Need) -> None:
    assert need_of(spec(limits)) == need


def test_a_cell_without_a_command_needs_its_slot() -> None:
    raw = b'{"apiVersion":"cellos.io/v1","kind":"ExecutionCell","spec":{"id":"c","authority":{},"lifetime":{"ttlSeconds":1}}}'
    assert need_of(parse_execution_cell(raw).spec) == Need()


def test_what_is_taken_is_not_given_twice() -> None:
    capacity = Capacity(slots=2, memory_bytes=100, cpu_micros=10)
    assert capacity.take(Need(memory_bytes=60))
    assert not capacity.take(Need(memory_bytes=60)), "it could be held, but not now"
    assert capacity.could_hold(Need(memory_bytes=60))
    assert capacity.take(Need(cpu_micros=10))
    assert not capacity.take(Need()), "no slot is left"
    capacity.give_back(Need(memory_bytes=60))
    assert capacity.take(Need(memory_bytes=100))
    assert not capacity.could_hold(Need(memory_bytes=101))
    assert not capacity.could_hold(Need(cpu_micros=11))


needs = st.builds(Need, memory_bytes=st.integers(0, 60), cpu_micros=st.integers(0, 60))


@given(st.lists(st.tuples(st.booleans(), needs)))
def test_it_never_promises_more_than_it_has(steps: list[tuple[bool, Need]]) -> None:
    capacity = Capacity(slots=3, memory_bytes=100, cpu_micros=100)
    held: list[Need] = []
    for gives_back, need in steps:
        if gives_back and held:
            capacity.give_back(held.pop())
        elif capacity.take(need):
            held.append(need)
        assert capacity.slots_free == 3 - len(held) >= 0
        assert capacity.memory_free == 100 - sum(each.memory_bytes for each in held) >= 0
        assert capacity.cpu_free == 100 - sum(each.cpu_micros for each in held) >= 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:    1024 kB\nMemFree:  1 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


PROCESSORS = len(os.sched_getaffinity(0)) * 1_000_000


def test_without_control_groups_it_is_the_host(root: Path) -> None:
    assert (host_memory_bytes(str(root)), host_cpu_micros(str(root))) == (1 << 20, PROCESSORS)


def test_of_version_2_every_group_above_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/a/b\n")
    write(root / "sys/fs/cgroup/a/memory.max", "4096\n")
    write(root / "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(root / "sys/fs/cgroup/a/cpu.max", "50000 100000\n")
    write(root / "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert (host_memory_bytes(str(root)), host_cpu_micros(str(root))) == (4096, 500_000)


def test_of_version_1_too(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:memory:/a\n4:cpu,cpuacct:/a\n1:name=systemd:/x\n")
    write(root / "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "8192\n")
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root / "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "25000\n")
    write(root / "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n")
    write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert (host_memory_bytes(str(root)), host_cpu_micros(str(root))) == (8192, 250_000)


def test_this_host_has_something() -> None:
    assert host_memory_bytes() > 1 << 20
    assert 0 < host_cpu_micros() <= PROCESSORS
