"""Process 1 of a cell: builds the cell from inside, confines itself, starts the one command, reaps, reports, and ends with its supervisor.

It builds what every cell has before it asks what this one shall have, so that a cell can be made ahead of its document.

It runs in a fork of the launcher (a small interpreter without secrets) and never executes anything itself. The command is started with
posix_spawn, so it inherits what init has put on itself: no capabilities, no_new_privs, limits, Landlock, seccomp. Only where it gets a
filter more than init has, which posix_spawn cannot give it, init forks.

It talks over one stream socket, `control`, whose only other end is the supervisor's. What it is told is trusted: marshalled values, each
behind its length. What it tells is not, as a cell surrounds it: lines of JSON, written by hand.
    init -> supervisor    {"built": true} with the descriptors of the work directory and of the socket at SOCKET_PATH
    supervisor -> init    {"last_cap", "limits", "mounts"} with a descriptor of each mount, if the supervisor opened them
    init -> supervisor    {"ready": true, "status": …} | {"failed": step, "errno": n}, which may come instead of the first, too
    supervisor -> init    {"argv", "env", "cwd", "seconds", "filter"} with the descriptors of standard output, error and, if relayed, input
    init -> supervisor    {"started": true} | {"not_started": errno, "step": …, "interpreter": … | ""}
    supervisor -> init    {"terminate": true}: SIGTERM to the command
    init -> supervisor    {"exited": code} (negative: the signal) | {"overdue": true}: its `seconds` are over, and nobody ended it
End of file on `control` means that the supervisor is gone: init exits, and the kernel kills everything in its process namespace.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import marshal
import os
import resource
import select
import stat
import struct
import sys

from cellos.sandbox import landlock, rootfs, seccomp, syscalls
from cellos.sandbox.descriptors import receive, send
from cellos.sandbox.framing import LENGTH_BYTES
from cellos.sandbox.layout import SOCKET_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal

    from cellos.sandbox.messages import CommandRequest, InitRequest
    from cellos.sandbox.rootfs import Step
else:
    import _signal  # `signal`, `socket` and `json` would double the time that the launcher takes to start

JOINED, GO = b"joined", b"go"
"""What init and launcher tell each other before init builds the cell; a failure is `marshal`led (place in `joins`, errno)."""
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40
_HIGHEST_FD_OF_OURS = 100
_PAGE = 4096
_FIRST_LINE = 256
"""What the kernel reads of a program to see what it is (BINPRM_BUF_SIZE)."""
_STATUS_LINES = ("Cap", "NoNewPrivs:", "Seccomp:")
_MOST_DESCRIPTORS = 253
"""What the kernel passes at once (SCM_MAX_FD)."""


class _Control:
    """Messages over the control socket."""

    def __init__(self, descriptor: int) -> None:
        self.socket = _socket.socket(fileno=descriptor)
        self.buffer = b""
        self.descriptors: list[int] = []

    def send(self, message: dict[str, object], descriptors: tuple[int, ...] = ()) -> None:
        members = ", ".join(f'"{name}": {_json(value)}' for name, value in message.items())
        send(self.socket, f"{{{members}}}\n".encode(), descriptors)

    def take_descriptors(self) -> list[int]:
        """Those that have come so far."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def receive(self) -> dict[str, object]:
        """The next message; descriptors that came along are in `descriptors`. Exits at end of file: the supervisor is gone."""
        while len(self.buffer) < LENGTH_BYTES or len(self.buffer) < self._end():
            data, descriptors = receive(self.socket, 1 << 16, _MOST_DESCRIPTORS)
            self.descriptors += descriptors
            if not data:
                os._exit(3)
            self.buffer += data
        end = self._end()
        message: dict[str, object] = marshal.loads(self.buffer[LENGTH_BYTES:end])  # noqa: S302  # from the supervisor
        self.buffer = self.buffer[end:]
        return message

    def _end(self) -> int:
        """Where the first message in the buffer ends."""
        return LENGTH_BYTES + int.from_bytes(self.buffer[:LENGTH_BYTES], sys.byteorder)


def _json(value: object) -> str:
    """A number, a truth value or a text as JSON; what is not plain ASCII in a text becomes an escape."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = (c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\u{min(ord(c), 0xFFFD):04x}" for c in value)
        return f'"{"".join(plain)}"'
    return str(int(value)) if isinstance(value, int) else "null"


def run(control_descriptor: int, launcher: int, joins: list[int], *, program: bytes) -> None:
    """Be process 1. Never returns normally.

    `launcher`: the socket on which it is told that we have joined our groups, and on which it answers once our ids are mapped.
    `joins`: files of the control groups of version 1 that we join. `program`: the seccomp filter.
    """
    os.setsid()
    os.write(launcher, _join(joins))
    attached_v1 = bool(joins)
    control_descriptor, launcher = _keep_only(control_descriptor, launcher)
    if os.read(launcher, len(GO)) != GO:
        os._exit(1)
    os.close(launcher)
    syscalls.set_dumpable(False)
    control = _Control(control_descriptor)
    step = ["start"]

    def now(text: str) -> None:
        step[0] = text

    try:
        work, listener = _build(attached_v1, now)
        now("pass the cell's descriptors")
        # While we may still have more files open than a cell: what others of our user have in flight is compared with our limit.
        control.send({"built": True}, (work, listener))
        os.close(work)
        os.close(listener)
        request: InitRequest = control.receive()  # type: ignore[assignment]  # the first message is the request
        _confine(request, control.take_descriptors(), program, now)
        now("read what holds the cell")
        status = _status()
    except OSError as error:
        control.send({"failed": step[0], "errno": error.errno, "text": syscalls.error_text(error, step[0])})
        os._exit(1)
    control.send({"ready": True, "status": status})
    try:
        _serve(control)
    except Exception as error:
        control.send({"crashed": f"{type(error).__name__}: {error}"})
        raise


def _join(groups: list[int]) -> bytes:
    """Come into our groups; what the launcher is told of it."""
    for place, descriptor in enumerate(groups):
        try:
            os.write(descriptor, b"0")
        except OSError as error:
            return marshal.dumps((place, error.errno))
    return JOINED


def _keep_only(*descriptors: int) -> list[int]:
    """Move what we keep above all others, close everything else, and point 0, 1 and 2 at nothing: they were the launcher's."""
    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGHEST_FD_OF_OURS) for descriptor in descriptors]
    last = 2
    for descriptor in kept:  # ascending, as each is the lowest free number; with many mounts some of the old ones lie in between
        syscalls.close_range(last + 1, descriptor - 1)
        last = descriptor
    syscalls.close_range(last + 1)
    return kept


def _build(attached_v1: bool, now: Step) -> tuple[int, int]:
    """What all cells have in common. Returns the descriptors of the work directory's mount and of the socket at SOCKET_PATH."""
    now("take the cell's ids")
    # Id 0 is not mapped: making a file on a new tmpfs as id 0 would be EOVERFLOW. Capabilities survive, as no id here is 0 inside.
    os.setresgid(rootfs.CELL_ID, rootfs.CELL_ID, rootfs.CELL_ID)
    os.setresuid(rootfs.CELL_ID, rootfs.CELL_ID, rootfs.CELL_ID)
    os.umask(0o022)
    if attached_v1:
        now("enter a cgroup namespace")
        syscalls.call("unshare", syscalls.CLONE_NEWCGROUP)  # attached after the clone: make the group the visible root only now
    now("bring up loopback")
    loopback_up()
    now("set the host name")
    syscalls.sethostname("cell")
    return rootfs.build(now), _bind(now)


def _bind(now: Step) -> int:
    """A socket that is bound and does not listen: only its owner can make it do so, and until then nobody can connect to it.

    Bound while the root, which becomes read-only, can be written to. The current directory is that root.
    """
    now("make the cell's socket")
    bound = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    bound.bind(SOCKET_PATH[1:])
    return bound.detach()


def _confine(request: InitRequest, trees: list[int], program: bytes, now: Step) -> None:
    """What this cell has of its own, and everything that takes power away, in the only order that works."""
    rootfs.finish([(source, target, trees[i] if trees else -1) for i, (source, target) in enumerate(request["mounts"])], now)
    now("open standard input")
    null = os.open("/dev/null", os.O_RDWR)  # only now: one opened before pivot_root would be a way to see the host's mount
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if null > 2:
        os.close(null)
    now("set resource limits")
    for name, value in request["limits"].items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except ValueError as error:  # what Python makes of EPERM here
            raise OSError(errno.EPERM, str(error), f"RLIMIT_{name}={value}") from error
    now("empty the session keyring")
    syscalls.new_session_keyring()
    now("drop capabilities")
    syscalls.drop_capabilities(request["last_cap"])
    now("set no_new_privs")
    syscalls.no_new_privileges()
    now("restrict with Landlock")
    landlock.restrict()
    now("install the seccomp filter")
    seccomp.install(program)


def _status() -> str:
    """What the kernel says of this process, and so of the command, which inherits it."""
    descriptor = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, _PAGE).decode("ascii", "replace")
    finally:
        os.close(descriptor)
    return "\n".join(line for line in text.split("\n") if line.startswith(_STATUS_LINES))


def loopback_up() -> None:
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        fcntl.ioctl(any_socket.fileno(), _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP | _IFF_RUNNING))
    finally:
        any_socket.close()


def _serve(control: _Control) -> None:
    """Wait for the command, start it, and live as long as it does."""
    command: CommandRequest = control.receive()  # type: ignore[assignment]  # the second message is the command
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    _signal.signal(_signal.SIGCHLD, lambda *_: None)
    _signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    _limit(control, command["seconds"])
    child = _start(control, command)
    if control.buffer:  # it came with the command
        _obey(control, child)
    poll = select.poll()
    poll.register(control.socket.fileno(), select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == woken:
                os.read(woken, 512)
            else:
                _obey(control, child)
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                control.send({"exited": os.waitstatus_to_exitcode(status)})
                os._exit(0)  # whatever else still runs here is killed by the kernel with us
            if pid == 0:
                break


def _limit(control: _Control, seconds: float) -> None:
    """End the cell after that time: a supervisor that is stopped cannot."""

    def overdue(*_: object) -> None:
        if _signal.getitimer(_signal.ITIMER_REAL)[0] > 0:
            return  # somebody in the cell sent the signal
        control.send({"overdue": True})
        os._exit(0)

    if seconds > 0:
        _signal.signal(_signal.SIGALRM, overdue)
        _signal.setitimer(_signal.ITIMER_REAL, seconds)


def _obey(control: _Control, child: int) -> None:
    if "terminate" in control.receive():
        os.kill(child, _signal.SIGTERM)


def _start(control: _Control, message: CommandRequest) -> int:
    """Start the command; on failure report and exit."""
    argv, environment = message["argv"], message["env"]
    streams = dict(zip((1, 2, 0), control.take_descriptors(), strict=False))
    step = "chdir"
    program = ""
    try:
        os.chdir(message["cwd"])
        step = "exec"
        program = _find(argv[0], environment.get("PATH", os.defpath))
        if message["filter"]:
            child = _fork_and_exec(program, argv, environment, streams, message["filter"])
        else:
            child = os.posix_spawn(
                program,
                argv,
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, standard) for standard, descriptor in streams.items()],
                setsid=True,
                setsigdef=_ordinary_signals(),
                setsigmask=(),
            )
    except OSError as error:
        if step == "exec" and error.filename == "seccomp":
            step = "seccomp"
        interpreter = _interpreter(program) if error.errno == errno.ENOENT and program else ""
        control.send({"not_started": error.errno, "step": step, "interpreter": interpreter})
        os._exit(0)
    for descriptor in streams.values():
        os.close(descriptor)
    control.send({"started": True})
    return child


def _interpreter(program: str) -> str:
    """What runs a script, where its first line says so."""
    try:
        descriptor = os.open(program, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        first = os.read(descriptor, _FIRST_LINE).split(b"\n")[0]
    except OSError:
        return ""  # it is the program itself that is not there, or we may not read it
    words = first[2:].split() if first.startswith(b"#!") else []
    return words[0].decode(errors="replace") if words else ""


def _ordinary_signals() -> set[int]:
    """To be set to their defaults: exec hands on what Python ignores, or whoever started the supervisor (nohup, a background job)."""
    return {int(number) for number in _signal.valid_signals()} - {_signal.SIGKILL, _signal.SIGSTOP}


def _fork_and_exec(program: str, argv: list[str], environment: dict[str, str], streams: dict[int, int], extra: bytes) -> int:
    """What posix_spawn does, with the filter `extra` from just before the exec. Raises OSError; it names seccomp where that failed."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for standard, descriptor in streams.items():
                os.dup2(descriptor, standard)
            for number in _ordinary_signals():
                _signal.signal(number, _signal.SIG_DFL)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
            seccomp.install(extra)
            os.execve(program, argv, environment)  # noqa: S606  # a shell would be one more thing to trust
        except OSError as error:
            os.write(writing, marshal.dumps((error.errno, error.filename)))
        finally:
            os._exit(127)
    os.close(writing)
    failure = os.read(reading, _PAGE)  # closed by exec, or by the end of a child that the filter killed
    os.close(reading)
    if failure:
        os.waitpid(child, 0)
        number, what = marshal.loads(failure)  # noqa: S302  # from our own fork, which executed nothing
        raise OSError(number, os.strerror(number), what)
    return child


def _find(program: str, path: str) -> str:
    """Look `program` up in PATH as execvp(3) does: a file that may not be executed is remembered, one that may wins."""
    if "/" in program:
        return program
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in path.split(":") if program else ():
        candidate = os.path.join(directory or ".", program)
        try:
            mode = os.stat(candidate).st_mode
        except PermissionError as error:
            failure = error
            continue
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        failure = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    raise failure
