"""What a program on a lifeline is given."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from cellos.eventlog import lifeline
from cellos.http.listener import listen

TELL = """
import json, os, socket
listener = socket.socket(fileno=3)
held = [name for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}") == "/dev/zero"]
print(json.dumps([os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] == str(os.getpid()), listener.getsockname(), len(held)]))
"""


@pytest.mark.parametrize(("before", "held"), [("", 0), ("exec 3</dev/zero; ", 1)], ids=["3 is free", "3 is taken"])
def test_a_socket_is_handed_over_as_descriptor_3(before: str, held: int) -> None:
    with listen("127.0.0.1", 0) as listener:
        number = listener.fileno()
        command = [sys.executable, "-I", "-S", lifeline.__file__, f"--listen={number}", sys.executable, "-c", TELL]
        started = subprocess.Popen(
            ["sh", "-c", before + 'exec "$@"', "sh", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(number,), text=True
        )
        with started:
            assert started.stdout is not None
            told = json.loads(started.stdout.read())
        assert started.returncode == 0
        assert told == ["1", True, list(listener.getsockname()), held]


def test_the_port_is_free_when_the_program_has_ended() -> None:
    with listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        command = [
            sys.executable,
            "-I",
            "-S",
            lifeline.__file__,
            f"--listen={listener.fileno()}",
            "/bin/sh",
            "-c",
            "echo up; exec sleep 1000",
        ]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(listener.fileno(),))
    with started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"up\n"
        socket.create_connection(address, 10).close()
    assert started.wait() == 128 + 15
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 10)


COUNT = """
import os, sys, time
held = [name for name in os.listdir("/proc/self/fd") if "/memfd:" in os.path.realpath(f"/proc/self/fd/{name}")]
print(sys.stdin.read(), held, flush=True)
while True:
    time.sleep(0.01)
"""


def test_a_program_is_given_its_input_and_ends_when_its_time_is_over() -> None:
    given = os.memfd_create("input")
    os.write(given, b"to be read")
    os.lseek(given, 0, os.SEEK_SET)
    later = time.clock_gettime(time.CLOCK_BOOTTIME) + 300
    options = [f"--stdin={given}", f"--until={later}"]
    command = [sys.executable, "-I", "-S", lifeline.__file__, *options, sys.executable, "-c", COUNT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(given,)) as started:
        os.close(given)
        assert started.stdin is not None
        assert started.stdout is not None
        assert started.stdout.readline() == b"to be read ['0']\n"
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        started.stdin.write(f"{later + 300}\n{began + 0.2}\n".encode())
        started.stdin.flush()
        assert started.wait(60) == 128 + 9  # at once: nobody was asked to end in order
        assert time.clock_gettime(time.CLOCK_BOOTTIME) >= began + 0.2


def test_a_program_with_a_time_still_ends_when_its_owner_is_gone() -> None:
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + 300
    program = ["/bin/sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done"]
    command = [sys.executable, "-I", "-S", lifeline.__file__, f"--until={until}", *program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        assert started.stdout.readline() == b"up\n"
        started.stdin.close()
        assert started.wait(60) == 7
