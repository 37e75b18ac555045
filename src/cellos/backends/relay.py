"""Moving bytes between a command's pipes and its caller, and watching its time, in one poll loop that never blocks on a slow reader."""

from __future__ import annotations

import codecs
import errno
import functools
import math
import os
import select
import stat
import time
from typing import TYPE_CHECKING, Protocol

from cellos.errors import HostBackendError, os_error_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from cellos.ports import Command, Ended, Output

_CHUNK = 1 << 16
_PIPE_BUF = 4096
"""A pipe that polls writable takes this much without blocking (pipe(7)). Others are asked again after each such piece."""
_KILL_SECONDS = 5.0
"""How long a killed tree may take to be gone, and a reader to take what an ended command wrote, where nobody said to wait."""
_LONGEST_POLL_SECONDS = 3600.0
"""poll(2) counts milliseconds in an int; a later deadline is waited for in turns."""

_KEPT_CONTROLS = "\n\t\r"
_LINE_FEED = 10
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class Escaper:
    r"""Untrusted bytes to text that a terminal only shows: control characters, in all their encodings, become `\x1b` and the like."""

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
    """One output stream: command -> descriptor, memory and/or `listener`."""

    def __init__(self, output: Output, listener: Callable[[bytes], None] | None) -> None:
        self.listener = listener
        self.source, self.child_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.source, False)
        self.target = output.descriptor
        self.wait = output.wait
        self.last = (0.0, _LINE_FEED)
        """When a byte was written last, and which."""
        self.captured = bytearray()
        self.capture_bytes = output.capture_bytes
        self.truncated = False
        self.pending = b""
        self.ended = False
        self.final = False
        """All who could write are gone: what is there is all that there is, also where somebody else was handed an end of the pipe."""
        self._own_target = -1
        try:
            mode = os.fstat(self.target).st_mode if self.target is not None else 0
        except OSError:
            self.close()
            os.close(self.child_end)
            raise
        self.piece = _CHUNK if stat.S_ISREG(mode) else _PIPE_BUF
        if self.target is not None and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            self._open_anew(self.target)
        self.escape = Escaper() if output.escape else None

    def _open_anew(self, target: int) -> None:
        """A non-blocking description of the same pipe or terminal: that it polls writable does not say that it takes what we write, as
        others (our other stream, for one) may write to it, too. The caller's own description is not ours to change.
        """
        try:
            self._own_target = self.target = os.open(f"/proc/self/fd/{target}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return  # somebody else's terminal (su), or no /proc: then it has to do as it is
        self.piece = _CHUNK

    def wants(self) -> tuple[int, int] | None:
        """The descriptor to poll and for what; None when this stream is finished."""
        if self.undelivered and self.target is not None:
            return self.target, select.POLLOUT
        return None if self.ended else (self.source, select.POLLIN)

    def move(self) -> None:
        if self.undelivered:
            self._write()
        elif not self.ended:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self.source, _CHUNK)
        except BlockingIOError:
            if not self.final:
                return
            data = b""
        room = self.capture_bytes - len(self.captured)
        self.captured += data[:room] if room > 0 else b""
        self.truncated |= self.capture_bytes > 0 and len(data) > room
        if not data:
            self.close_source()
        elif self.listener is not None:
            self.listener(data)
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
                raise HostBackendError(f"cannot pass the command's output on: {os_error_text(error)}") from error
            # The reader is gone. As in any pipeline the command learns it by SIGPIPE, unless somebody else still wants its output.
            self.target, self.pending = None, b""
            if not self.capture_bytes and self.listener is None:
                self.close_source()
            return
        if self.escape is not None and written:
            self.last = time.monotonic(), self.pending[written - 1]
        self.pending = self.pending[written:]

    @property
    def undelivered(self) -> bool:
        """Something waits for the reader, who lives."""
        return bool(self.pending) and self.target is not None

    @property
    def unread(self) -> bool:
        """There may be more, which can be read without waiting."""
        return self.final and not self.ended and not self.undelivered

    def close_source(self) -> None:
        if not self.ended:
            self.ended = True
            os.close(self.source)

    def close(self) -> None:
        self.close_source()
        if self._own_target >= 0:
            os.close(self._own_target)
            self._own_target = -1


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
            except OSError as error:
                raise HostBackendError(f"cannot read the command's input: {os_error_text(error)}") from error
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

    def ended(self) -> None:
        """`pidfd` was seen to be readable."""
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
        self.duration_ms = 0
        """From `started` of `watch` to the end of the command; what its reader took afterwards is not in it."""
        self.lost = False
        """A reader did not take everything in its time."""
        try:
            for name, output in (("stdout", command.stdout), ("stderr", command.stderr)):
                listener = functools.partial(command.on_output, name) if command.on_output is not None else None
                self._outflows.append(_Outflow(output, listener))
            if command.stdin is not None:
                self._inflow = _Inflow(command.stdin)
        except OSError as error:
            self.close()
            raise HostBackendError(f"cannot connect the command's streams: {os_error_text(error)}") from error

    @property
    def child_ends(self) -> list[int]:
        """Standard output, standard error and, if it is relayed, standard input."""
        return [flow.child_end for flow in self._outflows] + ([self._inflow.child_end] if self._inflow else [])

    @property
    def captured(self) -> tuple[bytes, bytes, bool]:
        """Captured output and error, and whether something was left out."""
        out, error = self._outflows
        return bytes(out.captured), bytes(error.captured), out.truncated or error.truncated

    @property
    def open_line(self) -> bool:
        """Whether what was written last to a terminal was no line feed."""
        return max(flow.last for flow in self._outflows)[1] != _LINE_FEED

    def release_child_ends(self) -> None:
        if self._holds_child_ends:
            self._holds_child_ends = False
            for descriptor in self.child_ends:
                os.close(descriptor)

    def close(self) -> None:
        self.release_child_ends()
        for flow in self._outflows:
            flow.close()
        if self._inflow:
            self._inflow.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, process: Process, *, started: float, drain_seconds: float | None = None) -> Ended:
        """Relay until the command's tree is gone and its output is delivered; enforce the deadline and the interrupt. Returns how it ended.

        `started`: the time.monotonic() from which the deadline counts. `drain_seconds`: how long after the end there may still come output
        from a process that is not ours to end; None where there is none.
        Raises HostBackendError where a stream fails, and what `on_output` raises.
        """
        command = self._command
        ended: Ended = "exited"
        limit = math.inf if command.deadline_seconds is None else started + command.deadline_seconds
        patience = math.inf if any(flow.wait for flow in self._outflows) else limit
        drain = math.inf if drain_seconds is None else drain_seconds
        stopping = killed = gone = hurried = False
        while True:
            # That it was hung up is told in any case, save where there is nothing more that could be done about it.
            asks = None if hurried or (killed and not gone) else 0 if stopping else select.POLLIN
            left = min(limit - time.monotonic(), _LONGEST_POLL_SECONDS)
            polled = self._poll(process, gone=gone, asks=asks, timeout=max(0, math.ceil(left * 1000)))
            if polled is None:
                return ended
            ready, moved = polled
            now = time.monotonic()
            interrupt = 0 if command.interrupt is None else ready.get(command.interrupt, 0)
            at_once = bool(interrupt & select.POLLHUP)
            if gone:
                if interrupt:  # what can be delivered without waiting still is
                    hurried, limit = True, now
                elif now >= limit + _KILL_SECONDS or (now >= limit and not moved):
                    if hurried or now >= patience or not any(flow.undelivered for flow in self._outflows):
                        self._abandon()
                        return ended
                    limit = min(patience, now + drain)
            elif interrupt or (now >= limit and process.pidfd not in ready):
                if killed:
                    self._ended(started, now)
                    self._abandon()
                    return ended
                asking = not stopping and not at_once and command.grace_seconds > 0
                if not stopping:
                    ended = "interrupted" if interrupt else "deadline"
                    stopping = True
                if asking:
                    process.terminate()
                    limit = now + command.grace_seconds
                else:
                    process.kill()
                    killed = True
                    limit = now + _KILL_SECONDS
            if process.control in ready:
                process.on_control()
            if not gone and process.pidfd in ready:
                gone = True
                self._ended(started, now)
                process.ended()
                for flow in self._outflows:
                    flow.final = drain_seconds is None
                patience = now + _KILL_SECONDS if stopping else max(patience, now + _KILL_SECONDS)
                limit = min(patience, now + drain)

    def _ended(self, started: float, now: float) -> None:
        self.duration_ms = round((now - started) * 1000)
        if self._inflow:
            self._inflow.close()

    def _abandon(self) -> None:
        """Somebody took too long, the reader of the output or a process that holds it open or does not end: what was not taken is lost, and
        said to be.
        """
        for flow in self._outflows:
            flow.truncated |= flow.undelivered or not flow.ended
            self.lost |= flow.undelivered or (flow.unread and flow.target is not None)

    def _poll(self, process: Process, *, gone: bool, asks: int | None, timeout: int) -> tuple[dict[int, int], bool] | None:
        """Wait for anything, move what can be moved. Returns what was ready, and for what, and whether a stream was; None when all is over.

        `asks`: for what to wait at the interrupt.
        """
        all_flows: list[_Outflow | _Inflow] = [*self._outflows, *([self._inflow] if self._inflow else [])]
        flows = {flow: wanted for flow in all_flows if (wanted := flow.wants())}
        if gone and not flows:
            return None
        poll = select.poll()
        for descriptor, events in flows.values():
            poll.register(descriptor, events)
        if not gone:  # before `control`, in the order of which they are looked at: what was said at the very end is seen with the end
            poll.register(process.pidfd, select.POLLIN)
        if process.control is not None:
            poll.register(process.control, select.POLLIN)
        if self._command.interrupt is not None and asks is not None:
            poll.register(self._command.interrupt, asks)
        unread = [flow for flow in self._outflows if flow.unread]
        ready = dict(poll.poll(0 if unread else timeout))
        moving = [flow for flow, (descriptor, _) in flows.items() if descriptor in ready or flow in unread]
        for flow in moving:
            flow.move()
        return ready, bool(moving)
