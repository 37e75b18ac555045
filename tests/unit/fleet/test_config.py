from __future__ import annotations

from typing import Any

import pytest

from cellos.errors import ConfigError
from cellos.fleet.cell import supervisor_environment
from cellos.fleet.config import VARIABLES, find_program, read_config, read_layout

BUCKET = {"CELLOS_FLEET_BUCKET": "b"}


def test_what_holds_without_any_variable() -> None:
    config = read_config(BUCKET)
    assert (config.prefix, config.queue, config.pool, config.supervisor) == ("fleet", "", "", "cellos-supervisor")
    assert (config.poll_ms, config.heartbeat_ms, config.lease_ms, config.retries) == (5000, 30_000, 60_000, 0)
    assert config.slots >= 1
    assert config.memory_bytes > 0
    assert config.cpu_micros > 0
    assert config.node
    assert config.request_seconds == 15.0


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ({}, "fleet"),
        ({"PREFIX": "a/b///"}, "a/b"),
        ({"PREFIX": ""}, ""),
        ({"PREFIX": "/"}, ""),
        ({"QUEUE_NAME": " nightly "}, "fleet/nightly"),
        ({"PREFIX": "", "QUEUE_NAME": "nightly"}, "nightly"),
    ],
)
def test_where_a_queue_lies(given: dict[str, str], base: str) -> None:
    variables = {f"CELLOS_FLEET_{name}": value for name, value in given.items()}
    assert read_config(BUCKET | variables).layout.base == base
    assert read_layout(variables).base == base


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("BUCKET", " ", "is empty"),
        ("PREFIX", "a//b", "is no path"),
        ("PREFIX", "/a", "is no path"),
        ("PREFIX", "a/../b", "is no path"),
        ("PREFIX", "a b", "is no path"),
        ("QUEUE_NAME", "pending", "in the middle of the default lane"),
        ("QUEUE_NAME", "leases", "in the middle of the default lane"),
        ("QUEUE_NAME", "a/b", "must match"),
        ("POOL_ID", "a b", "must match"),
        ("POLL_INTERVAL_MS", "0", "no whole number from 1"),
        ("POLL_INTERVAL_MS", "soon", "no whole number"),
        ("HEARTBEAT_INTERVAL_MS", "-1", "no whole number"),
        ("LEASE_MS", "9999", "no whole number from 10000"),
        ("SLOTS", "0", "no whole number from 1"),
        ("MEMORY_BYTES", "1G", "no whole number"),
        ("NODE_ID", "a\x1b[31mb", "printable characters"),
        ("NODE_ID", "n" * 254, "printable characters"),
        ("RETRIES", "1.5", "no whole number"),
    ],
)
def test_what_cannot_be_used_is_told_by_its_name(name: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as told:
        read_config(BUCKET | {f"CELLOS_FLEET_{name}": value})
    assert f"CELLOS_FLEET_{name}" in str(told.value)


def test_without_a_bucket() -> None:
    with pytest.raises(ConfigError, match="CELLOS_FLEET_BUCKET is required: environment variable not found"):
        read_config({})


def test_rows_say_everything() -> None:
    assert len({row.name for row in VARIABLES}) == len(VARIABLES)
    assert all(cell.strip() and "|" not in cell for row in VARIABLES for cell in row)


def test_the_supervisor_is_found_at_the_start(tmp_path: Any) -> None:
    assert find_program("sh", "/nowhere:/bin") == "/bin/sh"
    assert find_program("/bin/sh", None) == "/bin/sh"
    (tmp_path / "no-program").write_text("")
    for name in ("no-program", str(tmp_path / "no-program"), "/nowhere/at-all"):
        with pytest.raises(ConfigError, match="no such program"):
            find_program(name, str(tmp_path))


def test_what_a_supervisor_is_given() -> None:
    kept = {
        "PATH": "/bin", "HOME": "/h", "LANG": "C", "TZ": "UTC", "NATS_URL": "n", "NATS_CA_FILE": "c", "RUST_LOG": "info",
        "CELLOS_BROKER": "env", "CELL_OS_JSONL_EVENTS": "/e",
    }  # fmt: skip
    left = {
        "CELLOS_FLEET_BUCKET": "b", "AWS_ACCESS_KEY_ID": "a", "AWS_PROFILE": "p", "USER": "u", "LD_PRELOAD": "/x", "PYTHONPATH": "/y",
        "CELLOSX": "x", "XCELLOS_A": "y", "CELLOS_RUN_ID": "of somebody else",
    }  # fmt: skip
    assert supervisor_environment(kept | left, "r") == kept | {"CELLOS_RUN_ID": "r"}
