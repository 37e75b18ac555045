"""The structure of a formation: a tree of members below one coordinator, told by who authorizes whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cellos.core.formation.names import shown
from cellos.core.problem import Problem, problem
from cellos.errors import FormationRejected


class Link(NamedTuple):
    """A member and the one who authorizes it."""

    id: str
    authorized_by: str | None


def refuse_structure(coordinator: str, links: Sequence[Link]) -> None:
    """Raises FormationRejected, with the first problem, where the members are no tree with `coordinator` at its root."""
    for found in _problems(coordinator, links):
        raise FormationRejected(found)


def _problems(coordinator: str, links: Sequence[Link]) -> Iterator[Problem]:
    """In the order in which they are told. Each check relies on those before it."""
    parents = dict(links)
    if coordinator not in parents:
        yield problem("formation/no-coordinator", f"coordinator {shown(coordinator)} must appear in members list")
    seen: set[str] = set()
    for link in links:
        if link.id in seen:
            yield problem("formation/duplicate-member-id", f"duplicate member id {shown(link.id)}")
        seen.add(link.id)
    for link in links:
        if fault := _parent_fault(link, coordinator, parents):
            yield problem("formation/authority-not-narrowing", fault)
    if fault := _cycle_fault(coordinator, parents):
        yield problem("formation/cycle", fault)


def _parent_fault(link: Link, coordinator: str, parents: dict[str, str | None]) -> str | None:
    if link.id == coordinator:
        return None if link.authorized_by is None else f"coordinator {shown(link.id)} must not declare authorizedBy"
    if link.authorized_by is None:
        return f"non-coordinator member {shown(link.id)} missing authorizedBy"
    if link.authorized_by not in parents:
        return f"member {shown(link.id)} references unknown parent {shown(link.authorized_by)}"
    return None


def _cycle_fault(coordinator: str, parents: dict[str, str | None]) -> str | None:
    """The first member, in the order of the document, from which no walk upwards ends at the coordinator."""
    rooted: set[str | None] = {coordinator}
    for start in parents:
        walked: set[str | None] = set()
        at: str | None = start
        # What is known to end at the coordinator is not walked again: a chain of thousands costs each member once.
        while at is not None and at not in rooted:
            if at in walked:
                how = "involving member" if at == start else "on chain starting at"
                return f"authorizedBy cycle detected {how} {shown(start)}"
            walked.add(at)
            at = parents[at]
        rooted |= walked
    return None
