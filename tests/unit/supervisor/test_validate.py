from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cellos.core.documents import ExecutionCell, parse_execution_cell
from cellos.errors import CellosError, ConfigError, ExportError, InvalidSpec, SecretBrokerError, Unenforceable
from cellos.supervisor.config import read_config
from cellos.supervisor.trust import Rejected
from cellos.supervisor.validate import summary

STUB = {"CELLOS_CELL_BACKEND": "stub"}


def document(**spec: Any) -> ExecutionCell:
    run = {"argv": ["true"], "secretDelivery": "env"}
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": run, **spec}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode())


def text(of: ExecutionCell | None = None, warnings: list[str] | None = None, **variables: str) -> bytes:
    heard: list[str] = [] if warnings is None else warnings
    return summary(read_config({**STUB, **variables}), of or document(), path="spec.json", digest="ab" * 32, warn=heard.append)


def said(of: ExecutionCell | None = None, warnings: list[str] | None = None, **variables: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(text(of, warnings, **variables))
    return told


def test_everything_in_its_form() -> None:
    written = text()
    told = json.loads(written)
    assert written.decode() == json.dumps(told, indent=2, sort_keys=True) + "\n"
    assert told == {
        "authorityKeysConfigured": False,
        "deploymentProfile": "hardened",
        "eventSink": {"jsonlMirrorEnabled": False, "primary": "jetstream-or-noop-fallback", "subject": "cellos.events.v1"},
        "export": {"defaultSink": "noop", "namedTargets": []},
        "hostBackend": "stub",
        "mode": "validate",
        "policyPackConfigured": False,
        "runId": "validate",
        "secretBroker": "memory",
        "specId": "cell-1",
        "specPath": "spec.json",
        "specSha256": "ab" * 32,
    }


@pytest.mark.parametrize(
    ("variables", "members"),
    [
        ({"CELLOS_DEPLOYMENT_PROFILE": "portable"}, {"deploymentProfile": "portable"}),
        ({"CELLOS_RUN_ID": "r-1"}, {"runId": "r-1"}),
        ({"CELLOS_BROKER": "env"}, {"secretBroker": "env"}),
        ({"CELLOS_CELL_BACKEND": "linux"}, {"hostBackend": "linux"}),
    ],
)
def test_what_a_variable_changes(variables: dict[str, str], members: dict[str, Any]) -> None:
    plain = said()
    assert {name: value for name, value in said(**variables).items() if value != plain[name]} == members


def test_sinks() -> None:
    told = said(document(correlation={"tenantId": "acme"}), CELL_OS_USE_NOOP_SINK="1", CELL_OS_JSONL_EVENTS="/x", CELLOS_TENANT_ID="t")
    assert told["eventSink"] == {"jsonlMirrorEnabled": True, "primary": "noop", "subject": "cellos.events.t.cell-1.validate"}


@pytest.mark.parametrize(
    ("variables", "sink"),
    [
        ({"CELLOS_EXPORT_DIR": "/out"}, "local"),
        ({"CELLOS_EXPORT_DIR": " "}, "noop"),
        ({"CELLOS_EXPORT_HTTP_BASE_URL": "https://h.example", "CELLOS_EXPORT_DIR": "/out"}, "http"),
    ],
)
def test_where_artifacts_go(variables: dict[str, str], sink: str) -> None:
    assert said(**variables)["export"]["defaultSink"] == sink


def test_targets() -> None:
    targets = [{"kind": "http", "name": "h", "baseUrl": "https://h.example"}, {"kind": "s3", "name": "s", "bucket": "b"}]
    assert said(document(export={"targets": targets}))["export"]["namedTargets"] == [
        {"kind": "http", "name": "h"},
        {"kind": "s3", "name": "s"},
    ]


def test_backends_and_brokers_that_are_not_built_are_told_as_such(tmp_path: Path) -> None:
    warnings: list[str] = []
    vault = {"CELLOS_VAULT_ADDR": "https://v", "CELLOS_VAULT_ROLE_ID": "r", "CELLOS_VAULT_SECRET_ID": "s"}
    gvisor = {"CELLOS_CELL_BACKEND": "gvisor", "CELLOS_GVISOR_BUNDLE_ROOT": str(tmp_path)}
    told = said(None, warnings, CELLOS_BROKER="vault-approle", **vault, **gvisor)
    assert (told["hostBackend"], told["secretBroker"]) == ("gvisor", "vault-approle")
    assert [warning.partition(":")[0] for warning in warnings] == ["CELLOS_CELL_BACKEND=gvisor", "CELLOS_BROKER=vault-approle"]
    assert all("its settings are right, but it is not built yet" in warning for warning in warnings)


LEASED = {"argv": ["/usr/bin/true"]}
IDENTITY = {"kind": "federatedOidc", "provider": "github", "audience": "sts", "secretRef": "TOKEN"}
SECRET = {"authority": {"secretRefs": ["TOKEN"]}}
PROGRAMS = {"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": "/usr/bin"}
PACK = {"apiVersion": "cellos.io/v1", "kind": "PolicyPack", "spec": {"id": "strict", "rules": {"maxLifetimeTtlSeconds": 30}}}
ARTIFACT = {"artifacts": [{"name": "a", "path": "a"}]}
HTTP = {"CELLOS_EXPORT_HTTP_BASE_URL": "https://h.example"}
TOKEN = {
    "roleRoot": "ci",
    "leafCapability": {"egressRules": [], "secretRefs": []},
    "grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="},
}


@pytest.mark.parametrize(
    ("of", "variables", "kind", "part"),
    [
        (document(), {"CELLOS_EVENT_SIGNING": "rsa"}, ConfigError, "CELLOS_EVENT_SIGNING"),
        (document(), {"CELLOS_CELL_BACKEND": "firecracker"}, ConfigError, "CELLOS_FIRECRACKER_BINARY"),
        (document(), {"CELLOS_BROKER": "vault-approle"}, ConfigError, "CELLOS_VAULT_ADDR not set"),
        (document(), {"CELLOS_CELL_BACKEND": "linux", "CELLOS_CGROUP_CPU_MAX": "x"}, ConfigError, "CELLOS_CGROUP_CPU_MAX"),
        (document(), {"CELLOS_AUTHORITY_KEYS_PATH": "/nowhere"}, ConfigError, "CELLOS_AUTHORITY_KEYS_PATH: cannot read '/nowhere'"),
        (document(), {"CELL_OS_EVENTS_SUBJECT": "a..b"}, ConfigError, "CELL_OS_EVENTS_SUBJECT"),
        (document(authority={"authorityDerivation": TOKEN}), {}, InvalidSpec, "unknown role: ci"),
        (document(authority={"secretRefs": ["PATH"]}), {}, Unenforceable, "secretRefs[0]"),
        (
            document(run=LEASED, **SECRET),
            {"CELLOS_BROKER": "env"},
            SecretBrokerError,
            "; set spec.run.secretDelivery to runtimeBroker or env",
        ),
        (
            document(run=LEASED, identity=IDENTITY, **SECRET),
            {"CELLOS_BROKER": "env"},
            SecretBrokerError,
            "runtimeLeasedBroker is not supported",
        ),
        (document(**SECRET), {}, SecretBrokerError, 'no value was handed over for secret key "TOKEN"; set CELLOS_BROKER to env,'),
        (document(identity=IDENTITY, **SECRET), {"CELLOS_BROKER": ""}, SecretBrokerError, 'for secret key "sts"; set CELLOS_BROKER'),
        (document(), PROGRAMS, ConfigError, "CELLOS_RUN_ARGV0_ALLOW_PREFIXES is set but argv[0] is not an absolute path"),
        (document(run={"argv": ["/opt/x"]}), PROGRAMS, ConfigError, 'argv[0] "/opt/x" is not under any allowed prefix'),
        (document(export={}), {"CELLOS_EXPORT_HTTP_BASE_URL": "foo"}, ConfigError, "HTTP export sink init"),
        (document(export=ARTIFACT), {**HTTP, "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": "0"}, ConfigError, "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS"),
        (document(export=ARTIFACT), {**HTTP, "CELLOS_CA_BUNDLE": "/missing"}, ConfigError, "CELLOS_CA_BUNDLE: read /missing"),
        (document(export=ARTIFACT), {}, ExportError, "no export sink is configured"),
        (
            document(export={"targets": [{"kind": "s3", "name": "t", "bucket": "b"}]}),
            {"CELLOS_STRICT_CONFIG": "1"},
            ConfigError,
            "refusing to start with 1 ignored/misconfigured env var(s)",
        ),
    ],
)
def test_what_would_refuse_the_run(of: ExecutionCell, variables: dict[str, str], kind: type[CellosError], part: str) -> None:
    with pytest.raises(kind) as caught:
        text(of, **variables)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("of", "variables"),
    [
        (document(identity=IDENTITY, **SECRET), {"CELLOS_BROKER": "env"}),
        (document(**SECRET), {"CELLOS_BROKER": "file"}),
        (document(run=LEASED), PROGRAMS),
        (document(), {"CELLOS_EXPORT_HTTP_BASE_URL": "foo", "CELLOS_CA_BUNDLE": "/missing"}),
        (document(run=None), PROGRAMS),
    ],
)
def test_what_would_not(of: ExecutionCell, variables: dict[str, str]) -> None:
    assert said(of, **variables)["specId"] == "cell-1"


def test_a_policy_does_too(tmp_path: Path) -> None:
    path = tmp_path / "pack.json"
    path.write_text(json.dumps(PACK))
    variables = {"CELLOS_POLICY_PACK_PATH": str(path)}
    with pytest.raises(Rejected, match="cell spec rejected by policy pack 'strict'"):
        text(**variables)
    assert said(document(lifetime={"ttlSeconds": 30}), **variables)["policyPackConfigured"] is True
