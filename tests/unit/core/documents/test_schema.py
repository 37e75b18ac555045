import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cellos.core.documents.schema import DIALECT, execution_cell_schema

ROOT = Path(__file__).parents[4]
GOLDEN = ROOT / "tests" / "golden" / "documents"
STORED = ROOT / "docs" / "reference" / "execution-cell.schema.json"
SMALLEST: dict[str, Any] = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 1}}


def checker() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(execution_cell_schema())


def accepts(value: object) -> bool:
    return checker().is_valid(value)


def document(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": SMALLEST | spec}


def test_it_is_a_schema() -> None:
    schema = execution_cell_schema()
    assert schema["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_stored_schema_is_the_generated_one() -> None:
    # To renew it: python -c 'from cellos.core.documents.schema import *; import json; print(json.dumps(execution_cell_schema(), indent=2))'
    assert STORED.read_text() == json.dumps(execution_cell_schema(), indent=2) + "\n"


@pytest.mark.parametrize("path", sorted((GOLDEN / "valid").glob("*.json")), ids=lambda path: path.stem)
def test_valid_documents_conform(path: Path) -> None:
    checker().validate(json.loads(path.read_text()))


def parsable(kind: str) -> list[Any]:
    """The golden documents of a kind that an ordinary JSON library reads, with what it reads."""
    found = []
    for path in sorted((GOLDEN / kind).glob("*.json")):
        # A fault of shape names a member; a duplicate is gone when a library has read it.
        error = path.with_suffix(".error").read_text()
        if ": line " not in error and "given more than once" not in error and "is empty" not in error:
            found.append(pytest.param(json.loads(path.read_text()), id=path.stem))
    return found


@pytest.mark.parametrize("value", [param for param in parsable("malformed") if param.id != "float-for-integer"])
def test_documents_of_another_shape_do_not(value: object) -> None:
    assert not accepts(value)


def test_a_float_without_fraction_is_an_integer_to_json_schema() -> None:
    assert accepts(document(lifetime={"ttlSeconds": 9.0}))


@pytest.mark.parametrize(
    "spec",
    [
        {"id": "a..b"},
        {"id": ""},
        {"correlation": {"tenantId": "a.b"}},
        {"correlation": {"tenantId": ""}},
        {"environment": {"imageReference": ""}},
        {"environment": {"imageReference": "i", "imageDigest": "sha256:" + "F" * 64}},
        {"placement": {"kubernetesNamespace": "A"}},
        {"ingress": {"git": {"secretRef": "a/b"}}},
        {"run": {"argv": []}},
        {"run": {"argv": [""]}},
        {"run": {"argv": ["a"], "limits": {"memoryMaxBytes": 0}}},
        {"run": {"argv": ["a"], "limits": {"cpuMax": {"quotaMicros": 0}}}},
        {"authority": {"network": {}}},
        {"authority": {"secretRefs": ["-"]}},
        {"authority": {"egressRules": [{"host": "", "port": 1}]}},
        {"authority": {"dnsAuthority": {"hostnameAllowlist": ["10.0.0.1"]}}},
        {"authority": {"cdnAuthority": {"providers": [{"providerId": "p", "hostnamePattern": "a"}]}}},
        {"authority": {"filesystem": {"mounts": [{"source": "a"}]}}},
        {"authority": {"filesystem": {"mounts": [{"source": "/a", "target": "b"}]}}},
        {"export": {"artifacts": [{"name": "", "path": ""}]}},
        {"telemetry": {"channel": "vsock-cbor", "events": [], "agentVersion": "1.0.0"}},
        {"telemetry": {"channel": "vsock-cbor", "events": ["e"], "agentVersion": "1.0"}},
        {"lifetime": {"ttlSeconds": 2**64}},
    ],
)
def test_identifiers_and_bounds_are_told(spec: dict[str, Any]) -> None:
    assert accepts(document())
    assert not accepts(document(**spec))


def test_version_and_kind_are_told() -> None:
    assert not accepts(document() | {"apiVersion": "v1"})
    assert not accepts(document() | {"kind": "Cell"})
