"""Why a member does not go on, in words: what `cellos describe` shows of whoever waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from cellos.core.documents import CellSpec
from cellos.core.formation.members import Member
from cellos.core.formation.names import shown
from cellos.core.formation.runs import WorkClass, work_class
from cellos.core.formation.state import ENDED, FormationState, MemberState
from cellos.core.need import MICROS_PER_PROCESSOR, need_of

_MOST_NAMES = 5
_ENFORCE: dict[WorkClass, str] = {"base": "run cells", "limits": "enforce limits", "egress": "enforce egress rules"}


class NodeView(Protocol):
    """What a node says of itself: bytes, and microseconds of processor time per second."""

    @property
    def node(self) -> str: ...
    @property
    def pool(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def slots(self) -> int: ...
    @property
    def slots_free(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def memory_free(self) -> int: ...
    @property
    def cpu_micros(self) -> int: ...
    @property
    def cpu_free(self) -> int: ...
    @property
    def eligible(self) -> bool: ...
    @property
    def draining(self) -> bool: ...


def waiting_reason(
    member: MemberState, formation: FormationState, nodes: Sequence[NodeView], controllers: int, *, now_ms: int | None = None
) -> str | None:
    """What a member waits for; None where it does not. `nodes`: those that live; `controllers`: how many do.

    `now_ms`: milliseconds since 1970, for how long it still takes.
    """
    if formation.terminal or not formation.has_specs or member.phase in ENDED or member.phase in ("claimed", "running"):
        return None
    if formation.cancelling is not None:
        return "no controller runs" if not controllers else f"its formation is being cancelled: {formation.cancelling}"
    if member.phase == "waiting":
        return f"waits for: {_unmet(member, formation)}"
    if member.phase == "dispatched":
        return _why_not_taken(member.member, nodes)
    if not controllers:
        return "no controller runs"
    if member.phase == "backing_off":
        return _tried_again(member, now_ms)
    return (
        f"waits for its turn: of its formation {formation.under_way} are under way" if formation.under_way else "is about to be dispatched"
    )


def _unmet(member: MemberState, formation: FormationState) -> str:
    unmet = (id for id in member.member.after if formation.members[id].phase != "succeeded")
    more = member.unmet - _MOST_NAMES
    return ", ".join(islice(unmet, _MOST_NAMES)) + (f" and {more} more" if more > 0 else "")


def _tried_again(member: MemberState, now_ms: int | None) -> str:
    which = f"attempt {member.next_attempt} of {member.member.most_attempts}"
    left = None if now_ms is None else (member.not_before_ms - now_ms) / 1000
    when = "" if left is None else " now" if left <= 0 else f" in {left:.1f} s"
    return f"is tried again{when} ({which})"


# --- nodes ------------------------------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """One thing that a node has and a cell needs."""

    need: int
    total: Callable[[NodeView], int]
    free: Callable[[NodeView], int]
    shown: Callable[[int], str]


def _why_not_taken(member: Member, nodes: Sequence[NodeView]) -> str:
    """The first thing that keeps all nodes from it."""
    if member.spec is None:
        raise ValueError(f"member {shown(member.id)} has no spec, and was dispatched")
    pool = member.pool
    if not (here := [node for node in nodes if node.pool == pool]):
        return f"no node in pool {pool}"
    if not (taking := [node for node in here if node.eligible and not node.draining]):
        return f"no node of pool {pool} takes work: {_names(here)} {'is' if len(here) == 1 else 'are'} draining"
    work = work_class(member.spec)
    if not (able := [node for node in taking if work in node.classes]):
        return f"no node of pool {pool} can {_ENFORCE[work]}"
    kinds = _kinds(member.spec)
    for kind in kinds:
        if all(kind.total(node) < kind.need for node in able):
            largest = max(able, key=kind.total)
            return f"no node of pool {pool} is large enough: needs {kind.shown(kind.need)}, the largest is {_on(kind.total, kind, largest)}"
    fitting = able
    for kind in kinds:
        most = max(fitting, key=kind.free)
        fitting = [node for node in fitting if kind.free(node) >= kind.need]
        if not fitting:
            return f"no capacity: needs {kind.shown(kind.need)}, most free is {_on(kind.free, kind, most)}"
    return f"is about to be taken by {_names(fitting)}"


def _kinds(spec: CellSpec) -> list[_Kind]:
    """What is not declared is not counted, as nodes do not."""
    need = need_of(spec)
    return [
        _Kind(1, lambda node: node.slots, lambda node: node.slots_free, lambda count: f"{count} slot{'' if count == 1 else 's'}"),
        _Kind(need.memory_bytes, lambda node: node.memory_bytes, lambda node: node.memory_free, _bytes),
        _Kind(need.cpu_micros, lambda node: node.cpu_micros, lambda node: node.cpu_free, _processors),
    ]


def _on(amount: Callable[[NodeView], int], kind: _Kind, node: NodeView) -> str:
    return f"{kind.shown(amount(node))} on {node.node}"


def _names(nodes: Sequence[NodeView]) -> str:
    more = len(nodes) - _MOST_NAMES
    return ", ".join(node.node for node in nodes[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"


def _processors(micros: int) -> str:
    return f"{micros / MICROS_PER_PROCESSOR:.2f}".rstrip("0").rstrip(".") + (
        " processor" if micros == MICROS_PER_PROCESSOR else " processors"
    )
