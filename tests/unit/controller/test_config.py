from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cellos.controller.config import CONTROLLER_ID, LEASE_MS, MOST_IN_FLIGHT, VARIABLES, Config, read_config, table
from cellos.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs/reference/controller.md"


def test_nothing_has_to_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my_host.example.com")
    assert read_config({}) == Config(id=f"my-host-example-com-{os.getpid()}", host="my_host.example.com", in_flight=32, lease_ms=15_000)


def test_what_is_set_counts() -> None:
    found = read_config({CONTROLLER_ID: " c.1 ", MOST_IN_FLIGHT: "5", LEASE_MS: "2000"})
    assert (found.id, found.in_flight, found.lease_ms) == ("c.1", 5, 2000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (CONTROLLER_ID, "a b"),
        (CONTROLLER_ID, "*"),
        (MOST_IN_FLIGHT, "0"),
        (MOST_IN_FLIGHT, "many"),
        (MOST_IN_FLIGHT, "-1"),
        (MOST_IN_FLIGHT, "10001"),
        (LEASE_MS, "1"),
        (LEASE_MS, "1e3"),
        (LEASE_MS, "9" * 30),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_config({name: value})


def test_the_page_has_the_table() -> None:
    # To renew it: PYTHONPATH=src python scripts/pages.py
    generated = PAGE.read_text().partition("<!-- variables: begin -->\n")[2].partition("<!-- variables: end -->")[0]
    assert generated.strip() == table().strip()


def test_what_the_configuration_reads_is_in_the_table() -> None:
    asked: set[str] = set()

    class Spy(dict[str, str]):
        def get(self, name: str, *default: str) -> str | None:  # type: ignore[override]
            asked.add(name)
            return super().get(name, *default)

    read_config(Spy())
    assert asked <= {row.name for row in VARIABLES}
    assert len(asked) == 3
