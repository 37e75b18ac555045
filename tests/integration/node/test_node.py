from __future__ import annotations

from collections.abc import Callable

import pytest

from cellos.core import events
from cellos.core.events import PREFIX
from cellos.core.formation.runs import CLAIMED
from cellos.testing.daemon_process import NodeProcess

pytestmark = pytest.mark.linux_backend


def test_a_member_runs_in_a_cell_and_its_chain_verifies(log, node: Callable[..., NodeProcess]) -> None:  # type: ignore[no-untyped-def]
    node()
    attempt = log.dispatch("sh", "-c", "id -u; echo oops >&2", correlation={"platform": "p", "tenantId": "acme"})
    destroyed = log.until_ended(attempt)
    assert destroyed["outcome"] == "succeeded"
    found = log.events(attempt)
    assert [event.type for event in found][:1] == [CLAIMED]
    assert events.STARTED in [event.type for event in found]
    for event in found:
        print(event.type, "correlation" in event.members)
        assert event.members["cellId"] == f"{attempt.formation_id}.m"
    print([e.type.removeprefix(PREFIX) for e in found])
    chunks = log.output(destroyed["runId"])
    print(chunks)
