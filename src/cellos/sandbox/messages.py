"""The shapes of what backend, launcher and init say to each other, as JSON. Types only: the launcher never imports this (typing costs 12 ms)."""

from typing import TypedDict


class RootSizes(TypedDict):
    """Sizes of the cell's own file systems, in bytes and inodes."""

    work_bytes: int
    work_inodes: int
    tmp_bytes: int
    tmp_inodes: int
    shm_bytes: int


class InitRequest(TypedDict):
    """What process 1 needs to build and confine a cell."""

    last_cap: int
    limits: dict[str, int]
    """Resource limit (without RLIMIT_) to value, soft and hard."""
    root: RootSizes
    mounts: list[tuple[str, str]]
    """(source, target) of read-only mounts."""
    program: str
    """The seccomp filter, in hexadecimal."""
    attached_v1: bool


class CloneRequest(TypedDict):
    """What the launcher needs to make one cell. Goes with descriptors: control, `trees` detached mounts, and with `in_cgroup` a directory."""

    ids: tuple[int, int]
    attach: list[str]
    in_cgroup: bool
    trees: int
    init: InitRequest


class CommandRequest(TypedDict):
    """What init needs to start the command."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
