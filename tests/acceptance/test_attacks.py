"""A tour of attacks: each is first seen to work outside, as a plain process of the same user, and then fails in a cell.

The programs lie in attacks/; the same text runs in both places with the system's Python.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PYTHON = "/usr/bin/python3"
ROOT = os.geteuid() == 0
SECRET = "canary-5f1c9e7a"
ABSTRACT = f"{SECRET}-{os.getpid()}"
"""These names are the whole host's."""

WHY_SKIPPED = "what an ordinary user may not do outside proves nothing inside"
pytestmark = pytest.mark.linux_backend(user_may_skip=WHY_SKIPPED)


# ---------------------------------------------------------------- the host that is attacked


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the attacks are after. Its members fill the `{…}` in the arguments of an attack."""

    canary: str
    """A file with SECRET in a home directory."""
    home: str
    place: str
    """A directory that outside attackers may write to."""
    pid: str
    """A process that waits, has SECRET in its environment, and lets itself be traced."""
    address: str
    """Where that process has SECRET in its memory."""
    port: str
    six: str
    name: str
    """An abstract Unix socket that says SECRET, as both TCP ports do."""
    socket: str
    """A Unix socket with a path that does."""
    own: str
    """An address of this host that is not a loopback one."""


WAITING = """
import ctypes, signal
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # Yama: anybody may trace us
kept = ctypes.create_string_buffer(b"sibling secret")
print(ctypes.addressof(kept), flush=True)
while True: signal.pause()
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="cellos-home-", dir=_home()) as home, tempfile.TemporaryDirectory() as place:
        canary = Path(home, ".ssh", SECRET)
        canary.parent.mkdir()
        canary.write_text(SECRET)
        canary.chmod(0o600)
        waiting = subprocess.Popen([PYTHON, "-I", "-c", WAITING], stdout=subprocess.PIPE, text=True, env={"TOKEN": SECRET})
        assert waiting.stdout
        listeners = _listeners(place)
        own = _own_address()
        try:
            yield Host(
                canary=str(canary),
                home=home,
                place=place,
                pid=str(waiting.pid),
                address=waiting.stdout.readline().strip(),
                port=str(listeners[0].getsockname()[1]),
                six=str(listeners[1].getsockname()[1]),
                name="@" + ABSTRACT,
                socket=f"{place}/listener",
                own=own,
            )
        finally:
            waiting.kill()
            waiting.wait()
            waiting.stdout.close()
            for listener in listeners:
                listener.shutdown(socket.SHUT_RDWR)
                listener.close()


def _home() -> str:
    home = pwd.getpwuid(os.geteuid()).pw_dir
    return home if os.access(home, os.W_OK) and not home.startswith("/usr") else tempfile.gettempdir()


def _listeners(place: str) -> list[socket.socket]:
    """Each says SECRET to whoever connects, until it is shut down."""
    listeners = [socket.create_server(("0.0.0.0", 0)), socket.create_server(("::1", 0), family=socket.AF_INET6)]
    for name in ("\0" + ABSTRACT, f"{place}/listener"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen()
        listeners.append(listener)

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(SECRET.encode())

    for listener in listeners:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
    return listeners


def _own_address() -> str:
    """The address that the way out of this host starts from; a loopback one where there is no way out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


# ---------------------------------------------------------------- attacks that need nothing but their arguments


@dataclass(frozen=True, kw_only=True)
class Attack:
    """`do` names the program of attacks/, its function and the arguments; in them `{…}` stands for a member of Host."""

    do: str
    do_inside: str = ""
    """Where the same thing has another name in a cell."""
    works: Any
    denied: Any
    root: bool = False
    """Only root can do it outside."""
    policy: str = ""
    """What may forbid it to everybody on some hosts."""


DOORS = ("cmdline", "environ", "auxv", "mem", "maps", "fd", "open fd", "root", "cwd", "exe", "namespace")
MOUNT_STEPS = ("private", "mount", "fsopen", "open_tree", "remount", "mount_setattr", "umount2", "chroot")
TRACED = {"attach": 0, "seize": 0}
NOT_TRACED = {"attach": "ENOSYS", "seize": "ENOSYS"}

FILES = {
    "a file in the home": Attack(do="files.read {canary}", works=SECRET, denied="ENOENT"),
    "the home by another way": Attack(do=f"files.search {SECRET} {{home}}", do_inside=f"files.search {SECRET} /", works=1, denied=0),
    "a file by its inode": Attack(do="files.by_handle /usr/bin/env", works={"opened": True}, denied="ENOSYS", root=True),
    "the disk": Attack(
        do="files.block_device {place} /usr", do_inside="files.block_device /tmp /usr", works="done", denied="EPERM", root=True
    ),
}
PROCESSES = {
    "pid 1 through /proc": Attack(
        do="processes.look_into {pid}",
        do_inside="processes.look_into 1",
        works={door: "done" if door in {"mem", "open fd", "namespace"} else True for door in DOORS},
        denied=dict.fromkeys(DOORS, "ENOENT"),
    ),
    "the processes of the host": Attack(
        do=f"processes.find {SECRET}", works={"found": ["environ"], "few": False}, denied={"found": [], "few": True}
    ),
    "ptrace: ask to be traced": Attack(do="processes.trace_me", works=0, denied="ENOSYS"),
    "ptrace of pid 1": Attack(do="processes.trace {pid}", do_inside="processes.trace 1", works=TRACED, denied=NOT_TRACED),
    "ptrace of a sibling": Attack(do="processes.trace sibling", works=TRACED, denied=NOT_TRACED),
    "memory of pid 1": Attack(
        do="processes.read_memory {pid} {address}",
        do_inside="processes.read_memory 1 {address}",
        works="sibling secret",
        denied="ENOSYS",
    ),
    "memory of a sibling": Attack(do="processes.read_memory sibling 0", works="sibling secret", denied="ENOSYS"),
    "writing a sibling's memory": Attack(do="processes.write_memory", works=8, denied="ENOSYS"),
    "a descriptor of pid 1": Attack(
        do="processes.take_descriptor {pid}", do_inside="processes.take_descriptor 1", works=True, denied="ENOSYS"
    ),
    "a descriptor of a sibling": Attack(do="processes.take_descriptor sibling", works=True, denied="ENOSYS"),
}
NAMESPACES = {
    "mounts": Attack(
        do="kernel.mount {place}",
        do_inside="kernel.mount /work",
        works=dict.fromkeys(("namespace", *MOUNT_STEPS), "done"),
        denied={"namespace": "EPERM"} | dict.fromkeys(MOUNT_STEPS, "ENOSYS"),
    ),
    "a user namespace by unshare": Attack(do="kernel.unshare_user", works="done", denied="EPERM"),
    "a user namespace by clone": Attack(do="kernel.clone_user", works=True, denied="EPERM"),
    "a user namespace by clone3": Attack(do="kernel.clone3_user", works=True, denied="ENOSYS"),
    "entering a namespace": Attack(
        do="kernel.enter_namespace",
        works={"namespace": "done", "setns": "done", "hostname": "done"},
        denied={"namespace": "EPERM", "setns": "EPERM", "hostname": "ENOSYS"},
    ),
}
KERNEL = {
    "io_uring": Attack(do="kernel.io_uring", works=True, denied="ENOSYS", policy="kernel.io_uring_disabled"),
    "bpf": Attack(do="kernel.bpf_map", works=True, denied="ENOSYS", root=True),
    "userfaultfd": Attack(do="kernel.user_fault", works=True, denied="ENOSYS", policy="the access policy of userfaultfd"),
    "perf_event_open": Attack(do="kernel.perf_event", works=True, denied="ENOSYS", policy="kernel.perf_event_paranoid"),
    "reboot": Attack(do="kernel.reboot", works="EINVAL", denied="ENOSYS", root=True),
    "32-bit system calls": Attack(do="kernel.int80", works="done", denied="signal 31"),
    "huge pages": Attack(do="kernel.huge_pages", works={"mmap": True, "memfd_create": True}, denied={"mmap": False, "memfd_create": False}),
    "making the host write": Attack(do="kernel.write_all", works="EBADF", denied=0),
    "what the host reads": Attack(do="kernel.cached_pages /usr/bin/env", works=0, denied="ENOSYS", root=True),
    "POSIX message queue": Attack(do="kernel.message_queue", works=True, denied="ENOSYS"),
    "planting a key": Attack(do="kernel.add_key", works=True, denied="ENOSYS"),
}
NO_FAMILY: dict[str, Any] = {"works": "opened", "denied": "EAFNOSUPPORT"}
NO_PROTOCOL: dict[str, Any] = {"works": "opened", "denied": "EPROTONOSUPPORT"}
SOCKETS = {
    "raw socket": Attack(do="network.open_socket 2 3 1", works="opened", denied="EPERM", root=True),
    "raw IPv6 socket": Attack(do="network.open_socket 10 3 58", works="opened", denied="EPERM", root=True),
    "packet socket": Attack(do="network.open_socket 17 3 0", **NO_FAMILY, root=True),
    "vsock": Attack(do="network.open_socket 40 1 0", **NO_FAMILY),
    "audit by netlink": Attack(do="network.open_socket 16 3 9", **NO_FAMILY),
    "kernel events by netlink": Attack(do="network.open_socket 16 3 15", **NO_FAMILY),
    "raw socket in a namespace": Attack(
        do="network.open_socket_in_namespace 2 3 1",
        works={"namespace": "done", "socket": "opened"},
        denied={"namespace": "EPERM", "socket": "EPERM"},
    ),
    "packet socket in a namespace": Attack(
        do="network.open_socket_in_namespace 17 3 0",
        works={"namespace": "done", "socket": "opened"},
        denied={"namespace": "EPERM", "socket": "EAFNOSUPPORT"},
    ),
    "a listener of the host": Attack(do="network.connect 127.0.0.1 {port}", works=SECRET, denied="ECONNREFUSED"),
    "Multipath TCP": Attack(do="network.open_socket 2 1 262", **NO_PROTOCOL),
    "IPv6 UDP-Lite": Attack(do="network.open_socket 10 2 136", **NO_PROTOCOL),
    "SCTP": Attack(do="network.open_socket 2 1 132", **NO_PROTOCOL),
    "L2TP": Attack(do="network.open_socket 2 2 115", **NO_PROTOCOL),
    "out-of-band data": Attack(do="network.out_of_band", works=1, denied="ENOTSUP"),
    "IPsec in UDP": Attack(do="network.decapsulate", works="done", denied="ENOPROTOOPT"),
    "a protocol on top of TCP": Attack(do="network.stack_protocol", works=True, denied=False),
    "an IPv6 listener of the host": Attack(do="network.connect ::1 {six}", works=SECRET, denied="ECONNREFUSED"),
    "an abstract socket of the host": Attack(do="network.connect_unix {name}", works=SECRET, denied="ECONNREFUSED"),
    "a socket file of the host": Attack(do="network.connect_unix {socket}", works=SECRET, denied="ENOENT"),
}
TOUR = FILES | PROCESSES | NAMESPACES | KERNEL | SOCKETS

ABSENT = ("ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ENOPROTOOPT")


@pytest.mark.parametrize("attack", TOUR.values(), ids=TOUR.keys())
def test_works_outside_and_is_denied_inside(attack: Attack, host: Host, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    if attack.root and not ROOT:
        pytest.skip(f"only root can do this outside: {WHY_SKIPPED}")

    def steps(line: str) -> list[str]:
        function, *arguments = line.split(" ")
        return [*function.split("."), *(argument.format(**vars(host)) for argument in arguments)]

    control = outside(*steps(attack.do))
    if control in ABSENT or (attack.policy and control in {"EPERM", "EACCES"}):
        if not ROOT:
            pytest.skip(f"not to be had outside ({control}, {attack.policy or 'this kernel'}): {WHY_SKIPPED}")
        # Nobody on this host can do it. What a cell would answer elsewhere is told all the same.
    else:
        assert control == attack.works
    assert inside(*steps(attack.do_inside or attack.do)) == attack.denied


def test_a_module_by_ioctl(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    if os.path.isdir("/sys/module/bridge"):  # else the kernel would load it, whoever asks
        assert outside("network", "bridge_version") == 1
    assert inside("network", "bridge_version") == "EPERM"


def test_an_address_that_is_not_loopback(host: Host, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    if host.own.startswith("127."):
        pytest.skip("this host has no address but loopback")
    assert outside("network", "connect", host.own, host.port) == SECRET
    assert inside("network", "connect", host.own, host.port) == "ENETUNREACH"
    assert inside("network", "interfaces") == ["lo"]


def test_a_datagram_to_the_host(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(60)
        port = str(receiver.getsockname()[1])
        assert outside("network", "datagram", "127.0.0.1", port, SECRET) == "sent"
        assert receiver.recv(64).decode() == SECRET
        assert inside("network", "datagram", "127.0.0.1", port, SECRET) == "sent"  # to the cell's own loopback, where nobody is
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.recv(64)


# ---------------------------------------------------------------- files, as far as they need more


def test_the_password_file(host: Host, tmp_path: Path, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """/etc/shadow for root; for anybody else a private file of theirs."""
    private = tmp_path / "private"
    private.write_text("root:secret:")
    private.chmod(0o600)
    path = "/etc/shadow" if ROOT else str(private)
    assert ":" in outside("files", "read", path)
    assert inside("files", "read", path) == "ENOENT"


DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def test_times_of_devices(outside: Callable[..., Any], inside: Callable[..., Any], tmp_path: Path) -> None:
    """Those of a cell are files of the host. Whoever may write to a device may set its times; only root can make one to try that on."""
    mine = tmp_path / "device"
    if ROOT:
        os.mknod(mine, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    else:
        mine.touch()
    assert outside("files", "set_times", str(mine)) == {str(mine): "done"}
    masked = [f"/proc/{name}" for name in ("keys", "timer_list", "cmdline") if os.path.exists(f"/proc/{name}")]
    paths = [*(f"/dev/{name}" for name in DEVICES), *masked]
    assert inside("files", "set_times", *paths) == dict.fromkeys(paths, "EROFS")


SYSTEM = ("/usr", "/etc", "/dev", "/", "/home", "/root", "/var", "/run", "/sys", "/proc")


def test_writing_to_the_system(outside: Callable[..., Any], inside: Callable[..., Any], tmp_path: Path) -> None:
    assert outside("files", "create_in", str(tmp_path)) == {str(tmp_path): "done"}
    answers = inside("files", "create_in", *SYSTEM, "/work", "/tmp", "/dev/shm")
    assert {path: answers.pop(path) for path in ("/work", "/tmp", "/dev/shm")} == {"/work": "done", "/tmp": "done", "/dev/shm": "done"}
    assert set(answers) == set(SYSTEM)
    assert set(answers.values()) <= {"EROFS", "EACCES", "ENOENT"}


def test_writing_through_a_shown_directory(outside: Callable[..., Any], inside: Callable[..., Any], tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "file").write_text(SECRET)
    assert outside("files", "create_in", str(shown)) == {str(shown): "done"}
    assert outside("files", "write_back", f"{shown}/file") == {f"{shown}/file": "done"}
    options = ["--ro", str(shown)]
    assert inside("files", "read", f"{shown}/file", options=options) == SECRET
    assert inside("files", "create_in", str(shown), options=options) == {str(shown): "EROFS"}
    assert inside("files", "write_back", f"{shown}/file", options=options) == {f"{shown}/file": "EROFS"}


@pytest.mark.alone
def test_writing_to_proc_sys(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """Root writes what is there already. An ordinary user may write to the part of a user namespace of his own, which a cell has too."""
    mine = "/proc/sys/user/max_user_namespaces"
    if ROOT:
        files: tuple[str, ...] = ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/overcommit_memory")
        assert outside("files", "write_back", *files) == dict.fromkeys(files, "done")
    else:
        files = (mine,)
        assert outside("files", "write_back", mine, before=["/usr/bin/unshare", "--user", "--map-root-user"]) == {mine: "done"}
    assert set(inside("files", "write_back", *files).values()) <= {"EROFS", "EACCES"}


@pytest.mark.skipif(not ROOT, reason=f"only root may write there outside: {WHY_SKIPPED}")
def test_writing_to_switches_of_the_kernel(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    switches = [path for path in ("/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/mtrr") if os.path.exists(path)]
    assert switches
    assert outside("files", "open_to_write", *switches) == dict.fromkeys(switches, "done")
    assert set(inside("files", "open_to_write", *switches).values()) <= {"EROFS", "EACCES"}


@pytest.mark.skipif(not ROOT, reason=f"only root may read them outside: {WHY_SKIPPED}")
def test_what_proc_tells_of_the_kernel(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    files = [path for path in ("/proc/kallsyms", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/cmdline") if os.path.exists(path)]
    assert outside("files", "content", *files) == dict.fromkeys(files, True)
    assert inside("files", "content", *files) == dict.fromkeys(files, False)


def test_who_reads_a_file_holds_up_nobody(tmp_path: Path, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """A lease is for who owns the file, and that is an ordinary user's cell, too."""
    shown = tmp_path / "shown"
    shown.mkdir()
    file = shown / "file"
    file.touch()
    for name, path in (("lease", str(file)), ("notify", str(shown))):
        assert outside("files", name, path) in (0, "EINVAL"), "EINVAL: this kernel was built without it"
        assert inside("files", name, path, options=["--ro", str(shown)]) == "EPERM"


def test_the_control_groups(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """Its own limits are out of a cell's reach."""
    if not os.path.isdir("/sys/fs/cgroup"):
        pytest.skip("this host shows no control groups")
    assert outside("files", "content", "/proc/self/cgroup") == {"/proc/self/cgroup": True}
    assert inside("files", "create_in", "/sys/fs/cgroup") == {"/sys/fs/cgroup": "ENOENT"}


@pytest.mark.skipif(not ROOT, reason="only root can make a program that becomes another user")
def test_a_set_user_id_program(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        copy = shutil.copy("/usr/bin/id", place)
        os.chmod(copy, 0o4755)
        assert outside("files", "run_as_owner", copy, user=65534, group=65534, extra_groups=[]) == "0"
        assert inside("files", "run_as_owner", copy, options=["--ro", place]) == "1000"


# ---------------------------------------------------------------- lives of other processes


@pytest.mark.parametrize("way", ["end", "end_by_pidfd", "end_by_descriptor"])
def test_a_process_of_the_host_cannot_be_ended(way: str, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    for attempt, expected in ((outside, "done"), (inside, "ESRCH")):
        with subprocess.Popen(["/usr/bin/sleep", "60"]) as victim:
            try:
                assert attempt("processes", way, str(victim.pid)) == expected
                if expected == "done":
                    assert victim.wait(60) == -9
                else:
                    assert victim.poll() is None
            finally:
                victim.kill()


PID_NAMESPACE = ["/usr/bin/unshare", "--pid", "--fork", *([] if ROOT else ["--user", "--map-root-user"])]
"""For what would work too well in ours."""


def test_process_1_cannot_be_held_up(outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    """It has the command's user id, and all of the cell depends on it."""
    ways = outside("processes", "hold_up", "sibling", before=PID_NAMESPACE)
    assert set(ways.values()) == {0}, ways
    assert inside("processes", "hold_up", "1") == dict.fromkeys(ways, "EPERM")


def test_a_command_that_tries_and_leaves_no_processor_free(commands: Any, attack: Any) -> None:
    """Process 1 still sees it end, and the rest ends with it."""
    report = commands.cell([*attack("processes"), "hold_up_and_exhaust", "50"], "--timeout", "60s")
    assert (report["code"], report["exitCode"], report["residue"]) == (5, 5, [])


@pytest.mark.parametrize("way", ["end", "end_by_pidfd", "end_by_descriptor"])
def test_process_1_cannot_be_ended(way: str, inside: Callable[..., Any]) -> None:
    """That it can be done outside is seen above. Here the kernel takes the signal and drops it."""
    assert inside("processes", way, "1") == "done"


def test_ending_everything_reaches_the_cell_only(host: Host, outside: Callable[..., Any], inside: Callable[..., Any]) -> None:
    assert outside("processes", "end_all", before=PID_NAMESPACE) == -9
    assert inside("processes", "end_all") == -9
    os.kill(int(host.pid), 0)
