"""The life of a formation: its status words, the phases that its events tell, and which may follow which.

Writers go by `next_status`: a phase that has no place is refused before it is written. Terminal words are final.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from cellos.core.problem import problem
from cellos.errors import FormationRejected, LifecycleError

FormationStatus = Literal["PENDING", "LAUNCHING", "RUNNING", "DEGRADED", "COMPLETED", "FAILED", "CANCELLED"]
Phase = Literal["created", "launching", "running", "degraded", "completed", "failed", "cancelling", "cancelled"]
STATUSES: tuple[FormationStatus, ...] = get_args(FormationStatus)
PHASES: tuple[Phase, ...] = get_args(Phase)
TERMINAL: frozenset[FormationStatus] = frozenset({"COMPLETED", "FAILED", "CANCELLED"})

# From wherever a formation still is, it can end.
_ENDS: Mapping[Phase, FormationStatus] = {"completed": "COMPLETED", "failed": "FAILED", "cancelled": "CANCELLED"}

TRANSITIONS: Mapping[FormationStatus | None, Mapping[Phase, FormationStatus]] = {
    None: {"created": "PENDING"},
    # Whoever drives a formation by hand may report only what he sees: it runs, it is over.
    "PENDING": {"launching": "LAUNCHING", "running": "RUNNING", "degraded": "DEGRADED", "cancelling": "PENDING", **_ENDS},
    # A phase again is no step, but may carry news: another member that failed, another reason.
    "LAUNCHING": {"launching": "LAUNCHING", "running": "RUNNING", "degraded": "DEGRADED", "cancelling": "LAUNCHING", **_ENDS},
    "RUNNING": {"running": "RUNNING", "degraded": "DEGRADED", "cancelling": "RUNNING", **_ENDS},
    "DEGRADED": {"running": "RUNNING", "degraded": "DEGRADED", "cancelling": "DEGRADED", **_ENDS},
    "COMPLETED": {},
    "FAILED": {},
    "CANCELLED": {},
}
"""Status and phase to the next status. None is the status before the first event. `cancelling` changes no word: what runs still runs."""

REQUESTS: Mapping[str, Phase] = {
    "LAUNCHING": "launching",
    "RUNNING": "running",
    "DEGRADED": "degraded",
    "COMPLETED": "completed",
    "FAILED": "failed",
}
"""What a client may say that a formation is, and the phase that says so. PENDING and CANCELLED come from POST and DELETE alone."""

TELLS_FAILED_CELLS: frozenset[Phase] = frozenset({"degraded", "failed"})
"""The phases for which a client's list of failed cells is kept."""

_SEEN: Mapping[Phase, FormationStatus] = {
    "created": "PENDING",
    "launching": "LAUNCHING",
    "running": "RUNNING",
    "degraded": "DEGRADED",
    **_ENDS,
}


def next_status(status: FormationStatus | None, phase: Phase) -> FormationStatus:
    """The status after a phase. Raises LifecycleError where it has no place."""
    try:
        return TRANSITIONS[status][phase]
    except KeyError:
        raise LifecycleError(f"illegal transition to {phase}: {_why_not(status)}") from None


def _why_not(status: FormationStatus | None) -> str:
    if status is None:
        return "the formation does not exist yet"
    return f"the formation is {status}, which is final" if status in TERMINAL else f"the formation is already {status}"


def status_of(phase: Phase) -> FormationStatus | None:
    """The status that a phase alone tells, for a reader whose log begins after `created`. `cancelling` tells none."""
    return _SEEN.get(phase)


def phase_of_request(state: str) -> Phase:
    """The phase that a word of POST …/status stands for, in any case. Raises FormationRejected where it stands for none."""
    word = state.upper()
    # Beyond ASCII, letters exist whose upper case is one of ours.
    if not state.isascii() or word not in REQUESTS:
        raise FormationRejected(problem("bad-request", f"unknown state: {word[:100]}"))
    return REQUESTS[word]
