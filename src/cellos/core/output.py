"""The output of a cell, as `GET /v1/cells/…/output` gives it in lines of JSON: written by the server, read by clients.

{"runId": "…", "seq": 7, "stream": "stdout", "offset": 0, "text": "…"}        or "base64", where it is no UTF-8
{"runId": "…", "end": true, "output": "complete"}       the last line, with "truncated": true where not all was kept
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal

import msgspec

from cellos.errors import ServerError

NDJSON = "application/x-ndjson"
STREAMS = ("stdout", "stderr")

OutputState = Literal["open", "complete", "partial", "none", "gone"]
"""Of a run's output: it may yet grow; it is there from its beginning to its end, or not quite; nothing was kept of it, or no longer is."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Some output: `offset` is its place in its stream, `sequence` where to go on behind it."""

    run_id: str | None
    sequence: int
    stream: str
    offset: int
    data: bytes


class OutputEnd(msgspec.Struct, frozen=True, kw_only=True):
    """There is no more. `truncated`: the run wrote more than is kept."""

    run_id: str | None
    state: str
    truncated: bool = False


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"run_id": "runId"}):
    run_id: str | None = None
    seq: int = 0
    stream: str = ""
    offset: int | None = None
    text: str | None = None
    base64: str | None = None
    end: bool = False
    output: str = ""
    truncated: bool = False


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


def line(each: Piece | OutputEnd) -> bytes:
    """With its line feed."""
    if isinstance(each, OutputEnd):
        found = _Line(run_id=each.run_id, end=True, output=each.state, truncated=each.truncated)
    else:
        try:
            text, encoded = each.data.decode(), None
        except UnicodeDecodeError:
            text, encoded = None, base64.b64encode(each.data).decode()
        found = _Line(run_id=each.run_id, seq=each.sequence, stream=each.stream, offset=each.offset, text=text, base64=encoded)
    return _encode(found) + b"\n"


def read_line(text: bytes) -> Piece | OutputEnd:
    """Raises ServerError."""
    try:
        found = _decode(text)
        if found.end:
            return OutputEnd(run_id=found.run_id, state=found.output, truncated=found.truncated)
        data = (found.text or "").encode() if found.base64 is None else base64.b64decode(found.base64, validate=True)
    except (msgspec.DecodeError, binascii.Error, UnicodeError) as error:
        raise ServerError(f"cannot read a line of output: {error}") from error
    return Piece(run_id=found.run_id, sequence=found.seq, stream=found.stream, offset=found.offset or 0, data=data)
