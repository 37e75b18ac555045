"""What the launcher makes of what it was born with. Its cells are tested in tests/integration/sandbox/test_launcher.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellos.sandbox.workshop import _give_up_protection


@pytest.mark.parametrize(("was", "becomes"), [("-1000\n", "0"), ("-1\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")])
def test_what_is_spared_for_want_of_memory_makes_cells_that_are_not(was: str, becomes: str, tmp_path: Path) -> None:
    """Raising it is always allowed. Who asked to be ended first keeps that."""
    adjustment = tmp_path / "oom_score_adj"
    adjustment.write_text(was)
    _give_up_protection(str(adjustment))
    assert adjustment.read_text().startswith(becomes)
