from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellos.errors import ConfigError
from cellos.node.home import Home


def environment(path: Path) -> dict[str, str]:
    return {"CELLOS_STATE_DIR": str(path / "state")}


def test_a_life_is_remembered(tmp_path: Path) -> None:
    with Home.open(environment(tmp_path), "n") as home:
        assert home.former is None
        home.begin("first")
        home.begin("second")
        assert home.state.spool == str(tmp_path / "state/nodes/n/spool")
    with Home.open(environment(tmp_path), "n") as home:
        assert home.former == "second"
    with Home.open(environment(tmp_path), "other") as home:
        assert home.former is None


def test_only_one_process_has_it(tmp_path: Path) -> None:
    with Home.open(environment(tmp_path), "n"), pytest.raises(ConfigError) as raised:
        Home.open(environment(tmp_path), "n")
    assert f"as process {os.getpid()}" in str(raised.value)
    assert "CELLOS_NODE_ID" in str(raised.value)
    Home.open(environment(tmp_path), "n").close()


def test_a_life_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    with Home.open(environment(tmp_path), "n") as home:
        Path(home.state.path, "life").write_bytes(b"\xff")
    with Home.open(environment(tmp_path), "n") as home:
        assert home.former is None
