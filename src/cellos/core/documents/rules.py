"""What a well-shaped ExecutionCell must mean: named rules in their fixed order, the first broken one is the error.

Texts are part of the interface; users search for them. Rows 1 to 30 are compatible with CellOS 0.5 (17, the size of argv, is each
backend's own limit); the rules after them are ours. The faults of a rule carry the path of the member, with its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from cellos.core.documents.execution_cell import API_VERSION, KIND, U64_MAX, EgressRule, ExecutionCell, HttpTarget
from cellos.core.documents.identifiers import (
    FQDN,
    FQDN_RULE,
    NAMESPACE,
    NAMESPACE_RULE,
    PORTABLE_RULE,
    SEMVER3,
    SHA256,
    WHITE_SPACE,
    ascii_lower,
    is_portable,
    matches,
    reserved_in_subjects,
)
from cellos.core.documents.wording import quoted, quoted_char
from cellos.errors import InvalidSpec


class Fault(Struct, frozen=True):
    """One broken rule: what the error says, and the member at fault."""

    text: str
    path: str


Faults = Iterator[Fault]


class Rule(Struct, frozen=True):
    """`row` is its number in the order of CellOS 0.5; None for our own rules."""

    row: int | None
    name: str
    faults: Callable[[ExecutionCell], Faults]


def validate(document: ExecutionCell) -> None:
    """Raises InvalidSpec for the first rule that the document breaks."""
    for fault in faults(document):
        raise InvalidSpec(fault.text, path=fault.path)


def faults(document: ExecutionCell) -> Faults:
    """Everything that is wrong with the document, in the order of the rules."""
    for rule in RULES:
        yield from rule.faults(document)


def refuse_other_kind(api_version: object, kind: object) -> None:
    """Raises InvalidSpec where a document says that it is of another version or kind."""
    for fault in (*_version_faults(api_version), *_kind_faults(kind)):
        raise InvalidSpec(fault.text, path=fault.path)


def _version_faults(api_version: object) -> Faults:
    if isinstance(api_version, str) and api_version != API_VERSION:
        yield Fault(f"unsupported apiVersion: {_plain(api_version)}", "apiVersion")


def _kind_faults(kind: object) -> Faults:
    if isinstance(kind, str) and kind != KIND:
        yield Fault(f"unsupported kind: {_plain(kind)}", "kind")


def _plain(value: str) -> str:
    """A value inside a text that shows it without quotes: one line, whatever it holds."""
    return value if value.isprintable() and len(value) <= 300 else quoted(value)


def _portable(value: str | None, text_path: str, path: str) -> Faults:
    if value is not None and not is_portable(value):
        yield Fault(f"{text_path} {PORTABLE_RULE}", path)


def _secret_refs(document: ExecutionCell) -> frozenset[str]:
    return frozenset(document.spec.authority.secret_refs or ())


def _egress_rules(document: ExecutionCell) -> tuple[EgressRule, ...]:
    return document.spec.authority.egress_rules or ()


# --- the document -----------------------------------------------------------------------------------------------------------------------


def _api_version(document: ExecutionCell) -> Faults:
    yield from _version_faults(document.api_version)


def _kind(document: ExecutionCell) -> Faults:
    yield from _kind_faults(document.kind)


def _id(document: ExecutionCell) -> Faults:
    yield from _portable(document.spec.id, "spec.id", "spec.id")


def _tenant(document: ExecutionCell) -> Faults:
    path = "spec.correlation.tenantId"
    tenant = document.spec.correlation.tenant_id if document.spec.correlation else None
    if tenant is None:
        return
    if not tenant:
        yield Fault(f"{path} must be non-empty when present", path)
    elif reserved := reserved_in_subjects(tenant):
        yield Fault(f"{path} contains NATS-reserved char: {quoted_char(reserved)} (in {quoted(tenant)})", path)


def _secret_names(document: ExecutionCell) -> Faults:
    for index, name in enumerate(document.spec.authority.secret_refs or ()):
        yield from _portable(name, "authority.secretRefs[]", f"spec.authority.secretRefs[{index}]")


def _identity_secret(document: ExecutionCell) -> Faults:
    if identity := document.spec.identity:
        yield from _portable(identity.secret_ref, "spec.identity.secretRef", "spec.identity.secretRef")


def _identity_ttl(document: ExecutionCell) -> Faults:
    identity = document.spec.identity
    if identity and identity.ttl_seconds is not None and identity.ttl_seconds > document.spec.lifetime.ttl_seconds:
        yield Fault("spec.identity.ttlSeconds must be <= spec.lifetime.ttlSeconds", "spec.identity.ttlSeconds")


def _identity_secret_granted(document: ExecutionCell) -> Faults:
    identity = document.spec.identity
    if identity and identity.secret_ref not in _secret_refs(document):
        yield Fault(
            f"spec.identity.secretRef {quoted(identity.secret_ref)} must also appear in authority.secretRefs", "spec.identity.secretRef"
        )


def _image_reference(document: ExecutionCell) -> Faults:
    if document.spec.environment and not document.spec.environment.image_reference:
        yield Fault("spec.environment.imageReference must be non-empty", "spec.environment.imageReference")


def _image_digest(document: ExecutionCell) -> Faults:
    path = "spec.environment.imageDigest"
    digest = document.spec.environment.image_digest if document.spec.environment else None
    if digest is not None and not matches(SHA256, digest):
        yield Fault(f"{path} must be a sha256:<hex64> digest when present", path)


def _template_id(document: ExecutionCell) -> Faults:
    if environment := document.spec.environment:
        yield from _portable(environment.template_id, "spec.environment.templateId", "spec.environment.templateId")


def _placement_set(document: ExecutionCell) -> Faults:
    placement = document.spec.placement
    if placement and placement.pool_id is placement.kubernetes_namespace is placement.queue_name is None:
        yield Fault("spec.placement must set at least one placement hint", "spec.placement")


def _placement_names(document: ExecutionCell) -> Faults:
    if (placement := document.spec.placement) is None:
        return
    yield from _portable(placement.pool_id, "spec.placement.poolId", "spec.placement.poolId")
    if placement.kubernetes_namespace is not None and not matches(NAMESPACE, placement.kubernetes_namespace):
        yield Fault(f"spec.placement.kubernetesNamespace {NAMESPACE_RULE}", "spec.placement.kubernetesNamespace")
    yield from _portable(placement.queue_name, "spec.placement.queueName", "spec.placement.queueName")


def _ingress_secrets(document: ExecutionCell) -> Faults:
    if ingress := document.spec.ingress:
        for source, name in ((ingress.git, "git"), (ingress.oci_image, "ociImage")):
            path = f"spec.ingress.{name}.secretRef"
            yield from _portable(source.secret_ref if source else None, path, path)


# --- the run ----------------------------------------------------------------------------------------------------------------------------


def _argv(document: ExecutionCell) -> Faults:
    if (run := document.spec.run) and not (run.argv and all(run.argv)):
        at = f"[{run.argv.index('')}]" if run.argv else ""
        yield Fault("spec.run.argv must be non-empty with no empty strings", f"spec.run.argv{at}")


def _argv_nul(document: ExecutionCell) -> Faults:
    for index, argument in enumerate(document.spec.run.argv if document.spec.run else ()):
        if "\0" in argument:
            path = f"spec.run.argv[{index}]"
            yield Fault(f"{path} contains NUL byte (would be silently truncated by execve)", path)


def _timeout(document: ExecutionCell) -> Faults:
    timeout_ms = document.spec.run.timeout_ms if document.spec.run else None
    if timeout_ms is not None and timeout_ms > min(document.spec.lifetime.ttl_seconds * 1000, U64_MAX):
        yield Fault("spec.run.timeoutMs must be <= spec.lifetime.ttlSeconds * 1000", "spec.run.timeoutMs")


def _limits(document: ExecutionCell) -> Faults:
    limits = document.spec.run.limits if document.spec.run else None
    if not limits:
        return
    cpu = limits.cpu_max
    for value, path in (
        (limits.memory_max_bytes, "spec.run.limits.memoryMaxBytes"),
        (cpu and cpu.quota_micros, "spec.run.limits.cpuMax.quotaMicros"),
        (cpu and cpu.period_micros, "spec.run.limits.cpuMax.periodMicros"),
    ):
        if value == 0:
            yield Fault(f"{path} must be > 0", path)


# --- the authority ----------------------------------------------------------------------------------------------------------------------


def _egress_hosts(document: ExecutionCell) -> Faults:
    for index, rule in enumerate(_egress_rules(document)):
        if not rule.host:
            yield Fault("authority.egressRules[].host must be non-empty", f"spec.authority.egressRules[{index}].host")


def _resolvers(document: ExecutionCell) -> Faults:
    text = "authority.dnsAuthority.resolvers[]"
    dns = document.spec.authority.dns_authority
    seen: set[str] = set()
    for index, resolver in enumerate(dns.resolvers if dns else ()):
        path = f"spec.authority.dnsAuthority.resolvers[{index}]"
        yield from _portable(resolver.resolver_id, f"{text}.resolverId", f"{path}.resolverId")
        if resolver.resolver_id in seen:
            yield Fault(f"{text}.resolverId duplicates value {quoted(resolver.resolver_id)}", f"{path}.resolverId")
        seen.add(resolver.resolver_id)
        if not resolver.endpoint:
            yield Fault(f"{text}.endpoint must be non-empty", f"{path}.endpoint")
        yield from _portable(resolver.trust_kid, f"{text}.trustKid", f"{path}.trustKid")


def _hostname_allowlist(document: ExecutionCell) -> Faults:
    dns = document.spec.authority.dns_authority
    for index, entry in enumerate(dns.hostname_allowlist if dns else ()):
        if not matches(FQDN, entry):
            yield Fault(
                f"authority.dnsAuthority.hostnameAllowlist entry {quoted(entry)} {FQDN_RULE}",
                f"spec.authority.dnsAuthority.hostnameAllowlist[{index}]",
            )


def _refresh_policy(document: ExecutionCell) -> Faults:
    dns = document.spec.authority.dns_authority
    policy = dns.refresh_policy if dns else None
    if not policy or policy.min_ttl_seconds is None or policy.max_stale_seconds is None:
        return
    if policy.min_ttl_seconds > policy.max_stale_seconds:
        yield Fault(
            f"authority.dnsAuthority.refreshPolicy.minTtlSeconds ({policy.min_ttl_seconds})"
            f" must be <= maxStaleSeconds ({policy.max_stale_seconds})",
            "spec.authority.dnsAuthority.refreshPolicy.minTtlSeconds",
        )


def _cdn_providers(document: ExecutionCell) -> Faults:
    text = "authority.cdnAuthority.providers[]"
    cdn = document.spec.authority.cdn_authority
    seen: set[str] = set()
    for index, provider in enumerate(cdn.providers if cdn else ()):
        path = f"spec.authority.cdnAuthority.providers[{index}]"
        yield from _portable(provider.provider_id, f"{text}.providerId", f"{path}.providerId")
        if provider.provider_id in seen:
            yield Fault(f"{text}.providerId duplicates value {quoted(provider.provider_id)}", f"{path}.providerId")
        seen.add(provider.provider_id)
        if not matches(FQDN, provider.hostname_pattern):
            yield Fault(f"{text}.hostnamePattern {quoted(provider.hostname_pattern)} {FQDN_RULE}", f"{path}.hostnamePattern")


def _derivation(document: ExecutionCell) -> Faults:
    derivation = document.spec.authority.authority_derivation
    if derivation is None:
        return
    # Few documents carry a token; the others do not pay for the import.
    from cellos.core.authority import capability_excess, capability_of

    if excess := capability_excess(derivation.leaf_capability, capability_of(document.spec.authority)):
        yield Fault(
            "spec.authorityDerivation.leafCapability exceeds spec.authority — child authority must be ⊆ declared authority",
            f"spec.authority.authorityDerivation.leafCapability.{excess.field}",
        )


# --- export and telemetry ---------------------------------------------------------------------------------------------------------------


def _export_targets(document: ExecutionCell) -> Faults:
    export = document.spec.export
    granted = _secret_refs(document)
    reachable = {(ascii_lower(rule.host), rule.port) for rule in _egress_rules(document)}
    seen: set[str] = set()
    for index, target in enumerate((export and export.targets) or ()):
        path = f"spec.export.targets[{index}]"
        name = quoted(target.name)
        yield from _portable(target.name, "spec.export.targets[].name", f"{path}.name")
        if target.name in seen:
            yield Fault(f"duplicate export target name {name}", f"{path}.name")
        seen.add(target.name)
        if target.secret_ref is not None and target.secret_ref not in granted:
            yield Fault(
                f"export target {name} secretRef {quoted(target.secret_ref)} must appear in authority.secretRefs", f"{path}.secretRef"
            )
        if isinstance(target, HttpTarget):
            yield from _http_target(target, f"{path}.baseUrl", reachable)


def _http_target(target: HttpTarget, path: str, reachable: set[tuple[str, int]]) -> Faults:
    from cellos.core.documents.base_url import BaseUrlError, parse_base_url

    try:
        url = parse_base_url(target.base_url)
    except BaseUrlError as error:
        yield Fault(f"spec.export.targets[].baseUrl {error}", path)
        return
    if reachable and (url.host, url.port) not in reachable:
        yield Fault(f"http export target {quoted(target.name)} host {url.host}:{url.port} must appear in authority.egressRules", path)


def _artifacts(document: ExecutionCell) -> Faults:
    if (export := document.spec.export) is None:
        return
    targets = {target.name for target in export.targets or ()}
    for index, artifact in enumerate(export.artifacts or ()):
        path = f"spec.export.artifacts[{index}]"
        yield from _portable(artifact.name, "spec.export.artifacts[].name", f"{path}.name")
        yield from _portable(artifact.target, "spec.export.artifacts[].target", f"{path}.target")
        if artifact.target is not None and artifact.target not in targets:
            yield Fault(f"export artifact {quoted(artifact.name)} references unknown target {quoted(artifact.target)}", f"{path}.target")
        if artifact.target is None and len(targets) > 1:
            yield Fault(f"export artifact {quoted(artifact.name)} must set target when multiple export targets exist", f"{path}.target")


def _telemetry_events(document: ExecutionCell) -> Faults:
    if document.spec.telemetry and not document.spec.telemetry.events:
        yield Fault("spec.telemetry.events must be non-empty", "spec.telemetry.events")


def _agent_version(document: ExecutionCell) -> Faults:
    if document.spec.telemetry and not matches(SEMVER3, document.spec.telemetry.agent_version):
        path = "spec.telemetry.agentVersion"
        yield Fault(f"{path} must match MAJOR.MINOR.PATCH semver shape (optional -prerelease suffix)", path)


def _telemetry_names(document: ExecutionCell) -> Faults:
    telemetry = document.spec.telemetry
    for index, event in enumerate(telemetry.events if telemetry else ()):
        path = f"spec.telemetry.events[{index}]"
        trimmed = event.strip(WHITE_SPACE)
        if not trimmed:
            yield Fault("spec.telemetry.events[] entries must be non-empty", path)
        elif ascii_lower(trimmed).startswith("net.") and not _egress_rules(document):
            yield Fault(
                f"telemetry_without_egress: spec.telemetry.events[] entry {quoted(event)} requires at least one authority.egressRules entry"
                " — net.* telemetry without declared egress is an unbacked observation claim",
                path,
            )


# --- our own ----------------------------------------------------------------------------------------------------------------------------


def _network(document: ExecutionCell) -> Faults:
    if document.spec.authority.network is not None:
        yield Fault("authority.network is opaque and nothing enforces it: remove it", "spec.authority.network")


# The cell's own kernel interfaces and its built configuration: nothing of the host may lie there.
_OWN_TREES = ("/proc", "/dev", "/sys", "/etc", "/run/cellos")
# These are the cell's own directories, or links to them; what lies beneath them may be mounted over.
_OWN_DIRECTORIES = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32", "/work", "/tmp", "/var/tmp", "/run")


# PATH_MAX of Linux counts the final NUL.
_PATH_MAX = 4095


def _mounts(document: ExecutionCell) -> Faults:
    text = "authority.filesystem.mounts[]"
    filesystem = document.spec.authority.filesystem
    seen: set[str] = set()
    for index, mount in enumerate(filesystem.mounts if filesystem else ()):
        path = f"spec.authority.filesystem.mounts[{index}]"
        for value, name in ((mount.source, "source"), (mount.target, "target")):
            if not _is_normalised(value):
                yield Fault(
                    f"{text}.{name} {quoted(value)} must be an absolute path below '/' without '.', '..', '//', a trailing '/' or NUL",
                    f"{path}.{name}",
                )
            if len(value.encode(errors="surrogatepass")) > _PATH_MAX:
                yield Fault(f"{text}.{name} is longer than {_PATH_MAX} bytes, the most that Linux takes", f"{path}.{name}")
        target = mount.target
        if is_own(target):
            yield Fault(
                f"{text}.target {quoted(target)} is the cell's own: choose another place for {quoted(mount.source)}", f"{path}.target"
            )
        if target in seen:
            yield Fault(f"{text}.target {quoted(target)} is given twice", f"{path}.target")
        seen.add(target)


def is_own(path: str) -> bool:
    """Whether a cell has something of its own at a path, so that nothing of the host can be there."""
    return path in _OWN_DIRECTORIES or any(path == tree or path.startswith(f"{tree}/") for tree in _OWN_TREES)


def _is_normalised(path: str) -> bool:
    return path.startswith("/") and "\0" not in path and all(part not in {"", ".", ".."} for part in path[1:].split("/"))


def _nul_in_paths(document: ExecutionCell) -> Faults:
    """The kernel ends a path at NUL, so what is checked would not be what is opened."""
    spec = document.spec
    paths = [(spec.run.working_directory if spec.run else None, "spec.run.workingDirectory")]
    artifacts = (spec.export and spec.export.artifacts) or ()
    paths += [(artifact.path, f"spec.export.artifacts[{index}].path") for index, artifact in enumerate(artifacts)]
    for value, path in paths:
        if value is not None and "\0" in value:
            yield Fault(f"{path} contains NUL byte", path)


RULES: tuple[Rule, ...] = (
    Rule(1, "api-version", _api_version),
    Rule(2, "kind", _kind),
    Rule(3, "id", _id),
    Rule(4, "tenant", _tenant),
    Rule(5, "secret-names", _secret_names),
    Rule(6, "identity-secret", _identity_secret),
    Rule(7, "identity-ttl", _identity_ttl),
    Rule(8, "identity-secret-granted", _identity_secret_granted),
    Rule(9, "image-reference", _image_reference),
    Rule(10, "image-digest", _image_digest),
    Rule(11, "template-id", _template_id),
    Rule(12, "placement-set", _placement_set),
    Rule(13, "placement-names", _placement_names),
    Rule(14, "ingress-secrets", _ingress_secrets),
    Rule(15, "argv", _argv),
    Rule(16, "argv-nul", _argv_nul),
    Rule(18, "timeout", _timeout),
    Rule(19, "limits", _limits),
    Rule(20, "egress-hosts", _egress_hosts),
    Rule(21, "resolvers", _resolvers),
    Rule(22, "hostname-allowlist", _hostname_allowlist),
    Rule(23, "refresh-policy", _refresh_policy),
    Rule(24, "cdn-providers", _cdn_providers),
    Rule(25, "derivation", _derivation),
    Rule(26, "export-targets", _export_targets),
    Rule(27, "artifacts", _artifacts),
    Rule(28, "telemetry-events", _telemetry_events),
    Rule(29, "agent-version", _agent_version),
    Rule(30, "telemetry-names", _telemetry_names),
    Rule(None, "network", _network),
    Rule(None, "mounts", _mounts),
    Rule(None, "nul-in-paths", _nul_in_paths),
)
