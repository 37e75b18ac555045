"""The rows behind `cellos doctor`: trying everything changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

from cellos.sandbox.probe import REQUIRED

PROGRAM = """
import json, os
from cellos.sandbox.probe import rows
def state():
    mounts = [line for line in open("/proc/self/mountinfo") if "/pytest-of-" not in line]  # other tests have some of their own
    return [sorted(os.listdir("/proc/self/fd")), os.uname().nodename, mounts, os.getcwd(), os.geteuid(),
            [line for line in open("/proc/self/status") if line.startswith(("Seccomp", "Cap", "NoNewPrivs", "Threads"))]]
first = rows()
before = state()
second = rows()
try:
    children = bool(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    children = False
print(json.dumps([[row.primitive for row in second], first == second, before == state(), children]))
"""


def test_it_can_be_asked_twice_and_leaves_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    names, same, unchanged, children = json.loads(done.stdout)
    assert (same, unchanged, children) == (True, True, False)
    assert names == ["architecture", *REQUIRED, "openat2", "pidfd_send_signal", "limit memory", "limit processes", "limit processor time"]
