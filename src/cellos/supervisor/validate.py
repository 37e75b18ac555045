"""`--validate`: everything that can be said of a document without running it, as JSON.

The operator's policies, keys and tokens are held against it as in a run; no state directory, backend, broker, sink or store is opened.
"""

import time
from collections.abc import Callable

import msgspec

from cellos.artifacts.targets import open_targets
from cellos.core.documents import ExecutionCell
from cellos.eventlog.subject import read_subject_settings, resolve_subject
from cellos.supervisor import admission, trust
from cellos.supervisor.compose import read_signer, refuse_backend, run_identity
from cellos.supervisor.config import SETTINGS_ONLY, Config, Fallback, refuse_fallbacks


def summary(config: Config, document: ExecutionCell, *, path: str, digest: str, warn: Callable[[str], None]) -> bytes:
    """What would be run, and with what. Raises CellosError for what would refuse the run."""
    spec = document.spec
    files = trust.load(config, time.time_ns)
    granted = trust.grant(document, config, files, warn)
    run = run_identity(granted.document.spec, digest, config.run_id or "validate")
    with open_targets(spec, config.environment) as targets:
        if config.strict:
            refuse_fallbacks([Fallback(variable=each.variable, value=each.value, reason=each.reason) for each in targets.fallbacks])
    trust.check_policies(run, granted.document.spec, config, files)
    admission.check(granted.document.spec)
    if config.backend in SETTINGS_ONLY:
        warn(refuse_backend(config))
    read_signer(config)
    subject = resolve_subject(read_subject_settings(config.environment), spec_id=run.spec_id, run_id=run.run_id, tenant_id=run.tenant_id)
    said = {
        "authorityKeysConfigured": config.authority_keys is not None,
        "deploymentProfile": config.profile or "hardened",
        "eventSink": {
            "jsonlMirrorEnabled": config.jsonl is not None,
            "primary": "noop" if config.noop_sink else "jetstream-or-noop-fallback",
            "subject": subject,
        },
        "export": {
            "defaultSink": _default_sink(config),
            "namedTargets": [
                {"kind": str(target.__struct_config__.tag), "name": target.name} for target in (spec.export and spec.export.targets) or ()
            ],
        },
        "hostBackend": config.backend,
        "mode": "validate",
        "policyPackConfigured": config.policy_pack is not None,
        "runId": run.run_id,
        "secretBroker": config.broker,
        "specId": spec.id,
        "specPath": path,
        "specSha256": digest,
    }
    return msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n"


def _default_sink(config: Config) -> str:
    if config.environment.get("CELLOS_EXPORT_HTTP_BASE_URL", "").strip():
        return "http"
    return "local" if config.environment.get("CELLOS_EXPORT_DIR") else "noop"
