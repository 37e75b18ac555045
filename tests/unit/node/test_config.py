from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest

from cellos.core.formation.members import DEFAULT_POOL
from cellos.errors import ConfigError
from cellos.node import config
from cellos.node.config import read_config
from cellos.supervisor.variables import SECTIONS

PAGE = Path(__file__).parents[3] / "docs/reference/node.md"


def test_nothing_has_to_be_set() -> None:
    found = read_config({})
    assert (found.id, found.pool, found.slots) == (socket.gethostname(), DEFAULT_POOL, len(os.sched_getaffinity(0)))
    assert (found.lease_ms, found.lease_seconds, found.drain_ms) == (15_000, 15.0, 30_000)
    assert found.memory_bytes > 1 << 20
    assert found.cpu_micros > 0
    assert found.run.backend == "linux"


def test_blank_is_not_set() -> None:
    found = read_config({row.name: " " for row in config.VARIABLES if row.name.startswith("CELLOS_NODE_")})
    assert msgspec.structs.replace(found, run=read_config({}).run) == read_config({})


def test_what_is_set() -> None:
    given = {
        "CELLOS_NODE_ID": "n-1",
        "CELLOS_NODE_POOL": "gpu.big",
        "CELLOS_NODE_SLOTS": "3",
        "CELLOS_NODE_LEASE_MS": "1000",
        "CELLOS_NODE_DRAIN_MS": "0",
        "CELLOS_NODE_MEMORY_BYTES": "4096",
        "CELLOS_NODE_CPU_MICROS": "1500000",
        "CELLOS_CELL_BACKEND": "stub",
    }
    found = read_config(given)
    assert (found.id, found.pool, found.slots, found.lease_ms, found.drain_ms) == ("n-1", "gpu.big", 3, 1000, 0)
    assert (found.memory_bytes, found.cpu_micros, found.run.backend) == (4096, 1_500_000, "stub")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CELLOS_NODE_SLOTS", "0"),
        ("CELLOS_NODE_SLOTS", "-1"),
        ("CELLOS_NODE_SLOTS", "two"),
        ("CELLOS_NODE_SLOTS", "1.5"),
        ("CELLOS_NODE_SLOTS", "4097"),
        ("CELLOS_NODE_SLOTS", "9" * 400),
        ("CELLOS_NODE_LEASE_MS", "999"),
        ("CELLOS_NODE_LEASE_MS", "3600001"),
        ("CELLOS_NODE_DRAIN_MS", "-5"),
        ("CELLOS_NODE_MEMORY_BYTES", "0"),
        ("CELLOS_NODE_MEMORY_BYTES", "4G"),
        ("CELLOS_NODE_CPU_MICROS", "0"),
        ("CELLOS_NODE_ID", "a b"),
        ("CELLOS_NODE_ID", "../x"),
        ("CELLOS_NODE_POOL", "x" * 200),
        ("CELLOS_BROKER", "nonsense"),
        ("CELLOS_CELL_BACKEND", "docker"),
        ("CELLOS_REDACT_EVENT_FIELDS", "life"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config({name: value})
    assert name in str(raised.value)
    assert value[:20] in str(raised.value)


def test_a_host_whose_name_is_no_name_for_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Jo's laptop")
    with pytest.raises(ConfigError, match="set CELLOS_NODE_ID"):
        read_config({})


def test_its_representation_holds_no_secret() -> None:
    assert "s3cret" not in repr(read_config({"CELLOS_SECRET_TOKEN": "s3cret"}))


@pytest.mark.parametrize(("name", "text"), [("variables", config.table()), ("without effect", config.without_effect())])
def test_generated_parts_of_the_page_are_new(name: str, text: str) -> None:
    # To renew them: PYTHONPATH=src python scripts/pages.py
    generated = PAGE.read_text().partition(f"<!-- {name}: begin -->\n")[2].partition(f"<!-- {name}: end -->")[0]
    assert generated.strip() == text.strip()


def test_what_has_no_effect_is_a_variable_of_the_supervisor() -> None:
    known = {variable.name for section in SECTIONS for variable in section.variables}
    assert set(config.NOT_HERE) <= known


def test_what_it_reads_is_in_the_table() -> None:
    asked: set[str] = set()

    class Spy(dict[str, str]):
        def get(self, name: str, *default: str) -> str | None:  # type: ignore[override]
            asked.add(name)
            return super().get(name, *default)

    read_config(Spy())
    of_the_supervisor = {variable.name for section in SECTIONS for variable in section.variables}
    own = {row.name for row in config.VARIABLES}
    assert own - {"CELLOS_STATE_DIR", "RUST_LOG"} <= asked
    assert asked - of_the_supervisor <= own
