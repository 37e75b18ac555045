"""A daemon as a process: its command line, its exit codes, how it is told to end.

Exit code 0 after SIGTERM or SIGINT, 1 where it could not start or go on (the log says why), 128 + n where a second signal n came.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from cellos.daemon.logs import set_up_logging
from cellos.errors import CellosError


def command(name: str, version: str, text: str, work: Callable[[Mapping[str, str]], None]) -> NoReturn:
    """The command `name` without arguments; `text` is its help. `work` gets the environment and returns when it is told to end."""
    match sys.argv[1:]:
        case []:
            sys.exit(guarded(name, work))
        case ["--version" | "-V"]:
            sys.stdout.write(f"{name} {version}\n")
        case ["--help" | "-h"]:
            sys.stdout.write(text)
        case [first, *_]:
            sys.stderr.write(f"Error: {name} takes no argument {first} (see: {name} --help)\n")
            sys.exit(1)
    sys.exit(0)


def guarded(name: str, work: Callable[[Mapping[str, str]], None]) -> int:
    """The exit code of `work`. The log is where a service tells what ended it."""
    set_up_logging(os.environ.get("RUST_LOG", ""))
    log = logging.getLogger(name.replace("-", ".", 1))
    try:
        work(os.environ)
    except CellosError as error:
        log.error("%s fatal", name, extra={"fields": {"error": str(error), "code": error.code}})  # noqa: TRY400  # it says what to do
        return 1
    except Exception:
        log.exception("%s fatal", name)
        return 1
    return 0


def stop_event(signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT)) -> asyncio.Event:
    """Set by the first of these signals. The second one ends the process where it stands."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def heard(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in signals:
        loop.add_signal_handler(number, heard, number)
    return stop


def raise_open_files() -> int:
    """As many open files as the system lets us have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            logging.getLogger("cellos.daemon").debug("the limit of open files stays", extra={"fields": {"limit": soft}})
    return soft
