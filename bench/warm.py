"""A resident supervisor, as a node has it: one launcher, one backend, any number of runs."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from types import TracebackType

from cellos.brokers.memory import MemoryBroker
from cellos.core.documents import parse_execution_cell, raw_spec_hash
from cellos.errors import CellosError
from cellos.sandbox.launcher import Launcher
from cellos.supervisor.compose import Order, execute, open_host
from cellos.supervisor.config import read_config

SPEC = json.dumps(
    {
        "apiVersion": "cellos.io/v1",
        "kind": "ExecutionCell",
        "spec": {"id": "bench", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["/bin/true"]}},
    }
).encode()


class Warm:
    """Runs /bin/true in a fully isolated cell each time, with record, spool and chain. Prints nothing."""

    def __init__(self, environment: Mapping[str, str], directory: str) -> None:
        self._config = read_config({**environment, "CELL_OS_USE_NOOP_SINK": "1"})
        self._directory = directory

    def __enter__(self) -> Warm:
        self._launcher = Launcher.start(ahead=1, refill=True)
        self._host = open_host(self._config, self._launcher, print)
        self._order = Order(document=parse_execution_cell(SPEC), spec_hash=raw_spec_hash(SPEC), broker=MemoryBroker())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._launcher.close()

    def run(self) -> None:
        outcome = execute(self._host, self._order).outcome
        if outcome.reason or outcome.residue:
            raise RuntimeError(f"{outcome.reason} {outcome.residue}")

    def attempt(self) -> str | None:
        """Run one; the error's text when it did not succeed."""
        try:
            self.run()
        except (CellosError, RuntimeError, OSError) as error:
            return str(error)
        return None

    def holdings(self) -> dict[str, int]:
        """What this process and its launcher hold, and what of cells is on the host."""
        gc.collect()
        launcher = self._launcher.pid
        readable = os.access(f"/proc/{launcher}/fd", os.R_OK)
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * 4
        with open("/proc/self/mountinfo") as file:
            mounts = len(file.readlines())
        ids = "/run/cellos/ids"
        return {
            "resident_kib": resident,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "launcher descriptors": len(os.listdir(f"/proc/{launcher}/fd")) if readable else 0,
            "threads": len(os.listdir("/proc/self/task")),
            "children": sum(len(_children(pid)) for pid in (os.getpid(), launcher)),
            "mounts": mounts,
            "groups": sum(os.path.isdir(path) for path in _groups()),
            "ids": len(os.listdir(ids)) if os.path.isdir(ids) and os.access(ids, os.R_OK) else 0,
            "files": sum(len(files) for _, _, files in os.walk(self._directory)),
        }


def _children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def _groups() -> list[str]:
    """Every control group of a cell on this host."""
    return [os.path.join(path, name) for path, names, _ in os.walk("/sys/fs/cgroup") for name in names if name.startswith("cellos-")]
