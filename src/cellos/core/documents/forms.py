"""Two JSON forms of a document or a part of it: canonical, the bytes of which are hashed, and compact, for people."""

from __future__ import annotations

from msgspec import Struct

from cellos.core.documents import execution_cell as cell

# Members that the canonical form leaves out when they have their default value. All others are written, absent ones as null: CellOS 0.5
# hashes what its serialiser happens to write, and a digest is only worth something when everybody computes the same.
_LEFT_OUT: dict[type[Struct], frozenset[str]] = {
    cell.CellSpec: frozenset({"placement", "telemetry"}),
    cell.Correlation: frozenset({"tenant_id", "correlation_id"}),
    cell.Placement: frozenset(cell.Placement.__struct_fields__),
    cell.Limits: frozenset({"graceful_shutdown_seconds"}),
    cell.EgressRule: frozenset({"dns_egress_justification"}),
    cell.Authority: frozenset({"dns_authority", "cdn_authority"}),
    cell.DnsAuthority: frozenset(cell.DnsAuthority.__struct_fields__),
    cell.Resolver: frozenset({"trust_kid", "dnssec"}),
    cell.Dnssec: frozenset({"trust_anchors_path"}),
    cell.RefreshPolicy: frozenset(cell.RefreshPolicy.__struct_fields__),
    cell.RebindingPolicy: frozenset({"response_ip_allowlist"}),
    cell.CdnAuthority: frozenset({"providers"}),
    cell.Telemetry: frozenset({"rate_limits", "host_vs_guest_fields"}),
    cell.RateLimits: frozenset(cell.RateLimits.__struct_fields__),
    cell.HostVsGuestFields: frozenset(cell.HostVsGuestFields.__struct_fields__),
}


def canonical_form(part: cell.Wire) -> dict[str, object]:
    """Members in the order of the structs, map keys sorted, defaults written out, absent members null save for a fixed few."""
    left_out = _LEFT_OUT.get(type(part), frozenset())
    config = part.__struct_config__
    form: dict[str, object] = {config.tag_field: config.tag} if config.tag_field else {}
    for name, wire_name in zip(part.__struct_fields__, part.__struct_encode_fields__, strict=True):
        value = getattr(part, name)
        if name in left_out and (value is None or value is False or value == ()):
            continue
        form[wire_name] = _canonical(value)
    return form


def _canonical(value: object) -> object:
    match value:
        case cell.Wire():
            return canonical_form(value)
        case tuple() | list():
            return [_canonical(item) for item in value]
        case dict():
            return {name: _canonical(value[name]) for name in sorted(value)}
        case _:
            return value


def compact_form(part: cell.Wire) -> dict[str, object]:
    """What somebody would write: members in the order of the structs, without those that are absent or have their default value."""
    config = part.__struct_config__
    form: dict[str, object] = {config.tag_field: config.tag} if config.tag_field else {}
    defaults = dict(zip(reversed(part.__struct_fields__), reversed(part.__struct_defaults__), strict=False))
    for name, wire_name in zip(part.__struct_fields__, part.__struct_encode_fields__, strict=True):
        value = getattr(part, name)
        if value is None or (name in defaults and value == defaults[name]):
            continue
        form[wire_name] = _compact(value)
    if isinstance(part, cell.Mount) and part.target == part.source:
        del form["target"]
    return form


def _compact(value: object) -> object:
    match value:
        case cell.Wire():
            return compact_form(value)
        case tuple() | list():
            return [_compact(item) for item in value]
        case _:
            return value
