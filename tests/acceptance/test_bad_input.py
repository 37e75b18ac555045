"""Whatever is wrong with what we are given, or with the host: one clear line, the documented exit code, no traceback, no cell left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.linux_backend

ROOT = os.geteuid() == 0
OURS_IN_RUN, FAILED, CANNOT_EXECUTE, NOT_FOUND = 125, 1, 126, 127
LONGEST_LINE = 600

GOOD: dict[str, Any] = {
    "apiVersion": "cellos.io/v1",
    "kind": "ExecutionCell",
    "spec": {"id": "bad-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["true"]}},
}
TEXT = json.dumps(GOOD)


def one_line(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    """It failed as documented, and said why to a human being."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert len(lines[0]) < LONGEST_LINE
    assert lines[0].isprintable()
    assert "Traceback" not in lines[0]
    assert "internal error" not in lines[0]
    for text in texts:
        assert text in lines[0]


def control_groups() -> set[str]:
    """Groups of our user's cells that belong to no living launcher."""
    found = set()
    for top, names, _ in os.walk("/sys/fs/cgroup"):
        for name in names:
            pid = name.removeprefix("cellos-").partition("-")[0]
            if name.startswith("cellos-") and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                with suppress(FileNotFoundError):  # of a launcher that has just put it away and ended
                    if os.stat(f"{top}/{name}").st_uid == os.geteuid():
                        found.add(f"{top}/{name}")
    return found


@pytest.fixture
def no_cell_left(commands: Any) -> Callable[..., None]:
    """Checks that a run that was refused left no group, and no file but those named."""
    before = control_groups()

    def check(*files: str) -> None:
        end = time.monotonic() + 30
        while not control_groups() <= before and time.monotonic() < end:
            time.sleep(0.1)  # those of a launcher that a fault test beside us has killed are put away by its next one
        assert control_groups() <= before
        assert sorted(path.name for path in commands.state.rglob("*") if path.is_file()) == sorted(files)

    return check


# ---------------------------------------------------------------- documents


def changed(**members: Any) -> str:
    document = json.loads(TEXT)
    document["spec"].update(members)
    return json.dumps(document)


DOCUMENTS: dict[str, tuple[str | bytes, str]] = {
    "a comma too many": (TEXT.replace("{}", "{},\n ,"), "parse ExecutionCellDocument: line 2 column 2: "),
    "an end too early": ("{\n\n  ", "line 3 column 3: "),
    "text after the end": (TEXT + "\n  x", "line 2 column 3: there is text after the end of the document"),
    "two documents": (TEXT + TEXT, "there is text after the end of the document"),
    "a byte order mark": ("\ufeff" + TEXT, "byte order mark"),
    "another encoding": (TEXT.encode("utf-16"), "is not UTF-8"),
    "a NUL byte": (TEXT.replace("true", "tr\0ue"), "invalid control character"),
    "half a character": (TEXT.replace('"bad-1"', '"\\ud800"'), "surrogate"),
    "an integer of half a million digits": (TEXT.replace("60", "1" * 500_000), "spec.lifetime.ttlSeconds must be an integer"),
    "a number beyond all numbers": (TEXT.replace("60", "1e999"), "spec.lifetime.ttlSeconds must be an integer"),
    "an integer that does not fit": (TEXT.replace("60", str(2**64)), "spec.lifetime.ttlSeconds must be an integer"),
    "nested lists": ('{"a":' + "[" * 500_000, "nested more than"),
    "nested objects": ('{"a":' * 180_000, "nested more than"),
    "nested where it means nothing": (TEXT.replace("{}", '{"x":' * 5000 + "1" + "}" * 5000), "nested more than"),
    "a key of a megabyte": (TEXT.replace('"argv"', '"' + "k" * 1_000_000 + '"'), "is not a known member"),
    "escapes in a key": ('{"\\u001b]0;owned\\u0007\\u009b": 1}', "is not a known member"),
    "a key twice, deep down": (TEXT.replace('"argv"', '"argv": ["x"], "argv"'), "spec.run.argv is given more than once"),
    "not an object": ("[1]", "the document must be an object, given a list"),
    "no limit for the time of life": (changed(lifetime={}), "spec.lifetime.ttlSeconds"),
    "a program without a name": (changed(run={"argv": [""]}), "spec.run.argv"),
    "a NUL in an argument": (changed(run={"argv": ["echo", "a\0b"]}), "spec.run.argv[1] contains NUL byte"),
    "an argument longer than the kernel takes": (
        changed(run={"argv": ["echo", "a" * 131_072]}),
        "exceeds the backend's limit of 131071 bytes",
    ),
}


@pytest.mark.parametrize(("text", "says"), DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_documents(text: str | bytes, says: str, commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]) -> None:
    spec = tmp_path / "spec.json"
    spec.write_bytes(text if isinstance(text, bytes) else text.encode())
    one_line(commands.run("cellos-supervisor", str(spec)), FAILED, says)
    no_cell_left()


@pytest.mark.parametrize("inside", ["a string", "spaces", "digits"])
def test_documents_of_a_hundred_megabytes(inside: str, commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]) -> None:
    """No more of it is read than a document may have, from a file or a pipe."""
    filler = {"a string": ('{"x": "', "x"), "spaces": (TEXT, " "), "digits": ('{"x": ', "1")}[inside]
    spec = tmp_path / "spec.json"
    with spec.open("w") as file:
        file.write(filler[0])
        for _ in range(100):
            file.write(filler[1] * (1 << 20))
    says = "the document is larger than 1048576 bytes"
    one_line(commands.run("cellos-supervisor", str(spec)), FAILED, says)
    with subprocess.Popen(["cat", str(spec)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as pipe:
        assert pipe.stdout
        one_line(commands.run("cellos-supervisor", "-", stdin=pipe.stdout), FAILED, says)
        pipe.stdout.close()
    no_cell_left()


def test_a_document_without_an_end(commands: Any, no_cell_left: Callable[..., None]) -> None:
    one_line(commands.run("cellos-supervisor", "/dev/zero"), FAILED, "the document is larger than 1048576 bytes")
    no_cell_left()


@pytest.mark.parametrize("path", [".", "missing", "/dev/zero", "garbage", "long"])
def test_records(path: str, commands: Any, tmp_path: Path) -> None:
    """`cellos events` of what is none."""
    (tmp_path / "garbage").write_bytes(os.urandom(5000))
    (tmp_path / "long").write_bytes(b'{"a": "' + b"x" * (5 << 20))
    done = commands.run("cellos", "events", str(tmp_path / path))
    assert done.returncode == FAILED
    shown = (done.stdout + done.stderr).splitlines()
    assert shown
    assert all(len(line) < LONGEST_LINE and line.isprintable() for line in shown)
    assert "Traceback" not in done.stdout + done.stderr


# ---------------------------------------------------------------- programs


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Programs that cannot be run, each for a reason of its own."""
    place = tmp_path / "tools"
    place.mkdir()
    for name, text, mode in (
        ("plain", "x", 0o644),
        ("no-format", "\x7fELF\0\0\0", 0o755),
        ("no-interpreter", "#!/no/such/interpreter\n", 0o755),
        ("secret-interpreter", f"#!{place}/plain\n", 0o755),
    ):
        (place / name).write_text(text)
        (place / name).chmod(mode)
    return place


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("plain", CANNOT_EXECUTE, "Permission denied (os error 13)"),
        ("no-format", CANNOT_EXECUTE, "Exec format error (os error 8)"),
        ("no-interpreter", NOT_FOUND, "its interpreter /no/such/interpreter: No such file or directory (os error 2)"),
        ("secret-interpreter", CANNOT_EXECUTE, "Permission denied (os error 13)"),
        (".", CANNOT_EXECUTE, "Permission denied (os error 13)"),
        ("missing", NOT_FOUND, "No such file or directory (os error 2)"),
    ],
)
def test_programs(program: str, code: int, reason: str, commands: Any, tools: Path, no_cell_left: Callable[..., None]) -> None:
    done = commands.run("cellos", "run", "--ro", str(tools), "--", f"{tools}/{program}")
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith(f"cellos: cannot start {tools}/{program}: {reason} ")
    assert "Traceback" not in done.stderr
    [record] = commands.state.glob("evidence/*")
    no_cell_left(record.name)
    assert commands.run("cellos", "events", str(record)).returncode == 0


@pytest.mark.parametrize("directory", ["/no/such/directory", "/etc/passwd", "/dev/null"])
def test_working_directories(directory: str, commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]) -> None:
    spec, events = tmp_path / "spec.json", tmp_path / "events"
    spec.write_text(changed(run={"argv": ["true"], "workingDirectory": directory}))
    done = commands.run("cellos-supervisor", str(spec), variables={"CELL_OS_JSONL_EVENTS": str(events)})
    one_line(done, FAILED, "command spawn: spec.run.workingDirectory: ")
    assert json.loads(events.read_bytes().splitlines()[-1])["data"]["residueClass"] == "none"
    no_cell_left()


# ---------------------------------------------------------------- event files


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (".", "Is a directory (os error 21)"),
        ("missing/events", "No such file or directory (os error 2)"),
        ("loop", "Too many levels of symbolic links (os error 40)"),
        ("file/events", "Not a directory (os error 20)"),
        ("fifo", "No such device or address (os error 6)"),
        ("x" * 300, "File name too long (os error 36)"),
    ],
)
@pytest.mark.parametrize("command", ["cellos", "cellos-supervisor"])
def test_event_files(command: str, path: str, reason: str, commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")  # nobody reads it: not a reason to wait
    (tmp_path / "spec.json").write_text(TEXT)
    arguments = ["run", "--", "true"] if command == "cellos" else [str(tmp_path / "spec.json")]
    done = commands.run(command, *arguments, variables={"CELL_OS_JSONL_EVENTS": str(tmp_path / path)})
    one_line(done, OURS_IN_RUN if command == "cellos" else FAILED, "event sink: jsonl open", reason)
    no_cell_left()


def test_an_event_file_that_may_not_be_written(commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]) -> None:
    """For root, whom no permission stops, it lies on a read-only file system."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "events").touch(mode=0o444)
    line = [*commands.line("cellos"), "run", "--", "true"]
    if ROOT:
        line = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o ro none {place} && "$@"', "sh", *line]
    done = run_line(commands, ["env", f"CELL_OS_JSONL_EVENTS={place}/events", *line])
    reason = "Read-only file system (os error 30)" if ROOT else "Permission denied (os error 13)"
    one_line(done, OURS_IN_RUN, "event sink: jsonl open", reason)
    no_cell_left()


# ---------------------------------------------------------------- a disk that is full


def limited(line: Sequence[str], **limits: int) -> list[str]:
    """The same command line under limits that it cannot raise: of file size (`fsize`), open files (`nofile`), and so on."""
    text = (
        "import json, os, resource, sys\n"
        "for name, value in json.loads(sys.argv[1]).items():\n"
        "    resource.setrlimit(getattr(resource, 'RLIMIT_' + name.upper()), (value, value))\n"
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    return [sys.executable, "-c", text, json.dumps(limits), *line]


def run_line(commands: Any, line: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=commands.environment, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("more", [-100, 200], ids=["before the cell was announced", "after that"])
def test_a_record_that_cannot_grow(more: int, commands: Any) -> None:
    """What does not fit is not there at all; a command of which nothing can be told is not run; with room again the run gets its end."""
    whole = commands.cell(["/bin/echo", "ran"])
    lines = Path(whole["events"]).read_bytes().splitlines(keepends=True)
    started = next(position for position, line in enumerate(lines) if b"lifecycle.v1.started" in line)
    size = sum(map(len, lines[: started + 1])) + more
    done = run_line(commands, limited([*commands.line("cellos"), "run", "--", "/bin/echo", "ran"], fsize=size))
    one_line(done, OURS_IN_RUN, "event sink: jsonl write ", "File too large (os error 27)")
    assert done.stdout in ({""} if more < 0 else {"", "ran\n"}), "it is ended once its start cannot be told, which is after its start"
    [record] = [path for path in commands.state.glob("evidence/*") if str(path) != whole["events"]]
    assert record.read_bytes()[-1:] in {b"", b"\n"}, "whole events only"

    after = commands.run("cellos", "run", "--", "true")
    assert after.returncode == 0
    assert commands.run("cellos", "events", str(record)).returncode == 0
    assert [path for path in commands.state.glob("*/*") if path.parent.name != "evidence"] == []


@pytest.mark.linux_backend(user_may_skip="mounting a small file system is for root")
@pytest.mark.skipif(not ROOT or not shutil.which("unshare"), reason="mounting a small file system is for root")
@pytest.mark.parametrize("free_blocks", [0, 1])
def test_a_state_directory_on_a_full_disk(free_blocks: int, commands: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    fill = f"head -c {(8 - free_blocks) * 4096} /dev/zero > {small}/filler"
    script = f'mount -t tmpfs -o size=32k none {small} && mkdir -m 700 {small}/state && {fill} && "$@"'
    line = ["unshare", "-m", "sh", "-c", script, "sh", "env", f"CELLOS_STATE_DIR={small}/state", *commands.line("cellos")]
    done = run_line(commands, [*line, "run", "--", "sh", "-c", "echo ran"])
    assert (done.returncode, done.stdout) == (OURS_IN_RUN, ""), done.stderr
    one_line(done, OURS_IN_RUN, "No space left on device (os error 28)")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_or_file_that_takes_no_output(stream: str, commands: Any) -> None:
    argv = ["sh", "-c", "echo hello; echo hello >&2"]
    with open("/dev/full", "w") as full:
        done = commands.run("cellos", "run", "--", *argv, **{stream: full})
    assert done.returncode == OURS_IN_RUN
    if stream == "stdout":
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
    [record] = commands.state.glob("evidence/*")
    assert commands.run("cellos", "events", str(record)).returncode == 0


# ---------------------------------------------------------------- hosts

WITHOUT_CLONE3 = """
import os, sys
from cellos.sandbox import seccomp, syscalls
syscalls.no_new_privileges()
seccomp.install(seccomp.denying({435: int(sys.argv[1])}))
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (errno.ENOSYS, "allow user namespaces: sysctl user.max_user_namespaces=10000"),
        # posix_spawn itself uses clone3, and has another way only where there is none.
        (errno.EPERM, "cannot start the launcher"),
    ],
)
@pytest.mark.parametrize("command", ["cellos", "cellos-supervisor"])
def test_a_host_without_clone3(
    command: str, answer: int, says: str, commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]
) -> None:
    (tmp_path / "spec.json").write_text(TEXT)
    arguments = ["run", "--", "echo", "ran"] if command == "cellos" else [str(tmp_path / "spec.json")]
    line = [sys.executable, "-c", WITHOUT_CLONE3, str(answer), *commands.line(command), *arguments]
    done = run_line(commands, line)
    assert done.stdout == ""
    one_line(done, OURS_IN_RUN if command == "cellos" else FAILED, "host backend: ", says)
    no_cell_left()


NO_USER_NAMESPACES = """
import ctypes, os, sys
# A user namespace with the same ids, of which root needs them all, that allows no more of its kind.
user, group = os.geteuid(), os.getegid()
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.read(ready[0], 1)
    for name, number in (("uid_map", user), ("gid_map", group)):
        if user:
            open(f"/proc/{os.getppid()}/setgroups", "w").write("deny") if name == "gid_map" else None
        open(f"/proc/{os.getppid()}/{name}", "w").write("0 0 4294967295" if not user else f"{number} {number} 1")
    os.write(go[1], b"g")
    os._exit(0)
assert ctypes.CDLL(None, use_errno=True).unshare(0x1000_0000) == 0, os.strerror(ctypes.get_errno())
os.write(ready[1], b"r")
os.read(go[0], 1)
os.waitpid(child, 0)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["cellos", "cellos-supervisor"])
def test_a_host_without_user_namespaces(command: str, commands: Any, tmp_path: Path, no_cell_left: Callable[..., None]) -> None:
    (tmp_path / "spec.json").write_text(TEXT)
    arguments = ["run", "--", "echo", "ran"] if command == "cellos" else [str(tmp_path / "spec.json")]
    done = run_line(commands, [sys.executable, "-c", NO_USER_NAMESPACES, *commands.line(command), *arguments])
    assert done.stdout == ""
    says = "allow user namespaces: sysctl user.max_user_namespaces=10000"
    one_line(done, OURS_IN_RUN if command == "cellos" else FAILED, "host backend: clone3: ", "No space left on device", says)
    no_cell_left()


@pytest.mark.parametrize("most", [8, 16, 32, 64, 100])
def test_too_few_descriptors(most: int, commands: Any) -> None:
    done = run_line(commands, limited([*commands.line("cellos"), "run", "--", "echo", "ran"], nofile=most))
    assert done.stdout == ""
    one_line(done, OURS_IN_RUN, "open files")


def test_limits_of_the_caller_hold_in_the_cell(commands: Any) -> None:
    """Nobody can raise them again, so they are what the cell gets, and what it says that it has."""
    low = {"nofile": 256, "fsize": 1 << 20, "core": 0}
    line = limited([*commands.line("cellos"), "run", "--json", "--", "sh", "-c", "ulimit -n; ulimit -f"], **low)
    report = json.loads(run_line(commands, line).stdout)
    assert report["code"] == 0, report
    assert report["stdout"].split() == ["256", str((1 << 20) // 512)]
    assert (report["isolation"]["limits"]["openFiles"], report["isolation"]["limits"]["fileBytes"]) == (256, 1 << 20)


@pytest.mark.alone
@pytest.mark.linux_backend(user_may_skip="the handler of core dumps is for root to set")
@pytest.mark.skipif(not ROOT, reason="the handler of core dumps is for root to set")
def test_a_core_dump_handler_that_nothing_holds_is_told(commands: Any) -> None:
    """Only a limit of 1 keeps the handler from starting, and who has 0 cannot get 1 any more (core(5))."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    line = [*commands.line("cellos"), "run", "--json", "--", "true"]
    try:
        for text, none in (("|/bin/false", 0), ("|/bin/false", 1), ("core", 0)):
            pattern.write_text(text)
            isolation = json.loads(run_line(commands, limited(line, core=none)).stdout)["isolation"]
            held = (text, none) != ("|/bin/false", 0)
            assert ("coreBytes" in isolation["limits"], "core" in isolation["unbounded"]) == (held, not held)
    finally:
        pattern.write_text(before)
