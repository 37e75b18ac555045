import json
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.backends import linux
from cellos.core.documents import CpuMax, Limits
from cellos.core.formation import PLATFORM_LIMITS, Formation, parse_formation
from cellos.errors import FormationRejected
from cellos.sandbox import cgroups

Spec = dict[str, Any]


def spec(ttl: int = 60, limits: dict[str, Any] | None = None, **authority: Any) -> Spec:
    return {"run": {"argv": ["x"], "limits": limits or {}}, "authority": authority, "lifetime": {"ttlSeconds": ttl}}


def formation(specs: list[Spec], parents: list[int], **options: Any) -> Formation:
    """Member 0 is the coordinator; `parents` are those of the members after it."""
    members = [{"id": "m0", "spec": specs[0]}]
    members += [{"id": f"m{at}", "authorizedBy": f"m{parents[at - 1]}", "spec": specs[at]} for at in range(1, len(specs))]
    return parse_formation(json.dumps({"name": "demo", "coordinator": "m0", "members": members}).encode(), **options)


@pytest.mark.parametrize(
    ("parent", "child", "excess"),
    [
        (spec(), spec(egressRules=[{"host": "h", "port": 1}]), "spec.authority.egressRules 'h:1'"),
        (spec(secretRefs=["A"]), spec(secretRefs=["A", "B"]), "spec.authority.secretRefs 'B'"),
        (
            spec(dnsAuthority={"hostnameAllowlist": ["*.a.example"]}),
            spec(dnsAuthority={"hostnameAllowlist": ["x.a.example", "a.example"]}),
            "spec.authority.dnsAuthority.hostnameAllowlist 'a.example'",
        ),
        (
            spec(filesystem={"mounts": [{"source": "/srv"}]}),
            spec(filesystem={"mounts": [{"source": "/srv/x", "mode": "rw"}]}),
            "spec.authority.filesystem.mounts '/srv/x (rw)'",
        ),
        (spec(limits={"memoryMaxBytes": 7}), spec(limits={"memoryMaxBytes": 8}), "spec.run.limits.memoryMaxBytes '8'"),
        (spec(limits={"memoryMaxBytes": 7}), spec(), "spec.run.limits.memoryMaxBytes '536870912'"),
        (spec(), spec(limits={"memoryMaxBytes": 2**30}), "spec.run.limits.memoryMaxBytes '1073741824'"),
        (spec(), spec(limits={"cpuMax": {"quotaMicros": 200_000}}), "spec.run.limits.cpuMax '200000/100000'"),
        (spec(), spec(limits={"gracefulShutdownSeconds": 1}), "spec.run.limits.gracefulShutdownSeconds '1'"),
        (spec(60), spec(61), "spec.lifetime.ttlSeconds '61'"),
    ],
)
def test_member_field_and_value_are_named(parent: Spec, child: Spec, excess: str) -> None:
    with pytest.raises(FormationRejected) as caught:
        formation([parent, child], [0])
    assert (caught.value.problem.type, caught.value.problem.status) == ("/problems/formation/authority-not-narrowing", 400)
    assert caught.value.text == f"member 'm1' exceeds its parent 'm0': {excess} is not within the parent's"


def test_it_is_the_parent_that_counts() -> None:
    wide, narrow = spec(secretRefs=["A"]), spec()
    formation([wide, wide, wide], [0, 1])
    formation([wide, narrow, wide], [0, 0])
    with pytest.raises(FormationRejected, match="member 'm2' exceeds its parent 'm1': "):
        formation([wide, narrow, wide], [0, 1])


def test_defaults_are_the_operators() -> None:
    specs = [spec(), spec(limits={"memoryMaxBytes": 2**30})]
    formation(specs, [0], defaults=Limits(memory_max_bytes=2**30))
    with pytest.raises(FormationRejected, match="memoryMaxBytes"):
        formation(specs, [0], defaults=Limits(memory_max_bytes=2**30 - 1))


def test_the_platforms_limits_are_those_of_a_cell() -> None:
    period = cgroups.DEFAULT_PERIOD_MICROS
    quota = linux.DEFAULT_CPU_MICROS_PER_SECOND * period // 1_000_000
    limits = Limits(
        memory_max_bytes=linux.DEFAULT_MEMORY_BYTES, cpu_max=CpuMax(quota_micros=quota, period_micros=period), graceful_shutdown_seconds=0
    )
    assert limits == PLATFORM_LIMITS


# --- against everything that a member may do, one by one -------------------------------------------------------------------------------

HOSTS, PORTS, PROTOCOLS = ("a", "A", "b"), (1, 2), (None, "tls")
NAMES = ("x.c", "y.x.c", "c", "x.d")
ENTRIES = ("x.c", "X.C", "*.c", "*.x.c", "x.d")
FILES = ("/s", "/s/t", "/s/t/u", "/st")
SMALL: dict[str, Any] = {"max_size": 2}

SPECS = st.builds(
    spec,
    ttl=st.integers(1, 2),
    limits=st.fixed_dictionaries(
        {},
        optional={
            "memoryMaxBytes": st.integers(1, 3),
            "cpuMax": st.fixed_dictionaries({"quotaMicros": st.integers(1, 4), "periodMicros": st.integers(1, 2)}),
        },
    ),
    egressRules=st.lists(
        st.fixed_dictionaries({"host": st.sampled_from(HOSTS), "port": st.sampled_from(PORTS), "protocol": st.sampled_from(PROTOCOLS)}),
        **SMALL,
    ),
    secretRefs=st.lists(st.sampled_from("AB"), **SMALL),
    dnsAuthority=st.fixed_dictionaries({"hostnameAllowlist": st.lists(st.sampled_from(ENTRIES), **SMALL)}),
    filesystem=st.fixed_dictionaries(
        {
            "mounts": st.lists(
                st.fixed_dictionaries({"source": st.sampled_from(FILES), "mode": st.sampled_from(["ro", "rw"])}),
                max_size=2,
                unique_by=lambda mount: mount["source"],
            )
        }
    ),
)
DEFAULTS = Limits(memory_max_bytes=2, cpu_max=CpuMax(quota_micros=2, period_micros=1), graceful_shutdown_seconds=0)


def matched(entry: str, name: str) -> bool:
    entry = entry.lower()
    return name.endswith(entry[1:]) if entry.startswith("*.") else name == entry


def abilities(value: Spec) -> set[tuple[object, ...]]:
    """What a cell with this spec may do, in a world so small that it can be listed."""
    authority, limits = value["authority"], value["run"]["limits"]
    cpu = limits.get("cpuMax", {"quotaMicros": 2, "periodMicros": 1})
    reach = {
        ("connect", host.lower(), port, protocol)
        for host, port, protocol in product(HOSTS, PORTS, PROTOCOLS)
        if {"host": host, "port": port, "protocol": protocol} in authority["egressRules"]
    }
    mounts = {(mount["source"], mount["mode"]) for mount in authority["filesystem"]["mounts"]}
    files = {
        (how, file)
        for file, (source, mode) in product([*FILES, *(f"{file}/x" for file in FILES)], mounts)
        if file == source or file.startswith(f"{source}/")
        for how in (("read", "write") if mode == "rw" else ("read",))
    }
    # Names below a wildcard that the list above happens not to hold.
    names = [*NAMES, "q.c", "q.x.c"]
    return {
        *reach,
        *files,
        *(("use", name) for name in authority["secretRefs"]),
        *(("look up", name) for name in names if any(matched(entry, name) for entry in authority["dnsAuthority"]["hostnameAllowlist"])),
        *(("hold", byte) for byte in range(limits.get("memoryMaxBytes", 2))),
        *(("compute", share) for share in range(cpu["quotaMicros"] * 2 // cpu["periodMicros"])),
        *(("live", second) for second in range(value["lifetime"]["ttlSeconds"])),
    }


@given(st.data(), st.lists(SPECS, min_size=2, max_size=3))
def test_narrowing_is_what_a_list_of_all_abilities_says(data: st.DataObject, specs: list[Spec]) -> None:
    if data.draw(st.booleans()):
        # Drawn apart, hardly any two narrow: here they differ in one part.
        part = data.draw(st.sampled_from(["authority", "run", "lifetime"]))
        specs = [specs[0], *({**specs[0], part: each[part]} for each in specs[1:])]
    parents = [0, *(data.draw(st.integers(0, at)) for at in range(1, len(specs) - 1))]
    wider = [at for at in range(1, len(specs)) if not abilities(specs[at]) <= abilities(specs[parents[at - 1]])]
    refused: FormationRejected | None = None
    try:
        formation(specs, parents, defaults=DEFAULTS)
    except FormationRejected as error:
        refused = error
    assert (refused is None) == (not wider)
    if refused:
        assert refused.problem.type == "/problems/formation/authority-not-narrowing"
        assert refused.text.startswith(f"member 'm{wider[0]}' exceeds its parent 'm{parents[wider[0] - 1]}': ")
