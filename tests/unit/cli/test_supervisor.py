import pytest

from cellos.cli.supervisor import _tell
from cellos.ports import Isolation, Residue
from cellos.supervisor.compose import Finished
from cellos.supervisor.config import Config
from cellos.supervisor.run import CellOutcome


def test_what_was_left_behind_is_said_though_the_run_succeeded(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = CellOutcome(
        run_id="r",
        cell_id="c",
        outcome="succeeded",
        reason=None,
        command=None,
        timed_out=None,
        interrupted=False,
        isolation=Isolation(backend="fake"),
        residue=(Residue(kind="cgroup", detail="busy"),),
        events=1,
        head="",
        receipts=(),
        duration_ms=1,
    )
    assert _tell(Finished(outcome=outcome, evidence=None), Config()) == 0
    assert capfd.readouterr().err == "cellos-supervisor: left behind: cgroup busy\n"
