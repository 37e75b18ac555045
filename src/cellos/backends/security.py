"""What the kernel says of a process, for `Isolation.security`: the lines of /proc/PID/status that tell what it may do."""

from __future__ import annotations

from cellos.errors import HostBackendError
from cellos.ports import Security

LAST_CAPABILITY = "/proc/sys/kernel/cap_last_cap"


def read_status(text: str, *, last_capability: int) -> Security | None:
    """Read these lines (proc_pid_status(5)); None where one is missing or makes no sense, as nothing is measured then.

    `last_capability`: the highest number that this kernel knows. A process with the capabilities 0 to that one is privileged, whatever
    their number on other kernels.
    """
    values = {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    every = (2 << last_capability) - 1
    try:
        return Security(
            cap_eff=_set(values["CapEff"]),
            cap_prm=_set(values["CapPrm"]),
            cap_bnd=_set(values["CapBnd"]),
            cap_amb=_set(values["CapAmb"]),
            cap_inh=_set(values["CapInh"]),
            privileged=int(values["CapEff"], 16) & every == every,
            no_new_privs=bool(int(values["NoNewPrivs"])),
            seccomp_mode=int(values["Seccomp"]),
        )
    except (KeyError, ValueError):
        return None


def last_capability() -> int:
    """The highest capability that this kernel knows. Raises HostBackendError."""
    try:
        with open(LAST_CAPABILITY) as file:
            return int(file.read())
    except OSError as error:
        raise HostBackendError(f"cannot ask the kernel for its capabilities: {error.filename}: {error.strerror}") from error


def _set(digits: str) -> str:
    return f"{int(digits, 16):016x}"
