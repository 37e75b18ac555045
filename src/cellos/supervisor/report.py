"""What a run reports beside its course: what was declared, before anything is done, and how the books close, after everything is gone.

Pure: documents and measured values in, drafts out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from cellos.core import observations
from cellos.core.documents import CellSpec
from cellos.core.events import Draft, RunIdentity
from cellos.core.observations import l7_egress_decision
from cellos.ports import Isolation, Security

DNS_PORT = 53
MOST_TARGETS = 24


class Reporting(Struct, frozen=True, kw_only=True):
    """What the operator wants to see, and with which labels. `digest` is the canonical hash of the spec."""

    digest: str
    now: Callable[[], str]
    """RFC 3339."""
    new_id: Callable[[], str]
    limits_declared: bool = False
    """In the document itself, before a policy's maxima."""
    keyset_id: str = ""
    resolver_kid: str = ""
    l7_kid: str = ""
    trust_plane: bool = False
    l7_gate: bool = False
    resolve: Callable[[str, int], Sequence[Mapping[str, Any]]] | None = None
    """Addresses of a host for a port, as `dns_resolution` shows them; None: nobody wants them."""


def declared(run: RunIdentity, spec: CellSpec, reporting: Reporting) -> Iterator[Draft]:
    """What the document asks for: the first events of a run."""
    yield observations.network_scope(run, spec)
    rules = spec.authority.egress_rules or ()
    if reporting.trust_plane:
        labels = {"keysetId": reporting.keyset_id, "issuerKid": reporting.resolver_kid}
        yield observations.dns_target_set(run, digest=reporting.digest, updated_at=reporting.now(), labels=labels)
        for position, rule in enumerate(rules):
            yield _decision(run, reporting, rule.host, "egress_declared_allowlist", f"authority.egressRules[{position}]")
            if reporting.resolve is not None:
                targets = reporting.resolve(rule.host, rule.port)[:MOST_TARGETS]
                yield observations.dns_resolution(
                    run, fqdn=rule.host, resolved_at=reporting.now(), targets=targets, digest=reporting.digest, labels=labels
                )
    dns = spec.authority.dns_authority
    if reporting.l7_gate and dns is not None:
        for position, name in enumerate(dns.hostname_allowlist):
            yield _decision(run, reporting, name, "hostname_allowlist_evaluated", f"authority.dnsAuthority.hostnameAllowlist[{position}]")
        if dns.block_direct_workload_dns:
            resolvers = {resolver.endpoint for resolver in dns.resolvers if resolver.protocol in ("do53-udp", "do53-tcp")}
            for position, rule in enumerate(rules):
                if rule.port == DNS_PORT and not resolvers & {rule.host, f"{rule.host}:{rule.port}"}:
                    place = f"authority.egressRules[{position}]"
                    yield _decision(run, reporting, rule.host, "workload_direct_dns_blocked", place, allowed=False)


def container_security(run: RunIdentity, security: Security) -> Draft:
    """What was measured in the cell."""
    return observations.container_security(
        run,
        capabilities={
            "capEff": security.cap_eff,
            "capPrm": security.cap_prm,
            "capBnd": security.cap_bnd,
            "capAmb": security.cap_amb,
            "capInh": security.cap_inh,
        },
        privileged=security.privileged,
        no_new_privs=security.no_new_privs,
        seccomp_mode=security.seccomp_mode,
    )


def closing(
    run: RunIdentity, spec: CellSpec, reporting: Reporting, *, isolation: Isolation, exit_code: int | None, fetched: frozenset[str] | None
) -> Iterator[Draft]:
    """The summary, and what was used of the declared authority."""
    yield observations.compliance_summary(run, spec, limits_declared=reporting.limits_declared, exit_code=exit_code)
    # A network of its own without a way out: that nothing left is not counted, it is how the cell was made.
    connections = 0 if isolation.own_network and not spec.authority.egress_rules else None
    yield observations.homeostasis(run, spec, digest=reporting.digest, connections=connections, fetched_secrets=fetched)


def _decision(run: RunIdentity, reporting: Reporting, host: str, reason: str, rule: str, *, allowed: bool = True) -> Draft:
    return l7_egress_decision(
        run,
        decision_id=reporting.new_id(),
        allowed=allowed,
        host=host,
        reason_code=reason,
        rule=rule,
        digest=reporting.digest,
        labels={"keysetId": reporting.keyset_id, "issuerKid": reporting.l7_kid},
    )
