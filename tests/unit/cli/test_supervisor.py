import gc
import os
import sys

import pytest

from cellos.cli import supervisor
from cellos.cli.supervisor import _keep, _refuse, _tell
from cellos.errors import ConfigError, HostBackendError
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


def test_whoever_started_us_hears_why_no_cell_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    monkeypatch.setenv("CELLOS_ERROR_FD", str(writing))
    _keep(str(writing))
    assert not os.get_inheritable(writing)
    _refuse(ConfigError("why"))
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == b"why"


def test_also_why_there_is_no_launcher(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def start_launcher() -> None:
        raise HostBackendError("no")

    reading, writing = os.pipe()
    monkeypatch.setenv("CELLOS_ERROR_FD", str(writing))
    monkeypatch.setattr(sys, "argv", ["cellos-supervisor"])
    monkeypatch.setattr(supervisor, "start_launcher", start_launcher)
    monkeypatch.setattr(supervisor, "prefer_compiled", lambda: None)
    monkeypatch.setattr(supervisor, "leave", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        supervisor.main()
    gc.enable()
    os.close(writing)
    with open(reading) as file:
        assert file.read() == "cell create: host backend: no"
    assert capfd.readouterr().err == "Error: cell create: host backend: no\n"


def test_the_launcher_keeps_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _keep("2")
    assert os.get_inheritable(2)


def test_a_number_that_is_no_descriptor_yet_is_never_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    free = str(os.dup(writing))
    os.close(int(free))
    monkeypatch.setenv("CELLOS_ERROR_FD", free)
    _keep(free)
    assert os.dup(writing) == int(free), "a file of ours has that number now"
    _refuse(ConfigError("why"))
    for descriptor in (writing, int(free)):
        os.close(descriptor)
    with open(reading, "rb") as file:
        assert file.read() == b""
