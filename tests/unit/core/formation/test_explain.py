from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cellos.core.formation.decide import decide
from cellos.core.formation.explain import waiting_reason
from cellos.core.formation.runs import Attempt
from cellos.testing.formation_log import SPEC, FormationLog, document

GIB = 1 << 30


def node(name: str = "n1", **more: Any) -> Any:
    whole = {"slots": 2, "slots_free": 2, "memory_bytes": 8 * GIB, "memory_free": 8 * GIB, "cpu_micros": 4_000_000, "cpu_free": 4_000_000}
    return SimpleNamespace(
        **{"node": name, "pool": "default", "classes": ("base", "limits"), "eligible": True, "draining": False, **whole, **more}
    )


def formation(members: dict[str, Any], *, act: bool = True) -> FormationLog:
    log = FormationLog(document(members))
    if act:
        for action in decide(log.state(), log.now_ms, in_flight=2).actions:
            log.act(action, 1)
    return log


def why(log: FormationLog, id: str, *nodes: Any, controllers: int = 1, now_ms: int | None = None) -> str | None:
    state = log.state()
    return waiting_reason(state.members[id], state, nodes, controllers, now_ms=now_ms)


def needing(**limits: Any) -> dict[str, Any]:
    return {"use": None, "spec": {**SPEC, "run": {"argv": ["x"], "limits": limits}}}


BIG = {"use": None, "spec": {**SPEC, "run": {"argv": ["x"], "limits": {"memoryMaxBytes": 1 << 40, "cpuMax": {"quotaMicros": 10**9}}}}}


def test_who_waits_for_others() -> None:
    ids = [f"m{number}" for number in range(7)]
    log = formation({**{id: {} for id in ids}, "z": {"after": ids}, "y": {"after": ["m1", "z"]}})
    assert why(log, "y") == "waits for: m1, z"
    assert why(log, "z", controllers=0) == "waits for: m0, m1, m2, m3, m4 and 2 more"


def test_who_waits_for_a_turn() -> None:
    log = formation({"a": {}, "b": {}, "c": {}})
    assert why(log, "c") == "waits for its turn: of its formation 2 are under way"
    assert why(log, "c", controllers=0) == "no controller runs"
    assert why(formation({"a": {}}, act=False), "a") == "is about to be dispatched"


def test_who_is_tried_again() -> None:
    log = formation({"a": {"retries": 2}})
    run = log.claim(Attempt(log.id, "a", 1))
    assert run is not None
    run.end(outcome="failed")
    assert why(log, "a") == "is tried again (attempt 2 of 3)"
    assert why(log, "a", now_ms=log.now_ms - 2200) == "is tried again in 3.2 s (attempt 2 of 3)"
    assert why(log, "a", now_ms=log.now_ms + 1000) == "is tried again now (attempt 2 of 3)"
    assert why(log, "a", controllers=0) == "no controller runs"


def test_who_does_not_wait() -> None:
    log = formation({"a": {}})
    run = log.claim(Attempt(log.id, "a", 1))
    assert run is not None
    assert why(log, "a") is None
    run.start()
    assert why(log, "a") is None
    run.end()
    assert why(log, "a") is None
    log.append_phase("completed")
    assert why(log, "a") is None
    assert why(FormationLog({"name": "x", "coordinator": "a", "members": [{"id": "a"}]}), "a") is None


def test_who_is_being_cancelled() -> None:
    log = formation({"a": {}, "b": {"after": ["a"]}})
    log.delete()
    for id in "ab":
        assert why(log, id) == "its formation is being cancelled: deleted by operator"
        assert why(log, id, controllers=0) == "no controller runs"


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([], "no node in pool default"),
        ([node(pool="gpu")], "no node in pool default"),
        ([node(eligible=False)], "no node of pool default takes work: n1 is draining"),
        ([node(draining=True), node("n2", draining=True)], "no node of pool default takes work: n1, n2 are draining"),
        ([node(classes=("base",))], "no node of pool default can enforce limits"),
        ([node(slots=0, slots_free=0)], "no node of pool default is large enough: needs 1 slot, the largest is 0 slots on n1"),
        (
            [node(memory_bytes=GIB, memory_free=GIB), node("n2", memory_bytes=2 * GIB, memory_free=GIB)],
            "no node of pool default is large enough: needs 4 GiB, the largest is 2 GiB on n2",
        ),
        (
            [node(cpu_micros=1_000_000, cpu_free=1_000_000)],
            "no node of pool default is large enough: needs 1.5 processors, the largest is 1 processor on n1",
        ),
        ([node(slots_free=0)], "no capacity: needs 1 slot, most free is 0 slots on n1"),
        ([node(memory_free=GIB), node("n2", memory_free=1)], "no capacity: needs 4 GiB, most free is 1 GiB on n1"),
        ([node(cpu_free=250_000)], "no capacity: needs 1.5 processors, most free is 0.25 processors on n1"),
        ([node(slots_free=0), node("n2")], "is about to be taken by n2"),
        ([node(f"n{number}") for number in range(7)], "is about to be taken by n0, n1, n2, n3, n4 and 2 more"),
    ],
)
def test_why_nobody_takes_it(nodes: list[Any], text: str) -> None:
    limits = {"memoryMaxBytes": 4 * GIB, "cpuMax": {"quotaMicros": 150_000}}
    log = formation({"lead": BIG, "a": needing(**limits)})
    assert why(log, "a", *nodes) == text
    assert why(log, "a", *nodes, controllers=0) == text


def test_what_declares_nothing_fits_where_a_slot_is() -> None:
    log = formation({"a": {}})
    assert why(log, "a", node(classes=("base",), memory_free=0, cpu_free=0)) == "is about to be taken by n1"
