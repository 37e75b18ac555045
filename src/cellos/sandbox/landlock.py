"""Landlock: a second, independent check on files, signals and abstract sockets (landlock(7))."""

import os
import struct

from cellos.sandbox.syscalls import call

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of file system rights that an ABI version knows; later ones add none that we handle."""
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

WRITABLE = ("/work", "/tmp", "/dev/shm")


def abi() -> int:
    """The version this kernel offers. Raises OSError: ENOSYS without Landlock, EOPNOTSUPP where it is switched off."""
    return call("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)


def covers() -> str:
    """What `restrict` checks on this kernel, in words; empty without Landlock."""
    try:
        version = abi()
    except OSError:
        return ""
    if version < 3:
        return "files, but for truncating them (Landlock 3, Linux 6.2)"
    return "files" if version < 6 else "files, signals and abstract sockets"


def restrict() -> None:
    """Confine the calling thread: read and execute everywhere, write below WRITABLE, to devices and to /proc.

    What may be written in /proc is left to the owner checks there and to its read-only parts. Needs no_new_privs.
    """
    version = abi()
    rights = (1 << _RIGHTS_BY_ABI[min(version, 5)]) - 1
    if version >= 6:
        attributes = struct.pack("3Q", rights, 0, _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL)
    else:
        attributes = struct.pack("Q", rights)
    ruleset = call("landlock_create_ruleset", attributes, len(attributes), 0)
    devices = (_FILE_RIGHTS | _READ) & rights
    rules = [("/", _READ), ("/dev", devices), ("/proc", (_READ | _WRITE_FILE | _TRUNCATE) & rights), *((path, rights) for path in WRITABLE)]
    try:
        for path, allowed in rules:
            directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", allowed, directory), 0)
            finally:
                os.close(directory)
        call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
