"""Descriptors that come over a socket are closed on exec from the first moment, and counted."""

from __future__ import annotations

import _socket
import os
from collections.abc import Iterator

import pytest

from cellos.sandbox.descriptors import receive, send

Pair = tuple[_socket.socket, _socket.socket]


@pytest.fixture(params=[_socket.SOCK_STREAM, _socket.SOCK_SEQPACKET], ids=["stream", "packets"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, request.param | _socket.SOCK_CLOEXEC, 0)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


def test_they_are_not_inherited(pair: Pair, file: int) -> None:
    os.set_inheritable(file, True)
    assert send(pair[0], b"here", [file, file]) == 4
    data, received = receive(pair[1], 100, 4)
    assert (data, len(received)) == (b"here", 2)
    assert [os.get_inheritable(descriptor) for descriptor in received] == [False, False]
    assert all(os.path.sameopenfile(descriptor, file) for descriptor in received)
    for descriptor in received:
        os.close(descriptor)


def test_data_without_descriptors(pair: Pair) -> None:
    assert send(pair[0], b"plain", []) == 5
    assert receive(pair[1], 100, 4) == (b"plain", [])


def test_the_end_is_empty(pair: Pair) -> None:
    pair[0].close()
    assert receive(pair[1], 100, 4) == (b"", [])


@pytest.mark.parametrize("number", [1, 60, 253])
def test_as_many_as_the_kernel_passes(pair: Pair, file: int, number: int) -> None:
    send(pair[0], b"x", [file] * number)
    _, received = receive(pair[1], 100, 253)
    assert len(received) == number
    for descriptor in received:
        os.close(descriptor)


def test_more_than_the_kernel_passes_is_an_error(pair: Pair, file: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        send(pair[0], b"x", [file] * 254)


def test_more_than_were_asked_for_do_not_stay_open(pair: Pair, file: int) -> None:
    send(pair[0], b"x", [file] * 5)
    before = len(os.listdir("/proc/self/fd"))
    data, received = receive(pair[1], 100, 2)
    assert data == b"x"
    assert len(received) >= 2  # a control buffer has room for an even number
    assert len(os.listdir("/proc/self/fd")) == before + len(received)
    for descriptor in received:
        os.close(descriptor)
