import hashlib
import json
from pathlib import Path

from cellos.core.documents import canonical_spec_hash, parse_execution_cell, raw_spec_hash

SMALL = {
    "id": "t-true",
    "authority": {"secretRefs": []},
    "lifetime": {"ttlSeconds": 60},
    "run": {"secretDelivery": "env", "argv": ["/bin/true"]},
}


def digest(spec: object, **dumps: object) -> str:
    raw = json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": spec}, **dumps)  # type: ignore[arg-type]
    return canonical_spec_hash(parse_execution_cell(raw.encode()).spec)


def test_the_known_vectors() -> None:
    """What CellOS 0.5 computes."""
    assert digest(SMALL) == "sha256:375a3aa67c7596da3203ad5df80d5285169b2b4247f514002a91accf8899810b"
    demo = Path(__file__).parents[3] / "golden/supervisor/demo-build.json"
    known = "sha256:82a1a5342dfe94c2265d095eb6bc1f57bb127433182f3540a976330e64b227bf"
    assert canonical_spec_hash(parse_execution_cell(demo.read_bytes()).spec) == known


def test_blanks_order_and_written_defaults_do_not_matter() -> None:
    reordered = dict(reversed(SMALL.items())) | {"correlation": None, "placement": None}
    assert digest(reordered, indent=3) == digest(SMALL)
    default = SMALL | {"run": {"argv": ["x"]}}
    assert digest(default) == digest(SMALL | {"run": {"argv": ["x"], "secretDelivery": "runtimeLeasedBroker", "limits": None}})


def test_labels_do_not_depend_on_their_order() -> None:
    labels = {"b": "1", "a": "2", "é": "3"}
    one = digest(SMALL | {"correlation": {"labels": labels}})
    assert one == digest(SMALL | {"correlation": {"labels": dict(reversed(labels.items()))}})
    # Written out by hand, for other implementations: text beyond ASCII stands as UTF-8.
    text = (
        '{"id":"t-true","correlation":{"platform":null,"externalRunId":null,"externalJobId":null,"labels":{"a":"2","b":"1","é":"3"}},'
        '"ingress":null,"environment":null,"policy":null,"identity":null,"run":{"argv":["/bin/true"],"workingDirectory":null,"timeoutMs":null,'
        '"limits":null,"secretDelivery":"env"},"authority":{"filesystem":null,"network":null,"egressRules":null,"secretRefs":[],'
        '"authorityDerivation":null},"lifetime":{"ttlSeconds":60},"export":null}'
    )
    assert one == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_what_is_meant_matters() -> None:
    assert digest(SMALL | {"authority": {}}) != digest(SMALL)
    assert digest(SMALL | {"id": "t-false"}) != digest(SMALL)


def test_the_raw_hash_is_of_the_bytes() -> None:
    assert raw_spec_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert raw_spec_hash(b"{}") != raw_spec_hash(b"{} ")
