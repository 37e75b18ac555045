"""The deployment profile: what a host must be able to do before any document is looked at.

Without CELLOS_DEPLOYMENT_PROFILE, and with `hardened`, a host that lacks one of `PRIMITIVES` runs nothing. `portable` makes that a
warning. It lifts this check and nothing else: the Linux backend still refuses what it cannot enforce. What else `hardened` asks for is
in config.py.
"""

from collections.abc import Callable, Sequence

from cellos.errors import ConfigError

FORCED = "CELLOS_TEST_FORCE_MISSING_ISOLATION_PRIMITIVES"
PRIMITIVES = ("unshare", "seccomp", "cgroup-v2")
_SPELLINGS = {"cgroup_v2": "cgroup-v2", "cgroupv2": "cgroup-v2"}

HARDENED_BANNER = "[cellos-supervisor] startup-profile: Hardened (isolation enforced (unshare/seccomp/cgroup v2 required) — 1.0 default)"
PORTABLE_BANNER = (
    "[cellos-supervisor] startup-profile: Portable "
    "(isolation NOT enforced — explicit operator opt-out via CELLOS_DEPLOYMENT_PROFILE=portable)"
)


def forced_missing(value: str | None) -> tuple[str, ...] | None:
    """What a test says that the host lacks; None where no test says anything. Words that are no primitive are ignored."""
    if value is None:
        return None
    words = {_SPELLINGS.get(word.strip().lower(), word.strip().lower()) for word in value.split(",")}
    return tuple(name for name in PRIMITIVES if name in words or words & {"all", "*"})


def enforce(profile: str | None, missing: Sequence[str], warn: Callable[[str], None], *, cure: str = "") -> None:
    """Let the host pass, with a warning under `portable`. Raises ConfigError, with the cure where one is known."""
    if not missing:
        return
    listed = "[" + ", ".join(f'"{name}"' for name in missing) + "]"
    if profile != "portable":
        raise ConfigError(
            f"CELLOS_DEPLOYMENT_PROFILE=hardened (1.0 default): host is missing isolation primitives: {listed}. "
            "Set CELLOS_DEPLOYMENT_PROFILE=portable to run without isolation enforcement (audit-trail-only mode)."
            + (f" Or {cure}." if cure else "")
        )
    warn(f"host is missing isolation primitives: {listed}; going on because of CELLOS_DEPLOYMENT_PROFILE=portable")


def banner(profile: str | None) -> str:
    """The first line of a start."""
    return PORTABLE_BANNER if profile == "portable" else HARDENED_BANNER
