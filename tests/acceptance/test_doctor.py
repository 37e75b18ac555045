"""`cellos doctor`: each row is seen to fail, with its cure, where that primitive is really taken away; and what it says is so.

Away means: by a system call filter, by mounts in a private namespace, by fewer capabilities, by another personality. A helper process takes
it away from itself and then executes the doctor, or a program that creates a cell.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cellos.sandbox.cures import CURES

pytestmark = pytest.mark.linux_backend

ROOT = os.geteuid() == 0

HELPER = """
import ctypes, json, os, sys
from cellos.sandbox import seccomp, syscalls
away, argv = json.loads(sys.argv[1]), sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def mount(source, target, kind, flags):
    check(libc.mount(source and source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None))

user, group = os.geteuid(), os.getegid()
if away.get("map_as") is not None or (away.get("mounts") and user):
    check(libc.unshare(0x1000_0000 | 0x0002_0000))
    inside = away.get("map_as", user)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {user} 1"), ("gid_map", f"{inside} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
elif away.get("mounts"):
    check(libc.unshare(0x0002_0000))
if away.get("mounts"):
    mount(None, "/", None, 0x4_4000)  # MS_REC | MS_PRIVATE
for what in away.get("mounts", ()):
    mount(*what)
if "chroot" in away:
    here = os.getcwd()
    os.chroot(away["chroot"])
    os.chdir(here)
for capability in away.get("capabilities", ()):
    check(libc.prctl(24, capability, 0, 0, 0))  # PR_CAPBSET_DROP
if "personality" in away:
    check(libc.personality(ctypes.c_ulong(away["personality"])))
if away.get("calls"):
    syscalls.no_new_privileges()
    seccomp.install(seccomp.denying({int(number): answer for number, answer in away["calls"].items()}))
os.execv(argv[0], argv)
"""


DOCTOR = "from cellos.cli.main import main; main()"

REALITY = """
import json
from cellos.backends.linux import LinuxBackend
from cellos.core.documents import parse_execution_cell
from cellos.errors import HostBackendError
from cellos.ports import Command
from cellos.sandbox.launcher import Launcher
document = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {
    "id": "x", "authority": {"secretRefs": []}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"], "secretDelivery": "env"}}}
with Launcher.start() as launcher:
    try:
        cell = LinuxBackend(launcher=launcher).create(parse_execution_cell(json.dumps(document).encode()).spec, key="0123456789abcdef")
        result = cell.run(Command(argv=["true"], environment={"PATH": "/usr/bin:/bin"}, deadline_seconds=20), on_started=lambda: None)
        left = [str(residue) for residue in cell.destroy()]
        print(json.dumps({"exit_code": result.exit_code, "left": left, "unbounded": cell.isolation.unbounded}), flush=True)
    except HostBackendError as error:
        print(json.dumps({**vars(error), "error": type(error).__name__, "says": str(error)}, default=str), flush=True)
"""
BOTH = REALITY + DOCTOR

Away = dict[str, Any]


def deprived(away: Away, program: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", HELPER, json.dumps(away), sys.executable, "-c", program, *arguments]
    return subprocess.run(
        argv, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What comes of creating a real cell, and what the doctor says: exit code and rows."""

    cell: dict[str, Any]
    code: int
    rows: dict[str, dict[str, Any]]


def ask_both(away: Away) -> Answer:
    return _ask(json.dumps(away))


@cache
def _ask(away: str) -> Answer:
    """Python is started once for both: that is where the time goes."""
    done = deprived(json.loads(away), BOTH, "doctor", "--json")
    assert done.stderr == "", "a defect: nothing but the typed error should be told"
    cell, verdict = done.stdout.splitlines()
    return Answer(cell=json.loads(cell), code=done.returncode, rows=checked(done.returncode, verdict))


def ask(away: Away, *, environment: dict[str, str] | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
    """The doctor alone: exit code and rows."""
    done = deprived(away, DOCTOR, "doctor", "--json", environment=environment)
    assert done.stderr == ""
    return done.returncode, checked(done.returncode, done.stdout)


def checked(code: int, verdict: str) -> dict[str, dict[str, Any]]:
    answer = json.loads(verdict)
    rows = {row["primitive"]: row for row in answer["rows"]}
    assert len(rows) == len(answer["rows"])
    assert answer["ok"] == all(row["ok"] for row in rows.values() if row["required"])
    assert code == (0 if answer["ok"] else 1)
    return rows


def without(*numbers: int, answer: int = errno.EPERM) -> Away:
    return {"calls": {str(number): answer for number in numbers}}


COVER = ["tmpfs", "/proc/tty", "tmpfs", 0]
"""Any mount over part of /proc: the kernel then gives no fresh /proc to a user namespace."""
READ_ONLY_SYSCTL = [
    ["/proc/sys", "/proc/sys", None, 0x5000],
    [None, "/proc/sys", None, 0x1000 | 0x20 | 0x1],
]  # MS_BIND | MS_REC, as systemd has a mount below that a user namespace may not uncover; then MS_REMOUNT | MS_RDONLY


CHANGED_ROOT = {"mounts": [["/", "/mnt", None, 0x5000]], "chroot": "/mnt"}  # MS_BIND | MS_REC
"""Whoever is in a chroot may not make user namespaces (user_namespaces(7))."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A primitive taken away: the row that must say so, and what an attempt to create a cell answers, where that is not the same."""

    row: str
    away: Away
    first: bool = True
    """It is the first row that fails."""
    primitive: str = ""
    plain: bool = False
    """The attempt ends with an error that has no cure."""
    label: str = field(default="", kw_only=True)

    @property
    def id(self) -> str:
        return self.label or self.row


def map_ids_away() -> Away:
    """Root: no capability to map foreign ids. Another user: a name space in which we are root, and the cells' ids do not exist."""
    return {"capabilities": [7]} if ROOT else {"map_as": 0}


CASES = [
    Case(row="architecture", away={"personality": 0x0008}, label="architecture: setarch i686"),
    Case(row="clone3", away=without(435, answer=errno.ENOSYS), label="clone3: missing"),
    Case(row="clone3", away=CHANGED_ROOT, label="clone3: forbidden in a chroot"),
    Case(row="map ids", away=map_ids_away()),
    Case(row="close_range", away=without(436, answer=errno.ENOSYS)),
    # Python's own sockets need ioctl, too.
    Case(row="bring up loopback", away=without(16), plain=True),
    Case(row="set the host name", away=without(170)),
    Case(row="new root", away=without(430), label="new root: fsopen"),
    Case(row="new root", away=without(431), label="new root: fsconfig"),
    Case(row="new root", away=without(432), label="new root: fsmount"),
    Case(row="new root", away=without(429), label="new root: move_mount"),
    Case(row="new root", away=without(165), label="new root: mount", primitive="stop mount propagation"),
    Case(row="mount /usr", away=without(428), label="mount /usr: open_tree"),
    Case(row="mount /usr", away=without(442), label="mount /usr: mount_setattr"),
    Case(row="mount /proc", away={"mounts": [COVER]}),
    Case(row="forbid user namespaces", away={"mounts": READ_ONLY_SYSCTL}, first=False, primitive="mount /proc"),
    Case(row="pivot_root", away=without(155)),
    Case(row="empty the session keyring", away=without(250)),
    Case(row="drop capabilities", away=without(126)),
    Case(row="set no_new_privs", away=without(157), first=False, primitive="hide the launcher", label="set no_new_privs: prctl"),
    Case(row="drop capabilities", away=without(157), primitive="hide the launcher", label="drop capabilities: prctl"),
    Case(row="restrict with Landlock", away=without(444, answer=errno.EOPNOTSUPP), label="Landlock: switched off"),
    Case(row="restrict with Landlock", away=without(444, answer=errno.ENOSYS), label="Landlock: missing"),
    Case(row="install the seccomp filter", away=without(317, answer=errno.EINVAL)),
    Case(row="openat2", away=without(437, answer=errno.ENOSYS)),
    Case(row="pidfd_send_signal", away=without(424, answer=errno.ENOSYS)),
]


def baseline() -> dict[str, dict[str, Any]]:
    answer = ask_both({})
    assert answer.code == 0
    return answer.rows


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_missing_primitive_is_named_with_its_cure(case: Case) -> None:
    answer = ask_both(case.away)
    row = answer.rows[case.row]
    assert (answer.code, row["ok"], row["required"]) == (1, False, True)
    assert row["cure"] == CURES[case.row]
    assert row["detail"] not in {"", baseline()[case.row]["detail"]} or case.row == "architecture"
    if case.first:
        assert case.row == next(name for name, row in answer.rows.items() if not row["ok"] and row["required"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_where_the_doctor_says_no_a_cell_is_refused_with_the_same_cure(case: Case) -> None:
    answer = ask_both(case.away).cell
    if case.plain:
        assert answer["error"] == "HostBackendError"
        return
    primitive = case.primitive or case.row
    assert (answer["error"], answer["primitive"]) == ("MissingPrimitive", primitive)
    assert answer["cure"] == CURES[primitive]
    assert answer["says"].startswith(f"host backend: {primitive}: ")


def test_every_row_has_a_case() -> None:
    told = {case.row for case in CASES} | {"limit memory", "limit processes", "limit processor time", "state-directory"}
    assert set(baseline()) == told


def test_where_the_doctor_says_yes_a_cell_runs() -> None:
    assert all(row["ok"] for row in baseline().values() if row["required"])
    answer = ask_both({}).cell
    assert (answer["exit_code"], answer["left"]) == (0, [])
    limited = {"limit memory": "memory", "limit processor time": "cpu"}
    assert {limited[name] for name in limited if not baseline()[name]["ok"]} == set(answer["unbounded"])


def test_what_is_missing_is_shown_to_a_person() -> None:
    done = deprived(without(250), DOCTOR, "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "Cells cannot run here: empty the session keyring is missing."
    place = next(number for number, line in enumerate(lines) if "empty the session keyring" in line)
    assert lines[place].startswith("MISSING  empty the session keyring")
    assert "Operation not permitted" in lines[place]
    assert lines[place + 1].strip() == f"-> {CURES['empty the session keyring']}"
    assert sum(line.startswith("MISSING") for line in lines) == 1
    assert "\x1b" not in done.stdout, "colours are for terminals"


def test_what_is_there_is_shown_to_a_person() -> None:
    done = deprived({}, DOCTOR, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "Cells can run here."
    assert "MISSING" not in done.stdout


def test_hidden_control_groups_limit_what_can_be_limited() -> None:
    """Cells still run; what nothing bounds is named. The number of processes falls back to a resource limit."""
    away = {"mounts": [["tmpfs", "/sys/fs/cgroup", "tmpfs", 0]]}
    both = ask_both(away)
    rows, answer = both.rows, both.cell
    assert both.code == 0
    for name in ("limit memory", "limit processor time"):
        assert (rows[name]["ok"], rows[name]["required"]) == (False, False)
        assert "systemd-run" in rows[name]["cure"]
        assert "unbounded" in rows[name]["detail"]
    assert rows["limit processes"]["ok"]
    assert "RLIMIT_NPROC" in rows["limit processes"]["detail"]
    assert (answer["exit_code"], answer["left"], answer["unbounded"]) == (0, [], ["memory", "cpu"])
    shown = deprived(away, DOCTOR, "doctor").stdout
    assert "limited  limit memory" in shown
    assert shown.splitlines()[-1] == "Cells can run here."


@pytest.mark.parametrize("kind", ["a file", "below a file", "open to all"])
def test_an_unusable_state_directory_is_named(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "state"
    match kind:
        case "a file":
            place.touch()
        case "below a file":
            place.touch()
            place /= "below"
        case _:
            place.mkdir()
            place.chmod(0o777)
    code, rows = ask({}, environment={"CELLOS_STATE_DIR": str(place)})
    row = rows["state-directory"]
    assert (code, row["ok"], row["required"]) == (1, False, True)
    assert str(place) in row["detail"]
    assert "CELLOS_STATE_DIR" in row["cure"]


def test_a_usable_state_directory_is_shown(tmp_path: Path) -> None:
    code, rows = ask({}, environment={"CELLOS_STATE_DIR": str(tmp_path / "state")})
    assert (code, rows["state-directory"]["detail"]) == (0, str(tmp_path / "state"))


def host_mounts() -> list[str]:
    """But for those of other runs of tests, which come and go beside us."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if "/pytest-of-" not in line]


def test_the_doctor_leaves_nothing(tmp_path: Path) -> None:
    mounts = host_mounts()
    hostname = os.uname().nodename
    ask({})
    ask(without(155))
    assert host_mounts() == mounts
    assert os.uname().nodename == hostname


def test_usage_is_told() -> None:
    done = deprived({}, DOCTOR, "doctor", "--jso")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--json" in done.stderr
