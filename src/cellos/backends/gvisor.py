"""Settings of the gvisor backend. They are checked; a cell is not run by it yet.

CELLOS_GVISOR_RUNSC_BIN is a path, or a name to look up in PATH (`runsc`). CELLOS_GVISOR_BUNDLE_ROOT is the directory for its bundles
(`cellos-gvisor` in the directory for temporary files).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cellos.errors import ConfigError

RUNSC, BUNDLE_ROOT = "CELLOS_GVISOR_RUNSC_BIN", "CELLOS_GVISOR_BUNDLE_ROOT"


def check_settings(environment: Mapping[str, str]) -> None:
    """Raises ConfigError, naming the variable."""
    runsc, root = environment.get(RUNSC, "").strip(), environment.get(BUNDLE_ROOT, "").strip()
    if "/" in runsc and not os.path.isabs(runsc):
        raise ConfigError(f"gvisor backend init: {RUNSC} must be an absolute path, or a name without /")
    if root and not os.path.isabs(root):
        raise ConfigError(f"gvisor backend init: {BUNDLE_ROOT} must be an absolute path")
    if root and os.path.normpath(root) in ("/", "//"):
        raise ConfigError(f"gvisor backend init: {BUNDLE_ROOT} must not be /")
