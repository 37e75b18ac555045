"""From a cell's output to the stream CELLOS_OUTPUT: secrets masked in the thread of the run, the rest written by the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import cast

from cellos.eventlog.output import MAX_RUN_BYTES, OutputStream, OutputWriter
from cellos.supervisor.output import STREAMS, Masker
from cellos.supervisor.run import Recorder


class StreamRecorder:
    """Takes what one command writes. `also` gets the same, unmasked, and masks for itself."""

    def __init__(self, loop: asyncio.AbstractEventLoop, writer: OutputWriter, secrets: Iterable[str], also: Recorder | None) -> None:
        secrets = tuple(secrets)
        self._loop = loop
        self._writer = writer
        self._maskers = {stream: Masker(secrets) for stream in STREAMS}
        self._room = MAX_RUN_BYTES + 1
        """One byte more than is kept tells the writer that there was more; the rest would only wait in the loop's queue."""
        self._also = also

    def write(self, stream: str, data: bytes) -> None:
        """Of ports: `stdout` or `stderr`, and the bytes."""
        if self._room > 0:
            self._pass_on(stream, self._maskers[stream].feed(data))
        if self._also is not None:
            self._also.write(stream, data)

    def close(self) -> None:
        """The command is gone."""
        for stream in STREAMS:
            self._pass_on(stream, self._maskers[stream].finish())
        if self._also is not None:
            self._also.close()

    def _pass_on(self, stream: str, data: bytes) -> None:
        data = data[: self._room]
        self._room -= len(data)
        if data:
            self._loop.call_soon_threadsafe(self._writer.add, cast("OutputStream", stream), data)


def recording(
    loop: asyncio.AbstractEventLoop, writer: OutputWriter, also: Callable[[Iterable[str]], Recorder] | None
) -> Callable[[Iterable[str]], Recorder]:
    """What `Deps.record_output` asks for. `also`: what the supervisor's variables want of the output."""

    def record(secrets: Iterable[str]) -> Recorder:
        secrets = tuple(secrets)
        return StreamRecorder(loop, writer, secrets, also(secrets) if also is not None else None)

    return record
