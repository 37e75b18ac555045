"""A start loads what a cell needs, and nothing else: each of these modules would be a part of the time that a user waits for a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.linux_backend

LATE = (
    "asyncio", "click", "cryptography", "ctypes", "dataclasses", "hashlib", "http", "httpx2", "inspect", "json", "logging",
    "pathlib", "random", "rich", "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "typing_extensions",
    "urllib", "yaml",
)  # fmt: skip
if sys.version_info < (3, 12):  # for later versions `cli.process.load_msgspec` leaves these two where they are
    LATE += ("enum", "re")
SCRIPT = """
import sys
before = {*sys.modules}
from cellos.cli import %s as command
command.leave = lambda code: print(code, *sorted({*%r} & ({*sys.modules} - before)))
command.main()
"""


@pytest.mark.parametrize("command", ["main", "supervisor"])
def test_nothing_is_loaded_that_takes_long(command: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"]}}
    spec.write_text(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}))
    arguments = {"main": ["run", "--timeout", "30s", "--", "true"], "supervisor": [str(spec)]}[command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CELL_OS_", "CELLOS_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % (command, LATE), *arguments],
        env=environment
        | {"CELLOS_STATE_DIR": str(tmp_path / "state"), "CELL_OS_JSONL_EVENTS": str(tmp_path / "events.jsonl")}
        | {"CELLOS_DEPLOYMENT_PROFILE": "portable"},  # an ordinary user may have no control group
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "0\n", done.stderr
