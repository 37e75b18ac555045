"""What every command of ours does as a process: safe descriptors, signals as a descriptor, one line per error."""

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def secure_standard_streams() -> None:
    """Open what the caller closed of 0, 1 and 2 as /dev/null: the next file we open must not become somebody's standard output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open("/dev/null", os.O_RDWR)  # the lowest free number is the missing one
            os.set_inheritable(opened, True)


def say(text: str) -> None:
    """One line on standard error. Control characters are shown as escapes; a standard error that is gone is nobody's concern."""
    line = "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
    try:
        os.write(2, line.encode(errors="backslashreplace") + b"\n")
    except OSError:
        return


def leave(code: int) -> "NoReturn":
    """End the process at once. Nothing is left to be closed, and taking the interpreter down would cost 3 ms and more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            continue  # whoever read it is gone; what had to be said about that was said
    os._exit(code)


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a descriptor that becomes readable, instead of the death of the process.

    A signal that the caller had ignored (nohup, a background job) stays ignored. Main thread only; use with `with`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first one that came."""
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self.descriptor, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: "FrameType | None") -> None:
        if self.received is None:
            self.received = number
            os.write(self._writing, b"s")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        os.close(self.descriptor)
        os.close(self._writing)
