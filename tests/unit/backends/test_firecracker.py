"""Settings of the firecracker backend: what is wrong is said by name, whatever else is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.backends.firecracker import COUNTS, IDS, OPTIONAL_PATHS, PREFIX, REQUIRED, SWITCHES, check_settings
from cellos.errors import ConfigError

NAMES = (*REQUIRED, *OPTIONAL_PATHS, *IDS, *COUNTS, *SWITCHES)
GOOD = {
    "BINARY": "/usr/bin/firecracker",
    "KERNEL_IMAGE": "/img/vmlinux",
    "ROOTFS_IMAGE": "/img/rootfs.ext4",
    "JAILER_BINARY": "/usr/bin/jailer",
    "MANIFEST": "/img/manifest",
}


def check(**changes: str | None) -> None:
    given = {**GOOD, **changes}
    check_settings({PREFIX + name: value for name, value in given.items() if value is not None})


def fault(**changes: str | None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(**changes)
    return str(caught.value).removeprefix("firecracker backend init: ")


def test_what_is_needed_and_no_more() -> None:
    check()


@pytest.mark.parametrize("value", [None, "", " ", "firecracker", "./x"])
@pytest.mark.parametrize(
    ("name", "what"), [("BINARY", "firecracker binary"), ("KERNEL_IMAGE", "kernel image"), ("ROOTFS_IMAGE", "root file system image")]
)
def test_three_paths_are_needed(name: str, what: str, value: str | None) -> None:
    assert fault(**{name: value}) == f"{PREFIX}{name} must be set to an absolute path to the {what} when CELLOS_CELL_BACKEND=firecracker"


def test_errors_say_where_they_belong() -> None:
    with pytest.raises(ConfigError, match=r"^firecracker backend init: CELLOS_FIRECRACKER_BINARY "):
        check_settings({})


@pytest.mark.parametrize("name", OPTIONAL_PATHS)
def test_other_paths_are_absolute(name: str) -> None:
    assert fault(**{name: "relative"}) == f"{PREFIX}{name} must be an absolute path"


@pytest.mark.parametrize("root", ["/", "//", "/x/.."])
def test_the_root_is_no_base(root: str) -> None:
    assert fault(CHROOT_BASE=root) == f"{PREFIX}CHROOT_BASE must not be /"


@pytest.mark.parametrize(
    "changes", [{"ALLOW_NO_JAILER": "1"}, *({"REQUIRE_JAILER": word} for word in ("0", "false", "FALSE", "no", "NO"))], ids=str
)
def test_without_a_jailer_only_by_choice(changes: dict[str, str]) -> None:
    check(JAILER_BINARY=None, **changes)
    assert fault(JAILER_BINARY=None).startswith("jailer is required for production use")


@pytest.mark.parametrize("name", IDS)
def test_the_jailer_is_not_root(name: str) -> None:
    check(**{name: "10002"})
    assert fault(**{name: "0"}).startswith(f"[FC-41] {PREFIX}{name} ")
    for other in ("-1", "root", "1.5", "4294967295"):
        assert fault(**{name: other}).startswith(f"{PREFIX}{name} must be an i")


def test_a_manifest_or_both_switches() -> None:
    allow, really = "ALLOW_NO_MANIFEST", "ALLOW_NO_MANIFEST_REALLY"
    check(MANIFEST=None, **{allow: "1", really: "1"})
    assert fault(MANIFEST=None).startswith(f"{PREFIX}MANIFEST must be set")
    assert "must both be set" in fault(MANIFEST=None, **{allow: "1"})
    assert "must both be set" in fault(MANIFEST=None, **{really: "1"})
    for changes in ({allow: "1"}, {really: "1"}, {allow: "1", really: "1"}):
        assert "cannot be combined with" in fault(**changes)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_or_off(name: str) -> None:
    assert fault(**{name: "perhaps"}) == f"{PREFIX}{name} must be one of 1, true, yes, on, 0, false, no, off"


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    check(**{name: "0"})
    check(**{name: " 12 "})
    assert fault(**{name: "many"}) == f"{PREFIX}{name} must be an integer >= 0"


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=20)))
def test_any_settings_are_right_or_refused(changes: dict[str, str]) -> None:
    try:
        check(**changes)
    except ConfigError as error:
        text = str(error)
        assert text.startswith("firecracker backend init: ")  # both ends are fine
