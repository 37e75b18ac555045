"""`--validate`: everything that can be said of a document without running it, as JSON.

The operator's policies, keys, tokens and settings are held against it as in a run; no state directory, backend, broker, sink or store is
opened. What depends on the host is not asked, nor whether a broker has a secret: a document may be checked where it cannot be run.
"""

import time
from collections.abc import Callable

import msgspec

from cellos.artifacts.targets import open_targets
from cellos.core.documents import CellSpec, ExecutionCell
from cellos.errors import SecretBrokerError, Unenforceable
from cellos.eventlog.subject import read_subject_settings, resolve_subject
from cellos.supervisor import admission, trust
from cellos.supervisor.compose import check_output, make_broker, read_signer, refuse_backend, refuse_broker, run_identity
from cellos.supervisor.config import Config, Fallback, refuse_fallbacks
from cellos.supervisor.run import NO_LEASES, needs_leases


def summary(config: Config, document: ExecutionCell, *, path: str, digest: str, warn: Callable[[str], None]) -> bytes:
    """What would be run, and with what. Raises CellosError for what would refuse the run."""
    read_signer(config)
    _check_settings(config, warn)
    files = trust.load(config, time.time_ns)
    granted = trust.grant(document, config, files, warn)
    spec = granted.document.spec
    run = run_identity(spec, digest, config.run_id or "validate")
    with open_targets(spec, config.environment) as targets:
        if config.strict:
            refuse_fallbacks([Fallback(variable=each.variable, value=each.value, reason=each.reason) for each in targets.fallbacks])
        trust.check_policies(run, spec, config, files)
        admission.check(spec)
        _check_secrets(spec, run.cell_id, config)
        if spec.run is not None and config.argv0_prefixes:
            admission.program_check(config.argv0_prefixes)(spec.run.argv)
        if config.backend == "linux":
            from cellos.backends.linux import refused_anywhere

            for refusal in refused_anywhere(spec):
                raise Unenforceable(field=refusal.field, why=refusal.why)
        targets.check()
        check_output(config)
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


def _check_settings(config: Config, warn: Callable[[str], None]) -> None:
    """What the environment says of backend and broker. Raises ConfigError."""
    from cellos.backends import settings

    match config.backend:
        case "linux":
            warnings = settings.read_linux_settings(config.environment).warnings
        case "stub":
            warnings = settings.check_stub_settings(config.environment)
        case _:
            warnings = (refuse_backend(config),)
    for warning in warnings:
        warn(warning)
    if config.broker == "vault-approle":
        warn(refuse_broker(config))


def _check_secrets(spec: CellSpec, cell_id: str, config: Config) -> None:
    """What can be said of them without asking who has them. Raises SecretBrokerError."""
    if needs_leases(spec):
        raise SecretBrokerError(NO_LEASES)
    if config.broker != "memory":
        return
    # Nobody hands it anything here.
    broker = make_broker(config)
    for key in (*([spec.identity.audience] if spec.identity else []), *(spec.authority.secret_refs or ())):
        try:
            broker.resolve(key, cell_id=cell_id)
        except SecretBrokerError as error:
            raise SecretBrokerError(f"{error.text}; set CELLOS_BROKER to env, file or github-oidc") from error


def _default_sink(config: Config) -> str:
    if config.environment.get("CELLOS_EXPORT_HTTP_BASE_URL", "").strip():
        return "http"
    return "local" if config.environment.get("CELLOS_EXPORT_DIR", "").strip() else "noop"
