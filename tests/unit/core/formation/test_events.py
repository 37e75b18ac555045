import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.events import Event, canonical_bytes, parse_event
from cellos.core.formation import PHASES, Phase, parse_formation
from cellos.core.formation.events import (
    FORMATION_PREFIX,
    FORMATION_TYPE,
    NAME_RESERVED,
    created,
    name_reserved,
    name_subject,
    phase_event,
    phase_of,
    subject_of,
    subjects_of,
)
from cellos.core.formation.runs import Attempt

UUID = "018f6f0e-0000-7000-8000-000000000001"
STAMP: dict[str, Any] = {"event_id": "018f6f0e-0000-7000-8000-000000000002", "time": "2026-01-02T03:04:05.000000006+00:00"}
FLAT = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}], "z": 1}
PAGE = Path(__file__).parents[4] / "docs/reference/formation.md"


def envelope(event: Event) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(canonical_bytes(event))
    del whole["data"]
    return whole


def test_created_holds_the_whole_document() -> None:
    event = created(UUID, parse_formation(json.dumps(FLAT).encode()), **STAMP)
    assert envelope(event) == {
        "specversion": "1.0",
        "id": STAMP["event_id"],
        "source": UUID,
        "type": "dev.cellos.events.cell.formation.v1.created",
        "datacontenttype": "application/json",
        "time": STAMP["time"],
        "traceparent": None,
    }
    assert event.data == {"formationId": UUID, "formationName": "demo", "cellCount": 2, "failedCellIds": [], "document": FLAT}
    assert parse_event(canonical_bytes(event)) == event


def test_a_key_of_the_client_is_kept() -> None:
    event = created(UUID, parse_formation(json.dumps(FLAT).encode()), idempotency_key="k", **STAMP)
    assert event.data["idempotencyKey"] == "k"


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "created"])
def test_later_phases(phase: Phase) -> None:
    plain = phase_event(UUID, phase, name="demo", cell_count=2, **STAMP)
    assert (plain.type, plain.source) == (f"dev.cellos.events.cell.formation.v1.{phase}", UUID)
    assert plain.data == {"formationId": UUID, "formationName": "demo", "cellCount": 2, "failedCellIds": []}
    full = phase_event(
        UUID, phase, name="demo", cell_count=2, failed_cell_ids=["b"], reason="why", dispatched=[Attempt(UUID, "a", 2)], **STAMP
    )
    assert full.data == {**plain.data, "failedCellIds": ["b"], "reason": "why", "dispatched": [{"memberId": "a", "attempt": 2}]}


def test_nobody_creates_without_a_document() -> None:
    with pytest.raises(ValueError, match="created"):
        phase_event(UUID, "created", name="demo", cell_count=2, **STAMP)


def test_a_reserved_name() -> None:
    event = name_reserved(UUID, "demo", **STAMP)
    assert (event.type, event.source) == ("dev.cellos.events.cell.name.v1.reserved", UUID)
    assert event.data == {"formationId": UUID, "formationName": "demo"}


def test_subjects() -> None:
    assert subject_of(UUID, "created") == f"cellos.events.formations.{UUID}.created"
    assert subjects_of(UUID) == f"cellos.events.formations.{UUID}.>"
    assert name_subject("demo") == "cellos.events.names.MRSW23Y"
    assert subject_of(UUID, "failed").startswith(FORMATION_PREFIX)


NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,40}", fullmatch=True)


@given(NAMES, NAMES)
def test_a_name_is_one_token_of_its_own(one: str, other: str) -> None:
    token = name_subject(one).removeprefix("cellos.events.names.")
    assert re.fullmatch("[A-Z2-7]+", token)
    assert base64.b32decode(token + "=" * (-len(token) % 8)).decode() == one
    assert (name_subject(one) == name_subject(other)) == (one == other)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("prefix", ["dev.cellos.events.cell.formation.v1.", "io.cellos.formation.v1."])
def test_both_families_of_types_are_read(prefix: str, phase: Phase) -> None:
    assert phase_of(prefix + phase) == phase


@pytest.mark.parametrize("other", [FORMATION_TYPE, FORMATION_TYPE + "paused", "formation.v1.created", NAME_RESERVED, ""])
def test_other_types_are_no_phase(other: str) -> None:
    assert phase_of(other) is None


def test_the_events_are_documented() -> None:
    section = PAGE.read_text().partition("## Events\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `((?:formation|name)\.v1\.\w+)` \| .+? \| (.+) \|$", section, re.MULTILINE)
    assert [kind for kind, _ in rows] == [*(f"formation.v1.{phase}" for phase in PHASES), "name.v1.reserved"]
    data = {kind: re.findall(r"`(\w+)`", text) for kind, text in rows}
    formation = parse_formation(json.dumps(FLAT).encode())
    assert data["formation.v1.created"] == list(created(UUID, formation, idempotency_key="k", **STAMP).data)
    assert data["formation.v1.launching"] == list(
        phase_event(UUID, "failed", name="n", cell_count=1, reason="r", dispatched=[Attempt(UUID, "a", 2)], **STAMP).data
    )
    assert data["name.v1.reserved"] == list(name_reserved(UUID, "n", **STAMP).data)
    assert {text for kind, text in rows if kind not in data.keys() - {f"formation.v1.{phase}" for phase in PHASES[2:]}} == {"the same"}
