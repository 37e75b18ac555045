"""Messages between a supervisor and a cell's init survive the way, in any pieces; what init tells is JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

import cellos
from cellos.sandbox.framing import framed
from cellos.sandbox.init import _Control, _json

TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=50)


@given(
    st.lists(st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.booleans(), st.lists(TEXT))), min_size=1, max_size=4),
    st.integers(1, 64),
)
def test_messages_come_as_they_went_in_any_pieces(messages: list[dict[str, object]], piece: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = b"".join(framed(message) for message in messages)
        control = _Control(os.dup(theirs.fileno()))
        received = []
        sent = 0
        for _ in messages:
            while sent < len(stream):
                sent += ours.send(stream[sent : sent + piece * 100])
            received.append(control.receive())
        control.socket.close()
        assert received == messages


@given(st.dictionaries(st.sampled_from(["failed", "errno", "text"]), st.one_of(TEXT, st.integers(-(2**31), 2**31), st.booleans())))
def test_what_init_tells_is_json(message: dict[str, object]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        control = _Control(os.dup(theirs.fileno()))
        control.send(message)
        control.socket.close()
        line = ours.recv(1 << 16)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == message


def test_a_character_beyond_sixteen_bits_stays_one_escape() -> None:
    assert json.loads(_json("a\U0001f600b")) == "a\ufffdb"


def test_the_launcher_starts_without_what_takes_long() -> None:
    package = os.path.dirname(os.path.dirname(os.path.abspath(cellos.__file__)))
    late = ("collections", "enum", "json", "re", "signal", "socket", "typing")
    script = (
        f"import sys; sys.path.insert(0, {package!r}); from cellos.sandbox import workshop; print([m for m in {late} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
