"""A cure is told for what a host forbids or lacks, not for what it has run out of."""

from __future__ import annotations

import errno

import pytest

from cellos.sandbox.cures import CURES, cure
from cellos.sandbox.probe import REQUIRED


@pytest.mark.parametrize("primitive", [*REQUIRED, "openat2", "pidfd_send_signal", "architecture"])
def test_every_required_primitive_has_one(primitive: str) -> None:
    assert CURES[primitive]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EROFS, errno.ENOSPC])
def test_a_host_that_forbids_or_lacks_something(number: int) -> None:
    assert cure("clone3", number) == CURES["clone3"]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EAGAIN, errno.EINTR, 0])
def test_a_host_that_is_full_needs_none_of_ours(number: int) -> None:
    assert cure("clone3", number) is None


def test_an_unknown_step_has_none() -> None:
    assert cure("mount /home at /data", errno.EPERM) is None


def test_cures_are_one_line_each() -> None:
    for text in CURES.values():
        assert text == text.strip()
        assert text.isprintable()
        assert not text.endswith(".")
