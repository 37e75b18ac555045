"""Settings of the firecracker backend. They are checked; a cell is not run by it yet.

Names, defaults and rules are those of CellOS 0.5, see docs/reference/supervisor.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cellos.errors import ConfigError

PREFIX = "CELLOS_FIRECRACKER_"
REQUIRED = {"BINARY": "firecracker binary", "KERNEL_IMAGE": "kernel image", "ROOTFS_IMAGE": "root file system image"}
OPTIONAL_PATHS = ("JAILER_BINARY", "CHROOT_BASE", "SOCKET_DIR", "SCRATCH_DIR", "MANIFEST")
IDS = ("JAILER_UID", "JAILER_GID")
COUNTS = ("NO_VSOCK_TIMEOUT_SECS", "POOL_SIZE")
SWITCHES = (
    "ENABLE_NETWORK", "NO_SECCOMP", "REQUIRE_JAILER", "ALLOW_NO_JAILER", "ALLOW_NO_VSOCK", "ALLOW_NO_MANIFEST", "ALLOW_NO_MANIFEST_REALLY",
)  # fmt: skip
DEFAULT_ON = frozenset({"ENABLE_NETWORK", "REQUIRE_JAILER"})

_ON, _OFF = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
_HIGHEST_ID = 0xFFFF_FFFE


def check_settings(environment: Mapping[str, str]) -> None:
    """Raises ConfigError, naming the variable."""
    try:
        _check({name.removeprefix(PREFIX): value.strip() for name, value in environment.items() if name.startswith(PREFIX)})
    except ValueError as error:
        raise ConfigError(f"firecracker backend init: {error}") from error


def _check(given: Mapping[str, str]) -> None:
    for name, what in REQUIRED.items():
        if not os.path.isabs(given.get(name, "")):
            raise ValueError(f"{PREFIX}{name} must be set to an absolute path to the {what} when CELLOS_CELL_BACKEND=firecracker")
    for name in OPTIONAL_PATHS:
        if given.get(name) and not os.path.isabs(given[name]):
            raise ValueError(f"{PREFIX}{name} must be an absolute path")
    if given.get("CHROOT_BASE") and os.path.normpath(given["CHROOT_BASE"]) in ("/", "//"):
        raise ValueError(f"{PREFIX}CHROOT_BASE must not be /")
    for name in IDS:
        if _count(given, name, 10002) == 0:
            raise ValueError(f"[FC-41] {PREFIX}{name} must not be 0: the jailer would keep the privileges of root")
        if _count(given, name, 10002) > _HIGHEST_ID:
            raise ValueError(f"{PREFIX}{name} must be an id of at most {_HIGHEST_ID}")
    for name in COUNTS:
        _count(given, name, 0)
    on = {name: _switch(given, name) for name in SWITCHES}
    if not given.get("JAILER_BINARY") and on["REQUIRE_JAILER"] and not on["ALLOW_NO_JAILER"]:
        raise ValueError(
            f"jailer is required for production use: set {PREFIX}JAILER_BINARY, or {PREFIX}ALLOW_NO_JAILER=1 to run without it"
        )
    _check_manifest(manifest=bool(given.get("MANIFEST")), allow=on["ALLOW_NO_MANIFEST"], really=on["ALLOW_NO_MANIFEST_REALLY"])


def _check_manifest(*, manifest: bool, allow: bool, really: bool) -> None:
    """Images without a manifest are run by two switches at once, so that neither is left on by mistake."""
    flags = f"{PREFIX}ALLOW_NO_MANIFEST and {PREFIX}ALLOW_NO_MANIFEST_REALLY"
    if manifest and (allow or really):
        raise ValueError(f"{PREFIX}MANIFEST cannot be combined with {flags}")
    if allow != really:
        raise ValueError(f"{flags} must both be set to run without a manifest")
    if not manifest and not allow:
        raise ValueError(f"{PREFIX}MANIFEST must be set to the absolute path of the artifact manifest; to run without one set both {flags}")


def _count(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{PREFIX}{name} must be an integer >= 0")
    return int(text)


def _switch(given: Mapping[str, str], name: str) -> bool:
    word = given.get(name, "").lower()
    if not word:
        return name in DEFAULT_ON
    if word not in _ON | _OFF:
        raise ValueError(f"{PREFIX}{name} must be one of 1, true, yes, on, 0, false, no, off")
    return word in _ON
