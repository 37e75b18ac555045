"""Reading what the kernel says of a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellos.backends.security import last_capability, read_status
from cellos.ports import Security

STATUS = """\
Name:	python3
Umask:	0022
CapInh:	0000000000000001
CapPrm:	000001ffffffffff
CapEff:	000001ffffffffff
CapBnd:	000001fffffffffe
CapAmb:	0000000000000004
NoNewPrivs:	0
Seccomp:	0
Seccomp_filters:	0
"""
CONFINED = """\
CapInh:	0000000000000000
CapPrm:	0000000000000000
CapEff:	0000000000000000
CapBnd:	0000000000000000
CapAmb:	0000000000000000
NoNewPrivs:	1
Seccomp:	2
"""


def test_a_process_of_root() -> None:
    assert read_status(STATUS, last_capability=40) == Security(
        cap_eff="000001ffffffffff",
        cap_prm="000001ffffffffff",
        cap_bnd="000001fffffffffe",
        cap_amb="0000000000000004",
        cap_inh="0000000000000001",
        privileged=True,
        no_new_privs=False,
        seccomp_mode=0,
    )


def test_a_process_in_a_cell() -> None:
    none = "0" * 16
    assert read_status(CONFINED, last_capability=40) == Security(
        cap_eff=none, cap_prm=none, cap_bnd=none, cap_amb=none, cap_inh=none, privileged=False, no_new_privs=True, seccomp_mode=2
    )


@pytest.mark.parametrize(
    ("effective", "last", "privileged"),
    [
        ("000001ffffffffff", 40, True),
        ("000001ffffffffff", 41, False),  # a kernel with one capability more: this set lacks it
        ("000000ffffffffff", 40, False),
        ("0000003fffffffff", 37, True),
        ("0000000000000001", 0, True),
        ("0000000000000000", 0, False),
        ("ffffffffffffffff", 63, True),
    ],
)
def test_privileged_is_every_capability_of_this_kernel(effective: str, last: int, *, privileged: bool) -> None:
    security = read_status(STATUS.replace("CapEff:\t000001ffffffffff", f"CapEff:\t{effective}"), last_capability=last)
    assert security is not None
    assert security.privileged is privileged


def test_sets_have_16_digits() -> None:
    security = read_status(CONFINED.replace("CapEff:\t0000000000000000", "CapEff:\t1F"), last_capability=40)
    assert security is not None
    assert security.cap_eff == "000000000000001f"


@pytest.mark.parametrize("line", CONFINED.splitlines())
def test_nothing_is_made_up(line: str) -> None:
    """A kernel without seccomp has no such line: then nothing was measured."""
    name = line.partition(":")[0]
    assert read_status(CONFINED.replace(line + "\n", ""), last_capability=40) is None
    assert read_status(CONFINED.replace(line, f"{name}:\tnonsense"), last_capability=40) is None
    assert read_status("", last_capability=40) is None


def test_this_process() -> None:
    security = read_status(Path("/proc/self/status").read_text(), last_capability=last_capability())
    assert security is not None
    assert int(security.cap_bnd, 16) >> (last_capability() + 1) == 0
    if os.geteuid() != 0:
        assert not security.privileged
