"""What to do when a step of building a cell fails on a host: the knowledge behind `cellos doctor` and the errors of the Linux backend."""

from __future__ import annotations

import errno

_CURES: dict[str, tuple[tuple[int, ...], str]] = {
    "clone3": (
        (errno.EPERM, errno.ENOSPC, errno.EUSERS, errno.ENOSYS, errno.EINVAL, errno.EACCES),
        "allow user namespaces: sysctl user.max_user_namespaces=10000, kernel.unprivileged_userns_clone=1 (Debian), "
        "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in a container, allow clone3 in its seccomp profile",
    ),
    "map ids": (
        (errno.EPERM, errno.EACCES),
        "let the process write uid_map: keep CAP_SETUID and CAP_SETGID when running as root, and do not run under no_new_privs with AppArmor",
    ),
    "attach to control group": (
        (errno.EACCES, errno.EPERM, errno.EBUSY),
        "run as root or in a control group delegated to this user (Delegate=yes)",
    ),
    "bring up loopback": (
        (errno.EPERM, errno.EACCES),
        "load the AppArmor or SELinux policy that allows capabilities inside user namespaces",
    ),
    "new root": (
        (errno.EPERM, errno.EACCES, errno.ENOSYS),
        "needs Linux 5.12 or later with the mount API (fsopen, move_mount) allowed inside user namespaces",
    ),
    "mount /usr": (
        (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL),
        "needs Linux 5.12 or later with open_tree and mount_setattr allowed",
    ),
    "mount /proc": (
        (errno.EPERM,),
        "something is mounted over part of /proc, as in most containers: run on the host, or start the container with an unmasked /proc "
        "(docker: --security-opt systempaths=unconfined)",
    ),
    "pivot_root": ((errno.EPERM, errno.ENOSYS, errno.EINVAL), "allow pivot_root; it does not work from an initramfs root"),
    "forbid user namespaces": (
        (errno.EPERM, errno.EACCES, errno.ENOENT, errno.EROFS),
        "make /proc/sys/user writable: /proc/sys must not be mounted read-only",
    ),
    "empty the session keyring": ((errno.ENOSYS, errno.EPERM), "allow keyctl, in a container by its seccomp profile"),
    "restrict with Landlock": (
        (errno.ENOSYS, errno.EOPNOTSUPP),
        "needs Linux 5.13 or later with Landlock: build with CONFIG_SECURITY_LANDLOCK=y and boot with lsm=landlock,… in front",
    ),
    "install the seccomp filter": ((errno.EINVAL, errno.ENOSYS, errno.EPERM), "needs a kernel with CONFIG_SECCOMP_FILTER=y"),
}


def cure(step: str, number: int) -> str | None:
    """What to do about `step` failing with errno `number`; None when nothing is known."""
    numbers, text = _CURES.get(step, ((), ""))
    return text if number in numbers else None
