"""Narrowing: no member of a formation may do or use anything that the member who authorizes it may not."""

from __future__ import annotations

from collections.abc import Sequence

from cellos.core.authority import narrowing_excess
from cellos.core.documents import CpuMax, Limits
from cellos.core.formation.members import Member
from cellos.core.formation.names import shown
from cellos.core.problem import problem
from cellos.errors import FormationRejected

PLATFORM_LIMITS = Limits(
    memory_max_bytes=512 * 1024 * 1024, cpu_max=CpuMax(quota_micros=100_000, period_micros=100_000), graceful_shutdown_seconds=0
)
"""What a cell has that declares no limit, where the operator of a node says nothing else."""


def refuse_widening(members: Sequence[Member], *, defaults: Limits) -> None:
    """Raises FormationRejected for the first member, in order, whose spec exceeds that of the one who authorizes it.

    `defaults` stand for limits that a spec does not declare. Members form a tree; those without a spec have no authority of their own.
    """
    specs = {member.id: member.spec for member in members}
    for member in members:
        parent = specs.get(member.authorized_by) if member.authorized_by is not None else None
        if member.spec is None or parent is None or member.authorized_by is None:
            continue
        if excess := narrowing_excess(member.spec, parent, defaults=defaults):
            raise FormationRejected(
                problem(
                    "formation/authority-not-narrowing",
                    f"member {shown(member.id)} exceeds its parent {shown(member.authorized_by)}: "
                    f"{excess.field} {shown(excess.value)} is not within the parent's",
                )
            )
