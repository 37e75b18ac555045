import json
from typing import Any

import msgspec
import pytest

from cellos.core.documents.execution_cell import CellSpec, Correlation, Mount
from cellos.core.documents.forms import canonical_form, compact_form

SMALLEST = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 1}}


def canonical(**spec: Any) -> dict[str, Any]:
    return canonical_form(msgspec.convert(SMALLEST | spec, CellSpec))


def test_absent_members_are_null_save_for_a_few() -> None:
    assert json.dumps(canonical()) == json.dumps(
        {
            "id": "a",
            "correlation": None,
            "ingress": None,
            "environment": None,
            "policy": None,
            "identity": None,
            "run": None,
            "authority": {"filesystem": None, "network": None, "egressRules": None, "secretRefs": None, "authorityDerivation": None},
            "lifetime": {"ttlSeconds": 1},
            "export": None,
        }
    )


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"correlation": {}}, {"platform": None, "externalRunId": None, "externalJobId": None, "labels": None}),
        (
            {"correlation": {"tenantId": "t", "correlationId": "c", "labels": {"b": "1", "a": "2"}}},
            {
                "platform": None,
                "externalRunId": None,
                "externalJobId": None,
                "tenantId": "t",
                "labels": {"a": "2", "b": "1"},
                "correlationId": "c",
            },
        ),
        ({"placement": {"queueName": "q"}}, {"queueName": "q"}),
        (
            {"run": {"argv": ["x"]}},
            {"argv": ["x"], "workingDirectory": None, "timeoutMs": None, "limits": None, "secretDelivery": "runtimeLeasedBroker"},
        ),
        ({"ingress": {"git": {}}}, {"git": {"url": None, "ref": None, "secretRef": None}, "ociImage": None}),
        (
            {"export": {"targets": [{"kind": "http", "name": "n", "baseUrl": "u"}]}},
            {"artifacts": None, "targets": [{"kind": "http", "name": "n", "baseUrl": "u", "secretRef": None}]},
        ),
        (
            {"telemetry": {"channel": "vsock-cbor", "events": ["e"], "agentVersion": "1.0.0", "hostVsGuestFields": {"hostFields": []}}},
            {"channel": "vsock-cbor", "events": ["e"], "hostVsGuestFields": {}, "agentVersion": "1.0.0"},
        ),
    ],
)
def test_members_of_the_spec(given: dict[str, Any], written: dict[str, Any]) -> None:
    (name,) = given
    assert json.dumps(canonical(**given)[name]) == json.dumps(written)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"egressRules": [{"host": "h", "port": 1}]}, [{"host": "h", "port": 1, "protocol": None}]),
        ({"filesystem": {"mounts": [{"source": "/a"}]}}, {"mounts": [{"source": "/a", "target": "/a", "mode": "ro"}]}),
        ({"dnsAuthority": {}}, {}),
        ({"dnsAuthority": {"blockUdpDoq": False, "blockUdpHttp3": True, "resolvers": []}}, {"blockUdpHttp3": True}),
        (
            {"dnsAuthority": {"resolvers": [{"resolverId": "r", "endpoint": "e", "protocol": "dot", "dnssec": {}}]}},
            {"resolvers": [{"resolverId": "r", "endpoint": "e", "protocol": "dot", "dnssec": {"validate": True, "failClosed": False}}]},
        ),
        (
            {"dnsAuthority": {"refreshPolicy": {}, "rebindingPolicy": {}}},
            {"refreshPolicy": {}, "rebindingPolicy": {"maxNovelIpsPerHostname": 4, "rejectOnRebind": False}},
        ),
        ({"cdnAuthority": {}}, {}),
        (
            {"cdnAuthority": {"providers": [{"providerId": "p", "hostnamePattern": "a.b"}]}},
            {"providers": [{"providerId": "p", "hostnamePattern": "a.b", "acceptFronting": False}]},
        ),
    ],
)
def test_members_of_the_authority(given: dict[str, Any], written: object) -> None:
    (name,) = given
    assert json.dumps(canonical(authority=given)["authority"][name]) == json.dumps(written)


def test_compact_is_what_somebody_would_write() -> None:
    spec = SMALLEST | {
        "run": {"argv": ["x"], "secretDelivery": "runtimeLeasedBroker", "timeoutMs": 5},
        "correlation": {},
        "authority": {"filesystem": {"mounts": [{"source": "/a", "target": "/a"}, {"source": "/a", "target": "/b", "mode": "rw"}]}},
        "telemetry": {"channel": "vsock-cbor", "events": ["e"], "agentVersion": "1.0.0"},
    }
    assert json.dumps(compact_form(msgspec.convert(spec, CellSpec))) == json.dumps(
        {
            "id": "a",
            "correlation": {},
            "run": {"argv": ["x"], "timeoutMs": 5},
            "authority": {"filesystem": {"mounts": [{"source": "/a"}, {"source": "/a", "target": "/b", "mode": "rw"}]}},
            "lifetime": {"ttlSeconds": 1},
            "telemetry": {"channel": "vsock-cbor", "events": ["e"], "agentVersion": "1.0.0"},
        }
    )


def test_parts_have_forms_too() -> None:
    assert canonical_form(Correlation(platform="p")) == {"platform": "p", "externalRunId": None, "externalJobId": None, "labels": None}
    assert compact_form(Mount(source="/a", mode="rw")) == {"source": "/a", "mode": "rw"}
