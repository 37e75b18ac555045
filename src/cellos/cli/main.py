"""`cellos`: the one command people learn.

This module is only the frame: what must happen before anything else is imported, and the one place where errors become exit codes.
The verbs stand in a table in cli/group.py.

Exit codes. `cellos run` passes on the command's own, so everything of ours is 125 there. Elsewhere 2 is a usage error and 1 any other
failure. 130 is an interrupt, 141 an output that nobody reads any more.
"""

import gc
import os
import sys

from cellos.cli.process import (
    COMPLETION_VARIABLE,
    OUTPUT_LOST,
    leave,
    load_msgspec,
    say,
    secure_standard_streams,
    start_launcher,
    unexpected,
)
from cellos.compiled import prefer_compiled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cellos.sandbox.launcher import Launcher

OURS_IN_RUN = 125
FAILURE = 1
USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def main() -> None:
    """Entry point of `cellos`."""
    gc.disable()  # while modules load there is much to walk and nothing to collect; verbs other than `run` work with it again
    secure_standard_streams()
    prefer_compiled()
    arguments = sys.argv[1:]
    is_run = arguments[:1] == ["run"]
    failure, usage = (OURS_IN_RUN, OURS_IN_RUN) if is_run else (FAILURE, USAGE)
    code = _guarded(arguments, is_run=is_run, failure=failure, usage=usage)
    leave(_flushed(code, failure))


def _guarded(arguments: list[str], *, is_run: bool, failure: int, usage: int) -> int:
    launcher = None
    try:
        if is_run:
            launcher = start_launcher()
            code = _run(arguments[1:], launcher)
            if code is not None:
                return code
        from cellos.cli.group import UsageError, dispatch

        try:
            return dispatch(arguments, launcher)
        except UsageError as error:
            _tell(error, arguments)
            return usage
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        say(f"cellos: {error.code}")  # as the interpreter would
        return failure
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  # one of ours or not, the user gets one line and the documented exit code
        _tell(error, arguments)
        return failure
    finally:
        if launcher is not None:
            launcher.close()


def _tell(error: Exception, arguments: list[str]) -> None:
    """One line; and where a run was asked for JSON, that."""
    text = unexpected(error)
    say(f"cellos: {text}")
    if arguments[:1] == ["run"]:
        from cellos.cli.run_options import asks_for_json

        if asks_for_json(arguments[1:]):
            from cellos.cli.run import print_error

            print_error(getattr(error, "code", "error"), text)


def _run(arguments: list[str], launcher: "Launcher | None") -> int | None:
    """`cellos run` without click, where that can read its options; the exit code."""
    if os.environ.get(COMPLETION_VARIABLE):
        return None
    load_msgspec()
    from cellos.cli.run_options import read

    given = read(arguments)
    if given is None:
        return None
    from cellos.cli.run import run

    return run(launcher, **given)  # type: ignore[arg-type]  # its parameters are the names of the table


def _flushed(code: int, failure: int) -> int:
    """The exit code after what is still buffered was written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        if isinstance(error, BrokenPipeError):
            return code or BROKEN_PIPE
        if not code:
            say(f"cellos: {OUTPUT_LOST}{error.strerror}")
        return code or failure
    return code


if __name__ == "__main__":
    main()
