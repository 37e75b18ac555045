"""The supervisor's variables: one table of all that there are, and one value that they are read into, once.

The table is in variables.py. `read_config` answers a value that cannot be used with an error that names the
variable: nothing is guessed, and nothing that asks for a guarantee is ignored. The few cases in which CellOS 0.5 goes on without what was
asked for (`Fallback`) are kept where nothing is lost by them; CELLOS_STRICT_CONFIG makes them errors.
"""

import os
from collections.abc import Mapping, Sequence

import msgspec

from cellos.core import deadline
from cellos.core.evidence.redact import parse_fields
from cellos.errors import ConfigError

BACKENDS = ("linux", "stub")
SETTINGS_ONLY = ("firecracker", "gvisor")
"""Backends whose settings are checked, and which run nothing yet."""
BROKERS = ("memory", "env", "file", "github-oidc", "vault-approle")
LONGEST_RUN_ID = 256
DEFAULT_NATS_URL = "nats://127.0.0.1:4222"
DEFAULT_OUTPUT_BYTES = 1 << 20

TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})
_ONE = frozenset({"1"})
# Each asks, by one of these words, for something that this version does not have: to go on would be to pretend.
NOT_BUILT: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("CELLOS_DNS_PROXY", "the DNS proxy is", TRUE),
    ("CELLOS_SNI_PROXY", "the SNI proxy is", TRUE),
    ("CELLOS_DNS_AUTHORITY_REFRESH", "resolver refresh is", TRUE),
    ("CELLOS_DNS_AUTHORITY_CONTINUOUS", "resolver refresh is", TRUE),
    ("CELLOS_PER_FLOW_ENFORCEMENT_EVENTS", "per-flow evidence is", _ONE),
    ("CELLOS_PER_FLOW_REALTIME", "per-flow evidence is", _ONE),
    ("CELLOS_FIRECRACKER_PER_FLOW_EBPF", "per-flow evidence is", _ONE),
    ("CELLOS_HOST_TELEMETRY_SIGN_ALG", "host telemetry is", frozenset({"hmac", "hmac-sha256", "ed25519"})),
)


class Fallback(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that was not followed. `value` is what people may see of it."""

    variable: str
    value: str
    reason: str

    @property
    def text(self) -> str:
        return f'{self.variable}="{self.value}" ({self.reason})'


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """Names stamped into observability events. No signature stands behind them."""

    keyset_id: str = "cellos:builtin-v0"
    resolver_kid: str = "cellos-local-resolve-v0"
    l7_kid: str = "cellos-local-l7-v0"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The environment, read once."""

    environment: Mapping[str, str] = {}
    """All of it, with what the profile implies: brokers, export targets, signing and backends read their own variables from here."""
    profile: str | None = None
    """`hardened`, `portable`, None."""
    strict: bool = False
    backend: str = "linux"
    broker: str = "memory"
    caller: str = "default"
    run_id: str | None = None
    run_timeout_ms: int | None = None
    argv0_prefixes: tuple[str, ...] = ()
    allow_unknown_fields: bool = False
    namespace: str | None = None

    require_derivation: bool = False
    require_scoped: bool = True
    require_telemetry: bool = False
    authority_keys: str | None = None
    policy_pack: str | None = None
    allow_downgrade: bool = False
    authz_policy: str | None = None
    trust_keys: str | None = None
    keyset: tuple[str, ...] = ()
    """Files of the trust keyset, oldest first."""
    keyset_variable: str = "CELLOS_TRUST_KEYSET_PATH"
    require_trust_keys: bool = False
    labels: Labels = Labels()
    trust_plane: bool = True
    l7_gate: bool = False
    resolve_egress: bool = False

    jsonl: str | None = None
    noop_sink: bool = False
    nats_url: str | None = None
    require_jetstream: bool = False
    redacted_fields: frozenset[str] = frozenset()
    dead_letters: str | None = None
    output_dir: str | None = None
    output_bytes: int = DEFAULT_OUTPUT_BYTES
    output_events: bool = False

    def __repr__(self) -> str:
        return f"Config(profile={self.profile!r}, backend={self.backend!r})"  # the environment may hold secrets


def read_config(environment: Mapping[str, str]) -> Config:
    """The configuration of a supervisor. Raises ConfigError, naming the variable."""
    read = _Reader(environment)
    profile = read_profile(environment)
    if profile == "hardened":
        environment = _hardened(environment)
        read = _Reader(environment)
    for name, what, words in NOT_BUILT:
        if environment.get(name, "").strip().lower() in words:
            raise ConfigError(f"{name} is set, but {what} not built yet; unset it to run without")
    unknown = [*_unknown(read, "CELLOS_CELL_BACKEND", (*BACKENDS, *SETTINGS_ONLY)), *_unknown(read, "CELLOS_BROKER", BROKERS)]
    strict = read.truthy("CELLOS_STRICT_CONFIG")
    if strict:
        refuse_fallbacks(unknown)
    for fallback in unknown:
        raise ConfigError(f"{fallback.variable}: {fallback.reason}")
    chain = [path.strip() for path in environment.get("CELLOS_TRUST_KEYSET_CHAIN_PATH", "").replace("\n", ",").split(",")]
    single = read.text("CELLOS_TRUST_KEYSET_PATH")
    chained = "CELLOS_TRUST_KEYSET_CHAIN_PATH" in environment
    timeout = environment.get("CELLOS_RUN_TIMEOUT_MS")
    return Config(
        environment=dict(environment),
        profile=profile,
        strict=strict,
        backend=environment.get("CELLOS_CELL_BACKEND") or "linux",
        broker=environment.get("CELLOS_BROKER") or "memory",
        caller=read.text("CELLOS_CALLER_IDENTITY") or "default",
        run_id=_run_id(environment.get("CELLOS_RUN_ID", "")),
        run_timeout_ms=None if timeout is None else deadline.parse_run_timeout(timeout),
        argv0_prefixes=_prefixes(environment.get("CELLOS_RUN_ARGV0_ALLOW_PREFIXES", "")),
        allow_unknown_fields=read.truthy("CELLOS_ALLOW_UNKNOWN_FIELDS"),
        namespace=read.text("CELLOS_K8S_NAMESPACE"),
        require_derivation=read.flag("CELLOS_REQUIRE_AUTHORITY_DERIVATION"),
        require_scoped=not read.denied("CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS"),
        require_telemetry=read.flag("CELLOS_REQUIRE_TELEMETRY_DECLARED"),
        authority_keys=read.path("CELLOS_AUTHORITY_KEYS_PATH"),
        policy_pack=read.path("CELLOS_POLICY_PACK_PATH"),
        allow_downgrade=read.truthy("CELLOS_POLICY_ALLOW_DOWNGRADE"),
        authz_policy=read.path("CELLOS_AUTHZ_POLICY_PATH"),
        trust_keys=read.path("CELLOS_TRUST_VERIFY_KEYS_PATH"),
        keyset=tuple(path for path in chain if path) if chained else ((single,) if single else ()),
        keyset_variable="CELLOS_TRUST_KEYSET_CHAIN_PATH" if chained else "CELLOS_TRUST_KEYSET_PATH",
        require_trust_keys=read.truthy("CELLOS_REQUIRE_TRUST_VERIFY_KEYS"),
        labels=Labels(
            keyset_id=environment.get("CELLOS_TRUST_KEYSET_ID", Labels().keyset_id),
            resolver_kid=environment.get("CELLOS_TRUST_RESOLVER_KID", Labels().resolver_kid),
            l7_kid=environment.get("CELLOS_TRUST_L7_KID", Labels().l7_kid),
        ),
        trust_plane=not read.denied("CELLOS_TRUST_PLANE_EVENTS"),
        l7_gate=read.truthy("CELLOS_L7_GATE_OBSERVABILITY"),
        resolve_egress=read.truthy("CELLOS_RESOLVE_EGRESS_DNS"),
        jsonl=read.path("CELL_OS_JSONL_EVENTS"),
        noop_sink=read.flag("CELL_OS_USE_NOOP_SINK"),
        nats_url=read.text("NATS_URL"),
        require_jetstream=read.flag("CELL_OS_REQUIRE_JETSTREAM"),
        redacted_fields=parse_fields(environment.get("CELLOS_REDACT_EVENT_FIELDS", "")),
        dead_letters=read.text("CELLOS_DLQ_DIR"),
        output_dir=read.path("CELLOS_OUTPUT_DIR"),
        output_bytes=_output_bytes(environment.get("CELLOS_OUTPUT_MAX_BYTES")),
        output_events=read.truthy("CELLOS_OUTPUT_EVENTS"),
    )


def read_profile(environment: Mapping[str, str]) -> str | None:
    """CELLOS_DEPLOYMENT_PROFILE, without regard to case and surrounding blanks. Raises ConfigError."""
    given = environment.get("CELLOS_DEPLOYMENT_PROFILE")
    profile = (given or "").strip().lower()
    if profile not in ("", "hardened", "portable"):
        raise ConfigError(f"CELLOS_DEPLOYMENT_PROFILE: unknown profile \"{given}\" — expected 'hardened' or 'portable'")
    return profile or None


def refuse_fallbacks(fallbacks: Sequence[Fallback]) -> None:
    """With strict configuration nothing may be ignored. Raises ConfigError for any."""
    if fallbacks:
        listed = "; ".join(fallback.text for fallback in fallbacks)
        raise ConfigError(
            f"CELLOS_STRICT_CONFIG is set: refusing to start with {len(fallbacks)} ignored/misconfigured env var(s): [{listed}]"
        )


def _hardened(environment: Mapping[str, str]) -> dict[str, str]:
    """What the hardened profile asks for, where the operator did not say otherwise. Raises ConfigError."""
    if "CELLOS_AUTHORITY_KEYS_PATH" not in environment:
        raise ConfigError("CELLOS_DEPLOYMENT_PROFILE=hardened requires CELLOS_AUTHORITY_KEYS_PATH to be set")
    implied = dict.fromkeys(
        (
            "CELL_OS_REQUIRE_JETSTREAM",
            "CELLOS_REQUIRE_AUTHORITY_DERIVATION",
            "CELLOS_REQUIRE_TELEMETRY_DECLARED",
            "CELLOS_STRICT_CONFIG",
        ),
        "1",
    )
    return {**implied, **environment, "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS": "1"}


class _Reader:
    """The few ways in which a variable can be read."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def truthy(self, name: str) -> bool:
        """On by 1, true, yes, on."""
        return self._word(name) in TRUE

    def flag(self, name: str) -> bool:
        """On when it is there, even empty; 0, false, no, off mean what they say."""
        return name in self._environment and self._word(name) not in FALSE

    def denied(self, name: str) -> bool:
        """Off only by 0, false, no, off."""
        return self._word(name) in FALSE

    def text(self, name: str) -> str | None:
        """Trimmed; blank is not set."""
        return self._environment.get(name, "").strip() or None

    def path(self, name: str) -> str | None:
        """A path, absolute. Raises ConfigError for one that is set but blank: whoever sets it wants what it names."""
        value = self._environment.get(name)
        if value is not None and not value.strip():
            raise ConfigError(f"{name} is set, but empty; unset it or give a path")
        return None if value is None else os.path.abspath(value)

    def value(self, name: str) -> str:
        return self._environment.get(name, "")

    def _word(self, name: str) -> str:
        return self._environment.get(name, "").strip().lower()


def _unknown(read: _Reader, name: str, known: Sequence[str]) -> list[Fallback]:
    value = read.value(name)
    if not value or value in known:
        return []
    reason = f"value {value!r} is none of {', '.join(known)}; nothing is fallen back to"
    return [Fallback(variable=name, value=value, reason=reason)]


def _run_id(value: str) -> str | None:
    if len(value) > LONGEST_RUN_ID or not value.isprintable() or any(character.isspace() for character in value):
        raise ConfigError(f"CELLOS_RUN_ID: {value[:40]!r} is not a run id (at most {LONGEST_RUN_ID} printable characters, no blanks)")
    return value or None


def _prefixes(value: str) -> tuple[str, ...]:
    """Without their last slash: `/` is the empty string, which every absolute path begins with."""
    prefixes = [prefix.strip().replace("\\", "/") for prefix in value.split(",") if prefix.strip()]
    for prefix in prefixes:
        if not prefix.startswith("/"):
            raise ConfigError(f"CELLOS_RUN_ARGV0_ALLOW_PREFIXES: {prefix!r} is not an absolute path; no program could be under it")
    return tuple(prefix.rstrip("/") for prefix in prefixes)


def _output_bytes(value: str | None) -> int:
    if value is None:
        return DEFAULT_OUTPUT_BYTES
    digits = value.strip()
    if not (digits.isascii() and digits.isdigit()) or not 0 < len(digits) <= 12:
        raise ConfigError(f"CELLOS_OUTPUT_MAX_BYTES: {value!r} is not a number of bytes; leave it out for {DEFAULT_OUTPUT_BYTES}")
    return int(digits)
