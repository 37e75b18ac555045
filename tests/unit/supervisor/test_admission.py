from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.errors import ArgvTooLarge, ConfigError, Unenforceable
from cellos.ports import Refusal
from cellos.supervisor.admission import admit, check, program_check
from cellos.testing.backend import FakeBackend

TOKEN = {
    "roleRoot": "r",
    "leafCapability": {"egressRules": [], "secretRefs": []},
    "grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="},
}
IDENTITY = {"kind": "federatedOidc", "provider": "p", "audience": "a", "secretRef": "T"}


def spec(*, run: dict[str, Any] | None = None, **members: Any) -> CellSpec:
    command = {"argv": ["true"], "secretDelivery": "env", **(run or {})}
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": command, **members}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


def refusal(of: CellSpec) -> str:
    with pytest.raises(Unenforceable) as caught:
        admit(of, FakeBackend())
    return str(caught.value)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"run": {"secretDelivery": "env"}, "authority": {"secretRefs": ["TOKEN", "A-b.c"]}},
        {"run": {"secretDelivery": "runtimeLeasedBroker"}},
        {"run": {"secretDelivery": "runtimeLeasedBroker"}, "authority": {"secretRefs": ["T"]}},
        {"run": {"secretDelivery": "runtimeBroker"}, "authority": {"secretRefs": ["T"]}},
        {"run": {"limits": {"gracefulShutdownSeconds": 120}}},
        {"export": {"artifacts": [{"name": "a", "path": "a"}]}},
        {"export": {"targets": [{"kind": "s3", "name": "t", "bucket": "b"}]}},
        {"identity": IDENTITY, "authority": {"secretRefs": ["T"]}},
        {"authority": {"authorityDerivation": TOKEN}},
        {"placement": {"poolId": "p"}, "policy": {"packId": "p"}, "correlation": {"tenantId": "t"}},
    ],
)
def test_what_is_enforced_passes(members: dict[str, Any]) -> None:
    admit(spec(**members), FakeBackend())
    check(spec(**members))


def test_a_patience_that_is_too_long_is_refused_by_name() -> None:
    text = "cannot enforce: spec.run.limits.gracefulShutdownSeconds: it is at most 120"
    assert refusal(spec(run={"limits": {"gracefulShutdownSeconds": 121}})) == text
    with pytest.raises(Unenforceable, match="it is at most 120"):
        check(spec(run={"limits": {"gracefulShutdownSeconds": 121}}))


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "TMPDIR", "LD_PRELOAD", "LD_LIBRARY_PATH", "BASH_ENV", "PYTHONSTARTUP", "NODE_OPTIONS", "PERL5LIB", "CELLOS_X"]
)
def test_a_secret_never_chooses_the_program(name: str) -> None:
    assert f"secretRefs[1]: a secret named {name} " in refusal(spec(authority={"secretRefs": ["FINE", name]}))


def test_nor_does_an_identity() -> None:
    """Its secret is in secretRefs, too; without that rule of documents it would still be refused."""
    document = spec(identity=IDENTITY, authority={"secretRefs": ["T"]})
    assert document.identity is not None
    renamed = replace(document, identity=replace(document.identity, secret_ref="LD_PRELOAD"))
    assert refusal(renamed) == (
        "cannot enforce: spec.identity.secretRef: a secret named LD_PRELOAD would decide what the command executes; choose another name"
    )


@pytest.mark.parametrize(
    "name", ["PATHS", "MY_PATH", "HOMEPAGE", "LD", "OLD_TOKEN", "ENVIRONMENT", "PERL", "PYTHON", "PYTHON3", "PYTHON_X"]
)
def test_names_that_only_look_alike_pass(name: str) -> None:
    admit(spec(authority={"secretRefs": [name]}), FakeBackend())


def test_the_backend_has_its_say() -> None:
    backend = FakeBackend(refuses=[Refusal(field="spec.run.limits.cpuMax", why="no cpu controller"), Refusal(field="b", why="c")])
    with pytest.raises(Unenforceable) as caught:
        admit(spec(), backend)
    assert caught.value.field == "spec.run.limits.cpuMax"
    assert backend.calls == [], "nothing was created"


def test_argv_has_to_fit_in_an_event() -> None:
    admit(spec(run={"argv": ["x" * (512 * 1024 - 1)]}), FakeBackend())
    with pytest.raises(ArgvTooLarge) as caught:
        admit(spec(run={"argv": ["x" * 512 * 1024]}), FakeBackend())
    assert (caught.value.encoded_bytes, caught.value.limit_bytes) == (512 * 1024 + 1, 512 * 1024)


class TestPrograms:
    @pytest.mark.parametrize(
        ("prefixes", "program"),
        [
            (("/usr/bin",), "/usr/bin/true"),
            (("/usr/bin",), "/usr/bin"),
            (("/opt", "/usr/bin"), "/usr/bin/x/y"),
            (("/usr/bin",), "/usr//bin/./true"),
            (("",), "/any/thing"),
        ],
    )
    def test_under_a_prefix(self, prefixes: tuple[str, ...], program: str) -> None:
        program_check(prefixes)([program, "--option"])

    @pytest.mark.parametrize(
        ("prefixes", "program", "listed"),
        [
            (("/usr/bin",), "/usr/binary/true", '["/usr/bin"]'),
            (("/usr/bin",), "/bin/true", '["/usr/bin"]'),
            (("/usr/bin",), "/usr/bin/../../bin/sh", '["/usr/bin"]'),
            (("/usr/bin",), "/usr/lib/../bin/true", '["/usr/bin"]'),
            (("",), "/any/../thing", '["/"]'),
            (("/usr/bin", "/opt/x"), "/opt", '["/usr/bin", "/opt/x"]'),
        ],
    )
    def test_under_none(self, prefixes: tuple[str, ...], program: str, listed: str) -> None:
        with pytest.raises(ConfigError) as caught:
            program_check(prefixes)([program])
        assert str(caught.value) == f'argv[0] "{program}" is not under any allowed prefix from CELLOS_RUN_ARGV0_ALLOW_PREFIXES: {listed}'

    @pytest.mark.parametrize("program", ["true", "./true", "usr/bin/true", ""])
    def test_relative_ones_are_looked_up_in_the_cell(self, program: str) -> None:
        with pytest.raises(ConfigError) as caught:
            program_check(("",))([program])
        assert str(caught.value) == (
            f'CELLOS_RUN_ARGV0_ALLOW_PREFIXES is set but argv[0] is not an absolute path (got "{program}"); '
            "use a full path such as /usr/bin/true"
        )
