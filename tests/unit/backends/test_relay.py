"""The relay over real pipes, terminals and files. The command is played by the test: a pidfd is a pipe that becomes readable at its end."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cellos.backends.relay import Escaper, Relay
from cellos.errors import HostBackendError
from cellos.ports import Command, Output

PIPE_BYTES = 65536
"""What a pipe holds (pipe(7))."""
SOON = 30.0
"""Whatever takes longer has waited for somebody who does not come."""


class FakeProcess:
    """A command that ends when told. What the relay asks of it is in `asked`, with the time."""

    def __init__(self, *, ends_on: tuple[str, ...] = ("kill",)) -> None:
        self.pidfd, self._alive = os.pipe2(os.O_CLOEXEC)
        self.control: int | None = None
        self.asked: list[tuple[str, float]] = []
        self.ends = 0
        self._ends_on = ends_on
        self._lock = threading.Lock()

    def end(self) -> None:
        with self._lock:
            if self._alive >= 0:
                os.close(self._alive)
                self._alive = -1

    def on_control(self) -> None:
        raise AssertionError("this command has no control descriptor")

    def terminate(self) -> None:
        self._ask("terminate")

    def ended(self) -> None:
        self.ends += 1

    def kill(self) -> None:
        self._ask("kill")

    def _ask(self, what: str) -> None:
        self.asked.append((what, time.monotonic()))
        if what in self._ends_on:
            self.end()

    def close(self) -> None:
        self.end()
        os.close(self.pidfd)


@pytest.fixture
def process() -> Iterator[FakeProcess]:
    process = FakeProcess()
    yield process
    process.close()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


class Pipe:
    """A pipe, closed with the test."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe2(os.O_CLOEXEC)

    def close_reading(self) -> None:
        os.close(self.reading)
        self.reading = -1

    def close_writing(self) -> None:
        os.close(self.writing)
        self.writing = -1

    def fill(self) -> None:
        """Until nothing more goes in."""
        os.set_blocking(self.writing, False)
        try:
            while True:
                os.write(self.writing, b"." * 4096)
        except BlockingIOError:
            os.set_blocking(self.writing, True)

    def read_all(self) -> bytes:
        data = b""
        while chunk := os.read(self.reading, PIPE_BYTES):
            data += chunk
        return data

    def close(self) -> None:
        for descriptor in (self.reading, self.writing):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def pipe(_no_descriptor_is_left: None) -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def command(**members: object) -> Command:
    return Command(argv=["true"], environment={}, **members)  # type: ignore[arg-type]


def play(
    process: FakeProcess, order: Command, script: Callable[[list[int]], None], *, drain_seconds: float | None = None, written: bytes = b""
) -> tuple[str, tuple[bytes, bytes, bool]]:
    """Run the relay while `script` plays the command in a thread: it gets copies of the child ends and owns them. Then the command ends.

    `written`: what stands in standard output before anything else happens; a script that is ended meanwhile may come too late.
    """
    with Relay(order) as relay:
        ends = [os.dup(end) for end in relay.child_ends]
        os.write(ends[0], written)
        relay.release_child_ends()

        def act() -> None:
            try:
                script(ends)
            finally:
                for end in ends:
                    try:
                        os.close(end)
                    except OSError:
                        continue  # the script closed it
                process.end()

        thread = threading.Thread(target=act)
        thread.start()
        try:
            ended = relay.watch(process, started=time.monotonic(), drain_seconds=drain_seconds)
        finally:
            relay.close()
            thread.join(60)
        assert not thread.is_alive()
        return ended, relay.captured


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def waiting_bytes(pipe: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


def until_ended(process: FakeProcess) -> None:
    select.select([process.pidfd], [], [], 60)


# -- what is delivered ------------------------------------------------------------------------------------------------------------------


def test_delivers_and_captures_both_streams(process: FakeProcess, pipe: Pipe) -> None:
    def script(ends: list[int]) -> None:
        os.write(ends[0], b"out")
        os.write(ends[1], b"error")

    order = command(stdout=Output(descriptor=pipe.writing, capture_bytes=100), stderr=Output(capture_bytes=100))
    assert play(process, order, script) == ("exited", (b"out", b"error", False))
    pipe.close_writing()
    assert pipe.read_all() == b"out"
    assert process.asked == []


def test_output_that_nobody_wants_is_read_and_dropped(process: FakeProcess) -> None:
    ended, captured = play(process, command(), lambda ends: write_all(ends[0], b"x" * (PIPE_BYTES * 4)))
    assert (ended, captured) == ("exited", (b"", b"", False))


def test_capture_has_a_cap_and_the_descriptor_gets_all(process: FakeProcess, pipe: Pipe) -> None:
    data = os.urandom(PIPE_BYTES * 8)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_all()))
    reader.start()
    order = command(stdout=Output(descriptor=pipe.writing, capture_bytes=PIPE_BYTES + 7), stderr=Output(capture_bytes=4))
    ended, (out, error, truncated) = play(process, order, lambda ends: write_all(ends[0], data))
    pipe.close_writing()
    reader.join(60)
    assert ended == "exited"
    assert (out, error, truncated) == (data[: PIPE_BYTES + 7], b"", True)
    assert received == [data]


@pytest.mark.parametrize(("cap", "truncated"), [(5, False), (4, True), (0, False)])
def test_truncated_means_that_something_is_missing(process: FakeProcess, cap: int, truncated: bool) -> None:
    _, (out, _, answer) = play(process, command(stdout=Output(capture_bytes=cap)), lambda ends: write_all(ends[0], b"hello"))
    assert (out, answer) == (b"hello"[:cap], truncated)


def test_the_callers_descriptor_stays_as_it_was(process: FakeProcess, pipe: Pipe) -> None:
    play(process, command(stdout=Output(descriptor=pipe.writing)), lambda ends: write_all(ends[0], b"x"))
    assert os.get_blocking(pipe.writing)
    os.write(pipe.writing, b"y")
    assert os.read(pipe.reading, 10) == b"xy"


def test_output_of_a_descendant_after_the_end_is_waited_for_as_long_as_said(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 2 * SOON)
    keeper: list[int] = []
    started = time.monotonic()
    ended, (out, _, truncated) = play(
        process, command(stdout=Output(capture_bytes=9)), lambda ends: keeper.append(os.dup(ends[0])), drain_seconds=0.1
    )
    os.close(keeper[0])
    assert (ended, out, truncated) == ("exited", b"", True)
    assert time.monotonic() - started < SOON


def test_an_end_of_the_pipe_in_strange_hands_delays_nothing_and_loses_nothing(process: FakeProcess, pipe: Pipe) -> None:
    keeper: list[int] = []

    def hand_over(ends: list[int]) -> None:
        write_all(ends[0], b"all of it")
        keeper.append(os.dup(ends[0]))

    order = command(stdout=Output(descriptor=pipe.writing, wait=True, capture_bytes=20), deadline_seconds=60)
    ended, (out, _, truncated) = play(process, order, hand_over)
    os.close(keeper[0])
    assert (ended, out, truncated) == ("exited", b"all of it", False)
    assert os.read(pipe.reading, 20) == b"all of it"


# -- slow, stuck and lost readers -------------------------------------------------------------------------------------------------------


def talk_until_killed(process: FakeProcess) -> Callable[[list[int]], None]:
    def script(ends: list[int]) -> None:
        for end in ends[:2]:
            os.set_blocking(end, False)
        while not select.select([process.pidfd], [], [], 0.001)[0]:
            for end in ends[:2]:
                try:
                    os.write(end, b"line\n" * 999)
                except (BlockingIOError, BrokenPipeError):
                    continue

    return script


def unread(pipe: Pipe, **members: object) -> Command:
    """Both streams go to one pipe that nobody reads, as with `2>&1 | less`."""
    given = {"deadline_seconds": 0.2} | members
    return command(stdout=Output(descriptor=pipe.writing), stderr=Output(descriptor=os.dup(pipe.writing)), **given)


def test_a_reader_that_never_reads_does_not_delay_the_deadline(process: FakeProcess, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.2)
    pipe.fill()
    order = unread(pipe)
    started = time.monotonic()
    try:
        ended, (_, _, truncated) = play(process, order, talk_until_killed(process), written=b"late")
    finally:
        os.close(order.stderr.descriptor or 0)
    assert (ended, truncated) == ("deadline", True)
    assert [what for what, _ in process.asked] == ["kill"]
    assert time.monotonic() - started < SOON


def test_two_streams_into_one_full_pipe_do_not_block_us(process: FakeProcess, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.2)
    stop, stopper = os.pipe2(os.O_CLOEXEC)
    pipe.fill()

    def script(ends: list[int]) -> None:
        os.write(ends[0], b"x" * 4096)
        os.write(ends[1], b"x" * 4096)
        while any(waiting_bytes(end) for end in ends):  # until the relay holds both
            os.sched_yield()
        os.read(pipe.reading, 4096)  # room for one of them: both descriptors poll writable
        os.write(stopper, b"s")
        until_ended(process)

    order = unread(pipe, interrupt=stop, deadline_seconds=None)
    try:
        ended, _ = play(process, order, script)
    finally:
        for descriptor in (order.stderr.descriptor or 0, stop, stopper):
            os.close(descriptor)
    assert ended == "interrupted"


def test_a_stopped_terminal_does_not_delay_the_deadline(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.2)
    master, slave = pty.openpty()
    os.set_inheritable(master, False)
    try:
        termios.tcflow(slave, termios.TCOOFF)
        started = time.monotonic()
        order = command(stdout=Output(descriptor=slave, escape=True), deadline_seconds=0.2)
        ended, (_, _, truncated) = play(process, order, talk_until_killed(process), written=b"late")
        assert (ended, truncated) == ("deadline", True)
        assert time.monotonic() - started < SOON
    finally:
        termios.tcflow(slave, termios.TCOON)
        termios.tcflush(slave, termios.TCIOFLUSH)
        os.close(master)
        os.close(slave)


def test_a_slow_reader_gets_everything_after_the_end(process: FakeProcess, pipe: Pipe) -> None:
    data = os.urandom(PIPE_BYTES * 2)
    received: list[bytes] = []

    def read_later() -> None:
        until_ended(process)
        received.append(pipe.read_all())

    reader = threading.Thread(target=read_later)
    reader.start()
    ended, (_, _, truncated) = play(process, command(stdout=Output(descriptor=pipe.writing)), lambda ends: write_all(ends[0], data))
    pipe.close_writing()
    reader.join(60)
    assert (ended, truncated) == ("exited", False)
    assert received == [data]


def test_an_interrupt_ends_the_wait_for_a_stuck_reader(process: FakeProcess, pipe: Pipe) -> None:
    stop, stopper = os.pipe2(os.O_CLOEXEC)
    pipe.fill()
    process.ended = lambda: os.write(stopper, b"s")  # type: ignore[assignment,method-assign,return-value]

    try:
        order = command(stdout=Output(descriptor=pipe.writing), interrupt=stop)
        ended, (_, _, truncated) = play(process, order, lambda ends: None, written=b"late")
    finally:
        os.close(stop)
        os.close(stopper)
    assert (ended, truncated) == ("exited", True)


def test_after_an_interrupt_a_stuck_reader_is_not_waited_for(process: FakeProcess, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.2)
    stop, stopper = os.pipe2(os.O_CLOEXEC)
    os.write(stopper, b"s")
    pipe.fill()

    try:
        order = command(stdout=Output(descriptor=pipe.writing), interrupt=stop)
        ended, (_, _, truncated) = play(process, order, lambda _: until_ended(process), written=b"late")
    finally:
        os.close(stop)
        os.close(stopper)
    assert (ended, truncated) == ("interrupted", True)


def test_who_waits_gets_everything_after_the_deadline(process: FakeProcess, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.05)
    pipe.fill()
    reader = threading.Timer(0.3, lambda: os.read(pipe.reading, PIPE_BYTES))
    process.ended = reader.start  # type: ignore[method-assign]
    with Relay(command(stdout=Output(descriptor=pipe.writing, wait=True), deadline_seconds=50)) as relay:
        os.write(relay.child_ends[0], b"late")
        relay.release_child_ends()
        process.end()
        started = time.monotonic() - 100
        assert relay.watch(process, started=started) == "exited"
        waited = time.monotonic() - started
    reader.join(60)
    assert (relay.lost, relay.captured[2]) == (False, False)
    assert os.read(pipe.reading, PIPE_BYTES).endswith(b"late")
    assert relay.duration_ms <= (waited - 0.29) * 1000  # the reader's time is not the command's


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_given_up_is_called_lost(process: FakeProcess, pipe: Pipe, monkeypatch: pytest.MonkeyPatch, wait: bool) -> None:
    """Without `wait` after the time for it; with it only where the command was ended."""
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.1)
    pipe.fill()
    with Relay(command(stdout=Output(descriptor=pipe.writing, wait=wait), deadline_seconds=0.2)) as relay:
        os.write(relay.child_ends[0], b"late")
        relay.release_child_ends()
        if not wait:
            process.end()
        assert relay.watch(process, started=time.monotonic()) == ("deadline" if wait else "exited")
        assert relay.lost


def test_a_reader_that_is_gone_loses_nothing(process: FakeProcess, pipe: Pipe) -> None:
    pipe.close_reading()
    with Relay(command(stdout=Output(descriptor=pipe.writing))) as relay:
        os.write(relay.child_ends[0], b"late")
        relay.release_child_ends()
        process.end()
        assert relay.watch(process, started=time.monotonic()) == "exited"
        assert not relay.lost


@pytest.mark.parametrize("wait", [False, True])
def test_a_second_stop_request_ends_the_wait_for_a_stuck_reader(
    process: FakeProcess, pipe: Pipe, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 60.0)
    pipe.fill()
    stop, stopper = os.pipe2(os.O_CLOEXEC)
    os.write(stopper, b"s")

    def again() -> None:
        until_ended(process)
        os.close(stopper)

    thread = threading.Thread(target=again)
    order = command(stdout=Output(descriptor=pipe.writing, wait=wait, capture_bytes=9), stderr=Output(capture_bytes=9), interrupt=stop)
    try:
        with Relay(order) as relay:
            os.write(relay.child_ends[0], b"late")
            os.write(relay.child_ends[1], b"error")
            relay.release_child_ends()
            thread.start()
            started = time.monotonic()
            assert relay.watch(process, started=started) == "interrupted"
            assert time.monotonic() - started < 30
            assert (relay.lost, relay.captured) == (True, (b"late", b"error", True))  # what needs no reader is there
    finally:
        thread.join(60)
        os.close(stop)


def test_a_descendant_that_keeps_silent_does_not_cut_off_a_slow_reader(process: FakeProcess, pipe: Pipe) -> None:
    """The time for what a process that is not ours may still write is not the reader's."""
    pipe.fill()
    with Relay(command(stdout=Output(descriptor=pipe.writing, wait=True))) as relay:
        keeper = os.dup(relay.child_ends[0])
        os.write(keeper, b"late")
        relay.release_child_ends()
        process.end()
        reader = threading.Timer(0.3, lambda: os.read(pipe.reading, PIPE_BYTES))
        reader.start()
        try:
            assert relay.watch(process, started=time.monotonic(), drain_seconds=0.05) == "exited"
        finally:
            reader.join(60)
            os.close(keeper)
        assert not relay.lost
        assert os.read(pipe.reading, PIPE_BYTES).endswith(b"late")


def test_a_flood_does_not_delay_the_deadline(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.2)
    with Relay(command(deadline_seconds=0.2)) as relay:
        keeper = os.dup(relay.child_ends[0])
        relay.release_child_ends()
        child = subprocess.Popen(["cat", "/dev/zero"], stdout=keeper, stdin=subprocess.DEVNULL)
        try:
            assert relay.watch(process, started=time.monotonic(), drain_seconds=0.1) == "deadline"
            assert relay.duration_ms < 30_000
        finally:
            child.kill()
            child.wait(60)
            os.close(keeper)


def test_the_last_line_of_a_terminal() -> None:
    for text, is_open in ((b"abc", True), (b"abc\n", False), (b"", False)):
        process, (master, slave) = FakeProcess(), pty.openpty()
        try:
            with Relay(command(stdout=Output(descriptor=slave, escape=True), stderr=Output(capture_bytes=9))) as relay:
                os.write(relay.child_ends[1], b"elsewhere")
                os.write(relay.child_ends[0], text)
                relay.release_child_ends()
                process.end()
                relay.watch(process, started=time.monotonic())
                assert relay.open_line == is_open
        finally:
            process.close()
            os.close(master)
            os.close(slave)


def sigpipe_of_a_real_command(order: Command) -> tuple[int, tuple[bytes, bytes, bool]]:
    """`yes` under the relay; returns its exit status."""
    with Relay(order) as relay:
        child = subprocess.Popen(["yes"], stdout=relay.child_ends[0], stderr=relay.child_ends[1], stdin=subprocess.DEVNULL)
        pidfd = os.pidfd_open(child.pid)

        class Real(FakeProcess):
            def __init__(self) -> None:
                self.pidfd, self.control, self.asked, self.ends = pidfd, None, [], 0

            def kill(self) -> None:
                child.kill()

        try:
            relay.release_child_ends()
            relay.watch(Real(), started=time.monotonic())
            return child.wait(60), relay.captured
        finally:
            os.close(pidfd)


def test_when_the_reader_is_gone_the_command_gets_sigpipe(pipe: Pipe) -> None:
    pipe.close_reading()
    status, _ = sigpipe_of_a_real_command(command(stdout=Output(descriptor=pipe.writing), deadline_seconds=60))
    assert status == -signal.SIGPIPE


def test_while_we_still_capture_a_lost_reader_is_no_reason_to_stop(process: FakeProcess, pipe: Pipe) -> None:
    pipe.close_reading()
    order = command(stdout=Output(descriptor=pipe.writing, capture_bytes=PIPE_BYTES * 9))
    data = os.urandom(PIPE_BYTES * 8)
    assert play(process, order, lambda ends: write_all(ends[0], data)) == ("exited", (data, b"", False))


def test_a_terminal_that_hung_up_is_a_lost_reader() -> None:
    master, slave = pty.openpty()
    os.close(master)
    try:
        status, _ = sigpipe_of_a_real_command(command(stdout=Output(descriptor=slave), deadline_seconds=60))
    finally:
        os.close(slave)
    assert status == -signal.SIGPIPE


def test_a_full_disk_is_an_error_that_says_so(process: FakeProcess) -> None:
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(HostBackendError, match=r"output on: No space left on device"):
            play(process, command(stdout=Output(descriptor=full)), lambda ends: os.write(ends[0], b"x"))  # type: ignore[arg-type]
    finally:
        os.close(full)


def test_a_descriptor_that_is_not_open_is_an_error() -> None:
    with pytest.raises(HostBackendError, match=r"streams: Bad file descriptor"):
        Relay(command(stdout=Output(descriptor=9999)))
    with pytest.raises(HostBackendError, match=r"streams: Bad file descriptor"):
        Relay(command(stderr=Output(descriptor=9999)))


# -- standard input ---------------------------------------------------------------------------------------------------------------------


def test_input_is_relayed_to_its_end(process: FakeProcess, pipe: Pipe) -> None:
    data = os.urandom(PIPE_BYTES * 3)
    received: list[bytes] = []

    def script(ends: list[int]) -> None:
        whole = b""
        while chunk := os.read(ends[2], PIPE_BYTES):
            whole += chunk
        received.append(whole)

    def feed() -> None:
        write_all(pipe.writing, data)
        pipe.close_writing()

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert play(process, command(stdin=pipe.reading), script)[0] == "exited"
    feeder.join(60)
    assert received == [data]


def test_a_command_that_ends_does_not_wait_for_more_input(process: FakeProcess, pipe: Pipe) -> None:
    assert play(process, command(stdin=pipe.reading), lambda ends: None)[0] == "exited"


def test_a_command_that_closes_its_input_goes_on(process: FakeProcess, pipe: Pipe) -> None:
    os.write(pipe.writing, b"unread")

    def script(ends: list[int]) -> None:
        os.close(ends[2])
        os.write(ends[0], b"still here")

    ended, (out, _, _) = play(process, command(stdin=pipe.reading, stdout=Output(capture_bytes=99)), script)
    assert (ended, out) == ("exited", b"still here")


def test_a_command_that_never_reads_does_not_delay_the_deadline(process: FakeProcess, pipe: Pipe) -> None:
    pipe.fill()
    ended, _ = play(process, command(stdin=pipe.reading, deadline_seconds=0.1), lambda ends: until_ended(process))
    assert ended == "deadline"


def test_input_that_cannot_be_read_is_an_error_that_says_so(process: FakeProcess) -> None:
    directory = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(HostBackendError, match=r"input: Is a directory"):
            play(process, command(stdin=directory), lambda ends: None)
    finally:
        os.close(directory)


# -- deadline, grace, interrupt ---------------------------------------------------------------------------------------------------------


def test_at_the_deadline_without_grace_the_tree_is_killed(process: FakeProcess) -> None:
    started = time.monotonic()
    ended, _ = play(process, command(deadline_seconds=0.1), lambda ends: until_ended(process))
    assert ended == "deadline"
    assert [what for what, _ in process.asked] == ["kill"]
    assert 0.1 <= process.asked[0][1] - started < SOON


def test_grace_first_asks_and_then_kills(process: FakeProcess) -> None:
    started = time.monotonic()
    ended, _ = play(process, command(deadline_seconds=0.1, grace_seconds=0.2), lambda ends: until_ended(process))
    assert ended == "deadline"
    (first, asked_at), (second, killed_at) = process.asked
    assert (first, second) == ("terminate", "kill")
    assert asked_at - started >= 0.1
    assert killed_at - started >= 0.3


def test_a_command_that_obeys_is_not_killed() -> None:
    process = FakeProcess(ends_on=("terminate",))
    try:
        ended, _ = play(process, command(deadline_seconds=0.05, grace_seconds=30), lambda ends: until_ended(process))
    finally:
        process.close()
    assert ended == "deadline"
    assert [what for what, _ in process.asked] == ["terminate"]


@pytest.mark.parametrize(("grace", "asked"), [(0.0, ["kill"]), (0.05, ["terminate", "kill"])])
def test_an_interrupt_stops_the_command(process: FakeProcess, pipe: Pipe, grace: float, asked: list[str]) -> None:
    os.write(pipe.writing, b"s")
    order = command(interrupt=pipe.reading, grace_seconds=grace, deadline_seconds=30)
    assert play(process, order, lambda ends: until_ended(process))[0] == "interrupted"
    assert [what for what, _ in process.asked] == asked


@pytest.mark.parametrize(("said", "asked"), [(b"", ["kill"]), (b"x", ["terminate", "kill"])])
def test_an_interrupt_without_a_writer_kills_at_once(process: FakeProcess, said: bytes, asked: list[str]) -> None:
    """Also in the time that an earlier request left the command."""
    reading, writing = os.pipe()
    os.write(writing, said)

    def hang_up(ends: list[int]) -> None:
        while [what for what, _ in process.asked] != asked[:-1]:
            time.sleep(0.001)
        os.close(writing)
        until_ended(process)

    try:
        assert play(process, command(interrupt=reading, grace_seconds=3600.0), hang_up)[0] == "interrupted"
    finally:
        os.close(reading)
    assert [what for what, _ in process.asked] == asked


def test_a_deadline_during_the_grace_of_an_interrupt_changes_nothing(process: FakeProcess, pipe: Pipe) -> None:
    os.write(pipe.writing, b"s")
    order = command(interrupt=pipe.reading, grace_seconds=0.2, deadline_seconds=0.05)
    assert play(process, order, lambda ends: until_ended(process))[0] == "interrupted"
    assert [what for what, _ in process.asked] == ["terminate", "kill"]


def test_a_tree_that_cannot_be_killed_was_ended_by_the_deadline_all_the_same(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellos.backends.relay._KILL_SECONDS", 0.05)
    process = FakeProcess(ends_on=())
    pipe.fill()
    try:
        with Relay(command(deadline_seconds=0.05, stdout=Output(descriptor=pipe.writing))) as relay:
            os.write(relay.child_ends[0], b"late")
            relay.release_child_ends()
            assert relay.watch(process, started=time.monotonic()) == "deadline"
            assert (relay.lost, relay.captured[2]) == (True, True)
    finally:
        process.close()
    assert [what for what, _ in process.asked] == ["kill"]


def test_a_deadline_counts_from_the_start_that_was_given(process: FakeProcess) -> None:
    with Relay(command(deadline_seconds=60)) as relay:
        relay.release_child_ends()
        assert relay.watch(process, started=time.monotonic() - 61) == "deadline"


@pytest.mark.parametrize("seconds", [3e6, 1e10, 1e18])
def test_a_deadline_may_be_far_away(process: FakeProcess, seconds: float) -> None:
    assert play(process, command(deadline_seconds=seconds), lambda ends: None)[0] == "exited"


def test_what_comes_over_control_is_heard_before_the_end(process: FakeProcess, pipe: Pipe) -> None:
    heard: list[bytes] = []
    process.control = pipe.reading
    process.on_control = lambda: heard.append(os.read(pipe.reading, 99))  # type: ignore[method-assign]
    os.write(pipe.writing, b"exited")
    process.end()
    with Relay(command()) as relay:
        relay.release_child_ends()
        relay.watch(process, started=time.monotonic())
    assert heard == [b"exited"]


# -- escaping ---------------------------------------------------------------------------------------------------------------------------


def escape(*chunks: bytes) -> bytes:
    escaper = Escaper()
    return b"".join(escaper(chunk) for chunk in chunks) + escaper(b"", final=True)


def controls(text: str) -> list[str]:
    return [character for character in text if unicodedata.category(character) == "Cc" and character not in "\n\t\r"]


BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

NASTY = (
    st.binary()
    | st.text().map(str.encode)
    | st.text(alphabet=[*map(chr, range(0xA1)), *BIDI, "é", "日", "😀"]).map(str.encode)
    | st.lists(
        st.sampled_from([b"\x1b", b"\x9b", b"\xc2", b"\xc2\x9b", b"\xe2", b"\x80", b"\xae", b"\xf0\x9f", b"\xed\xa0\x80", b"a"])
    ).map(b"".join)
)


@given(data=NASTY, cuts=st.lists(st.integers(0, 60), max_size=5))
@example(data="\u009b2J".encode(), cuts=[1])
@example(data=b"\x9b2J", cuts=[])
@example(data="\u202e".encode(), cuts=[1, 2])
@example(data=b"\xc0\x9b", cuts=[1])  # an overlong form
def test_nothing_that_a_terminal_would_obey_comes_out(data: bytes, cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(data)]
    whole = escape(*(data[start:end] for start, end in itertools.pairwise(borders)))
    text = whole.decode()  # and it is valid UTF-8
    assert controls(text) == []
    assert not set(text) & set(BIDI)
    assert whole == escape(data), "it depends on where the chunks were cut"


@given(text=st.text(alphabet=st.characters(exclude_categories=["C", "Z"])) | st.sampled_from(["naïve\tcafé\r\n", "日本語 😀", "a b", ""]))
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert escape(text.encode()) == text.encode()


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_every_control_character_is_shown_or_kept(code: int) -> None:
    character = chr(code)
    expected = character if character in "\n\t\r" else f"\\x{code:02x}"
    assert escape(character.encode()).decode() == expected


@pytest.mark.parametrize("data", [b"\xc2", b"\xe2\x80", b"\xf0\x9f\x98"])
def test_a_character_cut_off_at_the_end_is_shown(data: bytes) -> None:
    assert escape(data).decode() == "".join(f"\\x{byte:02x}" for byte in data)


def test_the_relay_escapes_what_goes_out_and_captures_what_came(process: FakeProcess, pipe: Pipe) -> None:
    order = command(stdout=Output(descriptor=pipe.writing, escape=True, capture_bytes=99))
    _, (out, _, _) = play(process, order, lambda ends: write_all(ends[0], b"a\x1b[2Jb\xc2"))
    assert out == b"a\x1b[2Jb\xc2"
    pipe.close_writing()
    assert pipe.read_all() == b"a\\x1b[2Jb\\xc2"
