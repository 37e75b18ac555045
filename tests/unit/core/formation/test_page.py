"""The events of formations, as their page lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cellos.core.events import PREFIX, RunIdentity
from cellos.core.formation.documents import parse_formation
from cellos.core.formation.events import created, name_reserved, phase_event
from cellos.core.formation.runs import Attempt, claimed, dispatched, void
from cellos.core.formation.transitions import PHASES

PAGE = Path(__file__).parents[4] / "docs/reference/events.md"
STAMP = {"event_id": "1", "time": "2026-01-01T00:00:00+00:00"}
ATTEMPT = Attempt("f", "m", 1)
RUN = RunIdentity(cell_id="c", spec_id="s", run_id="r", spec_hash="0" * 64, correlation={"formationId": "f"})
FORMATION = parse_formation(b'{"name": "n", "coordinator": "m", "members": [{"id": "m"}]}')


BEGUN = [Attempt("f", "m", 1)]


def produced() -> Iterator[tuple[str, set[str]]]:
    """Types and the members of their data, with all that they can have and with as little as they must."""
    for event in (
        name_reserved("f", "n", **STAMP),
        created("f", FORMATION, idempotency_key="k", **STAMP),
        created("f", FORMATION, **STAMP),
        *(phase_event("f", phase, name="n", cell_count=1, **STAMP) for phase in PHASES if phase != "created"),
        *(phase_event("f", phase, name="n", cell_count=1, reason="r", dispatched=BEGUN, **STAMP) for phase in PHASES if phase != "created"),
        dispatched(ATTEMPT, name="n", pool="p", work="base", spec={}, on_disconnect="kill", **STAMP),
        void(ATTEMPT, reason="r", **STAMP),
    ):
        yield event.type.removeprefix(PREFIX), set(event.members)
    yield "run.v1.claimed", {*claimed(RUN, ATTEMPT, node="n", life="l", pool="p").data, "chain"}


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """Type to the members that are always there, and those that may be."""
    section = PAGE.read_text().partition("### Formations, and the runs of their members\n")[2].partition("\n### ")[0]
    found: dict[str, tuple[set[str], set[str]]] = {}
    last: tuple[set[str], set[str]] = (set(), set())
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        types, *_, data = (each.strip() for each in line.strip("|").split("|"))
        if data != "the same":
            last = set(re.findall(r"`(\w+)`(?!\?)", data)), set(re.findall(r"`(\w+)`\?", data))
        first, *others = re.findall(r"`([^`]+)`", types)
        for each in (first, *(f"{first.rpartition('.')[0]}.{word}" for word in others)):
            found[each] = last
    return found


def test_every_event_is_documented_with_what_is_in_it() -> None:
    always: dict[str, set[str]] = {}
    ever: dict[str, set[str]] = {}
    for kind, members in produced():
        always[kind] = always.get(kind, members) & members
        ever[kind] = ever.get(kind, set()) | members
    assert documented() == {kind: (always[kind], ever[kind] - always[kind]) for kind in ever}
