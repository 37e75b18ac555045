"""What `cellos run` says to people at the end: one line, and hints where a run failed for a reason that has a known cure."""

import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellos.client.local import Options
    from cellos.ports import Isolation
    from cellos.supervisor.run import CellOutcome

BUILT = ("/etc/", "/dev/", "/proc/", "/sys/")
"""What is made for each cell; nothing is to be added there, wherever a link of the host leads to."""
SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/", *BUILT)
"""What a cell has of the system; nothing is to be added there."""
OWN = ("/", "/tmp", "/work", "/var", "/var/tmp", "/run", "/home", "/root", "/mnt", "/opt")
"""Directories of the cell's own, which cannot be replaced as a whole."""


def closing_line(program: str, outcome: "CellOutcome", evidence: str | None, code: int) -> str:
    """How it ended and how long it took; what isolated it; where the record is."""
    from cellos.supervisor.run import OUTPUT_LOST

    end = how_it_ended(program, outcome, code)
    parts = [f"cellos: {end}", what_held_it(outcome.isolation)]
    if outcome.command is not None and outcome.command.output_lost and OUTPUT_LOST not in end:
        parts.append(OUTPUT_LOST)
    if outcome.residue:
        parts.append("left behind: " + ", ".join(f"{each.kind} {each.detail}" for each in outcome.residue))
    if evidence is not None:
        parts.append(f"events {evidence}")
    return " · ".join(parts)


def how_it_ended(program: str, outcome: "CellOutcome", code: int) -> str:
    """A clause: `exit 3 in 34 ms`, `time-out after 2 s`, …"""
    command = outcome.command
    if command is None:
        return f"failed: {outcome.reason}"
    took = duration(command.duration_ms)
    if outcome.interrupted:
        return f"stopped after {took}"
    if outcome.timed_out is not None:
        return f"time-out after {duration(outcome.timed_out.milliseconds)}"
    if command.spawn_error is not None:
        return f"cannot start {program}: {command.spawn_error}"
    if command.oom_killed and code != 0:
        return f"out of memory after {took} ({limit(outcome.isolation, 'memoryBytes')})"
    if command.signal is not None:
        return f"ended by {signal_name(command.signal)} after {took}"
    if command.exit_code is None:
        return f"failed: {outcome.reason}"
    if command.exit_code == 0 and outcome.reason is not None:
        return f"exit 0 in {took}, but {outcome.reason}"
    return f"exit {command.exit_code} in {took}"


def what_held_it(isolation: "Isolation") -> str:
    """`linux: 7 namespaces, seccomp, landlock, no network, memory 512 MiB`."""
    if not isolation.enforced:
        return f"{isolation.backend}: not isolated"
    namespaces = sum(name.endswith("-namespace") for name in isolation.enforced)
    parts = [f"{namespaces} namespaces"] if namespaces else []
    parts += [name for name in ("seccomp", "landlock") if name in isolation.enforced]
    if "no-network" in isolation.enforced:
        parts.append("no network")
    parts.append(f"memory {limit(isolation, 'memoryBytes')}")
    return f"{isolation.backend}: {', '.join(parts)}"


def limit(isolation: "Isolation", name: str) -> str:
    """A limit in bytes, for people."""
    value = isolation.limits.get(name)
    if value is None:
        return "unbounded"
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor and value % factor == 0:
            return f"{value // factor} {unit}"
    return f"{value} bytes"


def duration(milliseconds: int) -> str:
    """A time for people."""
    return f"{milliseconds} ms" if milliseconds < 10_000 and milliseconds % 1000 else f"{milliseconds / 1000:.4g} s"


def signal_name(number: int) -> str:
    """`signal 9 (SIGKILL)`."""
    import signal

    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def hints(options: "Options", outcome: "CellOutcome") -> Iterator[str]:
    """What to add to the command line, where the failure is of a kind that an option cures."""
    if outcome.command is None or outcome.reason is None or outcome.interrupted or outcome.timed_out is not None:
        return
    for shown in (*([options.here] if options.here else []), *options.read_only) if os.geteuid() == 0 else ():
        needed = _closed_to_others(shown)
        if needed:
            yield (
                f"a cell of root is not root, it may do what every user may, and {shown} is closed to others: "
                f"chmod o+{needed} {shown}, or copy what is needed to another place"
            )
            return
    if outcome.command.spawn_error is not None and "/" not in options.argv[0]:
        import shutil

        from cellos.supervisor.compose import COMMAND_PATH

        found = shutil.which(options.argv[0])
        if found is not None and not _visible(options, found):
            real = os.path.realpath(found)
            program = found if _is_shown(options, real) else real
            yield f"{options.argv[0]} lies outside the cell, at {found}: add --ro {_installed_in(program)}, and run it as {program}"
            return
        if found is not None and os.path.dirname(found) not in COMMAND_PATH.split(":"):
            yield f"{options.argv[0]} is in no directory of the cell's PATH, {COMMAND_PATH}: run it as {found}"
            return
    for argument in options.argv:
        if not argument or argument.startswith("-") or not os.path.exists(argument):
            continue
        if os.path.isabs(argument):
            if argument not in OWN and not _visible(options, argument):
                hidden = os.path.realpath(argument) if _is_shown(options, argument) else argument
                directory = hidden if os.path.isdir(hidden) else _installed_in(hidden)
                yield f"{hidden} is not visible in the cell: add --ro {hidden if directory in OWN else directory}"
                return
        elif options.here is None:
            yield f"{argument} exists here: add --here"
            return


def _closed_to_others(path: str) -> str:
    """What every user would need to read a file or directory, where they may not: `r` or `rx`."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""
    needed = 0o005 if stat.S_ISDIR(mode) else 0o004
    return "" if mode & needed == needed else "rx" if stat.S_ISDIR(mode) else "r"


def _installed_in(path: str) -> str:
    """The directory that shows a file together with what belongs to it: a program in `bin` comes with a `lib` beside it."""
    directory = os.path.dirname(path)
    parent = os.path.dirname(directory)
    whole = os.path.basename(directory) == "bin" and parent not in OWN and os.path.isdir(f"{parent}/lib")
    return parent if whole else directory


def _visible(options: "Options", path: str) -> bool:
    """Whether the cell has what the path means here: a link that it has may lead to where it has nothing, and from there to what it has."""
    return os.path.abspath(path).startswith(BUILT) or (_is_shown(options, path) and _is_shown(options, os.path.realpath(path)))


def _is_shown(options: "Options", path: str) -> bool:
    shown = [*SYSTEM, *(directory.rstrip("/") + "/" for directory in (*options.read_only, *([options.here] if options.here else [])))]
    return (os.path.abspath(path) + "/").startswith(tuple(shown))
