"""What a command writes, kept: as files, and as events if that is wanted. Up to a cap for each stream; secrets never show.

    CELLOS_OUTPUT_DIR/<run id>.stdout, .stderr      mode 0600
    command.v1.output                               {stream, offset, text or base64, truncated?}

A secret that the command prints becomes `***`. It can come in two pieces, so as many bytes as could be the beginning of one wait for the
next piece; `offset` and the cap count what is kept, after that.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from cellos.errors import ConfigError, HostBackendError, os_error_text

STREAMS = ("stdout", "stderr")
MASK = b"***"
SHORTEST_SECRET = 4
"""Shorter ones would blank out every other word."""
PIECE_BYTES = 32 * 1024
"""Most of one event: as base64, and signed, still far below what an event may have."""


def check_directory(path: str) -> None:
    """To be called before a cell is created: whether files can be made there. Raises ConfigError."""
    if not os.path.isdir(path):
        raise ConfigError(f"CELLOS_OUTPUT_DIR: {path} is no directory; make it, or unset the variable")
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"CELLOS_OUTPUT_DIR: no file can be made in {path}; make it writable, or unset the variable")


class Masker:
    """Replaces secrets in a stream that comes in pieces."""

    def __init__(self, secrets: Iterable[str]) -> None:
        words = sorted(
            {secret.encode(errors="surrogateescape") for secret in secrets if len(secret) >= SHORTEST_SECRET}, key=len, reverse=True
        )
        self._words = words
        self._pattern = re.compile(b"|".join(map(re.escape, words))) if words else None
        self._waiting = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown now. Where the pieces end makes no difference."""
        if self._pattern is None:
            return data
        data = self._waiting + data
        shown = []
        begin, undecided = 0, self._undecided(data, 0)
        for found in self._pattern.finditer(data):
            if found.start() >= undecided:
                break
            shown += [data[begin : found.start()], MASK]
            begin = found.end()
            if begin > undecided:
                undecided = self._undecided(data, begin)
        self._waiting = data[undecided:]
        return b"".join(shown) + data[begin:undecided]

    def finish(self) -> bytes:
        """What waited for more, which does not come."""
        rest, self._waiting = self._waiting, b""
        return self._pattern.sub(MASK, rest) if self._pattern is not None else rest

    def _undecided(self, data: bytes, begin: int) -> int:
        """From where on the rest could be the beginning of a secret; of a longer one, where it is a secret already."""
        least = len(data)
        for word in self._words:
            at = max(begin, len(data) - len(word) + 1)
            while (at := data.find(word[:1], at, least)) >= 0:
                if word.startswith(data[at:]):
                    least = at
                at += 1
        return least


class OutputRecorder:
    """One run's output. `emit` reports a piece: stream, offset, content, truncated. Raises HostBackendError for a file that is full."""

    def __init__(
        self,
        run_id: str,
        *,
        directory: str | None,
        most_bytes: int,
        secrets: Iterable[str],
        emit: Callable[[str, int, dict[str, Any], bool], object] | None,
    ) -> None:
        secrets = tuple(secrets)
        self._emit = emit
        self._most = most_bytes
        self._maskers = {stream: Masker(secrets) for stream in STREAMS}
        self._pending = dict.fromkeys(STREAMS, b"")
        self._kept = dict.fromkeys(STREAMS, 0)
        self._cut = dict.fromkeys(STREAMS, False)
        self._ended: set[str] = set()
        """Streams of which an event said that there was more."""
        self._files: dict[str, int] = {}
        if directory is not None:
            self._open(directory, run_id)

    def _open(self, directory: str, run_id: str) -> None:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", run_id)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            for stream in STREAMS:
                self._files[stream] = os.open(f"{directory}/{name}.{stream}", flags, 0o600)
        except OSError as error:
            self.close()
            raise ConfigError(f"CELLOS_OUTPUT_DIR: cannot make {error.filename}: {os_error_text(error)}") from error

    def write(self, stream: str, data: bytes) -> None:
        """Take what came."""
        self._keep(stream, self._maskers[stream].feed(data))

    def close(self) -> None:
        """The command is gone. Idempotent."""
        try:
            for stream in STREAMS:
                self._keep(stream, self._maskers[stream].finish())
                self._report(stream, self._pending[stream])
                self._pending[stream] = b""
        finally:
            files, self._files = self._files, {}
            for descriptor in files.values():
                os.close(descriptor)

    def _keep(self, stream: str, data: bytes) -> None:
        room = self._most - self._kept[stream]
        if len(data) > room:
            data, self._cut[stream] = data[:room], True
        self._kept[stream] += len(data)
        if stream in self._files:
            self._write(self._files[stream], data)
        if self._emit is not None:
            pending = self._pending[stream] + data
            while len(pending) >= PIECE_BYTES:
                self._report(stream, pending[:PIECE_BYTES], behind=len(pending))
                pending = pending[PIECE_BYTES:]
            line = pending.rfind(b"\n") + 1
            self._report(stream, pending[:line], behind=len(pending))
            self._pending[stream] = pending[line:]

    def _report(self, stream: str, piece: bytes, *, behind: int | None = None) -> None:
        """`behind`: bytes from the piece's beginning to the end of what was kept."""
        if self._emit is None:
            return
        offset = self._kept[stream] - (len(piece) if behind is None else behind)
        last = self._cut[stream] and offset + len(piece) == self._most and stream not in self._ended
        if last:
            self._ended.add(stream)
        if piece or last:
            self._emit(stream, offset, _content(piece), last)

    def _write(self, descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise HostBackendError(f"CELLOS_OUTPUT_DIR: cannot keep the command's output: {os_error_text(error)}") from error


def _content(piece: bytes) -> dict[str, Any]:
    try:
        return {"text": piece.decode()}
    except UnicodeDecodeError:
        import base64

        return {"base64": base64.b64encode(piece).decode()}
