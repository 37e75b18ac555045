"""The ExecutionCell document as frozen structs: what one cell runs, with which authority, for how long.

Attribute names are the snake_case of the wire names. `| None = None` marks a member that may be absent or null, which mean the same;
a member with another default may be absent but not null. Lists are tuples. The order of the members is that of the canonical form.
The structs promise the shape only; what values mean is checked by `cellos.core.documents.rules`. Some of that is also told here, to
readers of the JSON Schema: `extra_json_schema` changes nothing about what is accepted.
"""

# No `from __future__ import annotations`: msgspec would have to evaluate each of the strings again, 3 ms of the start of every run.

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from cellos.core.documents import identifiers

API_VERSION = "cellos.io/v1"
KIND = "ExecutionCell"

U64_MAX = 2**64 - 1

U16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
# msgspec has no bounds above 63 bits: the strict decoder keeps larger integers out, and only the schema needs the number.
U64 = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": U64_MAX})]
Positive = Annotated[int, Meta(ge=0, extra_json_schema={"exclusiveMinimum": 0, "maximum": U64_MAX})]

NonEmpty = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
Portable = Annotated[str, Meta(extra_json_schema={"pattern": f"^{identifiers.PORTABLE}$"})]
Namespace = Annotated[str, Meta(extra_json_schema={"pattern": f"^{identifiers.NAMESPACE}$"})]
Digest = Annotated[str, Meta(extra_json_schema={"pattern": f"^{identifiers.SHA256}$"})]
Semver = Annotated[str, Meta(extra_json_schema={"pattern": f"^{identifiers.SEMVER3}$"})]
HostPattern = Annotated[str, Meta(extra_json_schema={"pattern": f"^{identifiers.FQDN}$"})]
Tenant = Annotated[str, Meta(extra_json_schema={"pattern": r"^[^.*>\s]+$"})]
HostPath = Annotated[str, Meta(extra_json_schema={"pattern": "^/"})]

SecretDelivery = Literal["env", "runtimeBroker", "runtimeLeasedBroker"]
MountMode = Literal["ro", "rw"]
ResolverProtocol = Literal["do53-udp", "do53-tcp", "dot", "doh", "doq"]
QueryType = Literal["A", "AAAA", "CNAME", "TXT", "MX", "SRV", "NS", "PTR", "HTTPS", "SVCB"]
RefreshStrategy = Literal["ttl-honor", "fixed-interval", "manual"]


class Wire(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of every struct of a document: the one place where wire names are derived and unknown members refused.

    Subclasses repeat `frozen` and `kw_only`, which type checkers do not inherit.
    """


class Correlation(Wire, frozen=True, kw_only=True):
    """Identifiers of the world outside, copied into events. Only `tenantId` is checked."""

    platform: str | None = None
    external_run_id: str | None = None
    external_job_id: str | None = None
    tenant_id: Tenant | None = None
    labels: dict[str, str] | None = None
    correlation_id: str | None = None


class GitSource(Wire, frozen=True, kw_only=True):
    url: str | None = None
    ref: str | None = None
    secret_ref: Portable | None = None


class OciImage(Wire, frozen=True, kw_only=True):
    reference: str
    digest: str | None = None
    secret_ref: Portable | None = None


class Ingress(Wire, frozen=True, kw_only=True):
    """Where the material of a run is said to come from."""

    git: GitSource | None = None
    oci_image: OciImage | None = None


class Environment(Wire, frozen=True, kw_only=True):
    """The image that a cell runs in."""

    image_reference: NonEmpty
    image_digest: Digest | None = None
    template_id: Portable | None = None


class Placement(Wire, frozen=True, kw_only=True):
    """Where a cell may run. At least one member is set."""

    pool_id: Portable | None = None
    kubernetes_namespace: Namespace | None = None
    queue_name: Portable | None = None


class PolicyAttribution(Wire, frozen=True, kw_only=True):
    """The policy pack that the submitter says it follows. Attribution only."""

    pack_id: str | None = None
    pack_version: str | None = None
    bundle_digest: str | None = None


class Identity(Wire, frozen=True, kw_only=True):
    """A federated identity to be exchanged for the secret `secretRef`. `ttlSeconds` is at most the cell's."""

    kind: Literal["federatedOidc"]
    provider: str
    audience: str
    subject: str | None = None
    ttl_seconds: U64 | None = None
    secret_ref: Portable


class CpuMax(Wire, frozen=True, kw_only=True):
    """`quotaMicros` of processor time in every `periodMicros` (100,000 where absent)."""

    quota_micros: Positive
    period_micros: Positive | None = None


class Limits(Wire, frozen=True, kw_only=True):
    """Resource limits. An absent one stands for the platform's default, never for no limit."""

    memory_max_bytes: Positive | None = None
    cpu_max: CpuMax | None = None
    graceful_shutdown_seconds: U64 | None = None


class Run(Wire, frozen=True, kw_only=True):
    """The program of a cell. `timeoutMs` is at most the cell's time to live."""

    argv: Annotated[tuple[NonEmpty, ...], Meta(extra_json_schema={"minItems": 1})]
    working_directory: str | None = None
    timeout_ms: U64 | None = None
    limits: Limits | None = None
    secret_delivery: SecretDelivery = "runtimeLeasedBroker"


class Mount(Wire, frozen=True, kw_only=True):
    """A directory or file of the host that the cell sees. After construction `target` is never empty: it defaults to `source`."""

    source: HostPath
    # The empty string stands for an absent target; a document cannot say it, because an empty one is refused.
    target: Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": "^/"})] = ""
    mode: MountMode = "ro"

    def __post_init__(self) -> None:
        if not self.target:
            force_setattr(self, "target", self.source)


class Filesystem(Wire, frozen=True, kw_only=True):
    """What of the host's file system a cell sees beside the system's own directories."""

    mounts: tuple[Mount, ...]


class EgressRule(Wire, frozen=True, kw_only=True):
    """One destination that a cell may reach. Host and protocol are free text; names are compared without regard to ASCII case."""

    host: NonEmpty
    port: U16
    protocol: str | None = None
    dns_egress_justification: str | None = None


class Capability(Wire, frozen=True, kw_only=True):
    """Authority as a derivation token states it."""

    egress_rules: tuple[EgressRule, ...] = ()
    secret_refs: tuple[str, ...] = ()


class DerivationStep(Wire, frozen=True, kw_only=True):
    from_capability: Capability
    to_capability: Capability


class GrantorSignature(Wire, frozen=True, kw_only=True):
    """`bytes` is standard base64."""

    algorithm: str
    bytes: str


class AuthorityDerivation(Wire, frozen=True, kw_only=True):
    """A signed grant from a role to this cell. Here only its structure; signatures are checked elsewhere."""

    role_root: str
    parent_run_id: str | None = None
    derivation_steps: tuple[DerivationStep, ...] = ()
    leaf_capability: Capability
    grantor_signature: GrantorSignature


class Dnssec(Wire, frozen=True, kw_only=True):
    validate: bool = True
    fail_closed: bool = False
    trust_anchors_path: str | None = None


class Resolver(Wire, frozen=True, kw_only=True):
    resolver_id: Portable
    endpoint: NonEmpty
    protocol: ResolverProtocol
    trust_kid: Portable | None = None
    dnssec: Dnssec | None = None


class RefreshPolicy(Wire, frozen=True, kw_only=True):
    min_ttl_seconds: U32 | None = None
    max_stale_seconds: U32 | None = None
    strategy: RefreshStrategy | None = None


class RebindingPolicy(Wire, frozen=True, kw_only=True):
    response_ip_allowlist: tuple[str, ...] = ()
    max_novel_ips_per_hostname: U32 = 4
    reject_on_rebind: bool = False


class DnsAuthority(Wire, frozen=True, kw_only=True):
    """The names a cell may look up, by whom they are resolved, and how."""

    resolvers: tuple[Resolver, ...] = ()
    allowed_query_types: tuple[QueryType, ...] = ()
    hostname_allowlist: tuple[HostPattern, ...] = ()
    refresh_policy: RefreshPolicy | None = None
    rebinding_policy: RebindingPolicy | None = None
    block_direct_workload_dns: bool = False
    block_udp_doq: bool = False
    block_udp_http3: bool = False


class CdnProvider(Wire, frozen=True, kw_only=True):
    provider_id: Portable
    hostname_pattern: HostPattern
    accept_fronting: bool = False


class CdnAuthority(Wire, frozen=True, kw_only=True):
    providers: tuple[CdnProvider, ...] = ()


class Authority(Wire, frozen=True, kw_only=True):
    """What a cell may do. `{}` is nothing at all: no network, no secret, no file of the host.

    `network` is kept only to be refused: it is opaque, and nothing could enforce it.
    """

    filesystem: Filesystem | None = None
    network: Annotated[Any, Meta(extra_json_schema={"type": "null"})] = None
    egress_rules: tuple[EgressRule, ...] | None = None
    secret_refs: tuple[Portable, ...] | None = None
    authority_derivation: AuthorityDerivation | None = None
    dns_authority: DnsAuthority | None = None
    cdn_authority: CdnAuthority | None = None


class Lifetime(Wire, frozen=True, kw_only=True):
    ttl_seconds: U64


class HttpTarget(Wire, frozen=True, kw_only=True, tag_field="kind", tag="http"):
    name: Portable
    base_url: str
    secret_ref: Portable | None = None


class S3Target(Wire, frozen=True, kw_only=True, tag_field="kind", tag="s3"):
    name: Portable
    bucket: str
    key_prefix: str | None = None
    region: str | None = None
    secret_ref: Portable | None = None


class Artifact(Wire, frozen=True, kw_only=True):
    """A file of the cell that is delivered after its end. `target` may be left out where there is at most one."""

    name: Portable
    path: str
    target: Portable | None = None
    content_type: str | None = None


class Export(Wire, frozen=True, kw_only=True):
    artifacts: tuple[Artifact, ...] | None = None
    targets: tuple[HttpTarget | S3Target, ...] | None = None


class RateLimits(Wire, frozen=True, kw_only=True):
    events_per_second: U32 | None = None
    bytes_per_second: U32 | None = None


class HostVsGuestFields(Wire, frozen=True, kw_only=True):
    host_fields: tuple[str, ...] = ()
    guest_fields: tuple[str, ...] = ()


class Telemetry(Wire, frozen=True, kw_only=True):
    """What the guest promises to report."""

    channel: Literal["vsock-cbor"]
    events: Annotated[tuple[NonEmpty, ...], Meta(extra_json_schema={"minItems": 1})]
    rate_limits: RateLimits | None = None
    host_vs_guest_fields: HostVsGuestFields | None = None
    agent_version: Semver


class CellSpec(Wire, frozen=True, kw_only=True):
    """The body of the document. `run` absent: nothing is started."""

    id: Portable
    correlation: Correlation | None = None
    ingress: Ingress | None = None
    environment: Environment | None = None
    placement: Placement | None = None
    policy: PolicyAttribution | None = None
    identity: Identity | None = None
    run: Run | None = None
    authority: Authority
    lifetime: Lifetime
    export: Export | None = None
    telemetry: Telemetry | None = None


class ExecutionCell(Wire, frozen=True, kw_only=True):
    """The whole document: `cellos.io/v1`, `ExecutionCell`."""

    api_version: Annotated[str, Meta(extra_json_schema={"const": API_VERSION})]
    kind: Annotated[str, Meta(extra_json_schema={"const": KIND})]
    spec: CellSpec
