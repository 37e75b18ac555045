"""Versions of policy packs: MAJOR.MINOR.PATCH with an optional pre-release, and the oldest that is still taken.

A pre-release counts as its release: `1.0.0-rc.1` is not older than `1.0.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from cellos.core.documents.execution_cell import U64_MAX
from cellos.core.documents.wording import quoted

MEMBER = "policy pack spec.version"


class Version(NamedTuple):
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


FLOOR = Version(1, 0, 0)
"""Older packs were written for other meanings of their rules."""


def version_faults(text: str, *, allow_downgrade: bool) -> Iterator[str]:
    """What is wrong with a version, first fault first. `allow_downgrade` lifts the floor and nothing else."""
    number, dash, suffix = text.partition("-")
    if dash and not re.fullmatch(r"[A-Za-z0-9.-]+", suffix):
        yield f"{MEMBER} {quoted(text)} has malformed pre-release suffix"
        return
    components = number.split(".")
    if len(components) != 3:
        yield f"{MEMBER} {quoted(text)} must be a MAJOR.MINOR.PATCH semver string"
        return
    for component in components:
        if fault := _component_fault(component):
            yield f"{MEMBER} {quoted(text)} component {quoted(component)} {fault}"
            return
    if not allow_downgrade and Version(*map(int, components)) < FLOOR:
        yield f"{MEMBER} {text} is older than runtime-supported floor {FLOOR} (set CELLOS_POLICY_ALLOW_DOWNGRADE=1 to override)"


def _component_fault(component: str) -> str | None:
    if not re.fullmatch(r"[0-9]+", component):
        return "is not a non-negative integer"
    if component.startswith("0") and component != "0":
        return "has a leading zero"
    # 20 digits hold every 64-bit number; far longer ones int() refuses in its own words.
    if len(component) > 20 or int(component) > U64_MAX:
        return "overflows u64"
    return None
