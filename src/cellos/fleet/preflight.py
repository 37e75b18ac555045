"""What would fail every cell of an agent is found before a document is blamed for it: settings, the operator's files, sinks, the host.

The supervisor's own steps that need no document, in the environment that it will get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from cellos.backends.linux import missing_primitives, start_launcher
from cellos.core.events import RunIdentity
from cellos.sandbox.cures import OWN_GROUP
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
        launcher = closing.enter_context(start_launcher(environment, ahead=1)) if config.backend == "linux" else None
        open_host(config, launcher, warn)
        make_broker(config)
        check_output(config)
        if missing is None and launcher is not None:
            missing = missing_primitives(launcher)
    missing = missing or ()
    profile.enforce(config.profile, missing, warn, cure=OWN_GROUP if "cgroup-v2" in missing else "")
    fallbacks: list[Fallback] = []
    with open_sinks(config, _NOBODY, fallbacks, record_stays=False):
        if config.strict:
            refuse_fallbacks(fallbacks)
    return config
