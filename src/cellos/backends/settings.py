"""What the environment says of isolation, for the Linux backend: read once, checked whole, never ignored.

A cell always has every namespace, our system call filter and default limits. So these variables add to that or choose a default; none takes
anything away, save for a limit that the operator lifts by the word `max`. Forms and effects: docs/reference/supervisor.md.
CELLOS_CGROUP_PARENT is not here: the launcher uses it, and says what is wrong with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from msgspec import Struct

from cellos.errors import ConfigError, os_error_text
from cellos.sandbox.cgroups import DEFAULT_PERIOD_MICROS

PARENT = "CELLOS_CGROUP_PARENT"
MEMORY = "CELLOS_CGROUP_MEMORY_MAX"
CPU = "CELLOS_CGROUP_CPU_MAX"
UNSHARE = "CELLOS_SUBPROCESS_UNSHARE"
SECCOMP = "CELLOS_SUBPROCESS_SECCOMP"
PROGRAM = "CELLOS_SECCOMP_BPF_PATH"

NO_LIMIT = 0
NAMESPACES = frozenset({"pid", "ipc", "net", "uts", "mnt", "mount", "ns"})
LARGEST_PROGRAM = 32768
"""Bytes: 4096 instructions, the most that the kernel takes (BPF_MAXINSNS)."""

_ALL_NAMESPACES = frozenset({"1", "default"})
_SUFFIXES = "KMGTPE"
_MEMORY_FORMS = "expected `max`, `<bytes>`, or `<number>` with one of K, M, G, T"
_CPU_FORMS = "expected `max`, `<quota_micros>`, `max <period_micros>` or `<quota_micros> <period_micros>`, in integers >= 1"
_SECCOMP_WORDS = {
    "0": "off", "off": "off", "none": "off",
    "1": "baseline", "default": "baseline", "baseline": "baseline",
    "bpf": "bpf", "path": "bpf", "file": "bpf",
}  # fmt: skip
_INSTRUCTION = 8
"""Bytes of a struct sock_filter."""


class LinuxSettings(Struct, frozen=True, kw_only=True):
    """Defaults of cells whose document says nothing: None is the backend's own default, NO_LIMIT none at all."""

    memory_bytes: int | None = None
    cpu_quota_micros: int | None = None
    cpu_period_micros: int = DEFAULT_PERIOD_MICROS
    program: bytes = b""
    """A filter that the command gets on top of ours: an array of struct sock_filter."""
    warnings: tuple[str, ...] = ()
    """Lines for people."""


def read_linux_settings(environment: Mapping[str, str]) -> LinuxSettings:
    """Read them, and the file that CELLOS_SECCOMP_BPF_PATH names. Raises ConfigError, naming the variable."""
    quota, period = _cpu(environment.get(CPU, ""))
    return LinuxSettings(
        memory_bytes=_memory(environment.get(MEMORY, "")),
        cpu_quota_micros=quota,
        cpu_period_micros=period,
        program=_program(environment),
        warnings=_unshare(environment.get(UNSHARE, ""))[1],
    )


def check_stub_settings(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The stub isolates nothing, so it is not asked to. Returns lines for people. Raises ConfigError, naming the variable."""
    asked = [name for name in (PARENT, MEMORY, CPU) if environment.get(name, "").strip()]
    wanted, warnings = _unshare(environment.get(UNSHARE, ""))
    if wanted:
        asked.append(UNSHARE)
    mode, path = _seccomp_mode(environment)
    if mode not in ("", "off"):
        asked.append(PROGRAM if path else SECCOMP)
    if asked:
        raise ConfigError(f"{asked[0]} asks for isolation, and the stub backend isolates nothing; unset it, or CELLOS_CELL_BACKEND")
    return warnings


def check_program(program: bytes) -> str | None:
    """What is wrong with the bytes of a filter, as far as one can see without the kernel."""
    if not program:
        return "seccomp BPF program is empty"
    if len(program) > LARGEST_PROGRAM:
        return f"seccomp BPF program too large (max {LARGEST_PROGRAM} bytes)"
    if len(program) % _INSTRUCTION:
        return f"seccomp BPF length {len(program)} is not a multiple of 8 (sock_filter size)"
    return None


def _memory(text: str) -> int | None:
    """The forms of memory.max, which the kernel reads like this, too (memparse)."""
    text = text.strip()
    if not text:
        return None
    if text == "max":
        return NO_LIMIT
    power = _SUFFIXES.find(text[-1].upper()) + 1
    number = text[:-1] if power else text
    if not _is_count(number) or int(number) == 0:
        raise ConfigError(f"{MEMORY}: {_MEMORY_FORMS} (got {_shown(text)})")
    return int(number) << 10 * power


def _cpu(text: str) -> tuple[int | None, int]:
    """Quota and period, in microseconds."""
    words = text.split()
    if not words:
        return None, DEFAULT_PERIOD_MICROS
    numbers = words[1:] if words[0] == "max" else words
    if len(words) > 2 or not all(_is_count(word) and int(word) > 0 for word in numbers):
        raise ConfigError(f"{CPU}: {_CPU_FORMS} (got {_shown(text)})")
    quota = NO_LIMIT if words[0] == "max" else int(words[0])
    period = int(words[1]) if len(words) > 1 else DEFAULT_PERIOD_MICROS
    if quota and quota < 1000:
        raise ConfigError(f"{CPU}: the kernel takes a quota of 1000 or more (got {_shown(text)})")
    if not 1000 <= period <= 1_000_000:
        raise ConfigError(f"{CPU}: the kernel takes a period of 1000 to 1000000 (got {_shown(text)})")
    return quota, period


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 20


def _unshare(text: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """The namespaces asked for, and a warning for each word that is none."""
    words = text.replace(",", " ").split()
    if len(words) == 1 and words[0] in _ALL_NAMESPACES:
        return frozenset({"pid", "ipc", "mnt", "net"}), ()
    warnings = tuple(
        f"{UNSHARE}: {_shown(word)} is no namespace and is ignored; known: pid, ipc, net, uts, mnt"
        for word in words
        if word not in NAMESPACES
    )
    return NAMESPACES.intersection(words), warnings


def _seccomp_mode(environment: Mapping[str, str]) -> tuple[str, str]:
    """`off`, `baseline`, `bpf` or nothing, and the path of the program, where one is used."""
    given, path = environment.get(SECCOMP, ""), environment.get(PROGRAM, "").strip()
    word = given.strip().lower()
    if not word:
        return ("bpf" if path else ""), path
    if word not in _SECCOMP_WORDS:
        raise ConfigError(f'seccomp: {SECCOMP} must be one of: 1, default, baseline, bpf, 0, off, none (got "{_printable(given)}")')
    mode = _SECCOMP_WORDS[word]
    if mode == "bpf" and not path:
        raise ConfigError(f"seccomp: {SECCOMP}=bpf requires {PROGRAM}")
    if mode != "bpf" and path:  # to leave a filter out that somebody wrote would be to pretend
        raise ConfigError(f"seccomp: {SECCOMP}={mode} cannot be combined with {PROGRAM} ({path})")
    return mode, path


def _program(environment: Mapping[str, str]) -> bytes:
    _, path = _seccomp_mode(environment)
    if not path:
        return b""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            program = file.read(LARGEST_PROGRAM + 1)
    except OSError as error:
        raise ConfigError(f"seccomp: {PROGRAM} {path}: {os_error_text(error)}") from error
    fault = check_program(program or b"")
    if fault:
        raise ConfigError(f"seccomp: {PROGRAM} {path}: {fault}")
    return program


def _shown(text: str) -> str:
    return f'"{_printable(text)}"'


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode()
