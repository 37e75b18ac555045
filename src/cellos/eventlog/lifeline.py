"""A program of its own: runs another one, and ends it when its own standard input ends, which is when whoever started it is gone.

    python -I -S lifeline.py [--grace=SECONDS] [--listen=DESCRIPTOR] [--stdin=DESCRIPTOR] [--until=SECONDS] PROGRAM ARGUMENT…

Asked to go, by end of file or SIGTERM, it lets the program end in order (SIGTERM) for GRACE_SECONDS or what is given, then kills it. If it
is killed itself, the kernel kills the program: this process has one thread, so PR_SET_PDEATHSIG, which follows threads, can be relied on.
A socket that listens is handed to the program as systemd does it (cellos/http/listener.py); `--stdin` becomes its standard input.
`--until` is a time of CLOCK_BOOTTIME at which the program is killed at once; every line of our own standard input is a new such time. So
a program does not outlive what its owner may do, even where the owner is stopped and cannot say so.
Exit code: the program's, 128 and the signal that ended it, 127 where it could not be started.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # `signal` takes as long to load as all else here

GRACE_SECONDS = 10.0
_LISTEN_FD = 3
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0
"""How late an end may be seen after the machine slept: waiting does not count that time."""


class _Asked(Exception):
    """SIGTERM."""


def main(argv: list[str]) -> int:
    def asked(*_: object) -> None:
        raise _Asked

    options = {"--grace": GRACE_SECONDS, "--listen": -1, "--stdin": -1, "--until": 0.0}
    while argv[0].startswith("--"):
        name, _, value = argv.pop(0).partition("=")
        options[name] = type(options[name])(value)
    grace, until = options["--grace"], options["--until"]
    listener, stdin = int(options["--listen"]), int(options["--stdin"])
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.getpid()
    program = os.fork()
    if program == 0:
        _become(libc, own, argv, listener, stdin)
    for handed in (listener, stdin):
        if handed >= 0:
            os.close(handed)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # its output ends when the program's does
    os.dup2(null, 2)
    ended = os.pidfd_open(program)
    _signal.signal(_signal.SIGTERM, asked)
    try:
        if until and not _wait_until(until, ended):
            grace = 0.0
        elif not until:
            select.select([0, ended], [], [])
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
    except _Asked:
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
    for number in (_signal.SIGCONT, _signal.SIGTERM) if grace else ():
        _signal.pidfd_send_signal(ended, number) if not _over(ended, 0) else None
    if not _over(ended, grace):
        _signal.pidfd_send_signal(ended, _signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    return code if code >= 0 else 128 - code


def _wait_until(until: float, ended: int) -> bool:
    """Until the program has ended or we are asked to go. False: its time was over before that."""
    text = b""
    while True:
        left = until - time.clock_gettime(time.CLOCK_BOOTTIME)
        if left <= 0:
            return False
        ready = select.select([0, ended], [], [], min(left, _LOOK_SECONDS))[0]
        if ended in ready:
            return True
        if 0 in ready:
            read = os.read(0, 4096)
            if not read:
                return True
            *lines, text = (text + read).split(b"\n")
            until = float(lines[-1]) if lines else until


def _become(libc: ctypes.CDLL, parent: int, argv: list[str], listener: int, stdin: int) -> None:
    """The program, or exit code 127."""
    try:
        libc.prctl(_PR_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            given = stdin if stdin >= 0 else os.open(os.devnull, os.O_RDONLY)
            os.dup2(given, 0)
            os.close(given)
            if listener >= 0:
                _hand_over(listener)
            os.execv(argv[0], argv)  # noqa: S606 (a list, no shell)
    except OSError as error:
        os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _hand_over(listener: int) -> None:
    """As descriptor 3; what is there already goes on under another number."""
    if listener != _LISTEN_FD:
        try:
            os.set_inheritable(os.dup(_LISTEN_FD), True)
        except OSError:
            pass
        os.dup2(listener, _LISTEN_FD)
        os.close(listener)
    os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))


def _over(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
