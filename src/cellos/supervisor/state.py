"""The state directory: where this host's supervisor keeps what must outlive a process.

    runs/       a locked record per live run (supervisor/records.py)
    spool/      event files of runs that are also sent elsewhere
    evidence/   event files of `cellos run`, which stay

Place, first that applies: CELLOS_STATE_DIR; for root /var/lib/cellos; $XDG_STATE_HOME/cellos; ~/.local/state/cellos;
/var/tmp/cellos-<uid>; /tmp/cellos-<uid>. It belongs to the user, mode 0700. In a directory that everybody may write to, a name that
somebody else made first is refused and never used.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from cellos.errors import ConfigError, os_error_text

if TYPE_CHECKING:
    from cellos.sandbox.probe import Row

RUNS, SPOOL, EVIDENCE = "runs", "spool", "evidence"
SHARED = ("/var/tmp", "/tmp")


class StateDirectory(Struct, frozen=True, kw_only=True):
    """Paths of a state directory that exists with all its parts."""

    path: str

    @property
    def runs(self) -> str:
        return f"{self.path}/{RUNS}"

    @property
    def spool(self) -> str:
        return f"{self.path}/{SPOOL}"

    @property
    def evidence(self) -> str:
        return f"{self.path}/{EVIDENCE}"


def open_state_directory(environment: Mapping[str, str], *, user: int | None = None) -> StateDirectory:
    """Find or make the state directory and its parts. Raises ConfigError."""
    user = os.geteuid() if user is None else user
    chosen = environment.get("CELLOS_STATE_DIR", "").strip()
    if chosen:
        try:
            return _prepare(os.path.abspath(chosen), user)
        except OSError as error:
            raise ConfigError(f"CELLOS_STATE_DIR: cannot use {chosen}: {os_error_text(error)}") from error
    failures = []
    for place in candidates(environment, user):
        try:
            return _prepare(place, user)
        except OSError as error:
            failures.append(f"{place}: {os_error_text(error)}")
    raise ConfigError(f"no directory for run records can be written ({'; '.join(failures)}); set CELLOS_STATE_DIR")


def find_state_directory(environment: Mapping[str, str], *, user: int | None = None) -> StateDirectory | None:
    """The state directory where there is one already, perhaps without some of its parts: nothing is made. Raises ConfigError."""
    user = os.geteuid() if user is None else user
    chosen = environment.get("CELLOS_STATE_DIR", "").strip()
    for place in [os.path.abspath(chosen)] if chosen else candidates(environment, user):
        try:
            return _prepare(place, user, make=False)
        except OSError as error:
            if chosen and not isinstance(error, FileNotFoundError):
                raise ConfigError(f"CELLOS_STATE_DIR: cannot use {chosen}: {os_error_text(error)}") from error
    return None


def evidence_directory(environment: Mapping[str, str]) -> str:
    """Where `cellos run` keeps its event files. Raises ConfigError."""
    return open_state_directory(environment).evidence


def candidates(environment: Mapping[str, str], user: int) -> Iterator[str]:
    """Places to try when none was chosen, best first."""
    if user == 0:
        yield "/var/lib/cellos"
    else:
        state_home, home = environment.get("XDG_STATE_HOME", ""), environment.get("HOME", "")
        if os.path.isabs(state_home):  # the base directory specification has relative ones ignored
            yield os.path.join(state_home, "cellos")
        if os.path.isabs(home):
            yield os.path.join(home, ".local/state/cellos")
    for shared in SHARED:
        yield f"{shared}/cellos-{user}"


def check_state_directory() -> "Row":
    """The state directory as a row of `cellos doctor`."""
    from cellos.sandbox.probe import Row

    try:
        path = open_state_directory(os.environ).path
    except ConfigError as error:
        return Row(
            primitive="state-directory", ok=False, required=True, detail=str(error), cure="set CELLOS_STATE_DIR to a directory of yours"
        )
    return Row(primitive="state-directory", ok=True, required=True, detail=path)


def _prepare(path: str, user: int, *, make: bool = True) -> StateDirectory:
    """Make `path` and its parts, and check them. OSError: it cannot be written (or, not made, read); ConfigError: it is not safe to use."""
    if make and not os.path.exists(os.path.dirname(path)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    _own_directory(path, user, make=make)
    state = StateDirectory(path=path)
    for part in (state.runs, state.spool, state.evidence):
        if not make and not os.path.lexists(part):
            continue
        _own_directory(part, user, make=make)
        if not os.access(part, (os.W_OK if make else os.R_OK) | os.X_OK, effective_ids=True):
            raise PermissionError(13, os.strerror(13), part)
    return state


def _own_directory(path: str, user: int, *, make: bool) -> None:
    try:
        if make:
            os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"state directory {path}: not a directory (symbolic links are refused); remove it or set CELLOS_STATE_DIR")
    if found.st_uid != user:
        raise ConfigError(f"state directory {path}: belongs to uid {found.st_uid}, not to {user}; remove it or set CELLOS_STATE_DIR")
    if found.st_mode & 0o022:
        raise ConfigError(f"state directory {path}: others may write to it (mode {found.st_mode & 0o7777:04o}); chmod go-w it")
