"""Documents as `cellos-supervisor` judges them: every rule in its order, with the words that people look for."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest

SPEC = "invalid cell specification: "
PORTABLE = "must match [A-Za-z0-9][A-Za-z0-9._-]{0,127} and must not contain '..'"
LABEL = "must match Kubernetes DNS label rules: lowercase alphanumeric plus '-', <=63 chars"
NO_FQDN = "is not a valid FQDN (single leading '*.' wildcard allowed; IPs are rejected)"
IDENTITY = {"kind": "federatedOidc", "provider": "p", "audience": "a", "secretRef": "A"}
IMAGE = {"imageReference": "registry.example.net/app:1"}
TELEMETRY: dict[str, Any] = {"channel": "vsock-cbor", "events": ["process.spawned"], "agentVersion": "1.0.0"}
RESOLVER = {"resolverId": "r", "endpoint": "10.0.0.53:53", "protocol": "do53-udp"}
PROVIDER = {"providerId": "p", "hostnamePattern": "*.example.net"}
HTTP = {"kind": "http", "name": "t", "baseUrl": "https://drop.example.net/in"}
RULE = {"host": "drop.example.net", "port": 443}


def dns(**members: Any) -> dict[str, Any]:
    return {"authority": {"dnsAuthority": members}}


def cdn(*providers: dict[str, Any]) -> dict[str, Any]:
    return {"authority": {"cdnAuthority": {"providers": list(providers)}}}


def targets(*each: dict[str, Any], **authority: Any) -> dict[str, Any]:
    return {"export": {"targets": list(each)}, "authority": authority}


def artifacts(*each: dict[str, Any], to: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"export": {"artifacts": list(each), "targets": list(to)}}


RULES: list[tuple[dict[str, Any], str]] = [
    ({"id": "a/b"}, f"spec.id {PORTABLE}"),
    ({"id": "a..b"}, f"spec.id {PORTABLE}"),
    ({"id": "_a"}, f"spec.id {PORTABLE}"),
    ({"id": "a" * 129}, f"spec.id {PORTABLE}"),
    ({"correlation": {"tenantId": ""}}, "spec.correlation.tenantId must be non-empty when present"),
    (
        {"correlation": {"tenantId": "evil.tenant"}},
        "spec.correlation.tenantId contains NATS-reserved char: '.' (in \"evil.tenant\")",
    ),
    ({"correlation": {"tenantId": "a b"}}, "spec.correlation.tenantId contains NATS-reserved char: ' ' (in \"a b\")"),
    ({"authority": {"secretRefs": ["A", "../B"]}}, f"authority.secretRefs[] {PORTABLE}"),
    ({"identity": IDENTITY | {"secretRef": "/"}}, f"spec.identity.secretRef {PORTABLE}"),
    (
        {"identity": IDENTITY | {"ttlSeconds": 61}, "authority": {"secretRefs": ["A"]}},
        "spec.identity.ttlSeconds must be <= spec.lifetime.ttlSeconds",
    ),
    ({"identity": IDENTITY}, 'spec.identity.secretRef "A" must also appear in authority.secretRefs'),
    ({"environment": {"imageReference": ""}}, "spec.environment.imageReference must be non-empty"),
    (
        {"environment": IMAGE | {"imageDigest": "sha256:" + "A" * 64}},
        "spec.environment.imageDigest must be a sha256:<hex64> digest when present",
    ),
    ({"environment": IMAGE | {"templateId": "."}}, f"spec.environment.templateId {PORTABLE}"),
    ({"placement": {}}, "spec.placement must set at least one placement hint"),
    ({"placement": {"poolId": "-"}}, f"spec.placement.poolId {PORTABLE}"),
    ({"placement": {"kubernetesNamespace": "Prod"}}, f"spec.placement.kubernetesNamespace {LABEL}"),
    ({"placement": {"queueName": "a b"}}, f"spec.placement.queueName {PORTABLE}"),
    ({"ingress": {"git": {"secretRef": "/"}}}, f"spec.ingress.git.secretRef {PORTABLE}"),
    ({"ingress": {"ociImage": {"reference": "r", "secretRef": "/"}}}, f"spec.ingress.ociImage.secretRef {PORTABLE}"),
    ({"run": {"argv": []}}, "spec.run.argv must be non-empty with no empty strings"),
    ({"run": {"argv": ["true", ""]}}, "spec.run.argv must be non-empty with no empty strings"),
    (
        {"run": {"argv": ["sh", "-c", "a\0b"]}},
        "spec.run.argv[2] contains NUL byte (would be silently truncated by execve)",
    ),
    ({"run": {"timeoutMs": 60_001}}, "spec.run.timeoutMs must be <= spec.lifetime.ttlSeconds * 1000"),
    ({"run": {"limits": {"memoryMaxBytes": 0}}}, "spec.run.limits.memoryMaxBytes must be > 0"),
    ({"run": {"limits": {"cpuMax": {"quotaMicros": 0}}}}, "spec.run.limits.cpuMax.quotaMicros must be > 0"),
    (
        {"run": {"limits": {"cpuMax": {"quotaMicros": 1, "periodMicros": 0}}}},
        "spec.run.limits.cpuMax.periodMicros must be > 0",
    ),
    ({"authority": {"egressRules": [{"host": "", "port": 1}]}}, "authority.egressRules[].host must be non-empty"),
    (dns(resolvers=[RESOLVER | {"resolverId": "/"}]), f"authority.dnsAuthority.resolvers[].resolverId {PORTABLE}"),
    (dns(resolvers=[RESOLVER, RESOLVER]), 'authority.dnsAuthority.resolvers[].resolverId duplicates value "r"'),
    (dns(resolvers=[RESOLVER | {"endpoint": ""}]), "authority.dnsAuthority.resolvers[].endpoint must be non-empty"),
    (dns(resolvers=[RESOLVER | {"trustKid": "/"}]), f"authority.dnsAuthority.resolvers[].trustKid {PORTABLE}"),
    *(
        (dns(hostnameAllowlist=[host]), f'authority.dnsAuthority.hostnameAllowlist entry "{host}" {NO_FQDN}')
        for host in ("", "example", "10.0.0.1", "2001:db8::1", "api.*.example.com", "-bad.example.com", "a_b.example.com", "a.example.com.")
    ),
    (
        dns(refreshPolicy={"minTtlSeconds": 2, "maxStaleSeconds": 1}),
        "authority.dnsAuthority.refreshPolicy.minTtlSeconds (2) must be <= maxStaleSeconds (1)",
    ),
    (cdn(PROVIDER | {"providerId": "/"}), f"authority.cdnAuthority.providers[].providerId {PORTABLE}"),
    (cdn(PROVIDER, PROVIDER), 'authority.cdnAuthority.providers[].providerId duplicates value "p"'),
    (
        cdn(PROVIDER | {"hostnamePattern": "example"}),
        f'authority.cdnAuthority.providers[].hostnamePattern "example" {NO_FQDN}',
    ),
    (targets(HTTP | {"name": "/"}), f"spec.export.targets[].name {PORTABLE}"),
    (targets(HTTP, HTTP), 'duplicate export target name "t"'),
    (targets(HTTP | {"secretRef": "A"}), 'export target "t" secretRef "A" must appear in authority.secretRefs'),
    (targets(HTTP | {"baseUrl": "ftp://drop.example.net"}), "spec.export.targets[].baseUrl must use http or https"),
    *(
        (
            targets(HTTP | {"baseUrl": url}),
            "spec.export.targets[].baseUrl must be an absolute http(s) base URL without query or fragment",
        )
        for url in ("drop.example.net/in", "https://drop.example.net/?a", "https://drop.example.net/#a", "https://")
    ),
    (
        targets(HTTP, egressRules=[RULE | {"port": 80}]),
        'http export target "t" host drop.example.net:443 must appear in authority.egressRules',
    ),
    (artifacts({"name": "a/b", "path": "a"}), f"spec.export.artifacts[].name {PORTABLE}"),
    (artifacts({"name": "a", "path": "a", "target": "/"}), f"spec.export.artifacts[].target {PORTABLE}"),
    (artifacts({"name": "a", "path": "a", "target": "x"}, to=(HTTP,)), 'export artifact "a" references unknown target "x"'),
    (
        artifacts({"name": "a", "path": "a"}, to=(HTTP, HTTP | {"name": "u"})),
        'export artifact "a" must set target when multiple export targets exist',
    ),
    ({"telemetry": TELEMETRY | {"events": []}}, "spec.telemetry.events must be non-empty"),
    (
        {"telemetry": TELEMETRY | {"agentVersion": "1.0"}},
        "spec.telemetry.agentVersion must match MAJOR.MINOR.PATCH semver shape (optional -prerelease suffix)",
    ),
    ({"telemetry": TELEMETRY | {"events": [" "]}}, "spec.telemetry.events[] entries must be non-empty"),
    (
        {"telemetry": TELEMETRY | {"events": [" Net.connect"]}},
        (
            'telemetry_without_egress: spec.telemetry.events[] entry " Net.connect" requires at least one authority.egressRules entry'
            " — net.* telemetry without declared egress is an unbacked observation claim"
        ),
    ),
]


@pytest.mark.parametrize(("spec", "text"), RULES)
def test_rules(site: Any, spec: dict[str, Any], text: str) -> None:
    site.refused(site.validate("true", **spec), f"Error: {SPEC}{text}")


@pytest.mark.parametrize(
    "spec",
    [
        {"id": "A.b_c-9"},
        {"correlation": {"tenantId": "fin-emea"}},
        {"identity": IDENTITY | {"ttlSeconds": 60}, "authority": {"secretRefs": ["A", "A"]}},
        {"environment": IMAGE | {"imageDigest": "sha256:" + "0a" * 32, "templateId": "py312"}},
        {"run": {"timeoutMs": 60_000}},
        {"lifetime": {"ttlSeconds": 2**64 - 1}},
        dns(hostnameAllowlist=["*.example.com", "*.com"], resolvers=[RESOLVER | {"protocol": kind} for kind in ["doh"]]),
        dns(refreshPolicy={"minTtlSeconds": 1, "maxStaleSeconds": 1, "strategy": "fixed-interval"}),
        cdn(PROVIDER, PROVIDER | {"providerId": "q"}),
        targets(HTTP, egressRules=[RULE | {"host": "DROP.example.NET", "protocol": "anything"}]),
        targets(HTTP | {"baseUrl": "https://drop.example.net:8443/in"}, egressRules=[RULE | {"port": 8443}]),
        targets(HTTP),
        {"telemetry": TELEMETRY | {"events": ["net.connect"], "agentVersion": "1.2.0-rc.1"}, "authority": {"egressRules": [RULE]}},
        {"authority": {"secretRefs": None, "egressRules": None}},
    ],
)
def test_what_passes(site: Any, spec: dict[str, Any]) -> None:
    done = site.validate("true", **spec, variables={"CELLOS_BROKER": "env"})
    assert done.returncode == 0, done.stderr


def test_the_first_that_is_broken_is_told(site: Any) -> None:
    """In the order of the rules, whatever the order in the document."""
    for spec, text in [
        ({"telemetry": {**TELEMETRY, "events": []}, "id": "/"}, "spec.id "),
        ({"placement": {}, **RULES[20][0]}, "spec.placement "),
    ]:
        site.refused(site.validate("true", **spec), f"Error: {SPEC}{text}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"apiVersion": "cellos.io/v2"}, f"{SPEC}unsupported apiVersion: cellos.io/v2"),
        ({"kind": "Cell"}, f"{SPEC}unsupported kind: Cell"),
        ({"apiVersion": "v2", "kind": "Cell"}, f"{SPEC}unsupported apiVersion: v2"),
        ({"spec": {}}, "parse ExecutionCellDocument: spec"),
        ({"spec": None}, "parse ExecutionCellDocument: spec"),
        ({"metadata": {}}, "parse ExecutionCellDocument: metadata"),
    ],
)
def test_the_head(site: Any, change: dict[str, Any], text: str) -> None:
    path = site.written("spec.json", {**site.document("true"), **change})
    site.refused(site.on("--validate", path), f"Error: {text}")


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"lifetime": {"ttlSeconds": -1}}, "spec.lifetime.ttlSeconds"),
        ({"lifetime": {"ttlSeconds": 1.0}}, "spec.lifetime.ttlSeconds"),
        ({"lifetime": {"ttlSeconds": True}}, "spec.lifetime.ttlSeconds"),
        ({"lifetime": {"ttlSeconds": 2**64}}, "ttlSeconds"),
        ({"run": {"secretDelivery": "file"}}, "spec.run.secretDelivery"),
        ({"run": {"secretDelivery": None}}, "spec.run.secretDelivery"),
        ({"authority": {"egressRules": [{"host": "a", "port": 70_000}]}}, "spec.authority.egressRules[0].port"),
        ({"identity": IDENTITY | {"kind": "password"}}, "spec.identity.kind"),
        ({"telemetry": TELEMETRY | {"channel": "tcp"}}, "spec.telemetry.channel"),
        (dns(resolvers=[RESOLVER | {"protocol": "dns"}]), "spec.authority.dnsAuthority.resolvers[0].protocol"),
        ({"export": {"targets": [{"kind": "ftp", "name": "t"}]}}, "spec.export.targets[0]"),
        ({"authority": {"egresRules": []}}, "spec.authority.egresRules"),
    ],
)
def test_shapes(site: Any, spec: dict[str, Any], place: str) -> None:
    done = site.validate("true", **spec)
    site.refused(done, "Error: parse ExecutionCellDocument: ")
    assert place in done.stderr


def test_unknown_members_can_be_let_pass(site: Any) -> None:
    assert site.run("true", note="x", variables={"CELLOS_ALLOW_UNKNOWN_FIELDS": "1"}).returncode == 0


def test_hashes(site: Any) -> None:
    """One of the bytes as they are, without a prefix; one of what the document says, with one, the same however it is written."""
    digests = set()
    for indent in (None, 2):
        text = json.dumps(site.document("true", correlation={"labels": {"b": "1", "a": "2", "c": "3"}}), indent=indent)
        assert site.on(site.written("spec.json", text)).returncode == 0
        assert site.data("lifecycle.v1.started")["specHash"] == hashlib.sha256(text.encode()).hexdigest()
        digests.add(site.data("authority.v1.homeostasis")["specHash"])
        assert site.data("observability.v1.dns_target_set")["currentDigest"] in digests
        site.jsonl.unlink()
    [digest] = digests
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
