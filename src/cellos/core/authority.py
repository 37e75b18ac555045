"""Authority as sets, and narrowing: whether a child asks for nothing that its parent does not have.

An answer is the first `Excess`, naming member and value, or None. Everything here is a pure comparison of what documents declare:
links of the host's file system, for instance, are not followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cellos.core.documents.execution_cell import Authority, Capability, CellSpec, CpuMax, EgressRule, Limits, Mount
from cellos.core.documents.identifiers import ascii_lower

DEFAULT_CPU_PERIOD_MICROS = 100_000
"""The kernel's period where `cpuMax` states none."""


class Excess(NamedTuple):
    """What a child has beyond its parent: the path of the member, and the value as text (a rule, a name, a number)."""

    field: str
    value: str


class EgressKey(NamedTuple):
    """What makes two egress rules the same: the justification does not, nor does ASCII case in the host. No wildcards, no ranges."""

    host: str
    port: int
    protocol: str | None


def egress_key(rule: EgressRule) -> EgressKey:
    return EgressKey(ascii_lower(rule.host), rule.port, rule.protocol)


def capability_of(authority: Authority) -> Capability:
    """The part of an authority that derivation tokens speak of. Absent lists are empty."""
    return Capability(egress_rules=authority.egress_rules or (), secret_refs=authority.secret_refs or ())


def capability_excess(child: Capability, parent: Capability) -> Excess | None:
    """The first egress rule, then the first secret, of `child` that `parent` lacks; fields as in Capability."""
    reachable = {egress_key(rule) for rule in parent.egress_rules}
    for rule in child.egress_rules:
        if egress_key(rule) not in reachable:
            return Excess("egressRules", _egress_text(rule))
    granted = frozenset(parent.secret_refs)
    return next((Excess("secretRefs", ref) for ref in child.secret_refs if ref not in granted), None)


def narrowing_excess(child: CellSpec, parent: CellSpec, *, defaults: Limits) -> Excess | None:
    """The first thing that `child` may do or use and `parent` may not; None where its authority is a subset.

    `defaults` are the platform's limits, which stand for absent ones on both sides; one that is absent there too is no limit at all.
    """
    return next(_excesses(child, parent, defaults), None)


def _excesses(child: CellSpec, parent: CellSpec, defaults: Limits) -> Iterator[Excess]:
    if excess := capability_excess(capability_of(child.authority), capability_of(parent.authority)):
        yield excess._replace(field=f"spec.authority.{excess.field}")
    names = NameSet(_names(parent))
    for name in _names(child):
        if not names.covers(name):
            yield Excess("spec.authority.dnsAuthority.hostnameAllowlist", name)
    mounts = MountSet(_mounts(parent))
    for mount in _mounts(child):
        if not mounts.covers(mount):
            yield Excess("spec.authority.filesystem.mounts", f"{mount.source} ({mount.mode})")
    yield from _limit_excesses(_limits(child, defaults), _limits(parent, defaults))
    if child.lifetime.ttl_seconds > parent.lifetime.ttl_seconds:
        yield Excess("spec.lifetime.ttlSeconds", str(child.lifetime.ttl_seconds))


class NameSet:
    """The hosts that an allow-list matches. `*.x` matches one or more labels before `x`, never `x` itself."""

    def __init__(self, allowlist: Iterable[str]) -> None:
        self._entries = frozenset(map(ascii_lower, allowlist))

    def covers(self, entry: str) -> bool:
        """Whether every host that `entry`, a name or a wildcard, matches is in the set: `*.x` covers `a.x` and `*.a.x`."""
        wanted = ascii_lower(entry)
        if wanted in self._entries:
            return True
        while wanted := wanted.partition(".")[2]:
            if f"*.{wanted}" in self._entries:
                return True
        return False


class MountSet:
    """The files of the host that mounts give access to, and in which mode. Where they appear in the cell does not matter."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._writable: dict[str, bool] = {}
        for mount in mounts:
            self._writable[mount.source] = mount.mode == "rw" or self._writable.get(mount.source, False)

    def covers(self, mount: Mount) -> bool:
        """Whether the same source or one above it is there in a mode that is no narrower."""
        source = mount.source
        while source:
            if (writable := self._writable.get(source)) is not None and (writable or mount.mode == "ro"):
                return True
            source = source.rpartition("/")[0]
        return False


def _limit_excesses(child: Limits, parent: Limits) -> Iterator[Excess]:
    if _exceeds(child.memory_max_bytes, parent.memory_max_bytes):
        yield Excess("spec.run.limits.memoryMaxBytes", _limit_text(child.memory_max_bytes))
    if _cpu_exceeds(child.cpu_max, parent.cpu_max):
        yield Excess("spec.run.limits.cpuMax", _cpu_text(child.cpu_max))
    if _exceeds(child.graceful_shutdown_seconds, parent.graceful_shutdown_seconds):
        yield Excess("spec.run.limits.gracefulShutdownSeconds", _limit_text(child.graceful_shutdown_seconds))


def _exceeds(child: int | None, parent: int | None) -> bool:
    return parent is not None and (child is None or child > parent)


def _cpu_exceeds(child: CpuMax | None, parent: CpuMax | None) -> bool:
    if child is None or parent is None:
        return child is None and parent is not None
    # Shares of a processor as fractions, compared crosswise: no rounding.
    return child.quota_micros * _period(parent) > parent.quota_micros * _period(child)


def _period(cpu: CpuMax) -> int:
    return cpu.period_micros or DEFAULT_CPU_PERIOD_MICROS


def _limits(spec: CellSpec, defaults: Limits) -> Limits:
    declared = (spec.run and spec.run.limits) or Limits()
    return Limits(
        memory_max_bytes=defaults.memory_max_bytes if declared.memory_max_bytes is None else declared.memory_max_bytes,
        cpu_max=declared.cpu_max or defaults.cpu_max,
        graceful_shutdown_seconds=(
            defaults.graceful_shutdown_seconds if declared.graceful_shutdown_seconds is None else declared.graceful_shutdown_seconds
        ),
    )


def _names(spec: CellSpec) -> tuple[str, ...]:
    return spec.authority.dns_authority.hostname_allowlist if spec.authority.dns_authority else ()


def _mounts(spec: CellSpec) -> tuple[Mount, ...]:
    return spec.authority.filesystem.mounts if spec.authority.filesystem else ()


def _egress_text(rule: EgressRule) -> str:
    return f"{rule.host}:{rule.port}" + (f"/{rule.protocol}" if rule.protocol is not None else "")


def _limit_text(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


def _cpu_text(cpu: CpuMax | None) -> str:
    return "unlimited" if cpu is None else f"{cpu.quota_micros}/{_period(cpu)}"
