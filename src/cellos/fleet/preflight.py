"""What would fail every cell of an agent is found before a document is blamed for it: settings, the operator's files, sinks, the host.

The supervisor's own steps that need no document, in the environment that it will get.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from cellos.core.events import RunIdentity
from cellos.errors import HostBackendError, os_error_text
from cellos.sandbox.launcher import Launcher
from cellos.supervisor import profile
from cellos.supervisor.compose import check_output, make_broker, open_host
from cellos.supervisor.config import Config, Fallback, read_config, refuse_fallbacks
from cellos.supervisor.sinks import open_sinks

_NOBODY = RunIdentity(cell_id="agent", spec_id="agent", run_id="agent", spec_hash="", tenant_id="agent")


def check(environment: Mapping[str, str], warn: Callable[[str], None]) -> Config:
    """The configuration of the supervisors. Runs and writes nothing, but ends what dead supervisors left. Raises CellosError."""
    config = read_config(environment)
    missing = profile.forced_missing(environment.get(profile.FORCED))
    with ExitStack() as closing:
        launcher = closing.enter_context(_start_launcher(environment)) if config.backend == "linux" else None
        open_host(config, launcher, warn)
        make_broker(config)
        check_output(config)
        if missing is None and launcher is not None:
            from cellos.backends.linux import missing_primitives

            missing = missing_primitives(launcher)
    _require(config, missing or (), warn)
    fallbacks: list[Fallback] = []
    with open_sinks(config, _NOBODY, fallbacks, record_stays=False):
        if config.strict:
            refuse_fallbacks(fallbacks)
    return config


def _start_launcher(environment: Mapping[str, str]) -> Launcher:
    try:
        return Launcher.start(ahead=1, cgroup_parent=environment.get("CELLOS_CGROUP_PARENT", "").strip())
    except OSError as error:
        raise HostBackendError(f"cannot start the launcher, {sys.executable}: {os_error_text(error)}; see `cellos doctor`") from error


def _require(config: Config, missing: tuple[str, ...], warn: Callable[[str], None]) -> None:
    from cellos.sandbox.cures import OWN_GROUP

    profile.enforce(config.profile, missing, warn, cure=OWN_GROUP if "cgroup-v2" in missing else "")
