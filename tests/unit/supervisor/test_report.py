from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from msgspec.structs import replace

from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.core.events import Draft, RunIdentity
from cellos.ports import Isolation, Security
from cellos.supervisor.report import MOST_TARGETS, Reporting, closing, container_security, declared

RUN = RunIdentity(cell_id="cell-1", spec_id="cell-1", run_id="run-1", spec_hash="0" * 64)
SCOPE, TARGETS, DECISION, RESOLUTION = "network_scope", "dns_target_set", "l7_egress_decision", "dns_resolution"
RULES = [{"host": host, "port": 443, "protocol": "tls"} for host in ("a.example", "b.example")]
RESOLVER = {"resolverId": "r", "endpoint": "192.0.2.53:53", "protocol": "do53-udp"}


def spec(**authority: Any) -> CellSpec:
    body = {"id": "cell-1", "authority": authority, "lifetime": {"ttlSeconds": 60}}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


def reporting(**wanted: Any) -> Reporting:
    numbers = itertools.count(1)
    return Reporting(
        digest="sha256:d",
        now=lambda: "2026-01-01T00:00:00Z",
        new_id=lambda: f"id-{next(numbers)}",
        keyset_id="set",
        resolver_kid="names",
        l7_kid="decisions",
        **wanted,
    )


def reported(of: CellSpec, **wanted: Any) -> list[Draft]:
    return list(declared(RUN, of, reporting(**wanted)))


def kinds(drafts: list[Draft]) -> list[str]:
    return [draft.type.rpartition(".")[2] for draft in drafts]


def of_kind(drafts: list[Draft], kind: str) -> list[dict[str, Any]]:
    return [draft.data for draft in drafts if draft.type.endswith(kind)]


class TestDeclared:
    def test_the_scope_is_always_told(self) -> None:
        assert kinds(reported(spec(egressRules=RULES))) == [SCOPE]

    def test_with_the_trust_plane_every_destination(self) -> None:
        drafts = reported(spec(egressRules=RULES), trust_plane=True)
        assert kinds(drafts) == [SCOPE, TARGETS, DECISION, DECISION]
        [targets] = of_kind(drafts, TARGETS)
        assert targets["fqdn"] == "declared-egress.trust.cellos.internal"
        assert (targets["previousDigest"], targets["currentDigest"], targets["reason"]) == ("empty", "sha256:d", "refresh")
        assert (targets["keysetId"], targets["issuerKid"], targets["updatedAt"]) == ("set", "names", "2026-01-01T00:00:00Z")
        assert [(each["sniHost"], each["ruleRef"], each["decisionId"]) for each in of_kind(drafts, DECISION)] == [
            ("a.example", "authority.egressRules[0]", "id-1"),
            ("b.example", "authority.egressRules[1]", "id-2"),
        ]
        for each in of_kind(drafts, DECISION):
            assert (each["action"], each["reasonCode"]) == ("allow", "egress_declared_allowlist")
            assert (each["keysetId"], each["issuerKid"], each["policyDigest"]) == ("set", "decisions", "sha256:d")

    def test_addresses_follow_their_destination(self) -> None:
        asked: list[tuple[str, int]] = []

        def resolve(host: str, port: int) -> list[dict[str, Any]]:
            asked.append((host, port))
            return [{"address": "192.0.2.1", "family": "inet", "port": port}] if host == "a.example" else []

        drafts = reported(spec(egressRules=RULES), trust_plane=True, resolve=resolve)
        assert kinds(drafts) == [SCOPE, TARGETS, DECISION, RESOLUTION, DECISION, RESOLUTION]
        first, second = of_kind(drafts, RESOLUTION)
        assert asked == [("a.example", 443), ("b.example", 443)]
        assert (first["fqdn"], first["receiptId"], first["resolvedAt"]) == ("a.example", "rcp-run-1-a.example", "2026-01-01T00:00:00Z")
        assert first["targets"] == [{"address": "192.0.2.1", "family": "inet", "port": 443}]
        assert second["targets"] == []
        assert (first["keysetId"], first["issuerKid"], first["policyDigest"]) == ("set", "names", "sha256:d")

    def test_a_host_of_many_addresses_is_cut(self) -> None:
        targets = [{"address": f"192.0.2.{number}", "family": "inet"} for number in range(100)]
        [told] = of_kind(reported(spec(egressRules=RULES[:1]), trust_plane=True, resolve=lambda *_: targets), RESOLUTION)
        assert told["targets"] == targets[:MOST_TARGETS]
        assert MOST_TARGETS == 24

    def test_names_are_told_by_the_gate(self) -> None:
        of = spec(dnsAuthority={"hostnameAllowlist": ["a.example", "*.b.example"]})
        assert kinds(reported(of, trust_plane=True)) == [SCOPE, TARGETS], "it is off by default"
        drafts = reported(of, l7_gate=True)
        assert kinds(drafts) == [SCOPE, DECISION, DECISION]
        assert [(each["sniHost"], each["ruleRef"], each["action"], each["reasonCode"]) for each in of_kind(drafts, DECISION)] == [
            ("a.example", "authority.dnsAuthority.hostnameAllowlist[0]", "allow", "hostname_allowlist_evaluated"),
            ("*.b.example", "authority.dnsAuthority.hostnameAllowlist[1]", "allow", "hostname_allowlist_evaluated"),
        ]

    @pytest.mark.parametrize(
        ("rule", "resolver", "blocked"),
        [
            ({"host": "198.51.100.1", "port": 53}, RESOLVER, True),
            ({"host": "192.0.2.53", "port": 53}, RESOLVER, False),
            ({"host": "192.0.2.53", "port": 53}, {**RESOLVER, "endpoint": "192.0.2.53", "protocol": "do53-tcp"}, False),
            ({"host": "192.0.2.53", "port": 53}, {**RESOLVER, "endpoint": "192.0.2.53:5353"}, True),
            ({"host": "192.0.2.53", "port": 53}, {**RESOLVER, "protocol": "dot"}, True),
            ({"host": "198.51.100.1", "port": 5353}, RESOLVER, False),
        ],
    )
    def test_dns_past_the_declared_resolvers_is_told_as_denied(self, rule: dict[str, Any], resolver: dict[str, Any], blocked: bool) -> None:
        rules = [{"host": "a.example", "port": 443}, rule]
        dns = {"resolvers": [resolver], "blockDirectWorkloadDns": True}
        [*denied] = of_kind(reported(spec(egressRules=rules, dnsAuthority=dns), l7_gate=True), DECISION)
        assert [(each["action"], each["reasonCode"], each["sniHost"], each["ruleRef"]) for each in denied] == (
            [("deny", "workload_direct_dns_blocked", rule["host"], "authority.egressRules[1]")] if blocked else []
        )

    def test_where_nothing_is_blocked_nothing_is_denied(self) -> None:
        of = spec(egressRules=[{"host": "198.51.100.1", "port": 53}], dnsAuthority={"resolvers": [RESOLVER]})
        assert kinds(reported(of, l7_gate=True)) == [SCOPE]


MEASURED = Security(
    cap_eff="a" * 16,
    cap_prm="b" * 16,
    cap_bnd="c" * 16,
    cap_amb="d" * 16,
    cap_inh="e" * 16,
    privileged=False,
    no_new_privs=True,
    seccomp_mode=2,
)


def test_security_is_what_was_measured() -> None:
    data = container_security(RUN, MEASURED).data
    assert data == {
        "cellId": "cell-1",
        "runId": "run-1",
        "capEff": "a" * 16,
        "capPrm": "b" * 16,
        "capBnd": "c" * 16,
        "capAmb": "d" * 16,
        "capInh": "e" * 16,
        "privileged": False,
        "noNewPrivs": True,
        "seccompMode": 2,
    }
    other = container_security(RUN, replace(MEASURED, cap_eff="f" * 16, privileged=True, no_new_privs=False, seccomp_mode=0)).data
    assert (other["capEff"], other["privileged"], other["noNewPrivs"], other["seccompMode"]) == ("f" * 16, True, False, 0)


def books(of: CellSpec, *, own_network: bool, fetched: frozenset[str] | None = None) -> dict[str, Any]:
    isolation = Isolation(backend="fake", own_network=own_network)
    summary, homeostasis = closing(RUN, of, reporting(), isolation=isolation, exit_code=3, fetched=fetched)
    assert summary.data["commandExitCode"] == 3
    return homeostasis.data


class TestClosing:
    def test_the_summary_comes_first(self) -> None:
        drafts = list(closing(RUN, spec(), reporting(), isolation=Isolation(backend="fake"), exit_code=None, fetched=None))
        assert kinds(drafts) == ["summary", "homeostasis"]

    def test_a_network_without_a_way_out_has_no_connections(self) -> None:
        assert books(spec(), own_network=True)["exercisedEgressConnections"] == 0

    @pytest.mark.parametrize(("rules", "own_network"), [([], False), (RULES, True), (RULES, False)])
    def test_elsewhere_nobody_counts(self, rules: list[dict[str, Any]], own_network: bool) -> None:
        told = books(spec(egressRules=rules), own_network=own_network)
        assert (told["exercisedEgressConnections"], told["exercisedEgressReason"]) == (None, "telemetry_pending_L2-04")

    def test_secrets_that_nobody_asked_for(self) -> None:
        told = books(spec(secretRefs=["A", "B"]), own_network=True, fetched=frozenset({"B"}))
        assert (told["exercisedSecretCount"], told["recommendedRemovals"]) == (1, [{"kind": "secretRef", "name": "A"}])
