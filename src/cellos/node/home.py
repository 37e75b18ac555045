"""A node's own part of the state directory: `nodes/<id>`, with records and spools of its runs, one process at a time.

Supervisors sweep the records of each other; those of a node are its own alone, because what the sweep adds must go to the log. `lock` is
held as long as the process lives, however it dies, and has its pid; `life` names the last life that was begun here.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping

import msgspec

from cellos.errors import ConfigError, os_error_text
from cellos.node.config import NODE_ID
from cellos.supervisor.state import StateDirectory, open_state_directory

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Home:
    """Use with `with`. `state` has the directories of its runs."""

    def __init__(self, state: StateDirectory, lock: int) -> None:
        self.state = state
        self.former = _read_life(f"{state.path}/life")
        """The last life that was begun here, whose process is gone."""
        self._lock = lock

    @classmethod
    def open(cls, environment: Mapping[str, str], node: str) -> Home:
        """Raises ConfigError: also where such a node runs already."""
        top = open_state_directory(environment)
        state = open_state_directory({"CELLOS_STATE_DIR": f"{top.path}/nodes/{node}"})
        path = f"{state.path}/lock"
        try:
            lock = os.open(path, _FLAGS, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {os_error_text(error)}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
        except OSError as error:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise ConfigError(
                    f"{NODE_ID}: a node {node} runs already on this host, as process {holder} (it holds {path}); "
                    "stop it, or give this one another id"
                ) from error
            raise ConfigError(f"cannot lock {path}: {os_error_text(error)}") from error
        return cls(state, lock)

    def begin(self, life: str) -> None:
        """Note the life that begins now, before anybody else can know of it. Raises ConfigError."""
        path = f"{self.state.path}/life"
        try:
            descriptor = os.open(f"{path}.new", _FLAGS | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.encode(life))
            os.rename(f"{path}.new", path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {os_error_text(error)}") from error

    def close(self) -> None:
        """Idempotent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_life(path: str) -> str | None:
    """None where there was none, or nobody can read it: then its lease ends by itself."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=str)
    except (OSError, msgspec.DecodeError):
        return None
