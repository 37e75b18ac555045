"""The structure of a formation: a tree of members below one coordinator, told by who authorizes whom; and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
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


# --- after ------------------------------------------------------------------------------------------------------------------------------

_LONGEST_CYCLE_SHOWN = 6


def refuse_order(after: Mapping[str, Sequence[str]]) -> None:
    """Raises FormationRejected where a member waits for one that does not exist, or for itself in the end.

    `after` has every member, in the order of the document, with the ids of those that it waits for.
    """
    for place, (id, others) in enumerate(after.items()):
        for at, other in enumerate(others):
            if other not in after:
                text = f"member {shown(id)} (members[{place}].after[{at}]): after names {shown(other)}, which is no member"
                close = get_close_matches(other[:64], list(after), n=1)
                raise FormationRejected(problem("bad-request", text + (f"; did you mean {shown(close[0])}?" if close else "")))
    if cycle := _cycle(after):
        steps = [f"{shown(id)} waits for {shown(other)}" for id, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
        cut = steps[:_LONGEST_CYCLE_SHOWN]
        more = f", and {len(steps) - len(cut)} more" if len(steps) > len(cut) else ""
        raise FormationRejected(problem("formation/cycle", f"after makes a circle: {', '.join(cut)}{more}"))


def _cycle(after: Mapping[str, Sequence[str]]) -> list[str]:
    """Members that wait for each other in a circle, each for the next; empty where there are none."""
    waiting = {id: len(others) for id, others in after.items()}
    dependents: dict[str, list[str]] = {id: [] for id in after}
    for id, others in after.items():
        for other in others:
            dependents[other].append(id)
    free = [id for id, count in waiting.items() if not count]
    while free:
        done = free.pop()
        del waiting[done]
        for id in dependents[done]:
            waiting[id] -= 1
            if not waiting[id]:
                free.append(id)
    # Each of those that are left waits for another that is left: a walk among them comes back.
    walked: dict[str, int] = {}
    at = next(iter(waiting), None)
    while at is not None and at not in walked:
        walked[at] = len(walked)
        at = next(other for other in after[at] if other in waiting)
    return [] if at is None else list(walked)[walked[at] :]
