"""Every variable that `cellos-supervisor` knows, as the reference page lists them. Read by config.py and by the parts that they belong to.

No run needs this table: it is for people, for the test that holds the page to it, and for the test that tries each variable.
"""

from typing import NamedTuple

HEAD = "| variable | default | effect | a value that cannot be used |"
NOT_BUILT = "an error: it is not built yet"
UNUSED = "nothing: it sets up what is not built yet, and what would use it is refused"
ON = "a word other than `1`, `true`, `yes`, `on` (in any case) is off"
PRESENT = "`0`, `false`, `no`, `off` are off; anything else, even empty, is on"
OFF = "off only by `0`, `false`, `no`, `off`"


class Variable(NamedTuple):
    """A row: `bad` says what a value that cannot be used does."""

    name: str
    default: str
    effect: str
    bad: str


class Section(NamedTuple):
    title: str
    variables: tuple[Variable, ...]


def _rows(*rows: tuple[str, str, str, str]) -> tuple[Variable, ...]:
    return tuple(Variable(*row) for row in rows)


SECTIONS = (
    Section(
        "The run",
        _rows(
            ("CELLOS_CELL_BACKEND", "`linux`", "what isolates; `stub` isolates nothing, `firecracker` and `gvisor` only check their settings", "an error; never falls back"),
            ("CELLOS_RUN_ID", "a new UUIDv7", "run id in events and subjects, at most 256 printable characters", "an error"),
            ("CELLOS_ERROR_FD", "none", "number of an open descriptor that also gets the reason when no cell could be made", "left out"),
            ("CELLOS_RUN_TIMEOUT_MS", "none", "cap on the command's time in ms, an integer above 0", "an error"),
            ("CELLOS_RUN_ARGV0_ALLOW_PREFIXES", "any program", "directories, separated by commas, that the program's absolute path must be under, without `..`", "an error"),
            ("CELLOS_ALLOW_UNKNOWN_FIELDS", "off", "unknown members of a document are dropped, not refused", ON),
            ("CELLOS_CALLER_IDENTITY", "`default`", "who asks: looked up in a policy pack's `secretRefAllowlist`", "a caller that is not listed is refused"),
            ("CELLOS_K8S_NAMESPACE", "any", "a document that names a namespace must name this one", "the document is refused"),
            ("CELLOS_OUTPUT_DIR", "none", "directory that gets `<runId>.stdout` and `<runId>.stderr`", "an error"),
            ("CELLOS_OUTPUT_MAX_BYTES", "1048576", "how much of each stream is kept in files and events", "an error"),
            ("CELLOS_OUTPUT_EVENTS", "off", "what the command writes becomes `command.v1.output` events", ON),
            ("CELLOS_STATE_DIR", "see below", "directory for run records, spools and evidence", "an error"),
            ("RUST_LOG", "`info`", "lowest level of our lines on standard error: `error`, `warn`, `info`, `off`", "as `info`"),
        ),
    ),
    Section(
        "Profile",
        _rows(
            ("CELLOS_DEPLOYMENT_PROFILE", "the host must be able to isolate", "`hardened`: and more, see below; `portable`: what the host lacks is only a warning", "an error"),
            ("CELLOS_STRICT_CONFIG", "off; hardened: on", "a setting that could not be followed is an error", ON),
            ("CELLOS_TEST_FORCE_MISSING_ISOLATION_PRIMITIVES", "none", "for tests: what the host is said to lack, of `unshare`, `seccomp`, `cgroup-v2`, `all`", "unknown words are ignored"),
        ),
    ),
    Section(
        "Authority and policy",
        _rows(
            ("CELLOS_AUTHORITY_KEYS_PATH", "none; hardened: required", "file of role to public key, for derivation tokens", "an error"),
            ("CELLOS_REQUIRE_AUTHORITY_DERIVATION", "off; hardened: on", "a document with egress rules or secrets must carry a derivation token", PRESENT),
            ("CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS", "on", "a token without `parentRunId` is refused", OFF),
            ("CELLOS_REQUIRE_TELEMETRY_DECLARED", "off; hardened: on", "a document must have `telemetry`", PRESENT),
            ("CELLOS_POLICY_PACK_PATH", "none", "policy pack that documents are held against", "an error"),
            ("CELLOS_POLICY_ALLOW_DOWNGRADE", "off", "a pack older than 1.0.0 is taken", ON),
            ("CELLOS_AUTHZ_POLICY_PATH", "none", "authorization policy that tenants are held against", "an error"),
            ("CELLOS_TRUST_VERIFY_KEYS_PATH", "none", "file of key id to public key, for trust keysets", "an error"),
            ("CELLOS_TRUST_KEYSET_PATH", "none", "signed trust keyset, verified at the start", "an event, or an error where required"),
            ("CELLOS_TRUST_KEYSET_CHAIN_PATH", "none", "several of them, oldest first, separated by commas or line ends", "an event, or an error where required"),
            ("CELLOS_REQUIRE_TRUST_VERIFY_KEYS", "off", "without keys or a valid keyset nothing runs", ON),
            ("CELLOS_TRUST_KEYSET_ID", "`cellos:builtin-v0`", "`keysetId` of observability events, a label", "any text is taken"),
            ("CELLOS_TRUST_RESOLVER_KID", "`cellos-local-resolve-v0`", "`issuerKid` of events about names, a label", "any text is taken"),
            ("CELLOS_TRUST_L7_KID", "`cellos-local-l7-v0`", "`issuerKid` of events about decisions, a label", "any text is taken"),
            ("CELLOS_TRUST_PLANE_EVENTS", "on", "events about declared destinations", OFF),
            ("CELLOS_L7_GATE_OBSERVABILITY", "off", "events about declared names", ON),
            ("CELLOS_RESOLVE_EGRESS_DNS", "off", "events about the addresses of declared hosts, as this host resolves them", ON),
        ),
    ),
    Section(
        "Events",
        _rows(
            ("CELL_OS_JSONL_EVENTS", "none", "file that events are appended to, one per line; a pipe that nobody reads fails the run after 5 s", "an error"),
            ("NATS_URL", "`nats://127.0.0.1:4222`, if something listens there", "NATS servers with JetStream that events are published to", "the events wait in the spool"),
            ("NATS_CA_FILE", "the system's", "certificates that NATS servers are checked with", "as a connection that fails"),
            ("CELL_OS_REQUIRE_JETSTREAM", "off; hardened: on", "no run without NATS; events that are not acknowledged in the end are a failure", PRESENT),
            ("CELL_OS_USE_NOOP_SINK", "off", "events go nowhere but to the JSONL file", PRESENT),
            ("CELLOS_EVENTS_SUBJECT_TEMPLATE", "none", "subject, with `{spec_id}`, `{run_id}`, `{tenantId}` filled in", "an error"),
            ("CELLOS_TENANT_ID", "none", "without a template: subject `cellos.events.<tenant>.<spec id>.<run id>`", "an error"),
            ("CELL_OS_EVENTS_SUBJECT", "`cellos.events.v1`", "subject, where neither of the two is set", "an error"),
            ("CELLOS_EVENT_SIGNING", "`off`", "`ed25519`, `hmac`: every event is signed", "an error"),
            ("CELLOS_EVENT_SIGNING_KID", "none", "name of the key, required for signing", "an error"),
            ("CELLOS_EVENT_SIGNING_KEY_BASE64", "none", "base64url of the 32-byte seed, or of the HMAC key", "an error, which never shows it"),
            ("CELLOS_REDACT_EVENT_FIELDS", "off", "list of members of `data` to redact; `defaults` in it stands for argv, path, reason", "an error"),
            ("CELLOS_DLQ_DIR", "none", "directory for events that a sink did not take", "a warning; with strict configuration an error"),
        ),
    ),
    Section(
        "Secrets",
        _rows(
            ("CELLOS_BROKER", "`memory`, which holds none", "where secrets come from: `env`, `file`, `github-oidc`; `vault-approle` checks its settings only", "an error; never falls back"),
            ("CELLOS_SECRET_<KEY>", "none", "broker `env`: the value of a secret", "the run fails"),
            ("CELLOS_SECRET_FILE_<KEY>", "none", "broker `file`: the file that holds it", "the run fails"),
            ("ACTIONS_ID_TOKEN_REQUEST_URL", "none", "broker `github-oidc`: where tokens are asked for", "the run fails"),
            ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "none", "broker `github-oidc`: what authorizes that", "the run fails"),
            ("CELLOS_BROKER_OIDC_TIMEOUT_MS", "30000", "whole time of one request", "the default"),
            ("CELLOS_BROKER_OIDC_CONNECT_TIMEOUT_MS", "10000", "time to connect", "the default"),
            ("CELLOS_VAULT_ADDR", "none", "address of the Vault server, checked", "an error"),
            ("CELLOS_VAULT_ROLE_ID", "none", "AppRole, checked", "an error"),
            ("CELLOS_VAULT_SECRET_ID", "none", "AppRole, checked", "an error"),
            ("CELLOS_VAULT_KV_MOUNT", "`secret`", UNUSED, "nothing"),
            ("CELLOS_VAULT_KV_PATH_PREFIX", "none", UNUSED, "nothing"),
            ("CELLOS_VAULT_NAMESPACE", "none", UNUSED, "nothing"),
            ("CELLOS_VAULT_TIMEOUT_MS", "15000", UNUSED, "nothing"),
            ("CELLOS_VAULT_CONNECT_TIMEOUT_MS", "10000", UNUSED, "nothing"),
            ("CELLOS_SECRET_DELIVERY", "set for the command", "how it gets its secrets: `runtimeBroker`", "nothing"),
            ("CELLOS_RUNTIME_SECRET_SOCKET", "set for the command", "socket that `secret get` asks", "`secret get` fails"),
            ("CELLOS_RUNTIME_SECRET_TOKEN", "set for the command", "what authorizes that", "`secret get` fails"),
        ),
    ),
    Section(
        "Artifacts",
        _rows(
            ("CELLOS_EXPORT_DIR", "none", "directory that artifacts are copied to, as `<cell id>/<name>`", "the export fails"),
            ("CELLOS_EXPORT_HTTP_BASE_URL[__T]", "none", "where artifacts are sent with PUT", "an error"),
            ("CELLOS_EXPORT_HTTP_BEARER_TOKEN[__T]", "none", "what authorizes that", "an error"),
            ("CELLOS_EXPORT_HTTP_MAX_ATTEMPTS[__T]", "1", "how often a request is tried", "an error"),
            ("CELLOS_EXPORT_HTTP_RETRY_BACKOFF_MS[__T]", "0", "pause between attempts", "an error"),
            ("CELLOS_EXPORT_HTTP_TIMEOUT_MS", "30000", "time of one attempt", "the default"),
            ("CELLOS_EXPORT_HTTP_CONNECT_TIMEOUT_MS", "10000", "time to connect", "the default"),
            ("CELLOS_EXPORT_S3_PRESIGNED_URL[__T]", "none", "presigned URL that artifacts are sent to with PUT", "an error"),
            ("CELLOS_EXPORT_S3_REGION[__T]", "the document's", "region, which the presigned URL must be for", "an error"),
            ("CELLOS_EXPORT_S3_MAX_ATTEMPTS[__T]", "1", "how often a request is tried", "an error"),
            ("CELLOS_EXPORT_S3_RETRY_BACKOFF_MS[__T]", "0", "pause between attempts", "an error"),
            ("CELLOS_EXPORT_S3_TIMEOUT_MS", "30000", "time of one attempt", "the default"),
            ("CELLOS_EXPORT_S3_CONNECT_TIMEOUT_MS", "10000", "time to connect", "the default"),
            ("CELL_OS_REQUIRE_HTTP_EXPORT", "off", "an http target without URL is an error", PRESENT),
            ("CELL_OS_REQUIRE_S3_EXPORT", "off", "an s3 target without URL is an error", PRESENT),
            ("CELLOS_CA_BUNDLE", "none", "file of certificates that HTTP servers are checked with, beside the system's", "an error"),
            ("HTTP_PROXY", "none", "proxy for `http:` URLs", "the request fails"),
            ("HTTPS_PROXY", "none", "proxy for `https:` URLs", "the request fails"),
            ("NO_PROXY", "none", "hosts that are reached without it", "nothing"),
        ),
    ),
    Section(
        "Isolation",
        _rows(
            ("CELLOS_CGROUP_PARENT", "found", "control group that cells get theirs in", "an error"),
            ("CELLOS_CGROUP_MEMORY_MAX", "512 MiB", "memory of a cell whose document does not say", "an error"),
            ("CELLOS_CGROUP_CPU_MAX", "one processor", "processor time of a cell whose document does not say: `max`, `max P`, `Q`, `Q P`", "an error"),
            ("CELLOS_SUBPROCESS_UNSHARE", "all", "nothing on `linux`, which always has them all; an error on `stub`", "a warning"),
            ("CELLOS_SUBPROCESS_SECCOMP", "on", "`bpf`, `path`, `file`: the filter of CELLOS_SECCOMP_BPF_PATH beside ours, which no word turns off", "an error"),
            ("CELLOS_SECCOMP_BPF_PATH", "none", "file of a classic BPF program", "an error"),
        ),
    ),
    Section(
        "Not built yet",
        _rows(
            ("CELLOS_FIRECRACKER_*", "none", "settings of `firecracker`: checked, nothing runs", "an error"),
            ("CELLOS_GVISOR_BUNDLE_ROOT", "none", "setting of `gvisor`: checked, nothing runs", "an error"),
            ("CELLOS_GVISOR_RUNSC_BIN", "`runsc`", "setting of `gvisor`: checked, nothing runs", "an error"),
            ("CELLOS_DNS_PROXY", "off", NOT_BUILT, ON),
            ("CELLOS_DNS_PROXY_UPSTREAM_OVERRIDE", "none", UNUSED, "nothing"),
            ("CELLOS_SNI_PROXY", "off", NOT_BUILT, ON),
            ("CELLOS_SNI_PROXY_UPSTREAM_OVERRIDE", "none", UNUSED, "nothing"),
            ("CELLOS_SNI_PROXY_BIND", "none", UNUSED, "nothing"),
            ("CELLOS_DNS_AUTHORITY_REFRESH", "off", NOT_BUILT, ON),
            ("CELLOS_DNS_AUTHORITY_CONTINUOUS", "off", NOT_BUILT, ON),
            ("CELLOS_DNS_AUTHORITY_TICK_INTERVAL_SECS", "none", UNUSED, "nothing"),
            ("CELLOS_DNS_UPSTREAM_*", "none", UNUSED, "nothing"),
            ("CELLOS_DNSSEC_TRUST_ANCHORS_PATH", "none", UNUSED, "nothing"),
            ("CELLOS_PER_FLOW_ENFORCEMENT_EVENTS", "off", NOT_BUILT, "only `1` is on"),
            ("CELLOS_PER_FLOW_REALTIME", "off", NOT_BUILT, "only `1` is on"),
            ("CELLOS_FIRECRACKER_PER_FLOW_EBPF", "off", NOT_BUILT, "only `1` is on"),
            ("CELLOS_FIRECRACKER_PER_FLOW_NFLOG_GROUP", "none", UNUSED, "nothing"),
            ("CELLOS_FIRECRACKER_PER_FLOW_BACKEND", "none", UNUSED, "nothing"),
            ("CELLOS_PER_FLOW_BACKEND", "none", UNUSED, "nothing"),
            ("CELLOS_EBPF_OBJECT_PATH", "none", UNUSED, "nothing"),
            ("CELLOS_HOST_TELEMETRY_SIGN_ALG", "`off`", NOT_BUILT, "as `off`"),
            ("CELLOS_HOST_TELEMETRY_SIGN_*", "none", UNUSED, "nothing"),
        ),
    ),
)  # fmt: skip


def tables() -> str:
    """The tables of the reference page, in Markdown."""
    parts = []
    for section in SECTIONS:
        rows = [f"| `{row.name}` | {row.default} | {row.effect} | {row.bad} |" for row in section.variables]
        parts.append("\n".join([f"### {section.title}", "", HEAD, "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
