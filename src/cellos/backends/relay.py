"""Moving bytes between a command's pipes and its caller, and watching its time, in one poll loop that never blocks on a slow reader."""

from __future__ import annotations

import codecs
import errno
import math
import os
import select
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cellos.ports import Command, Ended, Output

_CHUNK = 1 << 16
_PIPE_BUF = 4096
"""A pipe that polls writable takes this much without blocking (pipe(7)). Others are asked again after each such piece."""
_KILL_SECONDS = 5.0
"""How long a killed tree may take to be gone."""

_KEPT_CONTROLS = "\n\t\r"
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class _Escaper:
    """Untrusted bytes to text that a terminal only shows: control characters, in all their encodings, become `\\x1b` and the like."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def __call__(self, data: bytes, *, final: bool = False) -> bytes:
        text = self._decoder.decode(data, final)
        if text.isprintable():
            return text.encode()
        return "".join(self._visible(character) for character in text).encode()

    @staticmethod
    def _visible(character: str) -> str:
        code = ord(character)
        if character in _KEPT_CONTROLS or (code >= 0x20 and not 0x7F <= code <= 0x9F and code not in _BIDI):
            return character
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Outflow:
    """One output stream: command -> descriptor and/or memory."""

    def __init__(self, output: Output) -> None:
        self.source, self.child_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.source, False)
        self.target = output.descriptor
        self.captured = bytearray()
        self.capture_bytes = output.capture_bytes
        self.truncated = False
        self.pending = b""
        self.ended = False
        self.piece = _CHUNK if self.target is not None and stat.S_ISREG(os.fstat(self.target).st_mode) else _PIPE_BUF
        self.escape = _Escaper() if output.escape else None

    def wants(self) -> tuple[int, int] | None:
        """The descriptor to poll and for what; None when this stream is finished."""
        if self.pending and self.target is not None:
            return self.target, select.POLLOUT
        return None if self.ended else (self.source, select.POLLIN)

    def move(self) -> None:
        if self.pending and self.target is not None:
            self._write()
        elif not self.ended:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self.source, _CHUNK)
        except BlockingIOError:
            return
        room = self.capture_bytes - len(self.captured)
        self.captured += data[:room] if room > 0 else b""
        self.truncated |= self.capture_bytes > 0 and len(data) > room
        if not data:
            self.close_source()
        if self.target is not None:
            self.pending = self.escape(data, final=not data) if self.escape else data

    def _write(self) -> None:
        assert self.target is not None
        try:
            written = os.write(self.target, self.pending[: self.piece])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # The reader is gone. As in any pipeline the command learns it by SIGPIPE, unless we still capture.
            self.target, self.pending = None, b""
            if not self.capture_bytes:
                self.close_source()
            return
        self.pending = self.pending[written:]

    def close_source(self) -> None:
        if not self.ended:
            self.ended = True
            os.close(self.source)


class _Inflow:
    """Standard input: a descriptor -> the command."""

    def __init__(self, source: int) -> None:
        self.source = source
        self.child_end, self.sink = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.sink, False)
        self.pending = b""
        self.ended = False

    def wants(self) -> tuple[int, int] | None:
        if self.ended:
            return None
        return (self.sink, select.POLLOUT) if self.pending else (self.source, select.POLLIN)

    def move(self) -> None:
        if not self.pending:
            try:
                self.pending = os.read(self.source, _CHUNK)
            except BlockingIOError:
                return
            if not self.pending:
                self.close()
            return
        try:
            self.pending = self.pending[os.write(self.sink, self.pending) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            os.close(self.sink)


class Process(Protocol):
    """What the loop needs to know of a running command."""

    @property
    def pidfd(self) -> int:
        """Readable once nothing of the command runs any more."""
        ...

    @property
    def control(self) -> int | None:
        """Another descriptor to read from, or None."""
        ...

    def on_control(self) -> None:
        """`control` is readable."""
        ...

    def terminate(self) -> None:
        """Ask the command to end."""
        ...

    def kill(self) -> None:
        """End the whole tree."""
        ...


class Relay:
    """The pipes of one command. Use with `with`; `child_ends` go to the command, `release_child_ends` once it has them."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._outflows: list[_Outflow] = []
        self._inflow: _Inflow | None = None
        self._holds_child_ends = True
        try:
            for output in (command.stdout, command.stderr):
                self._outflows.append(_Outflow(output))
            if command.stdin is not None:
                self._inflow = _Inflow(command.stdin)
        except OSError:
            self.close()
            raise

    @property
    def child_ends(self) -> list[int]:
        """Standard output, standard error and, if it is relayed, standard input."""
        return [flow.child_end for flow in self._outflows] + ([self._inflow.child_end] if self._inflow else [])

    @property
    def captured(self) -> tuple[bytes, bytes, bool]:
        """Captured output and error, and whether something was left out."""
        out, error = self._outflows
        return bytes(out.captured), bytes(error.captured), out.truncated or error.truncated

    def release_child_ends(self) -> None:
        if self._holds_child_ends:
            self._holds_child_ends = False
            for descriptor in self.child_ends:
                os.close(descriptor)

    def close(self) -> None:
        self.release_child_ends()
        for flow in self._outflows:
            flow.close_source()
        if self._inflow:
            self._inflow.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, process: Process, *, started: float, drain_seconds: float | None) -> Ended:
        """Relay until the command's tree is gone and its output is delivered; enforce the deadline and the interrupt. Returns how it ended.

        `started`: the time.monotonic() from which the deadline counts. `drain_seconds`: how long after the end output may still be on
        its way; None means as long as the deadline allows, and at least 5 s, for a slow reader.
        """
        command = self._command
        ended: Ended = "exited"
        limit = math.inf if command.deadline_seconds is None else started + command.deadline_seconds
        deadline = limit
        stopping = killed = gone = False
        while True:
            timeout = None if limit == math.inf else max(0, math.ceil((limit - time.monotonic()) * 1000))
            ready = self._poll(process, gone=gone, stopping=stopping, timeout=timeout)
            if ready is None:
                return ended
            interrupted = command.interrupt in ready and not stopping
            if interrupted or (not ready and time.monotonic() >= limit):
                if gone:
                    self._abandon()
                    return ended
                if killed:
                    return "lost"
                asking = not stopping and command.grace_seconds > 0
                if not stopping:
                    ended = "interrupted" if interrupted else "deadline"
                    stopping = True
                if asking:
                    process.terminate()
                    limit = time.monotonic() + command.grace_seconds
                else:
                    process.kill()
                    killed = True
                    limit = time.monotonic() + _KILL_SECONDS
            if process.control in ready:
                process.on_control()
            if not gone and process.pidfd in ready:
                gone = True
                if self._inflow:
                    self._inflow.close()
                now = time.monotonic()
                limit = now + drain_seconds if drain_seconds is not None else max(deadline, now + _KILL_SECONDS)

    def _abandon(self) -> None:
        """The reader of the output took too long: what it did not take is lost, and said to be."""
        for flow in self._outflows:
            flow.truncated = True

    def _poll(self, process: Process, *, gone: bool, stopping: bool, timeout: int | None) -> set[int] | None:
        """Wait for anything, move what can be moved, return what was ready; None when all is over."""
        all_flows: list[_Outflow | _Inflow] = [*self._outflows, *([self._inflow] if self._inflow else [])]
        flows = {flow: wanted for flow in all_flows if (wanted := flow.wants())}
        if gone and not flows:
            return None
        poll = select.poll()
        for descriptor, events in flows.values():
            poll.register(descriptor, events)
        if not gone:
            poll.register(process.pidfd, select.POLLIN)
        if process.control is not None:
            poll.register(process.control, select.POLLIN)
        if self._command.interrupt is not None and not stopping:
            poll.register(self._command.interrupt, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        for flow, (descriptor, _) in flows.items():
            if descriptor in ready:
                flow.move()
        return ready
