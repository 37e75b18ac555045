"""What a cell takes of the host that runs it, as its document declares it. What is not declared is not counted."""

from __future__ import annotations

from msgspec import Struct

from cellos.core.authority import DEFAULT_CPU_PERIOD_MICROS
from cellos.core.documents import CellSpec

MICROS_PER_PROCESSOR = 1_000_000


class Need(Struct, frozen=True, kw_only=True):
    """What one cell takes, beside its slot. `cpu_micros` are microseconds of processor time per second."""

    memory_bytes: int = 0
    cpu_micros: int = 0


def need_of(spec: CellSpec) -> Need:
    """What a document declares."""
    limits = spec.run.limits if spec.run else None
    cpu = limits.cpu_max if limits else None
    return Need(
        memory_bytes=(limits and limits.memory_max_bytes) or 0,
        cpu_micros=cpu.quota_micros * MICROS_PER_PROCESSOR // (cpu.period_micros or DEFAULT_CPU_PERIOD_MICROS) if cpu else 0,
    )
