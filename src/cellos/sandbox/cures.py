"""What to do when a step of building a cell fails on a host: the knowledge behind `cellos doctor` and the errors of the Linux backend."""

from __future__ import annotations

import errno

OWN_GROUP = (
    "give it a control group of its own: systemd-run --scope -p Delegate=yes cellos …, as an ordinary user systemd-run --user --scope …; "
    "with control groups version 1, run as root"
)

CURES = {
    "architecture": "the system calls and their filter are those of 64-bit x86; run a 64-bit kernel and a 64-bit Python there",
    "clone3": "allow user namespaces: sysctl user.max_user_namespaces=10000, kernel.unprivileged_userns_clone=1 (Debian), "
    "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in a container, allow clone3 in its seccomp profile",
    "take a host id": "let root write to /run/cellos; where you are root of a user namespace only, as in a rootless container, work there "
    "as another user",
    "map ids": "as root keep CAP_SETUID and CAP_SETGID; as another user let AppArmor or SELinux allow user namespaces",
    "attach to control group": OWN_GROUP,
    "hide the launcher": "allow prctl, in a container by its seccomp profile",
    "close_range": "needs Linux 5.9 or later",
    "enter a cgroup namespace": "allow unshare, in a container by its seccomp profile",
    "bring up loopback": "let AppArmor or SELinux allow capabilities inside user namespaces",
    "set the host name": "let AppArmor or SELinux allow capabilities inside user namespaces",
    "stop mount propagation": "let AppArmor or SELinux allow mounts inside user namespaces",
    "new root": "needs Linux 5.12 or later, with fsopen and move_mount allowed inside user namespaces",
    "mount /usr": "needs Linux 5.12 or later, with open_tree and mount_setattr allowed inside user namespaces",
    "mount /proc": "something is mounted over part of /proc, as in most containers: run on the host, or start the container with an "
    "unmasked /proc (docker: --security-opt systempaths=unconfined)",
    "forbid user namespaces": "/proc/sys must not be mounted read-only",
    "pivot_root": "allow pivot_root; it does not work from an initramfs root",
    "empty the session keyring": "allow keyctl, in a container by its seccomp profile",
    "drop capabilities": "allow capset and prctl, in a container by its seccomp profile",
    "set no_new_privs": "allow prctl, in a container by its seccomp profile",
    "restrict with Landlock": "needs Linux 5.13 or later with Landlock switched on: boot with landlock in the lsm= list",
    "install the seccomp filter": "needs a kernel with CONFIG_SECCOMP_FILTER=y",
    "openat2": "needs Linux 5.6 or later",
    "pidfd_send_signal": "needs Linux 5.3 or later",
}
"""Step or primitive to what makes it work."""

_HOST_REASONS = {
    errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EROFS, errno.ENOSPC, errno.EUSERS, errno.EBUSY,
}  # fmt: skip
"""Answers of a host that lacks or forbids something, unlike ENOMEM or EMFILE, which say that it is full."""


def cure(step: str, number: int) -> str | None:
    """What to do about `step` failing with errno `number`; None when the fault is not one of the host's abilities."""
    return CURES.get(step) if number in _HOST_REASONS else None
