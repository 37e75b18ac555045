"""One row per rule and text: a document that breaks just it, then those that come close."""

import ast
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import cellos.core.documents
from cellos.core.documents import ExecutionCell, validate
from cellos.core.documents.rules import RULES, faults
from cellos.errors import InvalidSpec, SpecSyntaxError

PORTABLE = "must match [A-Za-z0-9][A-Za-z0-9._-]{0,127} and must not contain '..'"
NAMESPACE = "must match Kubernetes DNS label rules: lowercase alphanumeric plus '-', <=63 chars"
FQDN = "is not a valid FQDN (single leading '*.' wildcard allowed; IPs are rejected)"
BASE_URL = "spec.export.targets[].baseUrl must be an absolute http(s) base URL without query or fragment"
DERIVATION = "spec.authorityDerivation.leafCapability exceeds spec.authority — child authority must be ⊆ declared authority"
NORMALISED = "must be an absolute path below '/' without '.', '..', '//', a trailing '/' or NUL"
U64_MAX = 2**64 - 1


def cell(spec: dict[str, Any], **top: Any) -> ExecutionCell:
    whole = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 60}} | spec
    return msgspec.convert({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": whole} | top, ExecutionCell)


def run(**members: Any) -> dict[str, Any]:
    return {"run": {"argv": ["/bin/true"]} | members}


def authority(**members: Any) -> dict[str, Any]:
    return {"authority": members}


def identity(*refs: str, **members: Any) -> dict[str, Any]:
    whole = {"kind": "federatedOidc", "provider": "p", "audience": "a", "secretRef": "S"} | members
    return {"identity": whole, "authority": {"secretRefs": list(refs)}}


def dns(**members: Any) -> dict[str, Any]:
    return authority(dnsAuthority=members)


def resolvers(*changes: dict[str, Any]) -> dict[str, Any]:
    return dns(resolvers=[{"resolverId": "r", "endpoint": "e", "protocol": "dot"} | change for change in changes])


def cdn(*providers: tuple[str, str]) -> dict[str, Any]:
    return authority(cdnAuthority={"providers": [{"providerId": name, "hostnamePattern": host} for name, host in providers]})


def derivation(leaf: dict[str, Any], **declared: Any) -> dict[str, Any]:
    token = {"roleRoot": "r", "leafCapability": leaf, "grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="}}
    return authority(authorityDerivation=token, **declared)


def http(name: str = "t", base_url: str = "https://drop.example", **members: Any) -> dict[str, Any]:
    return {"kind": "http", "name": name, "baseUrl": base_url} | members


def s3(name: str = "t", **members: Any) -> dict[str, Any]:
    return {"kind": "s3", "name": name, "bucket": ""} | members


def export(*targets: dict[str, Any], artifacts: tuple[dict[str, Any], ...] = (), **declared: Any) -> dict[str, Any]:
    return {"export": {"targets": list(targets), "artifacts": list(artifacts)}, "authority": declared}


def artifact(name: str = "f", **members: Any) -> dict[str, Any]:
    return {"name": name, "path": "/out"} | members


def telemetry(*events: str, agent: str = "1.0.0", **declared: Any) -> dict[str, Any]:
    return {"telemetry": {"channel": "vsock-cbor", "events": list(events), "agentVersion": agent}, "authority": declared}


def mounts(*whole: dict[str, Any]) -> dict[str, Any]:
    return authority(filesystem={"mounts": list(whole)})


def rule(host: str = "drop.example", port: int = 443, **members: Any) -> dict[str, Any]:
    return {"host": host, "port": port} | members


DIGEST = "sha256:" + "0" * 64

BROKEN: list[tuple[int | str, dict[str, Any], str, str]] = [
    (3, {"id": ""}, f"spec.id {PORTABLE}", "spec.id"),
    (3, {"id": "a..b"}, f"spec.id {PORTABLE}", "spec.id"),
    (3, {"id": "a/b"}, f"spec.id {PORTABLE}", "spec.id"),
    (4, {"correlation": {"tenantId": ""}}, "spec.correlation.tenantId must be non-empty when present", "spec.correlation.tenantId"),
    (
        4,
        {"correlation": {"tenantId": "evil.tenant"}},
        "spec.correlation.tenantId contains NATS-reserved char: '.' (in \"evil.tenant\")",
        "spec.correlation.tenantId",
    ),
    (
        4,
        {"correlation": {"tenantId": "a\tb>"}},
        "spec.correlation.tenantId contains NATS-reserved char: '\\t' (in \"a\\tb>\")",
        "spec.correlation.tenantId",
    ),
    (5, authority(secretRefs=["OK", "../x"]), f"authority.secretRefs[] {PORTABLE}", "spec.authority.secretRefs[1]"),
    (6, identity("S", secretRef="_S"), f"spec.identity.secretRef {PORTABLE}", "spec.identity.secretRef"),
    (7, identity("S", ttlSeconds=61), "spec.identity.ttlSeconds must be <= spec.lifetime.ttlSeconds", "spec.identity.ttlSeconds"),
    (8, identity("s", "T"), 'spec.identity.secretRef "S" must also appear in authority.secretRefs', "spec.identity.secretRef"),
    (9, {"environment": {"imageReference": ""}}, "spec.environment.imageReference must be non-empty", "spec.environment.imageReference"),
    (
        10,
        {"environment": {"imageReference": "i", "imageDigest": "sha256:" + "A" * 64}},
        "spec.environment.imageDigest must be a sha256:<hex64> digest when present",
        "spec.environment.imageDigest",
    ),
    (
        11,
        {"environment": {"imageReference": "i", "templateId": "-"}},
        f"spec.environment.templateId {PORTABLE}",
        "spec.environment.templateId",
    ),
    (12, {"placement": {}}, "spec.placement must set at least one placement hint", "spec.placement"),
    (12, {"placement": {"poolId": None}}, "spec.placement must set at least one placement hint", "spec.placement"),
    (13, {"placement": {"poolId": ".p"}}, f"spec.placement.poolId {PORTABLE}", "spec.placement.poolId"),
    (
        13,
        {"placement": {"kubernetesNamespace": "Cells"}},
        f"spec.placement.kubernetesNamespace {NAMESPACE}",
        "spec.placement.kubernetesNamespace",
    ),
    (13, {"placement": {"queueName": "q q"}}, f"spec.placement.queueName {PORTABLE}", "spec.placement.queueName"),
    (14, {"ingress": {"git": {"secretRef": "a/b"}}}, f"spec.ingress.git.secretRef {PORTABLE}", "spec.ingress.git.secretRef"),
    (
        14,
        {"ingress": {"ociImage": {"reference": "", "secretRef": ""}}},
        f"spec.ingress.ociImage.secretRef {PORTABLE}",
        "spec.ingress.ociImage.secretRef",
    ),
    (15, run(argv=[]), "spec.run.argv must be non-empty with no empty strings", "spec.run.argv"),
    (15, run(argv=["a", ""]), "spec.run.argv must be non-empty with no empty strings", "spec.run.argv[1]"),
    (16, run(argv=["a", "b", "c\0d"]), "spec.run.argv[2] contains NUL byte (would be silently truncated by execve)", "spec.run.argv[2]"),
    (18, run(timeoutMs=60_001), "spec.run.timeoutMs must be <= spec.lifetime.ttlSeconds * 1000", "spec.run.timeoutMs"),
    (
        18,
        run(timeoutMs=1) | {"lifetime": {"ttlSeconds": 0}},
        "spec.run.timeoutMs must be <= spec.lifetime.ttlSeconds * 1000",
        "spec.run.timeoutMs",
    ),
    (19, run(limits={"memoryMaxBytes": 0}), "spec.run.limits.memoryMaxBytes must be > 0", "spec.run.limits.memoryMaxBytes"),
    (
        19,
        run(limits={"cpuMax": {"quotaMicros": 0, "periodMicros": 0}}),
        "spec.run.limits.cpuMax.quotaMicros must be > 0",
        "spec.run.limits.cpuMax.quotaMicros",
    ),
    (
        19,
        run(limits={"cpuMax": {"quotaMicros": 1, "periodMicros": 0}}),
        "spec.run.limits.cpuMax.periodMicros must be > 0",
        "spec.run.limits.cpuMax.periodMicros",
    ),
    (
        20,
        authority(egressRules=[rule(), rule("")]),
        "authority.egressRules[].host must be non-empty",
        "spec.authority.egressRules[1].host",
    ),
    (
        21,
        resolvers({"resolverId": "r r"}),
        f"authority.dnsAuthority.resolvers[].resolverId {PORTABLE}",
        "spec.authority.dnsAuthority.resolvers[0].resolverId",
    ),
    (
        21,
        resolvers({}, {"endpoint": ""}),
        'authority.dnsAuthority.resolvers[].resolverId duplicates value "r"',
        "spec.authority.dnsAuthority.resolvers[1].resolverId",
    ),
    (
        21,
        resolvers({"endpoint": "", "trustKid": ""}),
        "authority.dnsAuthority.resolvers[].endpoint must be non-empty",
        "spec.authority.dnsAuthority.resolvers[0].endpoint",
    ),
    (
        21,
        resolvers({"trustKid": ""}),
        f"authority.dnsAuthority.resolvers[].trustKid {PORTABLE}",
        "spec.authority.dnsAuthority.resolvers[0].trustKid",
    ),
    (
        22,
        dns(hostnameAllowlist=["a.example", "10.0.0.1"]),
        f'authority.dnsAuthority.hostnameAllowlist entry "10.0.0.1" {FQDN}',
        "spec.authority.dnsAuthority.hostnameAllowlist[1]",
    ),
    (
        23,
        dns(refreshPolicy={"minTtlSeconds": 31, "maxStaleSeconds": 30}),
        "authority.dnsAuthority.refreshPolicy.minTtlSeconds (31) must be <= maxStaleSeconds (30)",
        "spec.authority.dnsAuthority.refreshPolicy.minTtlSeconds",
    ),
    (
        24,
        cdn(("", "x")),
        f"authority.cdnAuthority.providers[].providerId {PORTABLE}",
        "spec.authority.cdnAuthority.providers[0].providerId",
    ),
    (
        24,
        cdn(("p", "*.a.example"), ("p", "x")),
        'authority.cdnAuthority.providers[].providerId duplicates value "p"',
        "spec.authority.cdnAuthority.providers[1].providerId",
    ),
    (
        24,
        cdn(("p", "a.*.example")),
        f'authority.cdnAuthority.providers[].hostnamePattern "a.*.example" {FQDN}',
        "spec.authority.cdnAuthority.providers[0].hostnamePattern",
    ),
    (25, derivation({"egressRules": [rule()]}), DERIVATION, "spec.authority.authorityDerivation.leafCapability.egressRules"),
    (
        25,
        derivation({"egressRules": [rule(protocol="tls")]}, egressRules=[rule()]),
        DERIVATION,
        "spec.authority.authorityDerivation.leafCapability.egressRules",
    ),
    (
        25,
        derivation({"secretRefs": ["A", "B"]}, secretRefs=["A"]),
        DERIVATION,
        "spec.authority.authorityDerivation.leafCapability.secretRefs",
    ),
    (26, export(http(name="")), f"spec.export.targets[].name {PORTABLE}", "spec.export.targets[0].name"),
    (26, export(s3("x"), http("x")), 'duplicate export target name "x"', "spec.export.targets[1].name"),
    (
        26,
        export(s3("x", secretRef="K")),
        'export target "x" secretRef "K" must appear in authority.secretRefs',
        "spec.export.targets[0].secretRef",
    ),
    (
        26,
        export(http("x", "nonsense", secretRef="K"), secretRefs=["k"]),
        'export target "x" secretRef "K" must appear in authority.secretRefs',
        "spec.export.targets[0].secretRef",
    ),
    (26, export(http(base_url="drop.example/in")), BASE_URL, "spec.export.targets[0].baseUrl"),
    (26, export(http(base_url="https://drop.example/?a=b")), BASE_URL, "spec.export.targets[0].baseUrl"),
    (
        26,
        export(http(base_url="ftp://drop.example/?a=b")),
        "spec.export.targets[].baseUrl must use http or https",
        "spec.export.targets[0].baseUrl",
    ),
    (
        26,
        export(http("x", "https://Other.example/in"), egressRules=[rule()]),
        'http export target "x" host other.example:443 must appear in authority.egressRules',
        "spec.export.targets[0].baseUrl",
    ),
    (
        26,
        export(http("x", "http://drop.example"), egressRules=[rule(), rule("*.example", 80)]),
        'http export target "x" host drop.example:80 must appear in authority.egressRules',
        "spec.export.targets[0].baseUrl",
    ),
    (27, export(artifacts=(artifact("a b"),)), f"spec.export.artifacts[].name {PORTABLE}", "spec.export.artifacts[0].name"),
    (
        27,
        export(s3(), artifacts=(artifact(target="a b"),)),
        f"spec.export.artifacts[].target {PORTABLE}",
        "spec.export.artifacts[0].target",
    ),
    (
        27,
        export(s3(), artifacts=(artifact(target="t"), artifact("g", target="u"))),
        'export artifact "g" references unknown target "u"',
        "spec.export.artifacts[1].target",
    ),
    (27, export(artifacts=(artifact(target="u"),)), 'export artifact "f" references unknown target "u"', "spec.export.artifacts[0].target"),
    (
        27,
        export(s3("t"), s3("u"), artifacts=(artifact(),)),
        'export artifact "f" must set target when multiple export targets exist',
        "spec.export.artifacts[0].target",
    ),
    (28, telemetry(agent="x"), "spec.telemetry.events must be non-empty", "spec.telemetry.events"),
    (
        29,
        telemetry(" ", agent="1.0"),
        "spec.telemetry.agentVersion must match MAJOR.MINOR.PATCH semver shape (optional -prerelease suffix)",
        "spec.telemetry.agentVersion",
    ),
    (30, telemetry("a", "\u3000 "), "spec.telemetry.events[] entries must be non-empty", "spec.telemetry.events[1]"),
    (
        30,
        telemetry(" NET.connect"),
        (
            'telemetry_without_egress: spec.telemetry.events[] entry " NET.connect" requires at least one authority.egressRules entry'
            " — net.* telemetry without declared egress is an unbacked observation claim"
        ),
        "spec.telemetry.events[0]",
    ),
    ("network", authority(network={}), "authority.network is opaque and nothing enforces it: remove it", "spec.authority.network"),
    ("network", authority(network=False), "authority.network is opaque and nothing enforces it: remove it", "spec.authority.network"),
    *(
        (
            "mounts",
            mounts({"source": "/fine"}, {"source": source, "target": "/t"}),
            f'authority.filesystem.mounts[].source "{source}" {NORMALISED}'.replace("\0", "\\0"),
            "spec.authority.filesystem.mounts[1].source",
        )
        for source in ("", "/", "a", "./a", "/a/", "//a", "/a//b", "/a/./b", "/a/../b", "/..", "/a\0b")
    ),
    *(
        (
            "mounts",
            mounts({"source": "/a", "target": target}),
            f'authority.filesystem.mounts[].target "{target}" {NORMALISED}',
            "spec.authority.filesystem.mounts[0].target",
        )
        for target in ("/", "b", "/b/", "/b/..")
    ),
    *(
        (
            "mounts",
            mounts({"source": "/a", "target": target}),
            f'authority.filesystem.mounts[].target "{target}" is the cell\'s own: choose another place for "/a"',
            "spec.authority.filesystem.mounts[0].target",
        )
        for target in (
            "/proc",
            "/proc/self",
            "/dev",
            "/dev/shm",
            "/sys",
            "/sys/fs/cgroup",
            "/etc",
            "/etc/passwd",
            "/usr",
            "/bin",
            "/sbin",
            "/lib",
            "/lib64",
            "/lib32",
            "/libx32",
            "/work",
            "/tmp",
            "/var/tmp",
        )
    ),
    (
        "mounts",
        mounts({"source": "/etc/ssl"}),
        'authority.filesystem.mounts[].target "/etc/ssl" is the cell\'s own: choose another place for "/etc/ssl"',
        "spec.authority.filesystem.mounts[0].target",
    ),
    (
        "mounts",
        mounts({"source": "/a"}, {"source": "/b", "target": "/a"}),
        'authority.filesystem.mounts[].target "/a" is given twice',
        "spec.authority.filesystem.mounts[1].target",
    ),
    (
        "mounts",
        mounts({"source": "/" + "é" * 2048}),
        "authority.filesystem.mounts[].source is longer than 4095 bytes, the most that Linux takes",
        "spec.authority.filesystem.mounts[0].source",
    ),
    ("nul-in-paths", run(workingDirectory="/a\0"), "spec.run.workingDirectory contains NUL byte", "spec.run.workingDirectory"),
    (
        "nul-in-paths",
        export(artifacts=(artifact(), artifact(path="\0"))),
        "spec.export.artifacts[1].path contains NUL byte",
        "spec.export.artifacts[1].path",
    ),
]


@pytest.mark.parametrize(("rule_id", "spec", "text", "path"), BROKEN)
def test_a_broken_rule_has_its_text(rule_id: int | str, spec: dict[str, Any], text: str, path: str) -> None:
    document = cell(spec)
    with pytest.raises(InvalidSpec) as caught:
        validate(document)
    assert caught.value.text == text
    assert str(caught.value) == f"invalid cell specification: {text}"
    assert caught.value.path == path
    assert not isinstance(caught.value, SpecSyntaxError)
    breaking = next(rule for rule in RULES if any(rule.faults(document)))
    assert rule_id in {breaking.row, breaking.name}


@pytest.mark.parametrize(
    ("top", "text", "path"),
    [
        ({"apiVersion": "cellos.io/v2", "kind": "Pod"}, "unsupported apiVersion: cellos.io/v2", "apiVersion"),
        ({"apiVersion": ""}, "unsupported apiVersion: ", "apiVersion"),
        ({"apiVersion": "a\nb"}, 'unsupported apiVersion: "a\\nb"', "apiVersion"),
        ({"kind": "PolicyPack"}, "unsupported kind: PolicyPack", "kind"),
    ],
)
def test_other_kinds_come_first(top: dict[str, Any], text: str, path: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        validate(cell({"id": ""}, **top))
    assert (caught.value.text, caught.value.path) == (text, path)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"lifetime": {"ttlSeconds": 0}},
        {"id": "x" * 128},
        {"correlation": {}},
        {"correlation": {"tenantId": "fin-emea_1", "platform": "", "labels": {"": ""}}},
        {"correlation": {"tenantId": None}},
        authority(secretRefs=["A", "A"]),
        authority(secretRefs=[]),
        identity("S", ttlSeconds=60, provider="", audience=""),
        {"environment": {"imageReference": "i", "imageDigest": DIGEST, "templateId": "t"}},
        {"placement": {"queueName": "q.low"}},
        {"placement": {"kubernetesNamespace": "a-1"}},
        {"ingress": {"git": {"secretRef": "NOT_GRANTED"}, "ociImage": {"reference": ""}}},
        {"policy": {"packId": "../any", "packVersion": "not semver"}},
        run(timeoutMs=60_000),
        run(timeoutMs=0, workingDirectory="", secretDelivery="env"),
        run(timeoutMs=U64_MAX) | {"lifetime": {"ttlSeconds": U64_MAX}},
        run(argv=["é\n", " "]),
        run(argv=["x" * 5000]),
        run(limits={}),
        run(limits={"memoryMaxBytes": 1, "cpuMax": {"quotaMicros": 1}, "gracefulShutdownSeconds": 10_000}),
        authority(egressRules=[rule("10.0.0.0/8", 0, protocol="anything"), rule("*", 53), rule("*", 53)]),
        resolvers({}, {"resolverId": "s", "trustKid": "k", "dnssec": {}}),
        dns(hostnameAllowlist=["*.com", "a.example"], refreshPolicy={"minTtlSeconds": 30, "maxStaleSeconds": 30}),
        dns(refreshPolicy={"minTtlSeconds": 31}),
        dns(rebindingPolicy={"responseIpAllowlist": ["junk"], "maxNovelIpsPerHostname": 0}),
        cdn(("p", "*.a.example"), ("q", "*.a.example")),
        derivation({}),
        derivation({"egressRules": [rule("API.example", protocol="tls")]}, egressRules=[rule("api.EXAMPLE", protocol="tls")]),
        derivation({"secretRefs": ["A", "A"]}, secretRefs=["B", "A"]),
        export(http()),
        export(http(base_url="https://user:pw@DROP.example:443/in"), egressRules=[rule("Drop.Example", protocol="udp")]),
        export(s3(bucket="", keyPrefix="../"), egressRules=[rule("elsewhere")]),
        export(http(secretRef="K"), secretRefs=["K"]),
        export(http(base_url="http://[::1]:81"), egressRules=[rule("[::1]", 81)]),
        export(http(base_url="https://bücher.example"), egressRules=[rule("XN--bcher-kva.example")]),
        export(artifacts=(artifact(), artifact())),
        export(s3(), artifacts=(artifact(), artifact("g", target="t", path=""))),
        export(s3("t"), s3("u"), artifacts=(artifact(target="u"),)),
        {"export": {}},
        telemetry("process.spawned", "network", " nét.x"),
        telemetry("net.connect", egressRules=[rule()]),
        telemetry("a", agent="1.0.0-rc.1"),
        mounts(),
        mounts({"source": "/opt/py", "mode": "ro"}, {"source": "/opt/py/lib", "mode": "rw"}, {"source": "/etc/ssl", "target": "/opt/ssl"}),
        mounts({"source": "/a", "target": "/usr/local"}, {"source": "/a", "target": "/work/in"}, {"source": "/a", "target": "/tmp/x"}),
        mounts({"source": "/proc"} | {"target": "/host/proc"}, {"source": "/procs"}, {"source": "/...", "target": "/..a"}),
    ],
)
def test_what_comes_close_is_accepted(spec: dict[str, Any]) -> None:
    validate(cell(spec))


def test_the_first_rule_in_order_wins() -> None:
    document = cell(run(argv=[], timeoutMs=U64_MAX) | telemetry() | {"id": "/", "placement": {}})
    found = [fault.path for fault in faults(document)]
    assert found == ["spec.id", "spec.placement", "spec.run.argv", "spec.run.timeoutMs", "spec.telemetry.events"]
    with pytest.raises(InvalidSpec, match=r"spec\.id"):
        validate(document)


def test_rules_stand_in_the_order_of_the_table() -> None:
    rows = [rule.row for rule in RULES if rule.row is not None]
    assert rows == [row for row in range(1, 31) if row != 17]
    assert [rule.name for rule in RULES if rule.row is None] == ["network", "mounts", "nul-in-paths"]
    assert [rule.row for rule in RULES[: len(rows)]] == rows
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_every_rule_is_broken_by_a_row_above() -> None:
    broken = {1, 2} | {rule_id for rule_id, *_ in BROKEN}
    assert all(rule.row in broken or rule.name in broken for rule in RULES)


def test_long_values_do_not_make_long_errors() -> None:
    with pytest.raises(InvalidSpec) as caught:
        validate(cell({"correlation": {"tenantId": "." * 1_000_000}}))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", sorted(Path(cellos.core.documents.__file__).parents[0].glob("*.py")), ids=lambda path: path.name)
def test_documents_import_nothing_that_does_io(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    allowed = {
        "__future__",
        "cellos",
        "collections",
        "difflib",
        "functools",
        "hashlib",
        "ipaddress",
        "json",
        "msgspec",
        "re",
        "typing",
        "urllib",
        "yaml",
    }
    assert imported <= allowed
    assert allowed - {"cellos", "msgspec", "yaml"} <= sys.stdlib_module_names
