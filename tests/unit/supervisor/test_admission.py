from __future__ import annotations

import json
from typing import Any

import pytest

from cellos.artifacts.files import DirectoryStore
from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.errors import ArgvTooLarge, ExportError, Unenforceable
from cellos.ports import Refusal
from cellos.supervisor.admission import admit
from cellos.testing.backend import FakeBackend

STORE = DirectoryStore("/nowhere")
TOKEN = {
    "roleRoot": "r",
    "leafCapability": {"egressRules": [], "secretRefs": []},
    "grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="},
}


def spec(*, run: dict[str, Any] | None = None, **members: Any) -> CellSpec:
    command = {"argv": ["true"], "secretDelivery": "env", **(run or {})}
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": command, **members}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


def refusal(of: CellSpec) -> str:
    with pytest.raises(Unenforceable) as caught:
        admit(of, FakeBackend(), STORE)
    return str(caught.value)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"run": {"secretDelivery": "env"}, "authority": {"secretRefs": ["TOKEN", "A-b.c"]}},
        {"run": {"secretDelivery": "runtimeLeasedBroker"}},
        {"run": {"limits": {"gracefulShutdownSeconds": 120}}},
        {"export": {"artifacts": [{"name": "a", "path": "a"}]}},
        {"placement": {"poolId": "p"}, "policy": {"packId": "p"}, "correlation": {"tenantId": "t"}},
    ],
)
def test_what_is_enforced_passes(members: dict[str, Any]) -> None:
    admit(spec(**members), FakeBackend(), STORE)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (
            {
                "identity": {"kind": "federatedOidc", "provider": "p", "audience": "a", "secretRef": "T"},
                "authority": {"secretRefs": ["T"]},
            },
            "spec.identity: no identity broker is built yet",
        ),
        ({"authority": {"authorityDerivation": TOKEN}}, "spec.authority.authorityDerivation: derivation tokens are not verified yet"),
        (
            {"export": {"targets": [{"kind": "s3", "name": "t", "bucket": "b"}]}},
            "spec.export.targets: http and s3 targets are not built yet; without targets, artifacts go to CELLOS_EXPORT_DIR",
        ),
        (
            {"run": {"secretDelivery": "runtimeLeasedBroker"}, "authority": {"secretRefs": ["T"]}},
            (
                "spec.run.secretDelivery: runtime leased broker prepare: secret broker: runtimeLeasedBroker is not supported by this "
                'secret broker; set it to "env"'
            ),
        ),
        (
            {"run": {"secretDelivery": "runtimeBroker"}, "authority": {"secretRefs": ["T"]}},
            'spec.run.secretDelivery: runtimeBroker is not built yet; set it to "env"',
        ),
        ({"run": {"limits": {"gracefulShutdownSeconds": 121}}}, "spec.run.limits.gracefulShutdownSeconds: it is at most 120"),
    ],
)
def test_what_is_not_enforced_is_refused_by_name(members: dict[str, Any], text: str) -> None:
    assert refusal(spec(**members)) == f"cannot enforce: {text}"


@pytest.mark.parametrize("name", ["PATH", "HOME", "TMPDIR", "LD_PRELOAD", "LD_LIBRARY_PATH", "BASH_ENV", "PYTHONSTARTUP", "NODE_OPTIONS"])
def test_a_secret_never_chooses_the_program(name: str) -> None:
    assert f"secretRefs[1]: a secret named {name} " in refusal(spec(authority={"secretRefs": ["FINE", name]}))


@pytest.mark.parametrize("name", ["PATHS", "MY_PATH", "HOMEPAGE", "LD", "OLD_TOKEN", "ENVIRONMENT", "PERL"])
def test_names_that_only_look_alike_pass(name: str) -> None:
    admit(spec(authority={"secretRefs": [name]}), FakeBackend(), STORE)


def test_the_backend_has_its_say() -> None:
    backend = FakeBackend(refuses=[Refusal(field="spec.run.limits.cpuMax", why="no cpu controller"), Refusal(field="b", why="c")])
    with pytest.raises(Unenforceable) as caught:
        admit(spec(), backend, STORE)
    assert caught.value.field == "spec.run.limits.cpuMax"
    assert backend.calls == [], "nothing was created"


def test_artifacts_need_somewhere_to_go() -> None:
    with pytest.raises(ExportError, match=r'^export sink: export requested for artifact "a" but no export sink is configured'):
        admit(spec(export={"artifacts": [{"name": "a", "path": "a"}]}), FakeBackend(), None)


def test_argv_has_to_fit_in_an_event() -> None:
    admit(spec(run={"argv": ["x" * (512 * 1024 - 1)]}), FakeBackend(), STORE)
    with pytest.raises(ArgvTooLarge) as caught:
        admit(spec(run={"argv": ["x" * 512 * 1024]}), FakeBackend(), STORE)
    assert (caught.value.encoded_bytes, caught.value.limit_bytes) == (512 * 1024 + 1, 512 * 1024)
