"""A supervisor that is killed leaves nothing that runs, and the next start ends what it could not end.

It is stopped where a test wants it, without any hook in the product: `held_at.py` wraps the ports around it and stops at a named step, or
it is stopped from outside (SIGSTOP) as soon as a file of its own says how far it is. Then it is looked at, and killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.core.evidence.verify import verify

pytestmark = pytest.mark.linux_backend

SECONDS = 60.0
STARTED, SPAWNED, COMPLETED = "lifecycle.v1.started", "observability.v1.process_spawned", "command.v1.completed"
TOUCHED, EXPORTED, DESTROYED = "observability.v1.fs_touch", "export.v2.completed", "lifecycle.v1.destroyed"
DECLARED = ["observability.v1.network_scope", "observability.v1.dns_target_set"]
HELD = ["observability.v1.container_security", "observability.v1.network_policy"]
ENFORCED = "observability.v1.network_enforcement"
CLOSING = ["compliance.v1.summary", "authority.v1.homeostasis"]
EVENTS = [*DECLARED, STARTED, *HELD, SPAWNED, ENFORCED, COMPLETED, TOUCHED, EXPORTED, *CLOSING, DESTROYED]
UP = [*DECLARED, STARTED, *HELD, SPAWNED]
SECRET = "correct horse battery staple"


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true answer of `condition`."""
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for {what}"
        time.sleep(0.001)
    return answer


def kind(event: dict[str, Any]) -> str:
    return str(event["type"]).removeprefix("dev.cellos.events.cell.")


def document(*argv: str, cell_id: str = "victim", **spec: Any) -> dict[str, Any]:
    run = {"argv": list(argv), "secretDelivery": "env", **spec.pop("run", {})}
    body = {"id": cell_id, "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": run}
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body | spec}


EXPORTING = document(
    "/bin/sh",
    "-c",
    "echo made > result",
    authority={"secretRefs": ["KEY"]},
    run={"secretDelivery": "runtimeBroker"},
    export={"artifacts": [{"name": "result", "path": "result"}]},
)
"""It goes through every step: it has a secret that is fetched at run time, a command, an artifact."""
RUNNING = document("/bin/sh", "-c", "trap '' TERM; (setsid sleep 300 &); echo up; while :; do sleep 300; done")


class Victim:
    """A `cellos-supervisor` that will be killed."""

    def __init__(self, commands: Any, place: Path, ends: Callable[[Any], None]) -> None:
        self.commands = commands
        self.place = place
        self.jsonl = place / "events.jsonl"
        self.runs = commands.state / "runs"
        self.ids: list[Path] = []
        self._ends = ends

    def start(self, spec: dict[str, Any] | None, *, at: str | None = None, **options: Any) -> None:
        """Without a document it is left waiting for one on its standard input. `at`: the step at which it stops, and we wait for that."""
        path = self.place / "spec.json"
        path.write_text(json.dumps(spec))
        variables = {"CELL_OS_JSONL_EVENTS": str(self.jsonl), "CELLOS_EXPORT_DIR": str(self.place / "out")}
        variables |= {"CELLOS_BROKER": "env", "CELLOS_SECRET_KEY": SECRET}
        if spec is None:
            options["stdin"] = subprocess.PIPE
        if at is None:
            self.process = self.commands.start("cellos-supervisor", str(path) if spec else "-", variables=variables, **options)
            self._ends(self.process)
            return
        argv = [sys.executable, str(Path(__file__).with_name("held_at.py")), at, str(path)]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(argv, env=self.commands.environment | variables, text=True, **streams)
        self._ends(self.process)
        how = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert how is not None
        assert how.si_code == os.CLD_STOPPED, f"it never came to {at}: {self.process.communicate()}"

    # -- how far it is

    def records(self) -> list[dict[str, Any]]:
        found = []
        for path in self.runs.glob("*.json"):
            try:
                found.append(json.loads(path.read_bytes()))
            except FileNotFoundError:  # the run ended just now
                continue
        return found

    def spooled(self) -> list[dict[str, Any]]:
        found = []
        for path in self.commands.state.glob("spool/*"):
            try:
                found += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
            except FileNotFoundError:  # the run ended just now
                continue
        return found

    def holding(self, text: str) -> list[str]:
        """Files of ours that hold a text."""
        files = [*self.commands.state.rglob("*"), *self.place.glob("*.jsonl")]
        return [str(path) for path in files if path.is_file() and text.encode() in path.read_bytes()]

    def await_events(self, number: int) -> None:
        wait_for(lambda: len(self.spooled()) >= number, f"event {number}")

    def await_open(self, part: str) -> None:
        """Until it holds a file whose path has `part`, or has ended."""
        wait_for(lambda: self.has_open(part) or self.process.poll() is not None, part)

    def family(self) -> list[int]:
        """The processes below it: its launcher, and what that made."""

        def below(pid: int) -> Iterator[int]:
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except FileNotFoundError:
                return
            for child in map(int, children):
                yield child
                yield from below(child)

        return list(below(self.process.pid))

    def await_record(self) -> bool:
        """Look, without a pause, until its record is there; whether it is still at work then."""
        while not self.records():
            if self.process.poll() is not None:
                return False
        return True

    def stop(self) -> None:
        """Hold it where it is, so that it can be looked at; it may have ended before."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def has_open(self, part: str) -> bool:
        """Whether it holds a file whose path has `part`."""
        directory = f"/proc/{self.process.pid}/fd"
        try:
            return any(part in os.readlink(f"{directory}/{descriptor}") for descriptor in os.listdir(directory))
        except OSError:  # it closed one of them meanwhile, or ended
            return False

    def host_ids(self) -> list[Path]:
        """Where the host ids of its cells are taken (root only)."""
        found = set()
        for pid in self.family():
            try:
                ids = Path(f"/proc/{pid}/uid_map").read_text().split()
            except OSError:
                continue
            if ids and ids[1] not in {"0", str(os.geteuid())}:
                found.add(Path("/run/cellos/ids", ids[1]))
        return sorted(found)

    # -- its end

    def kill(self, *also: int) -> None:
        """SIGKILL to it and `also`; then nothing of it runs any more, though it would for minutes."""
        self.ids = self.host_ids()
        pidfds = {}
        for pid in self.family():
            try:
                pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:  # its time had come
                continue
        try:
            self.process.kill()
            for pid in also:
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + SECONDS
            for pid, pidfd in pidfds.items():
                left = select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]
                assert left, f"pid {pid} outlived the supervisor"
        finally:
            for pidfd in pidfds.values():
                os.close(pidfd)
        self.process.wait()


@pytest.fixture
def victim(commands: Any, tmp_path: Path, ends: Callable[[Any], None]) -> Callable[..., Victim]:
    def make(**options: Any) -> Victim:
        return Victim(commands, tmp_path, ends, **options)

    return make


def host_mounts(place: Path) -> list[str]:
    """But for those of other runs of tests, which come and go beside us."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/pytest-of-" not in line or f"{place}/" in line]


def next_start(victim: Victim) -> subprocess.CompletedProcess[str]:
    """Another run with the same state directory and events."""
    path = victim.place / "next.json"
    path.write_text(json.dumps(document("/bin/true", cell_id="next")))
    done: subprocess.CompletedProcess[str] = victim.commands.run(
        "cellos-supervisor", str(path), variables={"CELL_OS_JSONL_EVENTS": str(victim.jsonl)}
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def nothing_left(victim: Victim, records: list[dict[str, Any]]) -> None:
    for record in records:
        assert [path for path in record["footprint"]["cgroups"] if os.path.exists(path)] == []
    assert [path.name for path in victim.commands.state.rglob("*") if path.is_file()] == []
    assert [path.name for path in victim.place.glob("out/*/.*")] == []
    assert [path for path in victim.ids if abandoned(path)] == []


def abandoned(path: Path) -> bool:
    """Whether a host id is taken by nobody who lives; others may run cells beside us."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def the_run_was_ended(victim: Victim, done: subprocess.CompletedProcess[str], expected: list[str], *, lost: bool = True) -> None:
    """Its chain verifies and ends as it should, and so does that of the run that swept it."""
    assert (
        done.stderr.count("was left unfinished by its supervisor" if lost else "was over, but its events may not all have been sent") == 1
    )
    report = verify(victim.jsonl.read_bytes().splitlines())
    assert report.verified, report
    events = [json.loads(line) for line in victim.jsonl.read_bytes().splitlines()]
    mine = [event for event in events if event["data"]["cellId"] == "victim"]
    assert [kind(event) for event in mine] == expected
    end = mine[-1]["data"]
    if lost:
        assert (end["outcome"], end["reason"], end["terminalState"]) == ("failed", "supervisor_lost", "forced")
    else:
        assert (end["outcome"], end.get("reason")) == ("succeeded", None)
    assert (end["residueClass"], end["chain"]["count"]) == ("none", len(expected))
    shown = victim.commands.run("cellos", "events", str(victim.jsonl))
    assert shown.returncode == 0, shown.stdout + shown.stderr


# ---------------------------------------------------------------- kill -9


STEPS = {
    "recorded": 0,
    "created": 0,
    "listening": 5,
    "running": 5,
    "started": 5,
    "delivering": 9,
    "destroying": 10,
    "group removed": 10,
    "destroyed": 10,
    **{f"spooled {event}": number for number, event in enumerate(EVENTS, 1)},
    **{f"emitted {event}": number for number, event in enumerate(EVENTS, 1)},
}
"""Each with the number of events that are in the spool then."""


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[pytest.mark.needs("limit memory")] * (step == "group removed")) for step in STEPS]
)
def test_killed_at_a_step(step: str, victim: Callable[..., Victim]) -> None:
    killed = victim()
    mounts = host_mounts(killed.place)
    killed.start(EXPORTING, at=step)
    seen = [kind(event) for event in killed.spooled()]
    assert seen == EVENTS[: STEPS[step]]
    records = killed.records()
    assert [record["run"]["cell_id"] for record in records] == ["victim"]
    assert not killed.holding(SECRET)

    killed.kill()

    # What was spooled reaches the file, and what was promised to be last is last.
    finished = DESTROYED in seen
    the_run_was_ended(killed, next_start(killed), seen if finished else [*seen, DESTROYED], lost=not finished)
    nothing_left(killed, records)
    assert not killed.holding(SECRET)
    assert host_mounts(killed.place) == mounts


def test_there_are_no_other_steps(victim: Callable[..., Victim]) -> None:
    """A run that nobody stops tells of each of them, and of nothing else."""
    whole = victim()
    whole.start(EXPORTING)
    assert whole.process.wait(SECONDS) == 0
    assert [kind(json.loads(line)) for line in whole.jsonl.read_bytes().splitlines()] == EVENTS


@pytest.mark.parametrize("with_launcher", [False, True], ids=["alone", "with its launcher"])
def test_killed_while_the_command_runs(with_launcher: bool, victim: Callable[..., Victim]) -> None:
    killed = victim()
    killed.start(RUNNING)
    assert killed.process.stdout
    assert killed.process.stdout.readline() == "up\n"
    killed.await_events(len(UP))
    records = killed.records()
    family = killed.family()
    assert len(family) >= 4, "launcher, init, the command, its sleeper"
    assert len(killed.host_ids()) == (os.geteuid() == 0)

    killed.kill(*(family[:1] if with_launcher else []))
    the_run_was_ended(killed, next_start(killed), [*UP, DESTROYED])
    nothing_left(killed, records)


def test_killed_before_it_has_a_document(victim: Callable[..., Victim]) -> None:
    """There is no run yet, so there is nothing to end; a cell that was made ahead goes."""
    killed = victim()
    killed.start(None)
    wait_for(lambda: len(killed.family()) >= 2, "the launcher's spare cell")
    killed.kill()
    done = next_start(killed)
    assert done.stderr == ""
    assert {json.loads(line)["data"]["cellId"] for line in killed.jsonl.read_bytes().splitlines()} == {"next"}
    nothing_left(killed, [])


def test_killed_while_it_makes_the_cell(victim: Callable[..., Victim]) -> None:
    """Stopped as soon as its record is there; a try that came too late is repeated."""
    deadline = time.monotonic() + 2 * SECONDS
    while time.monotonic() < deadline:
        killed = victim()
        killed.start(EXPORTING)
        killed.await_record()
        killed.stop()
        records, too_late = killed.records(), bool(killed.spooled()) or not killed.records()
        begun = any(killed.commands.state.glob("spool/*"))
        killed.kill()
        done = next_start(killed)
        if not too_late:
            if begun:
                the_run_was_ended(killed, done, [DESTROYED])
            else:
                assert done.stderr == "", "where there was not even a spool, nothing had begun"
            nothing_left(killed, records)
            return
        killed.jsonl.unlink()
        (killed.place / "out/victim/result").unlink(missing_ok=True)
    pytest.fail("every time too late to stop it before the cell was there")


def test_killed_in_the_middle_of_a_copy(victim: Callable[..., Victim], tmp_path: Path) -> None:
    """No half artifact under its name, and none under another."""
    size = 200
    argv = ["/bin/sh", "-c", f"head -c {size}M /dev/zero > result"]
    deadline = time.monotonic() + 2 * SECONDS
    while time.monotonic() < deadline:
        killed = victim()
        killed.start(document(*argv, export={"artifacts": [{"name": "result", "path": "result"}]}))
        killed.await_open("out/victim/")
        killed.stop()
        too_late = len(killed.spooled()) != EVENTS.index(TOUCHED) + 1
        killed.kill()
        done = next_start(killed)
        out = tmp_path / "out/victim"
        if not too_late:
            the_run_was_ended(killed, done, [*EVENTS[: EVENTS.index(EXPORTED)], DESTROYED])
            assert os.listdir(out) == []
            return
        killed.jsonl.unlink()
        (out / "result").unlink()
    pytest.fail("every time too late to stop it before the copy was made")


def test_killed_at_any_time(victim: Callable[..., Victim], tmp_path: Path) -> None:
    """Spread over the life of a run: whatever was told of it ends once, and nothing stays."""
    whole = victim()
    whole.start(EXPORTING)
    assert whole.process.wait(SECONDS) == 0
    for part in range(len(EVENTS)):
        killed = victim()
        (tmp_path / "out/victim/result").unlink(missing_ok=True)
        killed.start(EXPORTING)
        killed.await_record()
        while killed.process.poll() is None and len(killed.spooled()) < part:
            pass
        records = killed.records()
        killed.kill()
        next_start(killed)
        nothing_left(killed, records)
    lines = whole.jsonl.read_bytes().splitlines()
    assert verify(lines).verified, "each run that was begun has its end"
    ends = [event["data"] for event in map(json.loads, lines) if kind(event) == DESTROYED and event["data"]["cellId"] == "victim"]
    assert len({end["runId"] for end in ends}) == len(ends)
    assert {end.get("reason") for end in ends} <= {None, "supervisor_lost"}


def test_a_run_that_lives_is_not_swept(victim: Callable[..., Victim]) -> None:
    alive = victim()
    alive.start(RUNNING)
    assert alive.process.stdout
    assert alive.process.stdout.readline() == "up\n"
    records = alive.records()
    assert next_start(alive).stderr == ""
    assert (alive.records(), alive.process.poll()) == (records, None)
    alive.process.terminate()
    assert alive.process.wait(SECONDS) == 143
    reasons = [event["data"].get("reason") for event in map(json.loads, alive.jsonl.read_bytes().splitlines()) if kind(event) == DESTROYED]
    assert reasons == [None, "supervisor_terminated"]
    nothing_left(alive, records)


def test_the_next_start_does_not_read_an_event_file_that_is_a_pipe(victim: Callable[..., Victim]) -> None:
    """What passed through it cannot be looked up, so the events come again: each has an id by which a reader tells."""
    killed = victim()
    os.mkfifo(killed.jsonl)
    pipe = os.open(killed.jsonl, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 18)
        killed.start(EXPORTING, at=f"emitted {SPAWNED}")
        killed.kill()
        done = next_start(killed)
        assert done.stderr.count("was left unfinished by its supervisor") == 1
        lines = [json.loads(line) for line in os.read(pipe, 1 << 18).splitlines()]
    finally:
        os.close(pipe)
    mine = [event for event in lines if event["data"]["cellId"] == "victim"]
    assert [kind(event) for event in mine] == [*UP, *UP, DESTROYED]
    assert len({event["id"] for event in mine}) == len(UP) + 1
    assert stat.S_ISFIFO(killed.jsonl.stat().st_mode)


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("event", [STARTED, SPAWNED])
def test_asked_to_stop_at_an_event(event: str, number: int, code: int, victim: Callable[..., Victim]) -> None:
    """A stop request before the command began, or in the middle of its beginning, is not lost."""
    asked = victim()
    asked.start(RUNNING, at=f"emitted {event}")
    family = asked.family()
    asked.process.send_signal(number)
    asked.process.send_signal(signal.SIGCONT)
    assert asked.process.wait(SECONDS) == code
    report = verify(asked.jsonl.read_bytes().splitlines())
    assert report.verified, report
    told = {kind(event): event["data"] for event in map(json.loads, asked.jsonl.read_bytes().splitlines())}
    completed, destroyed = told[COMPLETED], told[DESTROYED]
    assert (completed["exitCode"], completed["spawnError"]) == (-1, "supervisor terminated")
    assert (destroyed["outcome"], destroyed["reason"], destroyed["residueClass"]) == ("failed", "supervisor_terminated", "none")
    assert [pid for pid in family if os.path.exists(f"/proc/{pid}")] == []
    nothing_left(asked, [])


def test_asked_to_stop_with_grace(victim: Callable[..., Victim]) -> None:
    """The command gets SIGTERM and time to act on it; its tree goes all the same."""
    asked = victim()
    polite = "trap 'echo bye; exit 0' TERM; (setsid sleep 300 &); echo up; while :; do sleep 0.01; done"
    asked.start(document("/bin/sh", "-c", polite, run={"limits": {"gracefulShutdownSeconds": 120}}))
    assert asked.process.stdout
    assert asked.process.stdout.readline() == "up\n"
    family = asked.family()
    began = time.monotonic()
    asked.process.terminate()
    assert asked.process.stdout.read() == "bye\n"
    assert asked.process.wait(SECONDS) == 143
    assert time.monotonic() - began < 100
    assert [pid for pid in family if os.path.exists(f"/proc/{pid}")] == []
    nothing_left(asked, [])
