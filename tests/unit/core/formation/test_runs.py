from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents import CellSpec
from cellos.core.documents.shape import to_struct
from cellos.core.events import PREFIX, RunIdentity
from cellos.core.formation.runs import (
    CLAIMED,
    DISPATCHED,
    VOID,
    WORK_CLASSES,
    Attempt,
    attempt_of,
    claimed,
    dispatched,
    run_subject,
    runs_of,
    text,
    token,
    void,
    work_class,
    work_filter,
    work_of,
    work_subject,
)

PAGE = Path(__file__).parents[4] / "docs/reference/formation.md"
UUID = "018f6f0e-0000-7000-8000-000000000001"
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
ATTEMPT = Attempt(UUID, "a.b", 2)
STAMP: dict[str, Any] = {"event_id": "1", "time": "2026-01-02T03:04:05.000000006+00:00"}
ABOUT = {"formationId": UUID, "memberId": "a.b", "attempt": 2, "cellId": f"{UUID}.a.b"}


def matches(pattern: str, subject: str) -> bool:
    """As NATS matches."""
    wanted, found = pattern.split("."), subject.split(".")
    return wanted[-1] == ">" and len(found) >= len(wanted) and all(w in ("*", f) for w, f in zip(wanted[:-1], found, strict=False))


@given(IDS, IDS, st.sampled_from(WORK_CLASSES), st.integers(1, 9999))
def test_subjects_lead_back_to_the_attempt(member: str, pool: str, work: Any, number: int) -> None:
    attempt = Attempt(UUID, member, number)
    run, asked = run_subject(attempt), work_subject(pool, work, attempt)
    assert attempt_of(run) == attempt_of(asked) == attempt
    assert matches(runs_of(UUID), run)
    assert matches(work_of(UUID), asked)
    assert matches(work_filter(pool, work), asked)
    assert not matches(work_filter(pool + "x", work), asked)
    assert len(asked) < 512


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "cellos.events.runs.",
        f"cellos.events.runs.{UUID}.ME",
        f"cellos.events.runs.{UUID}.ME.1.2",
        f"cellos.events.runs.{UUID}.ME.0",
        f"cellos.events.runs.{UUID}.ME.01",
        f"cellos.events.runs.{UUID}.ME.-1",
        f"cellos.events.runs.{UUID}.ME.\u0661",
        f"cellos.events.runs.{UUID}.ME.{'9' * 5000}",
        f"cellos.events.runs.{UUID}.me.1",
        f"cellos.events.runs.{UUID}.MF.1",
        f"cellos.events.runs.{UUID}.74.1",
        f"cellos.events.work.{UUID}.ME.1",
        f"cellos.events.formations.{UUID}.ME.1",
    ],
)
def test_other_subjects_are_about_no_attempt(subject: str) -> None:
    assert attempt_of(subject) is None


@given(st.text(max_size=10))
def test_one_token_for_each_text(value: str) -> None:
    if text(value) is not None:
        assert token(str(text(value))) == value
    if value.encode(errors="replace").decode() == value:
        assert text(token(value)) == value


@pytest.mark.parametrize(
    ("spec", "work"),
    [
        ({}, "base"),
        ({"run": {"argv": ["x"]}}, "base"),
        ({"run": {"argv": ["x"], "limits": {"gracefulShutdownSeconds": 1}}}, "base"),
        ({"run": {"argv": ["x"], "limits": {"memoryMaxBytes": 1}}}, "limits"),
        ({"run": {"argv": ["x"], "limits": {"cpuMax": {"quotaMicros": 1}}}}, "limits"),
        ({"authority": {"egressRules": []}}, "base"),
        ({"authority": {"egressRules": [{"host": "h", "port": 1}]}, "run": {"argv": ["x"], "limits": {"memoryMaxBytes": 1}}}, "egress"),
    ],
)
def test_what_a_node_must_be_able_to_enforce(spec: dict[str, Any], work: str) -> None:
    assert work_class(to_struct({"id": "x", "authority": {}, "lifetime": {"ttlSeconds": 1}, **spec}, CellSpec)) == work


def test_the_events_are_documented() -> None:
    section = PAGE.read_text().partition("Of the runs of its members:")[2]
    rows = dict(re.findall(r"^\| `(run\.v1\.\w+)` \| .+ \| (.+) \|$", section, re.MULTILINE))
    run = RunIdentity(cell_id=ABOUT["cellId"], spec_id="a.b", run_id="r", spec_hash="0" * 64)
    written = {
        DISPATCHED: dispatched(ATTEMPT, name="demo", pool="gpu", work="base", spec={}, on_disconnect="kill", **STAMP).data,
        CLAIMED: claimed(run, ATTEMPT, node="n", life="l", pool="gpu").data,
        VOID: void(ATTEMPT, reason="why", **STAMP).data,
    }
    assert {PREFIX + kind: set(re.findall(r"`(\w+)`", data)) for kind, data in rows.items()} == {
        kind: set(data) for kind, data in written.items()
    }


def test_events() -> None:
    asked = dispatched(ATTEMPT, name="demo", pool="gpu", work="limits", spec={"authority": {}}, on_disconnect="kill", **STAMP)
    assert (asked.type, asked.source, asked.id, asked.time) == (DISPATCHED, UUID, STAMP["event_id"], STAMP["time"])
    more = {"formationName": "demo", "pool": "gpu", "class": "limits", "onDisconnect": "kill", "spec": {"authority": {}}}
    assert asked.data == ABOUT | more
    nobody = void(ATTEMPT, reason="why", **STAMP)
    assert (nobody.type, nobody.source, nobody.data) == (VOID, UUID, ABOUT | {"reason": "why"})
    run = RunIdentity(cell_id=ABOUT["cellId"], spec_id="a.b", run_id="r", spec_hash="0" * 64)
    taken = claimed(run, ATTEMPT, node="n", life="l", pool="gpu")
    assert taken.type == CLAIMED
    assert taken.data == ABOUT | {"specId": "a.b", "runId": "r", "node": "n", "life": "l", "pool": "gpu", "specHash": "0" * 64}
