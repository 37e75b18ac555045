from __future__ import annotations

from pathlib import Path

import pytest

from cellos.cli.control_plane import next_step
from cellos.client.address import find_server
from cellos.core.problem import problem
from cellos.errors import ServerProblem

REFUSED = ServerProblem(problem("unauthorized", "missing Authorization header"))
STEP = "give one token with --token-file or CELLOS_SERVER_API_TOKEN"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CELLOS_SERVER", "CELLOS_SERVER_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CELLOS_STATE_DIR", str(tmp_path))


class TestUnauthorized:
    def test_of_an_address_that_nobody_named(self, tmp_path: Path) -> None:
        why = f"no `cellos up` runs for {tmp_path} (CELLOS_STATE_DIR)"
        assert next_step(REFUSED, find_server({})) == f"{STEP}; asked http://127.0.0.1:8080, for {why}"

    def test_of_one_that_was_named(self) -> None:
        assert next_step(REFUSED, find_server({"CELLOS_SERVER": "http://127.0.0.1:8080"})) == STEP
