"""The operator's policy documents as `cellos-supervisor` keeps them: what is refused, in which words, and what the record says of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.linux_backend

PREFIX = "dev.cellos.events.cell."


class Host:
    """A supervisor with policy documents."""

    def __init__(self, commands: Any, place: Path) -> None:
        self.commands = commands
        self.place = place
        self.events_file = place / "events.jsonl"
        self.variables = {"CELL_OS_JSONL_EVENTS": str(self.events_file)}

    def pack(self, rules: dict[str, Any], **spec: Any) -> Path:
        return self.document("CELLOS_POLICY_PACK_PATH", "PolicyPack", {"id": "house", "rules": rules} | spec)

    def authorization(self, **spec: Any) -> Path:
        return self.document("CELLOS_AUTHZ_POLICY_PATH", "AuthorizationPolicy", {"subjects": ["acme", "emea"]} | spec)

    def document(self, variable: str, kind: str, spec: dict[str, Any]) -> Path:
        path = self.place / f"{kind}.json"
        path.write_text(json.dumps({"apiVersion": "cellos.io/v1", "kind": kind, "spec": spec}))
        self.variables[variable] = str(path)
        return path

    def run(self, *argv: str, **spec: Any) -> subprocess.CompletedProcess[str]:
        run = {"argv": list(argv or ("true",)), "secretDelivery": "env", **spec.pop("run", {})}
        body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": run, **spec}
        path = self.place / "spec.json"
        path.write_text(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}))
        done: subprocess.CompletedProcess[str] = self.commands.run("cellos-supervisor", str(path), variables=self.variables)
        return done

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Type and data of each event since the last look."""
        lines = self.events_file.read_text().splitlines() if self.events_file.exists() else []
        self.events_file.unlink(missing_ok=True)
        return [(event["type"].removeprefix(PREFIX), event["data"]) for event in map(json.loads, lines)]

    def refused(self, done: subprocess.CompletedProcess[str], text: str) -> None:
        assert done.returncode == 1
        assert done.stdout == ""
        assert f"Error: {text}" in done.stderr


@pytest.fixture
def host(commands: Any, tmp_path: Path) -> Host:
    return Host(commands, tmp_path)


class TestPacks:
    def test_all_violations_are_told_and_no_cell_is_made(self, host: Host) -> None:
        host.pack({"maxLifetimeTtlSeconds": 30, "requireRuntimeSecretDelivery": True}, version="1.0.0")
        policy = {"packId": "claimed", "packVersion": "9.9.9"}
        long = "spec.lifetime.ttlSeconds 60 exceeds policy maximum 30"
        delivery = "policy requires spec.run.secretDelivery to be runtimeBroker or runtimeLeasedBroker, not env"
        done = host.run(policy=policy, correlation={"tenantId": "acme"})
        host.refused(
            done,
            f"cell spec rejected by policy pack 'house': maxLifetimeTtlSeconds: {long}; requireRuntimeSecretDelivery: {delivery}\n",
        )
        [(kind, data)] = host.events
        assert kind == "policy.v1.rejected"
        assert (data["specId"], data["violationCount"]) == ("cell-1", 2)
        assert data["violations"] == [
            {"rule": "maxLifetimeTtlSeconds", "message": long},
            {"rule": "requireRuntimeSecretDelivery", "message": delivery},
        ]
        assert data["correlation"]["tenantId"] == "acme"

    def test_a_pack_says_nothing_of_cells_elsewhere(self, host: Host) -> None:
        host.pack({"maxLifetimeTtlSeconds": 1}, placement={"poolId": "batch"})
        assert host.run().returncode == 0
        assert host.run(placement={"poolId": "web"}).returncode == 0
        host.refused(host.run(placement={"poolId": "batch"}), "cell spec rejected by policy pack 'house': maxLifetimeTtlSeconds: ")

    def test_a_command_without_a_limit_gets_the_packs(self, host: Host) -> None:
        host.pack({"maxRunTimeoutMs": 300})
        done = host.run("sleep", "60")
        assert done.returncode == 1
        assert "command timed out after 300 ms" in done.stderr
        assert dict(host.events)["command.v1.completed"]["exitCode"] == -1

    def test_callers_get_their_secrets_and_no_others(self, host: Host) -> None:
        host.pack({"secretRefAllowlist": {"release": ["NPM_TOKEN"], "default": []}})
        host.variables |= {"CELLOS_BROKER": "env", "CELLOS_SECRET_NPM_TOKEN": "s3cret"}
        secrets = {"secretRefs": ["NPM_TOKEN"]}
        because = "policy pack rules.secretRefAllowlist; admission rejected per ADR-0007"
        assert host.run().returncode == 0
        done = host.run(authority=secrets)
        assert f'secret_ref_denied: caller "default" is not granted secretRef "NPM_TOKEN" by {because}' in done.stderr
        host.variables["CELLOS_CALLER_IDENTITY"] = " release "
        done = host.run("sh", "-c", 'test "$NPM_TOKEN" = s3cret', authority=secrets)
        assert (done.returncode, host.events[-1][0]) == (0, "lifecycle.v1.destroyed")
        host.variables["CELLOS_CALLER_IDENTITY"] = "stranger"
        done = host.run()
        assert done.returncode == 1
        assert f'caller_unmapped: caller identity "stranger" is not present in {because}' in done.stderr
        assert [kind for kind, _ in host.events] == ["policy.v1.rejected"]

    def test_the_oldest_version_can_be_lifted_and_nothing_else(self, host: Host) -> None:
        path = host.pack({}, version="0.9.0")
        text = (
            f"CELLOS_POLICY_PACK_PATH: invalid policy pack in '{path}': policy pack spec.version 0.9.0 is older than runtime-supported"
            " floor 1.0.0 (set CELLOS_POLICY_ALLOW_DOWNGRADE=1 to override)"
        )
        host.refused(host.run(), text)
        host.variables["CELLOS_POLICY_ALLOW_DOWNGRADE"] = "1"
        assert host.run().returncode == 0
        host.pack({"maxRunTimeoutMs": 0}, version="0.9.0")
        host.refused(host.run(), f"CELLOS_POLICY_PACK_PATH: invalid policy pack in '{path}': policy pack rules.maxRunTimeoutMs must be > 0")


class TestAuthorization:
    @pytest.mark.parametrize(
        ("policy", "spec", "reason", "message", "named"),
        [
            ({}, {}, "subject_not_authorized", "spec.correlation.tenantId is required when an AuthorizationPolicy is configured", {}),
            (
                {},
                {"correlation": {"tenantId": "umbrella"}},
                "subject_not_authorized",
                'tenantId "umbrella" is not in the authorization policy subjects list',
                {"tenantId": "umbrella", "subject": "umbrella"},
            ),
            (
                {"allowedPools": ["web"]},
                {"correlation": {"tenantId": "acme"}, "placement": {"poolId": "batch"}},
                "pool_not_allowed",
                'pool "batch" is not in the authorization policy allowedPools list',
                {"tenantId": "acme", "subject": "acme", "deniedPoolId": "batch"},
            ),
            (
                {"allowedPolicyPacks": ["ci"]},
                {"correlation": {"tenantId": "acme"}, "policy": {"packId": "own"}},
                "policy_pack_not_allowed",
                'policy pack "own" is not in the authorization policy allowedPolicyPacks list',
                {"tenantId": "acme", "subject": "acme", "deniedPolicyPackId": "own"},
            ),
        ],
    )
    def test_what_is_not_listed_is_refused(
        self, host: Host, policy: dict[str, Any], spec: dict[str, Any], reason: str, message: str, named: dict[str, str]
    ) -> None:
        host.authorization(**policy)
        host.refused(host.run(**spec), f"cell spec rejected by authorization policy: {message}")
        [(kind, data)] = host.events
        assert (kind, data["specId"], data["reason"]) == ("authz.v1.rejected", "cell-1", reason)
        assert data["message"].startswith(message)
        assert {name: data[name] for name in ("tenantId", "subject", "deniedPoolId", "deniedPolicyPackId") if name in data} == named

    def test_it_is_asked_before_the_pack(self, host: Host) -> None:
        host.authorization()
        host.pack({"maxLifetimeTtlSeconds": 1})
        host.refused(host.run(), "cell spec rejected by authorization policy: ")
        host.refused(host.run(correlation={"tenantId": "acme"}), "cell spec rejected by policy pack 'house': ")

    def test_an_hour_has_room_for_so_many_cells_of_a_tenant(self, host: Host) -> None:
        host.authorization(maxCellsPerHour=2)
        acme, emea = {"tenantId": "acme"}, {"tenantId": "emea"}
        assert [host.run(correlation=acme).returncode for _ in range(2)] == [0, 0]
        assert {kind for kind, _ in host.events} >= {"lifecycle.v1.started", "lifecycle.v1.destroyed"}
        host.refused(host.run(correlation=acme), 'cell spec rejected by authorization policy: tenantId "acme" has started 2 cell(s)')
        assert [(kind, data["reason"]) for kind, data in host.events] == [("authz.v1.rejected", "rate_limit_exceeded")]
        assert host.run(correlation=emea).returncode == 0


@pytest.mark.parametrize(
    ("variable", "kind"), [("CELLOS_POLICY_PACK_PATH", "policy pack"), ("CELLOS_AUTHZ_POLICY_PATH", "authorization policy")]
)
class TestFiles:
    def test_a_link_is_refused(self, host: Host, variable: str, kind: str) -> None:
        host.pack({})
        host.authorization()
        link = host.place / "link.json"
        link.symlink_to(host.variables[variable])
        host.variables[variable] = str(link)
        host.refused(host.run(correlation={"tenantId": "acme"}), f"{variable}: cannot read '{link}': ")

    def test_a_file_that_is_not_there(self, host: Host, variable: str, kind: str) -> None:
        host.variables[variable] = "/nowhere/policy.json"
        host.refused(host.run(), f"{variable}: cannot read '/nowhere/policy.json': No such file or directory (os error 2)")

    @pytest.mark.parametrize(
        ("text", "shape", "words"),
        [
            ('{"apiVersion": ', "JSON parse error in", "line 1 column 16: the document ends too early"),
            ('{"apiVersion": "cellos.io/v1", "kind": "Cell", "spec": {}}', "invalid {kind} in", "{kind} kind must be "),
        ],
    )
    def test_a_file_that_is_wrong(self, host: Host, variable: str, kind: str, text: str, shape: str, words: str) -> None:
        path = host.place / "policy.json"
        path.write_text(text)
        host.variables[variable] = str(path)
        done = host.run()
        host.refused(done, f"{variable}: {shape.format(kind=kind)} '{path}': ")
        assert words.format(kind=kind) in done.stderr
        assert host.events == []
