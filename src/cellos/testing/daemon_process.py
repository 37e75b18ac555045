"""Our daemons as processes for tests and benchmarks, and their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, Self

START_SECONDS = 60.0


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal already; before that it would die of it."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


class DaemonProcess:
    """`python -m MODULE` with `variables` and nothing else of ours. Use with `with`, or `start` and `stop`.

    `start` waits until the log has the message `ready`.
    """

    module: str
    ready: str

    def __init__(self, nats_url: str, **variables: str) -> None:
        self.variables = {"CELLOS_NATS_URL": nats_url, **variables}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()
        self._lines: list[dict[str, Any]] = []
        self._ended = False

    @property
    def program(self) -> list[str]:
        """What follows the interpreter in the command line."""
        return ["-m", self.module]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Start, without waiting."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CELLOS_", "RUST_LOG"))}
        command = [sys.executable, "-W", "error", *self.program]
        self._lines, self._ended = [], False
        self._process = subprocess.Popen(
            command, env=environment | self.variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.launch()
        self.wait_for(self.ready)

    def find(self, message: str) -> Mapping[str, Any] | None:
        """The fields of the last line of the log with that message."""
        with self._changed:
            return next((line["fields"] for line in reversed(self._lines) if line["fields"]["message"] == message), None)

    def wait_for(self, message: str) -> Mapping[str, Any]:
        """The same; waits for it. Raises RuntimeError where it does not come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self.find(message) is not None, START_SECONDS)
        found = self.find(message)
        if found is None:
            raise RuntimeError(f"{self.module} did not say {message!r}: {self._lines[-5:]}")
        return found

    @property
    def log(self) -> list[dict[str, Any]]:
        """All lines so far."""
        with self._changed:
            return list(self._lines)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Until it has ended; gives its exit code."""
        assert self._process is not None
        assert self._reader is not None
        code = self._process.wait(START_SECONDS)
        self._reader.join()
        return code

    def kill(self) -> None:
        """Without any chance to say goodbye."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def stop(self) -> int:
        """In order. Idempotent; gives the exit code."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self.wait()
        finally:
            self._process.kill()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for text in output:
                with self._changed:
                    self._lines.append(json.loads(text))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class NodeProcess(DaemonProcess):
    """`variables` say at least where its state is."""

    module = "cellos.node.main"
    ready = "cellos-node ready"


class ControllerProcess(DaemonProcess):
    """It needs no variables but the one that it has."""

    module = "cellos.controller.main"
    ready = "follows the log"
