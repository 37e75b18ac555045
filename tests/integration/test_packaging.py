"""The units under packaging/systemd are ones that systemd takes, and hold what the programs need; the images hold what is there.

Nothing here starts a unit, or builds an image: that needs a host that systemd runs, and a builder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from cellos.node.config import DEFAULT_DRAIN_MS
from cellos.server.config import DEFAULT_BIND
from cellos.server.main import DRAIN_SECONDS

ROOT = Path(__file__).parents[2]
UNITS = {path.name: path.read_text() for path in sorted((ROOT / "packaging/systemd").iterdir())}
SERVICES = [name for name in UNITS if name.endswith(".service")]
RUN_CELLS = ("cellos-node.service", "cellos-fleet.service")
BREAK_CELLS = {
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "PrivateUsers",
    "ProtectControlGroups",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelTunables",
    "ProtectProc",
    "RestrictAddressFamilies",
    "RestrictNamespaces",
    "RestrictSUIDSGID",
    "SystemCallFilter",
}
"""Cells would inherit it, or could not be made: they have a stricter filter of their own."""


PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def settings(name: str) -> dict[str, str]:
    """Of a unit; of a setting that stands there several times the last."""
    return dict(line.split("=", 1) for line in UNITS[name].splitlines() if re.match(r"\w+=", line))


def seconds(text: str) -> int:
    return int(text.removesuffix("h")) * 3600 if text.endswith("h") else int(text)


def test_systemd_takes_them(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this host")
    for name, text in UNITS.items():
        (tmp_path / name).write_text(re.sub(r"^ExecStart=.*", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in UNITS)],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, [line for line in done.stderr.splitlines() if "cellos" in line]) == (0, "", []), done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_each_starts_a_program_of_ours(name: str) -> None:
    program = name.removesuffix(".service")
    assert settings(name)["ExecStart"] == f"/opt/cellos/bin/{program}"
    assert program in PROGRAMS


@pytest.mark.parametrize("name", RUN_CELLS)
def test_what_runs_cells_may_make_them(name: str) -> None:
    found = settings(name)
    assert not BREAK_CELLS & set(found)
    assert (found["Delegate"], found["KillMode"], found["OOMPolicy"]) == ("yes", "mixed", "continue")
    assert {"CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"} <= set(found["CapabilityBoundingSet"].split())


def test_nobody_is_killed_before_it_had_its_time() -> None:
    assert seconds(settings("cellos-node.service")["TimeoutStopSec"]) > DEFAULT_DRAIN_MS / 1000 + 15
    assert seconds(settings("cellos-server.service")["TimeoutStopSec"]) > DRAIN_SECONDS


def test_the_port_is_that_of_the_server() -> None:
    assert settings("cellos-server.socket")["ListenStream"] == DEFAULT_BIND


def test_the_images_are_made_of_what_is_there() -> None:
    lines = (ROOT / "packaging/container/Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]]
    assert copied
    assert [word for word in copied if not (ROOT / word).exists()] == []
    kept = (ROOT / "packaging/container/Containerfile.dockerignore").read_text().splitlines()
    assert {f"!{word}" for word in copied} <= set(kept)
    started = re.findall(r'^CMD \["([\w-]+)"\]$', "\n".join(lines), re.MULTILINE)
    assert started == ["cellos-server", "cellos-node"]
    assert set(started) <= set(PROGRAMS)
