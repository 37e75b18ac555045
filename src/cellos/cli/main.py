"""`cellos`: the one command people learn.

This module is only the frame: what must happen before anything else is imported, and the one place where errors become exit codes.
The verbs stand in a table in cli/group.py.

Exit codes. `cellos run` passes on the command's own, so everything of ours is 125 there. Elsewhere 2 is a usage error and 1 any other
failure. 130 is an interrupt, 141 an output that nobody reads any more.
"""

import errno
import gc
import os
import sys

from cellos.cli.process import leave, say, secure_standard_streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cellos.sandbox.launcher import Launcher

OURS_IN_RUN = 125
FAILURE = 1
USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
_OUTPUT_LOST = "cannot write to standard output: "


def main() -> None:
    """Entry point of `cellos`."""
    gc.disable()  # while modules load there is much to walk and nothing to collect; the verb's own work runs with it again
    secure_standard_streams()
    arguments = sys.argv[1:]
    is_run = arguments[:1] == ["run"]
    failure, usage = (OURS_IN_RUN, OURS_IN_RUN) if is_run else (FAILURE, USAGE)
    code = _guarded(arguments, starts_launcher=is_run, failure=failure, usage=usage)
    leave(_flushed(code, failure))


def _guarded(arguments: list[str], *, starts_launcher: bool, failure: int, usage: int) -> int:
    from cellos.errors import CellosError

    launcher = None
    try:
        if starts_launcher:
            launcher = _start_launcher()
        from cellos.cli.group import UsageError, dispatch

        try:
            return dispatch(arguments, launcher)
        except UsageError as error:
            say(f"cellos: {error}")
            return usage
    except CellosError as error:
        say(f"cellos: {error}")
        return failure
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  # whatever it is, the user gets one line and the documented exit code
        say(f"cellos: {_internal_error(error)}")
        return failure
    finally:
        if launcher is not None:
            launcher.close()


def _start_launcher() -> "Launcher | None":
    """The process that makes cells. It loads while we import what takes long, and it must exist before any secret or thread does."""
    if os.environ.get("CELLOS_CELL_BACKEND", "").strip() not in ("", "linux"):
        return None
    from cellos.sandbox.launcher import Launcher

    return Launcher.start(ahead=1)


def _flushed(code: int, failure: int) -> int:
    """The exit code after what is still buffered was written."""
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        if isinstance(error, BrokenPipeError):
            return code or BROKEN_PIPE
        if not code:
            say(f"cellos: {_OUTPUT_LOST}{error.strerror}")
        return code or failure
    return code


def _internal_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        if error.errno == errno.ENOSPC and error.filename is None:
            return _OUTPUT_LOST + error.strerror
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({os.path.basename(place.tb_frame.f_code.co_filename)}:{place.tb_lineno})" if place else ""
    return f"internal error: {type(error).__name__}: {error}{where}; this is a defect of CellOS, please report it"


if __name__ == "__main__":
    main()
