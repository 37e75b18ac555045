"""Settings of the gvisor backend."""

from __future__ import annotations

import pytest

from cellos.backends.gvisor import BUNDLE_ROOT, RUNSC, check_settings
from cellos.errors import ConfigError


@pytest.mark.parametrize(
    "environment", [{}, {RUNSC: "runsc"}, {RUNSC: "/opt/runsc", BUNDLE_ROOT: "/var/lib/bundles"}, {RUNSC: "", BUNDLE_ROOT: " "}], ids=str
)
def test_right(environment: dict[str, str]) -> None:
    check_settings(environment)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({RUNSC: "bin/runsc"}, f"{RUNSC} must be an absolute path, or a name without /"),
        ({BUNDLE_ROOT: "bundles"}, f"{BUNDLE_ROOT} must be an absolute path"),
        ({BUNDLE_ROOT: "/x/.."}, f"{BUNDLE_ROOT} must not be /"),
    ],
    ids=str,
)
def test_wrong(environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(environment)
    assert str(caught.value) == f"gvisor backend init: {text}"
