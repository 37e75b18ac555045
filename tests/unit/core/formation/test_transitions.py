import re
from pathlib import Path

import pytest

from cellos.core.formation.transitions import (
    PHASES,
    REQUESTS,
    STATUSES,
    TELLS_FAILED_CELLS,
    TERMINAL,
    TRANSITIONS,
    FormationStatus,
    Phase,
    next_status,
    phase_of_request,
    status_of,
)
from cellos.errors import FormationRejected, LifecycleError

WORDS = {
    "created": "PENDING",
    "launching": "LAUNCHING",
    "running": "RUNNING",
    "degraded": "DEGRADED",
    "completed": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "CANCELLED",
}
LEGAL = {
    None: {"created"},
    "PENDING": {"launching", "running", "degraded", "completed", "failed", "cancelling", "cancelled"},
    "LAUNCHING": {"launching", "running", "degraded", "completed", "failed", "cancelling", "cancelled"},
    "RUNNING": {"running", "degraded", "completed", "failed", "cancelling", "cancelled"},
    "DEGRADED": {"running", "degraded", "completed", "failed", "cancelling", "cancelled"},
    "COMPLETED": set(),
    "FAILED": set(),
    "CANCELLED": set(),
}


def test_the_table_knows_every_status() -> None:
    assert set(TRANSITIONS) == {None, *STATUSES}
    assert set(STATUSES) == set(WORDS.values())
    assert set(PHASES) == {*WORDS, "cancelling"}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("status", [None, *STATUSES])
def test_every_pair(status: FormationStatus | None, phase: Phase) -> None:
    if phase in LEGAL[status]:
        assert next_status(status, phase) == (status if phase == "cancelling" else WORDS[phase])
    else:
        with pytest.raises(LifecycleError, match=f"illegal transition to {phase}: "):
            next_status(status, phase)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_terminal_is_final(status: FormationStatus, phase: Phase) -> None:
    with pytest.raises(LifecycleError, match=f"the formation is {status}, which is final"):
        next_status(status, phase)


def test_the_reason_is_told() -> None:
    with pytest.raises(LifecycleError, match="the formation is already RUNNING"):
        next_status("RUNNING", "launching")
    with pytest.raises(LifecycleError, match="the formation does not exist yet"):
        next_status(None, "running")


@pytest.mark.parametrize("phase", PHASES)
def test_what_a_phase_alone_tells(phase: Phase) -> None:
    assert status_of(phase) == WORDS.get(phase)


@pytest.mark.parametrize("word", ["LAUNCHING", "RUNNING", "DEGRADED", "COMPLETED", "FAILED"])
def test_a_request_word_in_any_case(word: str) -> None:
    for written in (word, word.lower(), word.title()):
        assert phase_of_request(written) == word.lower()
    assert status_of(REQUESTS[word]) == word


@pytest.mark.parametrize("word", ["pending", "SUCCEEDED", "cancelled", "cancelling", "created", "", " running", "runn\u0131ng"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(FormationRejected) as caught:
        phase_of_request(word)
    assert caught.value.problem.type == "/problems/bad-request"
    assert caught.value.problem.status == 400
    assert caught.value.text == f"unknown state: {word.upper()}"


def test_only_bad_news_name_cells() -> None:
    assert {"degraded", "failed"} == TELLS_FAILED_CELLS


def test_the_table_is_documented() -> None:
    page = (Path(__file__).parents[4] / "docs/reference/formation.md").read_text()
    rows = re.findall(r"^\| `([A-Z]+)` \| `(\w+)` \| (.*?) ?\|$", page.partition("## Status\n")[2], re.MULTILINE)
    assert [(status, phase, set(re.findall(r"`(\w+)`", after))) for status, phase, after in rows] == [
        (status, phase, set(TRANSITIONS[status])) for phase, status in WORDS.items()
    ]
