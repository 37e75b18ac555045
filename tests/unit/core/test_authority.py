from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.authority import Excess, MountSet, NameSet, capability_excess, capability_of, egress_key, narrowing_excess
from cellos.core.documents import Authority, Capability, CellSpec, CpuMax, EgressRule, Limits, Mount

DEFAULTS = Limits(memory_max_bytes=512, cpu_max=CpuMax(quota_micros=100_000, period_micros=100_000), graceful_shutdown_seconds=5)


def spec(*, ttl: int = 60, limits: dict[str, Any] | None = None, **authority: Any) -> CellSpec:
    value: dict[str, Any] = {"id": "a", "authority": authority, "lifetime": {"ttlSeconds": ttl}}
    if limits is not None:
        value["run"] = {"argv": ["x"], "limits": limits}
    return msgspec.convert(value, CellSpec)


def capability(*rules: EgressRule, refs: tuple[str, ...] = ()) -> Capability:
    return Capability(egress_rules=rules, secret_refs=refs)


def egress(host: str, port: int = 443, protocol: str | None = None, why: str | None = None) -> EgressRule:
    return EgressRule(host=host, port=port, protocol=protocol, dns_egress_justification=why)


@pytest.mark.parametrize(
    ("child", "parent", "excess"),
    [
        (capability(), capability(), None),
        (capability(egress("API.example")), capability(egress("api.EXAMPLE")), None),
        (capability(egress("a", why="x")), capability(egress("a", why="y")), None),
        (capability(egress("a"), egress("a")), capability(egress("a")), None),
        (capability(egress("a"), egress("b")), capability(egress("a")), Excess("egressRules", "b:443")),
        (capability(egress("a", 80)), capability(egress("a")), Excess("egressRules", "a:80")),
        (capability(egress("a", protocol="tls")), capability(egress("a")), Excess("egressRules", "a:443/tls")),
        (capability(egress("a")), capability(egress("a", protocol="tcp")), Excess("egressRules", "a:443")),
        (capability(egress("a", protocol="TLS")), capability(egress("a", protocol="tls")), Excess("egressRules", "a:443/TLS")),
        # No wildcards, and only ASCII letters have a case: this K is a Kelvin sign.
        (capability(egress("a.b")), capability(egress("*.b")), Excess("egressRules", "a.b:443")),
        (capability(egress("\u212a")), capability(egress("k")), Excess("egressRules", "\u212a:443")),
        (capability(refs=("A", "A")), capability(refs=("B", "A")), None),
        (capability(refs=("A", "a")), capability(refs=("A",)), Excess("secretRefs", "a")),
        (capability(egress("a"), refs=("A",)), capability(), Excess("egressRules", "a:443")),
    ],
)
def test_capabilities_are_sets_of_rules_and_secrets(child: Capability, parent: Capability, excess: Excess | None) -> None:
    assert capability_excess(child, parent) == excess


def test_absent_lists_are_empty() -> None:
    assert capability_of(Authority()) == Capability()


@pytest.mark.parametrize(
    ("allowlist", "entry", "covered"),
    [
        (["a.example"], "A.Example", True),
        (["a.example"], "b.a.example", False),
        (["*.example"], "a.example", True),
        (["*.example"], "b.a.example", True),
        (["*.example"], "*.example", True),
        (["*.Example"], "*.a.example", True),
        (["*.example"], "example", False),
        (["*.a.example"], "*.example", False),
        (["*.a.example"], "evil-a.example", False),
        (["a.example"], "*.example", False),
        ([], "a.example", False),
    ],
)
def test_names(allowlist: list[str], entry: str, covered: bool) -> None:
    assert NameSet(allowlist).covers(entry) is covered


@pytest.mark.parametrize(
    ("mounts", "source", "mode", "covered"),
    [
        ({"/a": "ro"}, "/a", "ro", True),
        ({"/a": "ro"}, "/a/b/c", "ro", True),
        ({"/a": "ro"}, "/ab", "ro", False),
        ({"/a": "ro"}, "/a", "rw", False),
        ({"/a": "rw"}, "/a/b", "rw", True),
        ({"/a": "rw"}, "/a/b", "ro", True),
        ({"/a/b": "rw"}, "/a", "ro", False),
        ({"/a": "rw", "/a/b": "ro"}, "/a/b", "rw", True),
        ({"/a": "ro", "/a/b": "rw"}, "/a/b/c", "rw", True),
        ({}, "/a", "ro", False),
    ],
)
def test_mounts(mounts: dict[str, Any], source: str, mode: Any, covered: bool) -> None:
    held = MountSet([Mount(source=path, mode=how) for path, how in mounts.items()])
    assert held.covers(Mount(source=source, target="/elsewhere", mode=mode)) is covered


def test_a_source_mounted_twice_has_the_wider_mode() -> None:
    for order in (("ro", "rw"), ("rw", "ro")):
        held = MountSet([Mount(source="/a", target=f"/{mode}", mode=mode) for mode in order])  # type: ignore[arg-type]
        assert held.covers(Mount(source="/a", mode="rw"))


@pytest.mark.parametrize(
    ("child", "parent", "excess"),
    [
        (spec(), spec(), None),
        (spec(egressRules=[]), spec(), None),
        (spec(egressRules=[{"host": "a", "port": 1}]), spec(), Excess("spec.authority.egressRules", "a:1")),
        (spec(secretRefs=["S"]), spec(secretRefs=["s"]), Excess("spec.authority.secretRefs", "S")),
        (
            spec(dnsAuthority={"hostnameAllowlist": ["a.example", "b.example"]}),
            spec(dnsAuthority={"hostnameAllowlist": ["a.example"]}),
            Excess("spec.authority.dnsAuthority.hostnameAllowlist", "b.example"),
        ),
        (
            spec(filesystem={"mounts": [{"source": "/a/b", "mode": "rw"}]}),
            spec(filesystem={"mounts": [{"source": "/a"}]}),
            Excess("spec.authority.filesystem.mounts", "/a/b (rw)"),
        ),
        (spec(filesystem={"mounts": [{"source": "/a"}]}), spec(), Excess("spec.authority.filesystem.mounts", "/a (ro)")),
        (spec(limits={"memoryMaxBytes": 100}), spec(limits={"memoryMaxBytes": 100}), None),
        (
            spec(limits={"memoryMaxBytes": 101}),
            spec(limits={"memoryMaxBytes": 100}),
            Excess("spec.run.limits.memoryMaxBytes", "101"),
        ),
        # An absent limit is the platform's default, on either side.
        (spec(), spec(limits={"memoryMaxBytes": 511}), Excess("spec.run.limits.memoryMaxBytes", "512")),
        (spec(limits={"memoryMaxBytes": 513}), spec(), Excess("spec.run.limits.memoryMaxBytes", "513")),
        (spec(), spec(limits={"memoryMaxBytes": 512}), None),
        (
            spec(limits={"cpuMax": {"quotaMicros": 50, "periodMicros": 100}}),
            spec(limits={"cpuMax": {"quotaMicros": 500, "periodMicros": 1000}}),
            None,
        ),
        (
            spec(limits={"cpuMax": {"quotaMicros": 51, "periodMicros": 100}}),
            spec(limits={"cpuMax": {"quotaMicros": 500, "periodMicros": 1000}}),
            Excess("spec.run.limits.cpuMax", "51/100"),
        ),
        (spec(limits={"cpuMax": {"quotaMicros": 100_001}}), spec(), Excess("spec.run.limits.cpuMax", "100001/100000")),
        (
            spec(limits={"gracefulShutdownSeconds": 6}),
            spec(limits={}),
            Excess("spec.run.limits.gracefulShutdownSeconds", "6"),
        ),
        (spec(limits={"gracefulShutdownSeconds": 0}), spec(limits={"gracefulShutdownSeconds": 0}), None),
        (spec(ttl=60), spec(ttl=60), None),
        (spec(ttl=61), spec(ttl=60), Excess("spec.lifetime.ttlSeconds", "61")),
    ],
)
def test_narrowing_names_the_first_excess(child: CellSpec, parent: CellSpec, excess: Excess | None) -> None:
    assert narrowing_excess(child, parent, defaults=DEFAULTS) == excess


def test_without_a_default_an_absent_limit_is_no_limit() -> None:
    child, parent = spec(), spec(limits={"memoryMaxBytes": 2**60})
    assert narrowing_excess(child, parent, defaults=Limits()) == Excess("spec.run.limits.memoryMaxBytes", "unlimited")
    assert narrowing_excess(parent, child, defaults=Limits()) is None
    busy = spec(limits={"cpuMax": {"quotaMicros": 1}})
    assert narrowing_excess(child, busy, defaults=Limits()) == Excess("spec.run.limits.cpuMax", "unlimited")


SMALL = {"max_size": 3}
RULES = st.builds(EgressRule, host=st.sampled_from(["a", "A", "b"]), port=st.sampled_from([1, 2]), protocol=st.sampled_from([None, "tls"]))
CAPABILITIES = st.builds(
    Capability, egress_rules=st.lists(RULES, **SMALL).map(tuple), secret_refs=st.lists(st.sampled_from("XYZ"), **SMALL).map(tuple)
)
NUMBERS = st.none() | st.integers(0, 3)
CPU = st.none() | st.fixed_dictionaries({"quotaMicros": st.integers(1, 4), "periodMicros": st.integers(1, 3)})
SPECS = st.builds(
    spec,
    ttl=st.integers(0, 2),
    limits=st.none() | st.fixed_dictionaries({"memoryMaxBytes": NUMBERS, "cpuMax": CPU, "gracefulShutdownSeconds": NUMBERS}),
    secretRefs=st.none() | st.lists(st.sampled_from("XY"), **SMALL),
    dnsAuthority=st.none()
    | st.fixed_dictionaries({"hostnameAllowlist": st.lists(st.sampled_from(["a.b.c", "*.b.c", "*.c", "A.b.c", "x.c"]), **SMALL)}),
    filesystem=st.none()
    | st.fixed_dictionaries(
        {
            "mounts": st.lists(
                st.fixed_dictionaries({"source": st.sampled_from(["/a", "/a/b", "/a/b/c"]), "mode": st.sampled_from(["ro", "rw"])}), **SMALL
            )
        }
    ),
)


def below(child: CellSpec, parent: CellSpec) -> bool:
    return narrowing_excess(child, parent, defaults=DEFAULTS) is None


@given(SPECS)
def test_nothing_exceeds_itself(one: CellSpec) -> None:
    assert below(one, one)


@given(SPECS, SPECS, SPECS)
def test_a_grandchild_does_not_exceed(one: CellSpec, two: CellSpec, three: CellSpec) -> None:
    if below(one, two) and below(two, three):
        assert below(one, three)


@given(CAPABILITIES, CAPABILITIES, CAPABILITIES)
def test_capabilities_are_ordered(one: Capability, two: Capability, three: Capability) -> None:
    assert capability_excess(one, one) is None
    assert capability_excess(Capability(), one) is None
    if capability_excess(one, two) is None and capability_excess(two, three) is None:
        assert capability_excess(one, three) is None
    if capability_excess(one, two) is None and capability_excess(two, one) is None:
        assert {egress_key(rule) for rule in one.egress_rules} == {egress_key(rule) for rule in two.egress_rules}
        assert set(one.secret_refs) == set(two.secret_refs)


@given(CAPABILITIES, CAPABILITIES)
def test_an_excess_is_really_beyond(child: Capability, parent: Capability) -> None:
    excess = capability_excess(child, parent)
    keys = {egress_key(rule) for rule in parent.egress_rules}
    outside = [rule for rule in child.egress_rules if egress_key(rule) not in keys] + list(set(child.secret_refs) - set(parent.secret_refs))
    assert (excess is None) == (not outside)


LABELS = st.sampled_from(["a", "b", "c", "A"])
HOSTS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
ENTRIES = HOSTS | HOSTS.map(lambda host: f"*.{host}")


def admits(entry: str, host: str) -> bool:
    """The matching of hosts, written down a second time."""
    entry, host = entry.lower(), host.lower()
    return host.endswith(entry[1:]) and len(host) > len(entry) - 1 if entry.startswith("*.") else host == entry


@given(st.lists(ENTRIES, **SMALL), ENTRIES, HOSTS)
def test_a_covered_entry_matches_no_other_hosts(allowlist: list[str], entry: str, host: str) -> None:
    if NameSet(allowlist).covers(entry) and admits(entry, host):
        assert any(admits(allowed, host) for allowed in allowlist)
