"""The parts of `cellos up`: programs of ours as children, each on a lifeline (eventlog/lifeline.py), started again whenever one ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping

from cellos.errors import ServerError
from cellos.eventlog import lifeline
from cellos.eventlog.connect import pause
from cellos.eventlog.embedded import end, ended_by

GRACE_SECONDS = 10.0
"""What a part has to end in order."""
STEADY_SECONDS = 30.0
"""A part that ran so long is started again at once."""
_LONGEST_LINE = 1 << 16
_FATAL = " fatal"
"""How the message of the record ends that a service ends with (daemon/process.py)."""


class Part:
    """One program. `held` is a descriptor that it keeps open as long as it lives; `listener`, one to listen on, stays the caller's."""

    def __init__(
        self,
        name: str,
        module: str,
        log: str,
        variables: Mapping[str, str],
        *,
        held: int,
        listener: int | None = None,
        grace: float = GRACE_SECONDS,
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self.log = log
        self._module = module
        self._variables = variables
        self._held = held
        self._listener = listener
        self._grace = grace
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0.0
        self._logged = 0
        """The size of its log when it was started."""

    @property
    def listens(self) -> bool:
        """Whether it is the one that was given a listener."""
        return self._listener is not None

    async def start(self) -> None:
        """With a new log. Returns at once."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.log)
        await self._launch()

    async def wait(self) -> None:
        """Until it ends."""
        assert self._process is not None
        await self._process.wait()

    async def keep(self) -> None:
        """Start it again, as often as it ends. Does not return."""
        attempt = 0
        while self._process is not None:
            code = await self._process.wait()
            attempt = 0 if time.monotonic() - self._started > STEADY_SECONDS else attempt + 1
            by = ended_by(code)
            why = "" if by else self._last_words()
            ending = f"ended {f'by {by}' if by else f'with exit code {code}'} and is started again"
            self._tell(f"{self.name} {ending}{f': {why}' if why else ''} (log: {self.log})")
            await asyncio.sleep(pause(attempt) if attempt > 1 else 0)
            await self._launch()

    async def stop(self) -> None:
        """In order. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            await end(process, self._grace + 5)

    def failure(self, how: str) -> ServerError:
        """That it did not come up, with what it said itself."""
        return ServerError(f"{self.name} {how}: {self._last_words() or 'it said nothing'}; its log is {self.log}")

    def _last_words(self) -> str:
        return last_words(self.log, self._logged)

    async def _launch(self) -> None:
        options = [f"--grace={self._grace:g}"] + ([] if self._listener is None else [f"--listen={self._listener}"])
        # -P: nothing is imported from the directory that we happen to be in.
        program = [sys.executable, "-P", "-m", self._module]
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._logged = os.fstat(log).st_size
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", lifeline.__file__, *options, *program),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._variables,
                start_new_session=True,  # ^C in a terminal is for its owner, who ends the parts in order
                pass_fds=(self._held,) if self._listener is None else (self._held, self._listener),
            )
        finally:
            os.close(log)
        self._started = time.monotonic()


def last_words(path: str, start: int = 0) -> str:
    """Why a part ended, by what its log has behind `start`: a fatal error, or its very last line if that is no record of success.

    Empty: it did not say. What it complained of while it ran is not why it ended.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last = ""
    for distance, line in enumerate(reversed(lines)):
        try:
            record = json.loads(line)
            fields, is_error = record["fields"], record["level"] == "ERROR"
            words = str(fields.get("error") or fields["message"]) if is_error else ""
            if is_error and str(fields["message"]).endswith(_FATAL):
                return words
        except (ValueError, LookupError, TypeError, AttributeError):
            words = line
        if distance == 0:
            last = words
    return last
