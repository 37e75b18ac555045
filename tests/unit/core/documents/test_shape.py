import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents.execution_cell import U64_MAX, ExecutionCell
from cellos.core.documents.shape import _fault, _type_info, to_struct
from cellos.core.documents.strict import OutOfRange
from cellos.errors import SpecSyntaxError

U64 = "an integer from 0 to 18446744073709551615"
ABSENT = object()


def document(**spec: Any) -> dict[str, Any]:
    whole = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 1}} | spec
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {k: v for k, v in whole.items() if v is not ABSENT}}


def refusal(value: object, *, allow_unknown_fields: bool = False) -> SpecSyntaxError:
    with pytest.raises(SpecSyntaxError) as caught:
        to_struct(value, ExecutionCell, allow_unknown_fields=allow_unknown_fields)
    return caught.value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], "the document must be an object, given a list"),
        (None, "the document must be an object, given null"),
        ("x", 'the document must be an object, given the string "x"'),
        ({}, "apiVersion is required"),
        ({"apiVersion": "x", "kind": "y"}, "spec is required"),
        (document() | {"spec": {}}, "spec.id is required"),
        (document() | {"apiVersion": 1}, "apiVersion must be a string, given the integer 1"),
        (document() | {"metadata": {}}, "metadata is not a known member; known here: apiVersion, kind, spec"),
        (document(id=ABSENT), "spec.id is required"),
        (document(id=None), "spec.id must be a string, given null"),
        (document(authority=ABSENT), "spec.authority is required"),
        (document(authority=[]), "spec.authority must be an object, given a list"),
        (document(authority=None), "spec.authority must be an object, given null"),
        (document(lifetime={}), "spec.lifetime.ttlSeconds is required"),
        (document(lifetime={"ttlSecond": 1}), "spec.lifetime.ttlSecond is not a known member; did you mean ttlSeconds?"),
        (document(lifetime={"ttlSeconds": "5"}), f'spec.lifetime.ttlSeconds must be {U64}, given the string "5"'),
        (document(lifetime={"ttlSeconds": True}), f"spec.lifetime.ttlSeconds must be {U64}, given true"),
        (document(lifetime={"ttlSeconds": 1.0}), f"spec.lifetime.ttlSeconds must be {U64}, given the number 1.0"),
        (document(lifetime={"ttlSeconds": 1e3}), f"spec.lifetime.ttlSeconds must be {U64}, given the number 1000.0"),
        (document(lifetime={"ttlSeconds": -1}), f"spec.lifetime.ttlSeconds must be {U64}, given the integer -1"),
        (
            document(lifetime={"ttlSeconds": OutOfRange("18446744073709551616")}),
            f"spec.lifetime.ttlSeconds must be {U64}, given the integer 18446744073709551616",
        ),
        (document(Authority={}), "spec.Authority is not a known member; did you mean authority?"),
        (document(authority={"egressRule": []}), "spec.authority.egressRule is not a known member; did you mean egressRules?"),
        (document(authority={"secret_refs": []}), "spec.authority.secret_refs is not a known member; did you mean secretRefs?"),
        (document(authority={"egressRules": {}}), "spec.authority.egressRules must be a list, given an object"),
        (
            document(authority={"egressRules": [{"host": "a", "port": 1}, {"host": "b", "port": 70000}]}),
            "spec.authority.egressRules[1].port must be an integer from 0 to 65535, given the integer 70000",
        ),
        (document(authority={"egressRules": [{"port": 1}]}), "spec.authority.egressRules[0].host is required"),
        (document(authority={"egressRules": [None]}), "spec.authority.egressRules[0] must be an object, given null"),
        (document(authority={"secretRefs": ["A", 7]}), "spec.authority.secretRefs[1] must be a string, given the integer 7"),
        (document(run={"argv": "ls"}), 'spec.run.argv must be a list, given the string "ls"'),
        (document(run={"argv": ["a", "b", None]}), "spec.run.argv[2] must be a string, given null"),
        (document(run={}), "spec.run.argv is required"),
        (document(run=[]), "spec.run must be an object, given a list"),
        (
            document(run={"argv": ["a"], "secretDelivery": "broker"}),
            'spec.run.secretDelivery must be one of env, runtimeBroker, runtimeLeasedBroker, given the string "broker"',
        ),
        (
            document(run={"argv": ["a"], "secretDelivery": None}),
            "spec.run.secretDelivery must be one of env, runtimeBroker, runtimeLeasedBroker, given null",
        ),
        (
            document(run={"argv": ["a"], "secretDelivery": {"env": None}}),
            "spec.run.secretDelivery must be one of env, runtimeBroker, runtimeLeasedBroker, given an object",
        ),
        (document(run={"argv": ["a"], "limits": {"cpuMax": {"periodMicros": 1}}}), "spec.run.limits.cpuMax.quotaMicros is required"),
        (
            document(run={"argv": ["a"], "limits": {"memoryMax": 1}}),
            "spec.run.limits.memoryMax is not a known member; did you mean memoryMaxBytes?",
        ),
        (
            document(correlation={"labels": {"a": "b", "two words": 1}}),
            'spec.correlation.labels["two words"] must be a string, given the integer 1',
        ),
        (document(correlation={"labels": ["a"]}), "spec.correlation.labels must be an object, given a list"),
        (document(correlation={"labels": {"a": None}}), "spec.correlation.labels.a must be a string, given null"),
        (
            document(identity={"kind": "oidc", "provider": "", "audience": "", "secretRef": "A"}),
            'spec.identity.kind must be "federatedOidc", given the string "oidc"',
        ),
        (document(authority={"dnsAuthority": {"resolvers": None}}), "spec.authority.dnsAuthority.resolvers must be a list, given null"),
        (
            document(authority={"dnsAuthority": {"allowedQueryTypes": ["A", "aaaa"]}}),
            (
                "spec.authority.dnsAuthority.allowedQueryTypes[1] must be one of A, AAAA, CNAME, HTTPS, MX, NS, PTR, SRV, SVCB, TXT,"
                ' given the string "aaaa"'
            ),
        ),
        (
            document(authority={"dnsAuthority": {"blockUdpDoq": 1}}),
            "spec.authority.dnsAuthority.blockUdpDoq must be true or false, given the integer 1",
        ),
        (
            document(authority={"dnsAuthority": {"blockUdpDoq": None}}),
            "spec.authority.dnsAuthority.blockUdpDoq must be true or false, given null",
        ),
        (
            document(authority={"dnsAuthority": {"refreshPolicy": {"minTtlSeconds": 2**32}}}),
            "spec.authority.dnsAuthority.refreshPolicy.minTtlSeconds must be an integer from 0 to 4294967295, given the integer 4294967296",
        ),
        (
            document(authority={"dnsAuthority": {"rebindingPolicy": {"maxNovelIpsPerHostname": None}}}),
            "spec.authority.dnsAuthority.rebindingPolicy.maxNovelIpsPerHostname must be an integer from 0 to 4294967295, given null",
        ),
        (document(export={"targets": [{"name": "x"}]}), "spec.export.targets[0].kind is required: one of http, s3"),
        (
            document(export={"targets": [{"kind": "ftp", "name": "x"}]}),
            'spec.export.targets[0].kind must be one of http, s3, given the string "ftp"',
        ),
        (document(export={"targets": [{"kind": None}]}), "spec.export.targets[0].kind must be one of http, s3, given null"),
        (document(export={"targets": ["http"]}), 'spec.export.targets[0] must be an object, given the string "http"'),
        (document(export={"targets": [{"kind": "s3", "name": "x"}]}), "spec.export.targets[0].bucket is required"),
        (
            document(export={"targets": [{"kind": "s3", "name": "x", "bucket": "b", "baseUrl": "u"}]}),
            "spec.export.targets[0].baseUrl is not a known member; known here: name, bucket, keyPrefix, region, secretRef",
        ),
        (
            document(telemetry={"channel": "vsock-json", "events": [], "agentVersion": "1.0.0"}),
            'spec.telemetry.channel must be "vsock-cbor", given the string "vsock-json"',
        ),
        (document(authority={"filesystem": []}), "spec.authority.filesystem must be an object, given a list"),
        (document(authority={"filesystem": {}}), "spec.authority.filesystem.mounts is required"),
        (
            document(authority={"filesystem": {"paths": ["/a"]}}),
            "spec.authority.filesystem.paths is not a known member; known here: mounts",
        ),
        (document(authority={"filesystem": {"mounts": [{}]}}), "spec.authority.filesystem.mounts[0].source is required"),
        (
            document(authority={"filesystem": {"mounts": [{"source": "/a", "mode": "rx"}]}}),
            'spec.authority.filesystem.mounts[0].mode must be one of ro, rw, given the string "rx"',
        ),
        (
            document(authority={"filesystem": {"mounts": [{"source": "/a", "target": ""}]}}),
            'spec.authority.filesystem.mounts[0].target must be a non-empty string, given the string ""',
        ),
        (
            document(authority={"filesystem": {"mounts": [{"source": "/a", "target": None}]}}),
            "spec.authority.filesystem.mounts[0].target must be a non-empty string, given null",
        ),
        (
            document(authority={"filesystem": {"mounts": [{"source": "/a", "mode": None}]}}),
            "spec.authority.filesystem.mounts[0].mode must be one of ro, rw, given null",
        ),
        (
            document(authority={"authorityDerivation": {"roleRoot": "r"}}),
            "spec.authority.authorityDerivation.leafCapability is required",
        ),
        (document() | {"x" * 5000: 1}, None),
        (document(id={"a": "\n"}), "spec.id must be a string, given an object"),
        (document(lifetime={"ttlSeconds": "\n" * 200}), None),
    ],
)
def test_faults_of_shape(value: object, text: str | None) -> None:
    error = refusal(value)
    assert "\n" not in str(error)
    assert len(str(error)) < 400
    assert str(error) == f"parse ExecutionCellDocument: {error.text}"
    if text is not None:
        assert error.text == text
        assert text.startswith(error.path or "the document")


NULLABLE = [
    *(
        "spec." + name
        for name in ["correlation", "ingress", "environment", "placement", "policy", "identity", "run", "export", "telemetry"]
    ),
    *(
        "spec.authority." + n
        for n in ["filesystem", "network", "egressRules", "secretRefs", "authorityDerivation", "dnsAuthority", "cdnAuthority"]
    ),
]


@pytest.mark.parametrize("path", NULLABLE)
def test_null_means_absent_for_optional_members(path: str) -> None:
    value = document()
    *parents, name = path.split(".")
    inner = value
    for parent in parents:
        inner = inner[parent]
    inner[name] = None
    assert to_struct(value, ExecutionCell) == to_struct(document(), ExecutionCell)


def test_defaults() -> None:
    cell = to_struct(
        document(run={"argv": []}, authority={"filesystem": {"mounts": [{"source": "/a"}]}, "dnsAuthority": {}}), ExecutionCell
    )
    assert cell.spec.run is not None
    assert cell.spec.run.secret_delivery == "runtimeLeasedBroker"
    assert cell.spec.authority.filesystem is not None
    mount = cell.spec.authority.filesystem.mounts[0]
    assert (mount.source, mount.target, mount.mode) == ("/a", "/a", "ro")
    assert cell.spec.authority.dns_authority is not None
    assert cell.spec.authority.dns_authority.resolvers == ()


def test_limits_of_integers_are_accepted() -> None:
    rule = {"host": "a", "port": 65535}
    cell = to_struct(document(lifetime={"ttlSeconds": U64_MAX}, authority={"egressRules": [rule, rule | {"port": 0}]}), ExecutionCell)
    assert cell.spec.lifetime.ttl_seconds == U64_MAX


def test_unknown_members_are_dropped_on_request() -> None:
    loose = document(run={"argv": ["a"], "x": 1}, export={"targets": [{"kind": "s3", "name": "n", "bucket": "b", "acl": []}]}, future={})
    loose["metadata"] = {"labels": {}}
    loose["spec"]["correlation"] = {"labels": {"any": "label"}, "new": 1}
    strict = document(
        run={"argv": ["a"]}, export={"targets": [{"kind": "s3", "name": "n", "bucket": "b"}]}, correlation={"labels": {"any": "label"}}
    )
    before = copy.deepcopy(loose)
    assert to_struct(loose, ExecutionCell, allow_unknown_fields=True) == to_struct(strict, ExecutionCell)
    assert loose == before
    assert refusal(loose).text == "metadata is not a known member; known here: apiVersion, kind, spec"


@pytest.mark.parametrize("filesystem", [{"mounts": [{"source": "/a", "readOnly": True}]}, {"mounts": [], "paths": []}])
def test_unknown_members_of_mounts_are_refused_always(filesystem: object) -> None:
    assert "is not a known member" in refusal(document(authority={"filesystem": filesystem}), allow_unknown_fields=True).text


def test_wrong_types_are_refused_with_unknown_members_allowed_too() -> None:
    for wrong in (document(run={"argv": 1, "x": 1}), document(export={"targets": [{"kind": "ftp"}]}), document(lifetime=3), [document()]):
        refusal(wrong, allow_unknown_fields=True)


WHOLE = document(
    correlation={"labels": {"a": "b"}, "tenantId": "t"},
    identity={"kind": "federatedOidc", "provider": "p", "audience": "a", "secretRef": "S"},
    run={"argv": ["a", "b"], "limits": {"cpuMax": {"quotaMicros": 1}}},
    authority={
        "filesystem": {"mounts": [{"source": "/a", "mode": "rw"}]},
        "egressRules": [{"host": "h", "port": 1}],
        "dnsAuthority": {"resolvers": [{"resolverId": "r", "endpoint": "e", "protocol": "dot", "dnssec": {"validate": True}}]},
    },
    export={"targets": [{"kind": "http", "name": "n", "baseUrl": "http://h"}, {"kind": "s3", "name": "m", "bucket": "b"}]},
)


def places(value: object) -> list[list[Any]]:
    """The way to every value of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *rest] for key, item in inner for rest in places(item))]


VALUES = st.sampled_from(
    [None, True, 0, -1, 2**64 - 1, 70_000, 1.5, "", "x", "http", [], [1], ["a"], {}, {"a": 1}, {"kind": "s3"}, OutOfRange("9" * 30)]
)


@given(st.sampled_from(places(WHOLE)), VALUES, st.booleans())
def test_our_words_and_the_converter_agree(place: list[Any], put: object, rename: bool) -> None:
    """Whatever is put anywhere: the converter refuses it exactly where we have words for it."""
    mutant: Any = {"root": copy.deepcopy(WHOLE)}
    *parents, last = ["root", *place]
    inner = mutant
    for parent in parents:
        inner = inner[parent]
    if rename and isinstance(inner, dict) and parents:
        inner[f"{last}s"] = inner.pop(last)
    else:
        inner[last] = put
    value = mutant["root"]
    fault = _fault(value, _type_info(ExecutionCell), "")
    try:
        msgspec.convert(value, ExecutionCell)
    except msgspec.ValidationError:
        assert fault is not None
    else:
        assert fault is None
