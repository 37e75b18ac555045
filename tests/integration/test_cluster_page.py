"""The configuration that docs/how-to/nats-cluster.md gives is one that nats-server takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cellos.testing.nats_server import program

PAGE = Path(__file__).parents[2] / "docs/how-to/nats-cluster.md"
CONFIGURATION, REPORTER = re.findall(r"^```conf\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("with_reporter", [False, True])
def test_nats_takes_it(tmp_path: Path, certificates: Path, with_reporter: bool) -> None:
    text = CONFIGURATION.replace("/etc/nats/", f"{certificates}/").replace("/var/lib/nats", str(tmp_path / "store"))
    assert text.count(str(certificates)) == 5
    if with_reporter:
        head, found, tail = text.partition("users: [ ")
        text = head + found + REPORTER + tail
    (tmp_path / "nats.conf").write_text(text)
    done = subprocess.run([program(), "-t", "-c", str(tmp_path / "nats.conf")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
