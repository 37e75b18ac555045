"""What every command of ours does as a process: safe descriptors, signals as a descriptor, one line per error."""

import errno
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Sequence
    from types import FrameType
    from typing import Any, NoReturn

    from cellos.sandbox.launcher import Launcher
else:
    import _signal  # `signal` itself makes enums of all its numbers, which takes 0.6 ms

COMPLETION_VARIABLE = "_CELLOS_COMPLETE"
"""Set where a shell asks what could follow, instead of something to be done."""
OUTPUT_LOST = "cannot write to standard output: "
_MEASURED = sys.version_info < (3, 12)
"""Whether this is the version for which some of `load_msgspec` was measured; the others import the whole modules."""
STOP_SIGNALS = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGQUIT)
AGAIN_SECONDS = 0.5
"""A stop signal that comes sooner after the first one is the same request: timeout(1), for one, sends each twice."""


def secure_standard_streams() -> None:
    """Open what the caller closed of 0, 1 and 2 as /dev/null: the next file we open must not become somebody's standard output.

    The interpreter has no stream for such a one: it gets one, so that nobody has to ask.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open("/dev/null", os.O_RDWR)  # the lowest free number is the missing one
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            errors = "backslashreplace" if name == "stderr" else None
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", errors=errors, closefd=False))  # noqa: SIM115  # it stays


def say(text: str) -> None:
    """One line on standard error. Control characters are shown as escapes; a standard error that is gone is nobody's concern."""
    line = "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
    try:
        os.write(2, line.encode(errors="backslashreplace") + b"\n")
    except OSError:
        return


def write_all(descriptor: int, data: "bytes | memoryview") -> None:
    """All of it, also where the descriptor does not block: that is as the caller has it, and not ours to change. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            import select

            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


def leave(code: int) -> "NoReturn":
    """End the process at once. Nothing is left to be closed, and taking the interpreter down would cost 3 ms and more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            continue  # whoever read it is gone; what had to be said about that was said
    os._exit(code)


def start_launcher() -> "Launcher | None":
    """The process that makes cells, if they are to be made on Linux. It loads while we import what takes long (`backends.linux`, which has
    the same for others, is that), and it must exist before any secret or thread does. Raises HostBackendError.
    """
    if os.environ.get("CELLOS_CELL_BACKEND", "") not in ("", "linux"):
        return None
    from cellos.sandbox.launcher import Launcher

    try:
        return Launcher.start(ahead=1, cgroup_parent=os.environ.get("CELLOS_CGROUP_PARENT", "").strip())
    except OSError as error:
        from cellos.backends.linux import no_launcher

        raise no_launcher(error) from error


class _Later(type(sys)):  # type: ignore[misc]  # the type of modules, without importing `types` for its name
    """A module that is loaded when somebody wants something of it, or calls one of `functions`, which may be imported before."""

    def __init__(self, name: str, functions: "Sequence[str]" = ()) -> None:
        super().__init__(name)
        for function in functions:
            self.__dict__[function] = lambda *given, _name=function, **named: self.__getattr__(_name)(*given, **named)

    def __getattr__(self, name: str) -> "Any":
        own = str(self.__name__)
        if sys.modules.get(own) is self:
            del sys.modules[own]
        __import__(own)
        return getattr(sys.modules[own], name)

    def __setattr__(self, name: str, value: object) -> None:
        self.__getattr__("__name__")
        setattr(sys.modules[str(self.__name__)], name, value)


def load_msgspec() -> None:
    """Import msgspec without what it would load and a run never uses, 26 of 37 ms. Call this before anything else imports it.

    - typing_extensions is not there for the time of this import; msgspec takes what it needs of it from `typing` then, and with Python 3.11
      nothing is missing.
    - It gets types of its own for UUIDs, decimals and enumerations, which no document and no event has: to it the real ones are as any
      other class.
    - Its modules that we use seldom or never, `textwrap` and `warnings` are loaded when they are used.
    - With Python 3.11 also: `datetime` is its part in C alone, which is all that it is later; `re`, of which `typing` and msgspec keep two
      types and a function, is loaded when that function is called; and msgspec need not try out what ForwardRef takes, for which the
      interpreter would make the classes of all syntax trees.
    """
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # it takes what is not a module as well
    if "msgspec" in modules:
        return
    stand_ins = {name: module for name, module in _stand_ins() if name not in modules}
    modules.update(stand_ins)
    for name in ("textwrap", "warnings", "msgspec.inspect", "msgspec.msgpack", "msgspec.toml", "msgspec.yaml"):
        modules.setdefault(name, _Later(name))
    modules.setdefault("msgspec._json_schema", _Later("msgspec._json_schema", functions=("schema", "schema_components")))
    try:
        import typing

        forward_reference = typing.ForwardRef
        if _MEASURED:
            if "datetime" not in modules:
                import _datetime  # type: ignore[import-not-found]  # it has no stub

                modules["datetime"] = _datetime
            typing.ForwardRef = lambda *_, **__: None  # type: ignore[assignment,misc]  # all that is asked is whether it takes them
        try:
            import msgspec  # noqa: F401  # into sys.modules
        finally:
            typing.ForwardRef = forward_reference  # type: ignore[misc]  # put back what was there
    finally:
        for name in stand_ins:
            del modules[name]


def _stand_ins() -> "list[tuple[str, object]]":
    """What is in the place of a module, by its name, while msgspec is imported."""
    uuid, decimal, enum, re = (type(sys)(name) for name in ("uuid", "decimal", "enum", "re"))
    vars(uuid).update(UUID=type("UUID", (), {}), SafeUUID=type("SafeUUID", (), {"unknown": None}))
    vars(decimal).update(Decimal=type("Decimal", (), {}))
    vars(enum).update(EnumMeta=type("EnumMeta", (type,), {}))
    found: list[tuple[str, object]] = [("typing_extensions", None), ("uuid", uuid), ("decimal", decimal)]
    if _MEASURED and "re" not in sys.modules:
        import _sre  # type: ignore[import-not-found]  # it has no stub

        empty = _sre.compile("", 32, [1], 0, {}, (None,))  # what re.compile("") makes: flag UNICODE, one operation, SUCCESS
        vars(re).update(Pattern=type(empty), Match=type(empty.match("")), compile=_compile)
        found += [("enum", enum), ("re", re)]
    return found


def _compile(pattern: str, flags: int = 0) -> object:
    import re

    return re.compile(pattern, flags)


def unexpected(error: Exception) -> str:
    """An error that nobody expected where it is caught, in one line."""
    from cellos.errors import CellosError

    if isinstance(error, CellosError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        if error.errno == errno.ENOSPC and error.filename is None:
            return OUTPUT_LOST + error.strerror
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({os.path.basename(place.tb_frame.f_code.co_filename)}:{place.tb_lineno})" if place else ""
    return f"internal error: {type(error).__name__}: {error}{where}; this is a defect of CellOS, please report it"


class StopSignals:
    """SIGTERM, SIGINT, SIGHUP and SIGQUIT as a descriptor that becomes readable, instead of the death of the process.

    When one comes again, it is a pipe without a writer: nothing is waited for any more. A signal that the caller had ignored (nohup, a
    background job) stays ignored. Main thread only; use with `with`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first one that came."""
        self._first = 0.0
        """When it came."""
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self.descriptor, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in STOP_SIGNALS:
            if _signal.getsignal(number) != _signal.SIG_IGN:
                self._old[number] = _signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: "FrameType | None") -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = number, now
            os.write(self._writing, b"s")
        elif self._writing >= 0 and now >= self._first + AGAIN_SECONDS:
            self._hang_up()

    def _hang_up(self) -> None:
        os.close(self._writing)
        self._writing = -1

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            _signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        os.close(self.descriptor)
        if self._writing >= 0:
            self._hang_up()
