from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.output import OutputEnd, Piece, line, read_line
from cellos.errors import ServerError


@given(st.binary(), st.sampled_from(["stdout", "stderr"]), st.integers(0, 1 << 40), st.none() | st.text(max_size=5))
def test_pieces_both_ways(data: bytes, stream: str, offset: int, run: str | None) -> None:
    piece = Piece(run_id=run, sequence=7, stream=stream, offset=offset, data=data)
    written = line(piece)
    assert written.count(b"\n") == 1
    assert read_line(written) == piece


def test_as_they_are_written() -> None:
    assert json.loads(line(Piece(run_id="r", sequence=7, stream="stdout", offset=0, data="é\n".encode()))) == {
        "runId": "r",
        "seq": 7,
        "stream": "stdout",
        "offset": 0,
        "text": "é\n",
    }
    assert json.loads(line(Piece(run_id="r", sequence=7, stream="stderr", offset=9, data=b"\xff")))["base64"] == "/w=="
    end = OutputEnd(run_id="r", state="complete")
    assert line(end) == b'{"runId":"r","end":true,"output":"complete"}\n'
    assert read_line(line(OutputEnd(run_id=None, state="open", truncated=True))) == OutputEnd(run_id=None, state="open", truncated=True)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"seq":"x"}', b'{"base64":"%"}', b'{"text":1}', b'{"text":"\\ud800"}', b"\xff"])
def test_what_is_no_line(text: bytes) -> None:
    with pytest.raises(ServerError, match="cannot read a line of output"):
        read_line(text)
