"""Whether this host can hold a cell: each primitive is tried for real, in a child that is thrown away.

`rows` tries everything that the launcher and init use, one by one, so that a failure of one does not hide the others. Call it from a
process with one thread.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from cellos.sandbox import cgroups, landlock, seccomp, syscalls
from cellos.sandbox.cures import CURES, OWN_GROUP
from cellos.sandbox.hostids import FIRST
from cellos.sandbox.init import loopback_up
from cellos.sandbox.rootfs import BUILDING_PLACE, CELL_ID

ALL_NAMESPACES = (
    syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One primitive. Without a `required` one no cell runs; without another one something stays unbounded, and is refused when declared."""

    primitive: str
    ok: bool
    required: bool
    detail: str
    cure: str = ""


def rows() -> list[Row]:
    """Try everything. Never raises for something that is missing."""
    found = [_architecture()]
    inside = _try_inside()
    for primitive, what in (REQUIRED | {"restrict with Landlock": f"a second check on {landlock.covers()}"}).items():
        failure = inside.get(primitive, "not tried: needs the ones above")
        found.append(
            Row(
                primitive=primitive, ok=not failure, required=True, detail=failure or what, cure=CURES.get(primitive, "") if failure else ""
            )
        )
    for primitive, attempt in OUTSIDE.items():
        found.append(_attempt(primitive, *attempt))
    return found + _limits()


REQUIRED = {
    "clone3": "seven new namespaces, the user namespace among them",
    "map ids": "an unprivileged host id stands for the cell's user",
    "close_range": "no descriptor is inherited",
    "bring up loopback": "the cell has a network of its own",
    "set the host name": "the cell has a host name of its own",
    "new root": "an own root on tmpfs (fsopen, fsmount, move_mount)",
    "mount /usr": "/usr read-only (open_tree, mount_setattr)",
    "mount /proc": "/proc of the cell's own processes",
    "forbid user namespaces": "no new user namespace inside",
    "pivot_root": "the host's files are out of reach",
    "empty the session keyring": "no key of the host is reachable",
    "drop capabilities": "no capability, now or later",
    "set no_new_privs": "set-user-id programs gain nothing",
    "restrict with Landlock": "a second check on files",
    "install the seccomp filter": "only listed system calls",
}
"""Primitives that init and launcher need, in their order, and what each is for."""


def _architecture() -> Row:
    host = os.uname()
    ok = syscalls.architecture_fits()
    return Row(
        primitive="architecture", ok=ok, required=True, detail=f"{host.sysname} {host.release} {host.machine}",
        cure="" if ok else CURES["architecture"],
    )  # fmt: skip


def _try_inside() -> dict[str, str]:
    """Primitive to failure text, empty where it worked; what could not be tried is missing."""
    results: dict[str, str] = {}
    reading, writing = os.pipe2(os.O_CLOEXEC)
    go_reading, go_writing = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            pid, pidfd = syscalls.clone3(ALL_NAMESPACES)
        except OSError as error:
            return {"clone3": _text(error)}
        if pid == 0:
            _inside(go_reading, go_writing, writing)
        os.close(pidfd)
        results["clone3"] = ""
        try:
            ids = (os.geteuid(), os.getegid()) if os.geteuid() else (FIRST, FIRST)
            for name, text in (("setgroups", "deny"), ("uid_map", f"{CELL_ID} {ids[0]} 1"), ("gid_map", f"{CELL_ID} {ids[1]} 1")):
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write(text)
            results["map ids"] = ""
            os.write(go_writing, b"g")
        except OSError as error:
            results["map ids"] = _text(error)
        os.close(go_writing)
        go_writing = -1
        os.close(writing)
        writing = -1
        answer = b""
        while chunk := os.read(reading, 1 << 16):
            answer += chunk
        os.waitpid(pid, 0)
        return results | (json.loads(answer) if answer else {})
    finally:
        for descriptor in (reading, writing, go_reading, go_writing):
            if descriptor >= 0:
                os.close(descriptor)


def _inside(go_reading: int, go_writing: int, answer: int) -> None:
    """The child: try each primitive, write what happened, and exit. Failures of one step must not stop the others."""
    os.close(go_writing)
    if os.read(go_reading, 1) != b"g":
        os._exit(1)
    results: dict[str, str] = {}

    def attempt(primitive: str, action: Callable[[], object]) -> None:
        try:
            action()
            results[primitive] = ""
        except OSError as error:
            results[primitive] = _text(error)

    try:
        for take in (os.setresgid, os.setresuid):
            take(CELL_ID, CELL_ID, CELL_ID)
        attempt("close_range", lambda: syscalls.close_range(max(go_reading, answer) + 1))
        attempt("bring up loopback", loopback_up)
        attempt("set the host name", lambda: syscalls.sethostname("cell"))
        attempt("new root", _new_root)
        if not results["new root"]:
            attempt("mount /usr", _mount_usr)
            attempt("mount /proc", _mount_proc)
            attempt("forbid user namespaces", _forbid_user_namespaces)
            attempt("pivot_root", syscalls.pivot_here)
        attempt("empty the session keyring", syscalls.new_session_keyring)
        attempt("set no_new_privs", syscalls.no_new_privileges)
        attempt("drop capabilities", lambda: syscalls.drop_capabilities(_last_capability()))
        attempt("restrict with Landlock", landlock.abi)
        attempt("install the seccomp filter", lambda: seccomp.install(seccomp.program()))
        os.write(answer, json.dumps(results).encode())
    finally:
        os._exit(0)


def _new_root() -> None:
    syscalls.stop_propagation()
    mount = syscalls.new_mount("tmpfs", syscalls.MOUNT_ATTR_NOSUID, size="1m", mode="755")
    syscalls.attach_mount(mount, BUILDING_PLACE)
    os.close(mount)
    os.chdir(BUILDING_PLACE)
    os.mkdir("usr")
    os.mkdir("proc")


def _mount_usr() -> None:
    syscalls.bind("/usr", "usr", syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)


def _mount_proc() -> None:
    mount = syscalls.new_mount("proc", syscalls.MOUNT_ATTR_NOSUID)
    syscalls.attach_mount(mount, "proc")
    os.close(mount)


def _forbid_user_namespaces() -> None:
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")


def _last_capability() -> int:
    # Through the cell's own /proc if it is mounted, else through the old one.
    for path in ("/proc/sys/kernel/cap_last_cap", "proc/sys/kernel/cap_last_cap"):
        if os.path.exists(path):
            with open(path) as file:
                return int(file.read())
    return 40


def _attempt(primitive: str, what: str, action: Callable[[], object]) -> Row:
    try:
        action()
    except OSError as error:
        return Row(primitive=primitive, ok=False, required=True, detail=_text(error), cure=CURES.get(primitive, ""))
    return Row(primitive=primitive, ok=True, required=True, detail=what)


def _try_openat2() -> None:
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(syscalls.open_beneath(directory, "."))
    finally:
        os.close(directory)


def _try_pidfd() -> None:
    descriptor = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(descriptor, 0)
    finally:
        os.close(descriptor)


OUTSIDE: dict[str, tuple[str, Callable[[], object]]] = {
    "openat2": ("exports cannot be led astray", _try_openat2),
    "pidfd_send_signal": ("kill reaches the right process", _try_pidfd),
}


def _limits() -> list[Row]:
    """What can be limited here. pids falls back to RLIMIT_NPROC, so it is always there."""
    hierarchy = cgroups.discover(ours=frozenset({os.getpid()}))
    found = []
    for controller, unit in ((cgroups.MEMORY, "memory"), (cgroups.PIDS, "processes"), (cgroups.CPU, "processor time")):
        have = hierarchy is not None and controller in hierarchy.controllers
        if have and hierarchy is not None:
            detail = f"control group version {hierarchy.version}"
        elif controller == cgroups.PIDS:
            have, detail = True, "RLIMIT_NPROC in the cell's user namespace (no control group of our own)"
        else:
            detail = "no control group of our own: unbounded, and refused where a spec declares it"
        found.append(Row(primitive=f"limit {unit}", ok=have, required=False, detail=detail, cure="" if have else OWN_GROUP))
    return found


def _text(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "?")
    return f"{error.filename + ': ' if isinstance(error.filename, str) else ''}{error.strerror} ({name})"
