"""What every CellBackend promises, as tests. An embedder's own backend passes them like ours do:

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def backend(self): return MyBackend()

The programs that the tests run are methods, so that a backend which has no shell can put its own in their place.
"""

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.errors import ExportError, HostBackendError
from cellos.ports import CellBackend, Command, CommandResult, LiveCell, Output

CAPTURE = Output(capture_bytes=1 << 21)
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
SOON = 0.3
"""Seconds: a deadline that a test waits for."""
LATE = 60.0
"""A deadline that nothing here reaches, so that a broken backend fails a test instead of hanging it."""
AT_ONCE = 16


class BackendConformance:
    """The suite. Subclasses give the fixture `backend`."""

    work_directory: str | None = "/work"
    """Where the cell sees its work directory; None where that is not the same in every cell."""

    def exits(self, code: int) -> list[str]:
        return ["sh", "-c", f"exit {code}"]

    def dies(self, signal: int) -> list[str]:
        return ["sh", "-c", f"kill -{signal} $$"]

    def writes(self, out: str, error: str = "") -> list[str]:
        return ["sh", "-c", 'printf %s "$1"; printf %s "$2" >&2', "sh", out, error]

    def environment(self) -> list[str]:
        return ["env"]

    def copies(self) -> list[str]:
        return ["cat"]

    def sleeps(self) -> list[str]:
        return ["sleep", "1000"]

    def stubborn(self) -> list[str]:
        return ["sh", "-c", "trap '' TERM; while :; do sleep 1000; done"]

    def leaves_a_child(self) -> list[str]:
        return ["sh", "-c", "sleep 1000 & exit 0"]

    def asks(self, path: str) -> list[str]:
        program = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdout.write(s.makefile().read())"
        return ["python3", "-c", program, path]

    def reads_status(self) -> list[str]:
        return ["cat", "/proc/self/status"]

    def makes_file(self, path: str, text: str) -> list[str]:
        return ["sh", "-c", 'printf %s "$2" > "$1"', "sh", path, text]

    def makes_link(self, path: str) -> list[str]:
        return ["ln", "-s", "/etc/passwd", path]

    def makes_fifo(self, path: str) -> list[str]:
        return ["mkfifo", path]

    def not_executable(self) -> list[str]:
        return ["/etc/passwd"]

    # -- how a command ends

    @pytest.mark.parametrize("code", [0, 1, 126, 255])
    def test_an_exit_code(self, backend: CellBackend, code: int) -> None:
        result = self.run(backend, self.exits(code))
        assert (result.ended, result.exit_code, result.signal, result.spawn_error) == ("exited", code, None, None)

    @pytest.mark.parametrize("signal", [6, 9, 15])
    def test_a_signal(self, backend: CellBackend, signal: int) -> None:
        result = self.run(backend, self.dies(signal))
        assert (result.ended, result.exit_code, result.signal, result.spawn_error) == ("exited", None, signal, None)

    def test_a_program_that_is_not_there(self, backend: CellBackend) -> None:
        calls: list[str] = []
        result = self.run(backend, ["/no/such/program"], on_started=lambda: calls.append("started"))
        assert (result.exit_code, result.signal, result.spawn_errno) == (None, None, errno.ENOENT)
        assert result.spawn_error == "No such file or directory (os error 2)"
        assert calls == [], "it was never started"

    def test_a_program_that_cannot_be_executed(self, backend: CellBackend) -> None:
        result = self.run(backend, self.not_executable())
        assert (result.exit_code, result.signal, result.spawn_errno) == (None, None, errno.EACCES)
        assert result.spawn_error == "Permission denied (os error 13)"

    def test_a_start_is_told_once(self, backend: CellBackend) -> None:
        calls: list[str] = []
        self.run(backend, self.exits(3), on_started=lambda: calls.append("started"))
        assert calls == ["started"]

    def test_a_failure_to_note_the_start_kills(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell, pytest.raises(ZeroDivisionError):
            cell.run(command(self.sleeps()), on_started=lambda: divide(1, 0))

    def test_what_a_command_leaves_running_is_killed(self, backend: CellBackend) -> None:
        result = self.run(backend, self.leaves_a_child())
        assert (result.ended, result.exit_code) == ("exited", 0)

    # -- time and interruption

    def test_a_deadline_without_grace_kills_at_once(self, backend: CellBackend) -> None:
        result = self.run(backend, self.sleeps(), deadline_seconds=SOON)
        assert (result.ended, result.signal) == ("deadline", 9)
        assert result.duration_ms >= SOON * 1000

    def test_a_deadline_of_nothing(self, backend: CellBackend) -> None:
        assert self.run(backend, self.sleeps(), deadline_seconds=0.0).ended == "deadline"

    def test_grace_lets_a_command_end_itself(self, backend: CellBackend) -> None:
        result = self.run(backend, self.sleeps(), deadline_seconds=SOON, grace_seconds=LATE)
        assert (result.ended, result.signal) == ("deadline", 15)

    def test_after_the_grace_it_is_killed(self, backend: CellBackend) -> None:
        result = self.run(backend, self.stubborn(), deadline_seconds=SOON, grace_seconds=SOON)
        assert (result.ended, result.signal) == ("deadline", 9)

    @pytest.mark.parametrize("grace", [0.0, LATE])
    def test_an_interrupt(self, backend: CellBackend, grace: float) -> None:
        reading, writing = os.pipe()
        try:
            result = self.run(
                backend, self.sleeps(), interrupt=reading, grace_seconds=grace, on_started=lambda: divide(os.write(writing, b"x"), 1)
            )
        finally:
            os.close(reading)
            os.close(writing)
        assert (result.ended, result.signal) == ("interrupted", 15 if grace else 9)

    def test_an_interrupt_that_came_before(self, backend: CellBackend) -> None:
        reading, writing = os.pipe()
        os.close(writing)  # its end is readable, too
        try:
            assert self.run(backend, self.sleeps(), interrupt=reading).ended == "interrupted"
        finally:
            os.close(reading)

    # -- streams and environment

    def test_streams_are_captured_apart(self, backend: CellBackend) -> None:
        result = self.run(backend, self.writes("out", "error"))
        assert (result.stdout, result.stderr, result.truncated) == (b"out", b"error", False)

    def test_a_cap_on_what_is_captured(self, backend: CellBackend) -> None:
        result = self.run(backend, self.writes("0123456789", "ab"), stdout=Output(capture_bytes=4))
        assert (result.stdout, result.stderr, result.truncated) == (b"0123", b"ab", True)

    def test_what_fits_exactly_is_whole(self, backend: CellBackend) -> None:
        result = self.run(backend, self.writes("0123"), stdout=Output(capture_bytes=4))
        assert (result.stdout, result.truncated) == (b"0123", False)

    def test_a_descriptor_gets_everything(self, backend: CellBackend, tmp_path: Any) -> None:
        with (tmp_path / "out").open("wb+") as file:
            result = self.run(backend, self.writes("0123456789"), stdout=Output(descriptor=file.fileno(), capture_bytes=2))
            assert os.pread(file.fileno(), 100, 0) == b"0123456789"
        assert result.stdout == b"01"

    def test_much_output_arrives_whole_and_in_order(self, backend: CellBackend) -> None:
        text = "".join(f"{number:07}\n" for number in range(15_000))
        assert self.run(backend, self.writes(text)).stdout == text.encode()

    def test_nothing_is_inherited(self, backend: CellBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OF_THE_HOST", "1")
        given = {**ENVIRONMENT, "EMPTY": "", "TEXT": "café = ✓"}
        result = self.run(backend, self.environment(), environment=given)
        assert dict(line.split("=", 1) for line in result.stdout.decode().splitlines()) == given

    def test_without_stdin_there_is_an_end_of_file(self, backend: CellBackend) -> None:
        assert self.run(backend, self.copies()).stdout == b""

    def test_stdin_is_relayed(self, backend: CellBackend) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"from outside")
        os.close(writing)
        try:
            assert self.run(backend, self.copies(), stdin=reading).stdout == b"from outside"
        finally:
            os.close(reading)

    def test_a_stdin_that_nobody_reads_holds_nothing_up(self, backend: CellBackend) -> None:
        reading, writing = os.pipe()
        try:
            assert self.run(backend, self.exits(0), stdin=reading).exit_code == 0
        finally:
            os.close(reading)
            os.close(writing)

    def test_output_is_heard_of_and_relayed_all_the_same(self, backend: CellBackend, tmp_path: Any) -> None:
        heard = {"stdout": b"", "stderr": b""}
        with (tmp_path / "out").open("wb+") as file:
            result = self.run(
                backend,
                self.writes("0123456789\x1b", "error"),
                stdout=Output(descriptor=file.fileno(), capture_bytes=4, escape=True),
                on_output=lambda stream, data: heard.update({stream: heard[stream] + data}),
            )
            passed_on = os.pread(file.fileno(), 100, 0)
        assert heard == {"stdout": b"0123456789\x1b", "stderr": b"error"}, "as it was written"
        assert (passed_on[:10], result.stdout, result.stderr, result.truncated) == (b"0123456789", b"0123", b"error", True)

    def test_output_that_nobody_else_wants_is_heard_of(self, backend: CellBackend) -> None:
        heard: list[tuple[str, bytes]] = []
        text = "".join(f"{number:07}\n" for number in range(15_000))
        nowhere = Output()
        result = self.run(
            backend, self.writes(text), stdout=nowhere, stderr=nowhere, on_output=lambda stream, data: heard.append((stream, data))
        )
        assert {stream for stream, _ in heard} == {"stdout"}, "nothing is told of a stream that stayed empty"
        assert b"".join(data for _, data in heard) == text.encode()
        assert (result.stdout, result.truncated) == (b"", False)

    def test_a_failure_to_note_output_kills(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell, pytest.raises(ZeroDivisionError):
            cell.run(command(self.writes("x"), on_output=lambda stream, data: divide(1, 0)), on_started=nothing)

    # -- the socket

    def test_a_command_reaches_the_socket(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell:
            listener = cell.listen()
            with socket.socket(fileno=listener.descriptor) as listening:
                server = threading.Thread(target=answer, args=(listening, b"hello"))
                server.start()
                result = cell.run(command(self.asks(listener.path)), on_started=nothing)
                server.join()
            assert (result.exit_code, result.stdout) == (0, b"hello"), result

    def test_the_socket_is_asked_for_once(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell:
            os.close(cell.listen().descriptor)
            with pytest.raises(HostBackendError):
                cell.listen()

    def test_without_a_listener_nobody_answers(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell:
            listener = cell.listen()
            os.close(listener.descriptor)
            assert cell.run(command(self.asks(listener.path)), on_started=nothing).exit_code == 1

    def test_each_cell_has_a_socket_of_its_own(self, backend: CellBackend) -> None:
        with self.cell(backend) as one, self.cell(backend) as other:
            listeners = [one.listen(), other.listen()]
            with socket.socket(fileno=listeners[0].descriptor) as first, socket.socket(fileno=listeners[1].descriptor) as second:
                first.settimeout(LATE)
                second.settimeout(0)
                server = threading.Thread(target=answer, args=(first, b"mine"))
                server.start()
                assert one.run(command(self.asks(listeners[0].path)), on_started=nothing).stdout == b"mine"
                server.join()
                with pytest.raises(BlockingIOError):
                    second.accept()

    def test_nothing_stays_of_a_socket_that_nobody_used(self, backend: CellBackend) -> None:
        before = os.listdir("/proc/self/fd")
        with self.cell(backend) as cell:
            listener = cell.listen()
            os.close(listener.descriptor)
        assert not os.path.exists(listener.path)
        assert os.listdir("/proc/self/fd") == before

    # -- artifacts

    def test_a_file_of_the_work_directory(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell:
            cell.run(command(self.makes_file("result", "made inside")), on_started=nothing)
            for path in ("result", *([f"{self.work_directory}/result"] if self.work_directory else [])):
                with cell.open_artifact(path) as file:
                    assert file.read() == b"made inside"

    @pytest.mark.parametrize("path", ["missing", "missing/result", "../etc/passwd", "/etc/passwd", "/", ".", "", ".."])
    def test_what_is_not_one(self, backend: CellBackend, path: str) -> None:
        with self.cell(backend) as cell:
            cell.run(command(self.makes_file("result", "x")), on_started=nothing)
            with pytest.raises(ExportError):
                cell.open_artifact(path).close()

    @pytest.mark.parametrize("make", ["link", "fifo"])
    def test_what_only_looks_like_one(self, backend: CellBackend, make: str) -> None:
        with self.cell(backend) as cell:
            cell.run(command(self.makes_link("it") if make == "link" else self.makes_fifo("it")), on_started=nothing)
            with pytest.raises(ExportError):
                cell.open_artifact("it").close()

    # -- beginning and end

    def test_a_cell_that_ran_nothing_leaves_nothing(self, backend: CellBackend) -> None:
        with self.cell(backend):
            pass

    def test_a_key_is_free_again_after_the_end(self, backend: CellBackend) -> None:
        for _ in range(2):
            with self.cell(backend, key="0123456789abcdef") as cell:
                assert cell.run(command(self.exits(0)), on_started=nothing).exit_code == 0

    def test_the_footprint_is_json(self, backend: CellBackend) -> None:
        footprint = backend.footprint("0123456789abcdef")
        assert json.loads(json.dumps(footprint)) == footprint

    def test_a_sweep_of_what_is_not_there(self, backend: CellBackend) -> None:
        key = os.urandom(8).hex()
        assert backend.sweep(backend.footprint(key)) == ()
        with self.cell(backend, key=key):
            pass
        assert backend.sweep(json.loads(json.dumps(backend.footprint(key)))) == ()

    def test_isolation_names_its_backend(self, backend: CellBackend) -> None:
        with self.cell(backend) as cell:
            assert cell.isolation.backend == backend.kind
            assert not set(cell.isolation.limits) & set(cell.isolation.unbounded)

    def test_what_holds_the_command_was_measured(self, backend: CellBackend) -> None:
        """What is told of the cell is what the command reads of itself, where it can."""
        with self.cell(backend) as cell:
            security = cell.isolation.security
            assert security is not None
            result = cell.run(command(self.reads_status()), on_started=nothing)
        said = {name: value.strip() for name, _, value in (line.partition(":") for line in result.stdout.decode().splitlines())}
        for name, value in {
            "CapEff": security.cap_eff,
            "CapPrm": security.cap_prm,
            "CapBnd": security.cap_bnd,
            "CapAmb": security.cap_amb,
            "CapInh": security.cap_inh,
            "NoNewPrivs": str(int(security.no_new_privs)),
            "Seccomp": str(security.seccomp_mode),
        }.items():
            assert said.get(name, value) == value, name
        assert said or result.exit_code is None, "it has no such program, or it prints something"

    def test_no_descriptor_stays(self, backend: CellBackend) -> None:
        self.run(backend, self.exits(0))
        before = os.listdir("/proc/self/fd")
        for argv in (self.exits(1), ["/no/such/program"], self.writes("x")):
            self.run(backend, argv)
        self.run(backend, self.sleeps(), deadline_seconds=0.0)
        assert os.listdir("/proc/self/fd") == before

    def test_many_at_once(self, backend: CellBackend) -> None:
        barrier = threading.Barrier(AT_ONCE)
        results: dict[int, CommandResult | BaseException] = {}

        def work(number: int) -> None:
            barrier.wait()
            try:
                results[number] = self.run(backend, self.writes(f"I am {number}"))
            except BaseException as error:  # noqa: BLE001 - told by the thread that started this one
                results[number] = error

        threads = [threading.Thread(target=work, args=(number,)) for number in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {number: getattr(result, "stdout", result) for number, result in results.items()} == {
            number: f"I am {number}".encode() for number in range(AT_ONCE)
        }

    # -- how the tests do it

    def run(self, backend: CellBackend, argv: list[str], *, on_started: Callable[[], None] | None = None, **members: Any) -> CommandResult:
        """Run one command in a cell of its own, which must leave nothing."""
        with self.cell(backend) as cell:
            return cell.run(command(argv, **members), on_started=on_started or nothing)

    @contextmanager
    def cell(self, backend: CellBackend, *, key: str | None = None) -> Iterator[LiveCell]:
        """A cell that must leave nothing, however its user ends."""
        cell = backend.create(spec(), key=key or os.urandom(8).hex())
        try:
            yield cell
        finally:
            residue = cell.destroy()
        assert residue == ()


def spec(members: Mapping[str, Any] | None = None) -> CellSpec:
    """The smallest spec, with these members."""
    body = {"id": "conformance", "authority": {}, "lifetime": {"ttlSeconds": 60}, **(members or {})}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


def command(argv: list[str], **members: Any) -> Command:
    """A command whose streams are captured."""
    given = {"environment": ENVIRONMENT, "stdout": CAPTURE, "stderr": CAPTURE, "deadline_seconds": LATE, **members}
    return Command(argv=argv, **given)


def nothing() -> None:
    """For whoever need not know that the command was started."""


def answer(listening: socket.socket, text: bytes) -> None:
    """Serve one connection."""
    listening.settimeout(LATE)
    connection, _ = listening.accept()
    with connection:
        connection.sendall(text)


def divide(number: int, by: int) -> None:
    """A call that may raise, where an expression is wanted."""
    number //= by
