from __future__ import annotations

import pytest

from cellos.errors import ConfigError
from cellos.supervisor.profile import banner, enforce, forced_missing

ALL = ("unshare", "seccomp", "cgroup-v2")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("unshare", ("unshare",)),
        ("seccomp", ("seccomp",)),
        ("cgroup-v2", ("cgroup-v2",)),
        ("cgroup_v2", ("cgroup-v2",)),
        ("cgroupv2", ("cgroup-v2",)),
        (" CGroup-V2 , UNSHARE ", ("unshare", "cgroup-v2")),
        ("seccomp,nonsense", ("seccomp",)),
        ("all", ALL),
        ("*", ALL),
        ("nonsense", ()),
        ("", ()),
        (" , ", ()),
    ],
)
def test_what_a_test_says_that_the_host_lacks(value: str | None, expected: tuple[str, ...] | None) -> None:
    """Said to lack nothing is another thing than nothing said: it replaces the look at the host."""
    assert forced_missing(value) == expected


class TestGate:
    @pytest.mark.parametrize("profile", [None, "hardened", "portable"])
    def test_a_host_that_lacks_nothing_passes(self, profile: str | None) -> None:
        warnings: list[str] = []
        enforce(profile, (), warnings.append)
        assert warnings == []

    @pytest.mark.parametrize("profile", [None, "hardened"])
    @pytest.mark.parametrize(("lacking", "listed"), [(("unshare",), '["unshare"]'), (ALL, '["unshare", "seccomp", "cgroup-v2"]')])
    def test_another_runs_nothing(self, profile: str | None, lacking: tuple[str, ...], listed: str) -> None:
        warnings: list[str] = []
        with pytest.raises(ConfigError) as caught:
            enforce(profile, lacking, warnings.append)
        assert str(caught.value) == (
            f"CELLOS_DEPLOYMENT_PROFILE=hardened (1.0 default): host is missing isolation primitives: {listed}. "
            "Set CELLOS_DEPLOYMENT_PROFILE=portable to run without isolation enforcement (audit-trail-only mode)."
        )
        assert warnings == []

    def test_what_can_be_done_about_it_follows(self) -> None:
        with pytest.raises(ConfigError, match=r"\(audit-trail-only mode\)\. Or buy a machine\.$"):
            enforce(None, ALL, lambda _: None, cure="buy a machine")

    def test_portable_makes_it_a_warning(self) -> None:
        warnings: list[str] = []
        enforce("portable", ("seccomp",), warnings.append)
        assert warnings == ['host is missing isolation primitives: ["seccomp"]; going on because of CELLOS_DEPLOYMENT_PROFILE=portable']


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        (
            None,
            "[cellos-supervisor] startup-profile: Hardened (isolation enforced (unshare/seccomp/cgroup v2 required) — 1.0 default)",
        ),
        (
            "hardened",
            "[cellos-supervisor] startup-profile: Hardened (isolation enforced (unshare/seccomp/cgroup v2 required) — 1.0 default)",
        ),
        (
            "portable",
            (
                "[cellos-supervisor] startup-profile: Portable "
                "(isolation NOT enforced — explicit operator opt-out via CELLOS_DEPLOYMENT_PROFILE=portable)"
            ),
        ),
    ],
)
def test_the_first_line_of_a_start(profile: str | None, line: str) -> None:
    assert banner(profile) == line
