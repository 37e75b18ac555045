"""The runs of a formation's members in the log: what is asked of nodes, who took it, and where the events of a run go.

An attempt is one try to run a member, numbered from 1. `dispatched` asks for it; any node may answer with `claimed`, the first event on the
attempt's subject, which the log takes once. Every later event of the run goes to the same subject and expects the one before it, so that
the log refuses whatever comes after a run was closed. `void` in the place of `claimed` says that the attempt will never run.

Pools and member ids may hold dots: in subjects each is one token in base32 (RFC 4648, without padding).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

from cellos.core.documents import CellSpec
from cellos.core.events import PREFIX, Draft, Event, RunIdentity, about
from cellos.core.formation.members import cell_id

WORK_PREFIX = "cellos.events.work."
RUN_PREFIX = "cellos.events.runs."
DISPATCHED = PREFIX + "run.v1.dispatched"
CLAIMED = PREFIX + "run.v1.claimed"
VOID = PREFIX + "run.v1.void"

NODE_LOST = "node_lost"
"""The reason of `destroyed` where a controller closed a run because its node was gone, or a node did because its lease was."""
NODE_DRAINED = "node_drained"
"""Where a node that was to end could not wait any longer."""
NODE_RESTARTED = "node_restarted"
"""Where a node found the run unfinished by its former life."""
LOST_REASONS = frozenset({NODE_LOST, NODE_DRAINED, NODE_RESTARTED})
"""The program is not to blame: such an end counts as a lost node, not as a failure."""
CANCELLED = "cancelled"
"""The reason of `destroyed` where a node ended a run because its formation is to end."""

_NUMBER = re.compile(r"[1-9][0-9]{0,3}").fullmatch

WorkClass = Literal["base", "limits", "egress"]
WORK_CLASSES: tuple[WorkClass, ...] = get_args(WorkClass)


class Attempt(NamedTuple):
    """One try to run a member."""

    formation_id: str
    member_id: str
    number: int


def work_class(spec: CellSpec) -> WorkClass:
    """What a node must be able to enforce, the dearest demand: declared egress, declared memory or cpu, or what every node can."""
    if spec.authority.egress_rules:
        return "egress"
    limits = spec.run.limits if spec.run else None
    declared = limits is not None and (limits.memory_max_bytes is not None or limits.cpu_max is not None)
    return "limits" if declared else "base"


def work_subject(pool: str, work: WorkClass, attempt: Attempt) -> str:
    """Where `dispatched` goes; the first there expects nothing before it."""
    return f"{WORK_PREFIX}{token(pool)}.{work}.{_place(attempt)}"


def work_filter(pool: str, work: WorkClass) -> str:
    """All that is asked of the nodes of a pool that can enforce `work`."""
    return f"{WORK_PREFIX}{token(pool)}.{work}.>"


def run_subject(attempt: Attempt) -> str:
    """Where every event of an attempt goes."""
    return RUN_PREFIX + _place(attempt)


def runs_of(formation_id: str) -> str:
    """The filter of all events of all runs of a formation."""
    return f"{RUN_PREFIX}{formation_id}.>"


def work_of(formation_id: str) -> str:
    """The filter of all that was asked for a formation."""
    return f"{WORK_PREFIX}*.*.{formation_id}.>"


def attempt_of(subject: str) -> Attempt | None:
    """The attempt that a subject of either kind is about; None where it is about none."""
    if subject.startswith(RUN_PREFIX):
        parts = subject[len(RUN_PREFIX) :].split(".")
    elif subject.startswith(WORK_PREFIX):
        parts = subject[len(WORK_PREFIX) :].split(".")[2:]
    else:
        return None
    # A subject that only reads like another one guards nothing of it.
    if len(parts) != 3 or not _NUMBER(parts[2]):
        return None
    member_id = text(parts[1])
    return None if member_id is None else Attempt(parts[0], member_id, int(parts[2]))


def token(value: str) -> str:
    """A subject's token for any text."""
    return base64.b32encode(value.encode()).decode().rstrip("=")


@lru_cache(maxsize=4096)  # base64 is written in Python, and a run has a dozen events
def text(value: str) -> str | None:
    """What `token` was made of; None where it is no such token."""
    try:
        found = base64.b32decode(value + "=" * (-len(value) % 8)).decode()
    except ValueError:
        return None
    # The last character has bits that mean nothing: only one way to set them is ours.
    return found if token(found) == value else None


def dispatched(
    attempt: Attempt, *, name: str, pool: str, work: WorkClass, spec: Mapping[str, Any], on_disconnect: str, event_id: str, time: str
) -> Event:
    """A member is to be run. `name` is the formation's, `spec` the body of the member's cell without `id`: a node needs nothing else."""
    data = _about(attempt) | {"formationName": name, "pool": pool, "class": work, "onDisconnect": on_disconnect, "spec": spec}
    return _event(attempt, DISPATCHED, data, event_id, time)


def void(attempt: Attempt, *, reason: str, event_id: str, time: str) -> Event:
    """The attempt was not claimed, and no claim will be taken any more."""
    return _event(attempt, VOID, _about(attempt) | {"reason": reason}, event_id, time)


def claimed(run: RunIdentity, attempt: Attempt, *, node: str, life: str, pool: str) -> Draft:
    """Event 0 of the run's chain: this life of this node runs the attempt."""
    return Draft(CLAIMED, _about(attempt) | about(run) | {"node": node, "life": life, "pool": pool, "specHash": run.spec_hash})


def _about(attempt: Attempt) -> dict[str, Any]:
    formation_id, member_id, number = attempt
    return {
        "formationId": formation_id,
        "memberId": member_id,
        "attempt": number,
        "cellId": cell_id(formation_id, member_id),
    }


def _place(attempt: Attempt) -> str:
    return f"{attempt.formation_id}.{token(attempt.member_id)}.{attempt.number}"


def _event(attempt: Attempt, kind: str, data: dict[str, Any], event_id: str, time: str) -> Event:
    return Event(id=event_id, source=attempt.formation_id, type=kind, datacontenttype="application/json", data=data, time=time)
