"""The course of a run as its events tell it: success, each way to fail, each way to be killed, and what the measured values say."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden/supervisor"
SCOPE = ["observability.v1.network_scope", "observability.v1.dns_target_set"]
STARTED = ["lifecycle.v1.started", "observability.v1.container_security"]
NETWORK = ["observability.v1.network_policy"]
SPAWNED = ["observability.v1.process_spawned"]
ENFORCED = ["observability.v1.network_enforcement"]
COMPLETED = ["command.v1.completed"]
TOUCHED = "observability.v1.fs_touch"
CLOSING = ["compliance.v1.summary", "authority.v1.homeostasis", "lifecycle.v1.destroyed"]
BEFORE = [*SCOPE, *STARTED, *NETWORK]
RAN = [*SPAWNED, *ENFORCED, *COMPLETED]
LOST = [*ENFORCED, *COMPLETED]
RULES = [{"host": "localhost", "port": 443, "protocol": "tls"}, {"host": "nowhere.invalid", "port": 53}]


def normal(event: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: ids, times, and what was measured."""
    text = json.dumps(event)
    text = re.sub(r'"(id|decisionId|parent|time|updatedAt)": "[^"]+"', r'"\1": "…"', text)
    text = re.sub(r'"cap(...)": "[0-9a-f]{16}"', r'"cap\1": "…"', text)
    text = re.sub(r'"(durationMs|privileged)": (\d+|true|false)', r'"\1": "…"', text)
    result: dict[str, Any] = json.loads(text)
    return result


def test_the_events_that_consumers_know(site: Any) -> None:
    """A document and its events as consumers of CellOS 0.5 know them. There is more in some, nothing is missing, nothing is different."""
    export = str(site.place / "out")
    path = site.written("demo.json", (GOLDEN / "demo-build.json").read_bytes())
    done = site.on(path, variables={"CELLOS_RUN_ID": "run-0042", "CELLOS_EXPORT_DIR": export})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    known = [json.loads(line) for line in (GOLDEN / "demo-build.jsonl").read_text().splitlines()]
    more = {
        "lifecycle.v1.started": {"chain", "backend", "enforced", "limits", "unbounded"},
        "observability.v1.container_security": {"chain", "noNewPrivs", "seccompMode"},
        "lifecycle.v1.destroyed": {"chain", "residueClass"},
    }
    assert [event["type"] for event in site.events] == [event["type"] for event in known]
    for kind, event, expected in zip(site.types, site.events, known, strict=True):
        assert list(event) == list(expected)
        assert event["data"].keys() - expected["data"].keys() == more.get(kind, {"chain"})
        assert list(event["data"]) == sorted(event["data"])
        event["data"] = {name: event["data"][name] for name in expected["data"]}
        assert normal(event) == normal(expected)
    started = site.events[3]
    assert site.data("export.v2.completed")["provenance"]["parent"] == started["id"]
    assert (site.place / "out/demo-build/out.txt").read_text() == "built\n"


@pytest.mark.linux_backend
class TestOrder:
    """On the linux backend, from the first event to the last."""

    @pytest.fixture
    def linux(self, site: Any) -> Any:
        site.variables |= {"CELLOS_CELL_BACKEND": "linux", "CELLOS_BROKER": "env", "CELLOS_SECRET_STS": "id-token"}
        return site

    IDENTITY: dict[str, Any] = {  # noqa: RUF012
        "identity": {"kind": "federatedOidc", "provider": "p", "audience": "sts", "secretRef": "ID"},
        "authority": {"secretRefs": ["ID"]},
    }
    ARTIFACTS: dict[str, Any] = {  # noqa: RUF012
        "export": {"artifacts": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}, {"name": "c", "path": "c"}]}
    }

    @pytest.mark.parametrize(
        ("argv", "spec", "types", "reason"),
        [
            (["true"], {}, [*BEFORE, *RAN, *CLOSING], None),
            (
                ["true"],
                IDENTITY,
                [*SCOPE, "identity.v1.materialized", *STARTED, *NETWORK, *RAN, "identity.v1.revoked", *CLOSING],
                None,
            ),
            (
                ["touch", "a", "b", "c"],
                ARTIFACTS,
                [*BEFORE, *RAN, *(kind for _ in "abc" for kind in (TOUCHED, "export.v2.completed")), *CLOSING],
                None,
            ),
            ([], {}, [*BEFORE, *CLOSING], None),
            (["sh", "-c", "exit 7"], {}, [*BEFORE, *RAN, *CLOSING], "command exited with status 7"),
            (["sh", "-c", "kill -9 $$"], {}, [*BEFORE, *RAN, *CLOSING], "command exited with status -1"),
            (["/no/such"], {}, [*BEFORE, *LOST, *CLOSING], "command spawn: No such file or directory (os error 2)"),
            (["true"], {"authority": {"secretRefs": ["NONE"]}}, [*SCOPE, *CLOSING], "secret NONE unresolvable via env broker: "),
            (
                ["true"],
                {**IDENTITY, "identity": {**IDENTITY["identity"], "audience": "other"}},
                [*SCOPE, "identity.v1.failed", *CLOSING],
                "identity ID unresolvable via env broker: ",
            ),
            (
                ["touch", "a", "c"],
                ARTIFACTS,
                [*BEFORE, *RAN, TOUCHED, "export.v2.completed", TOUCHED, "export.v2.failed", *CLOSING],
                "export sink: ",
            ),
            (["false"], ARTIFACTS, [*BEFORE, *RAN, *CLOSING], "command exited with status 1"),
            (
                ["false"],
                IDENTITY,
                [*SCOPE, "identity.v1.materialized", *STARTED, *NETWORK, *RAN, "identity.v1.revoked", *CLOSING],
                "command exited with status 1",
            ),
            (
                ["sleep", "1000"],
                {"run": {"timeoutMs": 100}},
                [*BEFORE, *RAN, *CLOSING],
                "command spawn: command timed out after 100 ms (spec.run.timeoutMs)",
            ),
            (
                ["sleep", "1000"],
                {"lifetime": {"ttlSeconds": 1}},
                [*BEFORE, *RAN, *CLOSING],
                "command spawn: cell killed by TTL watchdog after 1000 ms (ttl_seconds=1)",
            ),
        ],
    )
    def test_it_is_pinned(self, linux: Any, argv: list[str], spec: dict[str, Any], types: list[str], reason: str | None) -> None:
        done = linux.run(*argv, **spec, variables={"CELLOS_EXPORT_DIR": str(linux.place / "out")})
        assert linux.types == types
        end = linux.data("lifecycle.v1.destroyed")
        if reason is None:
            assert (done.returncode, end["outcome"], "reason" in end) == (0, "succeeded", False)
        else:
            assert (done.returncode, end["outcome"]) == (1, "failed")
            assert end["reason"].startswith(reason)
            assert done.stderr == f"Error: {end['reason']}\n"
        assert end["residueClass"] == "none"
        assert not {"exitCode", "exit_code"} & set(end)
        assert linux.left == []

    @pytest.mark.needs("limit memory")
    def test_more_memory_than_was_granted(self, linux: Any) -> None:
        grow = ["/usr/bin/python3", "-c", "x = bytearray(256 << 20)"]
        done = linux.run(*grow, run={"limits": {"memoryMaxBytes": 64 << 20}})
        assert done.returncode == 1
        assert linux.types == [*BEFORE, *RAN, *CLOSING]
        completed = linux.data("command.v1.completed")
        assert (completed["exitCode"], completed["oomKilled"]) == (-1, True)
        assert linux.data("lifecycle.v1.destroyed")["reason"] == "command exited with status -1"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_while_the_command_runs(self, linux: Any, ends: Any, number: int) -> None:
        process = linux.start("sh", "-c", "echo up; sleep 1000", **self.IDENTITY)
        ends(process)
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (128 + number, "Error: supervisor_terminated\n")
        revoked = [*SCOPE, "identity.v1.materialized", *STARTED, *NETWORK, *RAN, "identity.v1.revoked", *CLOSING]
        assert linux.types == revoked
        assert linux.data("command.v1.completed")["exitCode"] == -1


class TestTime:
    SPEC, ENV = "command timed out after {} ms (spec.run.timeoutMs)", "command timed out after {} ms (CELLOS_RUN_TIMEOUT_MS)"
    TTL = "cell killed by TTL watchdog after {} ms (ttl_seconds=1)"

    @pytest.mark.parametrize(
        ("timeout", "cap", "ttl", "text"),
        [
            (100, None, 60, SPEC.format(100)),
            (None, "100", 60, ENV.format(100)),
            (100, "101", 60, SPEC.format(100)),
            (101, "100", 60, ENV.format(100)),
            (100, "100", 60, SPEC.format(100)),
            (1000, None, 1, SPEC.format(1000)),
            (None, "1000", 1, ENV.format(1000)),
            (None, "1001", 1, TTL.format(1000)),
            (None, None, 1, TTL.format(1000)),
        ],
    )
    def test_who_ends_a_command_and_when(self, site: Any, timeout: int | None, cap: str | None, ttl: int, text: str) -> None:
        variables = {"CELLOS_RUN_TIMEOUT_MS": cap} if cap else {}
        run = {"timeoutMs": timeout} if timeout else {}
        began = time.monotonic()
        done = site.run("sleep", "1000", run=run, lifetime={"ttlSeconds": ttl}, variables=variables)
        assert time.monotonic() - began < 50
        assert done.returncode == 1
        completed = site.data("command.v1.completed")
        assert (completed["exitCode"], completed["spawnError"]) == (-1, text)
        assert completed["durationMs"] >= min(timeout or 60_000, int(cap or 60_000), ttl * 1000)
        assert site.data("lifecycle.v1.destroyed")["reason"] == f"command spawn: {text}"

    @pytest.mark.parametrize(
        ("value", "text"),
        [("0", "CELLOS_RUN_TIMEOUT_MS must be > 0"), ("soon", 'invalid CELLOS_RUN_TIMEOUT_MS: "soon"'), ("-1", "invalid")],
    )
    def test_a_cap_that_is_none(self, site: Any, value: str, text: str) -> None:
        site.refused(site.run("true", variables={"CELLOS_RUN_TIMEOUT_MS": value}), f"Error: {text}")

    def test_a_timeout_is_at_most_the_lifetime(self, site: Any) -> None:
        assert site.run("true", run={"timeoutMs": 60_000}).returncode == 0
        text = "Error: invalid cell specification: spec.run.timeoutMs must be <= spec.lifetime.ttlSeconds * 1000"
        site.jsonl.unlink()
        site.refused(site.run("true", run={"timeoutMs": 60_001}), text)

    def test_the_whole_tree_is_gone(self, site: Any) -> None:
        done = site.run("sh", "-c", "sleep 1000 & echo $!; wait", run={"timeoutMs": 300})
        assert done.returncode == 1
        status = Path(f"/proc/{done.stdout.strip()}/status")
        assert not status.exists() or "State:\tZ" in status.read_text(), "dead, even where nobody reaps it"


@pytest.mark.parametrize("backend", ["stub", pytest.param("linux", marks=pytest.mark.linux_backend)])
class TestCommands:
    def test_nothing_of_the_hosts_environment_is_there(self, site: Any, backend: str) -> None:
        variables = {"CELLOS_CELL_BACKEND": backend, "CELLOS_SECRET_A": "a-value", "CELLOS_BROKER": "env", "EDITOR": "vi"}
        done = site.run("/usr/bin/env", authority={"secretRefs": ["A"]}, variables=variables)
        assert "PATH=/usr/bin:/bin:/usr/local/bin" in done.stdout.splitlines()
        assert {line.partition("=")[0] for line in done.stdout.splitlines()} <= {"PATH", "A", "HOME", "TMPDIR"}

    def test_arguments_are_no_shells(self, site: Any, backend: str) -> None:
        done = site.run("printf", "%s|", "$HOME", "*", "a b", "é\n", variables={"CELLOS_CELL_BACKEND": backend})
        assert done.stdout == "$HOME|*|a b|é\n|"

    def test_without_a_command_secrets_are_had_and_artifacts_delivered(self, site: Any, backend: str) -> None:
        site.variables |= {"CELLOS_CELL_BACKEND": backend, "CELLOS_BROKER": "env", "CELLOS_EXPORT_DIR": str(site.place / "out")}
        done = site.run(authority={"secretRefs": ["A"]})
        assert "secret A unresolvable via env broker" in done.stderr
        done = site.run(export={"artifacts": [{"name": "a", "path": "a"}]})
        assert (done.returncode, site.types[-5:]) == (1, [TOUCHED, "export.v2.failed", *CLOSING])


class TestObservations:
    """Each value changes when its cause does."""

    def test_scope(self, site: Any) -> None:
        for rules in ([], RULES):
            assert site.run("true", authority={"egressRules": rules}).returncode == 0
            scope = site.data("observability.v1.network_scope")
            assert (scope["egressRuleCount"], scope["hasOpaqueNetworkAuthority"]) == (len(rules), False)
            assert site.types.count("observability.v1.l7_egress_decision") == len(rules)
            site.jsonl.unlink()

    def test_labels(self, site: Any) -> None:
        variables = {"CELLOS_TRUST_KEYSET_ID": "", "CELLOS_TRUST_RESOLVER_KID": "resolver-7", "CELLOS_TRUST_L7_KID": "l7-7"}
        site.run("true", authority={"egressRules": RULES[:1]}, variables=variables)
        names, decision = site.data("observability.v1.dns_target_set"), site.data("observability.v1.l7_egress_decision")
        assert (names["keysetId"], names["issuerKid"]) == ("", "resolver-7")
        assert (decision["keysetId"], decision["issuerKid"]) == ("", "l7-7")

    @pytest.mark.parametrize("value", ["0", "false", " NO ", "off"])
    def test_the_trust_plane_can_be_off(self, site: Any, value: str) -> None:
        site.run("true", authority={"egressRules": RULES}, variables={"CELLOS_TRUST_PLANE_EVENTS": value})
        assert site.types[:2] == [SCOPE[0], "lifecycle.v1.started"]

    def test_names_are_resolved_where_that_is_wanted(self, site: Any) -> None:
        site.run("true", authority={"egressRules": RULES}, variables={"CELLOS_RESOLVE_EGRESS_DNS": "1", "CELLOS_RUN_ID": "r1"})
        known, unknown = [event["data"] for event in site.events if event["type"].endswith("dns_resolution")]
        assert (known["fqdn"], known["receiptId"]) == ("localhost", "rcp-r1-localhost")
        assert {"address": "127.0.0.1", "family": "inet", "port": 443} in known["targets"]
        assert (unknown["fqdn"], unknown["targets"]) == ("nowhere.invalid", [])
        decision, resolution = "observability.v1.l7_egress_decision", "observability.v1.dns_resolution"
        assert site.types[2:6] == [decision, resolution] * 2

    def test_what_a_gate_would_say_of_names(self, site: Any) -> None:
        dns = {
            "hostnameAllowlist": ["a.example.org"],
            "blockDirectWorkloadDns": True,
            "resolvers": [{"resolverId": "site", "endpoint": "10.0.0.53:53", "protocol": "do53-udp"}],
        }
        rules = [{"host": "10.0.0.53", "port": 53}, {"host": "8.8.8.8", "port": 53}]
        variables = {"CELLOS_L7_GATE_OBSERVABILITY": "true", "CELLOS_TRUST_PLANE_EVENTS": "0"}
        site.run("true", authority={"egressRules": rules, "dnsAuthority": dns}, variables=variables)
        said = [event["data"] for event in site.events if event["type"].endswith("l7_egress_decision")]
        assert [(each["action"], each["sniHost"], each["ruleRef"]) for each in said] == [
            ("allow", "a.example.org", "authority.dnsAuthority.hostnameAllowlist[0]"),
            ("deny", "8.8.8.8", "authority.egressRules[1]"),
        ]
        site.jsonl.unlink()
        site.run("true", authority={"egressRules": rules, "dnsAuthority": dns}, variables={"CELLOS_TRUST_PLANE_EVENTS": "0"})
        assert "observability.v1.l7_egress_decision" not in site.types

    @pytest.mark.linux_backend
    def test_what_holds_the_command(self, site: Any) -> None:
        """The stub has what this process has; a cell has nothing, and a network of its own."""
        reports = {}
        for backend in ("stub", "linux"):
            done = site.run(
                "sed", "-n", r"s/^\(Cap\|NoNewPrivs\|Seccomp:\)/\1/p", "/proc/self/status", variables={"CELLOS_CELL_BACKEND": backend}
            )
            security = reports[backend] = site.data("observability.v1.container_security")
            kernel = dict(line.split(":\t") for line in done.stdout.splitlines())
            names = {"capEff": "CapEff", "capPrm": "CapPrm", "capBnd": "CapBnd", "capAmb": "CapAmb", "capInh": "CapInh"}
            assert {name: security[name] for name in names} == {name: kernel[row] for name, row in names.items()}
            assert (security["noNewPrivs"], security["seccompMode"]) == (kernel["NoNewPrivs"] == "1", int(kernel["Seccomp"]))
            own_network = {*NETWORK, *ENFORCED} <= set(site.types)
            started = site.data("lifecycle.v1.started")
            assert (started["backend"], own_network, bool(started["enforced"])) == (backend, backend == "linux", backend == "linux")
            site.jsonl.unlink()
        assert (reports["linux"]["privileged"], reports["linux"]["noNewPrivs"], reports["linux"]["seccompMode"]) == (False, True, 2)
        every = (2 << int(Path("/proc/sys/kernel/cap_last_cap").read_text())) - 1
        assert reports["stub"]["privileged"] == (int(reports["stub"]["capEff"], 16) == every)

    @pytest.mark.linux_backend
    def test_the_network_and_how_the_command_ended(self, site: Any) -> None:
        site.variables["CELLOS_CELL_BACKEND"] = "linux"
        for argv, code, error in (["true"], 0, False), (["sh", "-c", "exit 3"], 3, False), (["/no/such"], -1, True):
            site.run(*argv)
            policy, enforcement = site.data(NETWORK[0]), site.data(ENFORCED[0])
            assert (policy["isolationMode"], policy["declaredEgressCount"], policy["declaredEgress"]) == ("clone_newnet", 0, [])
            assert enforcement["isolationMode"] == "clone_newnet"
            assert (enforcement["commandExitCode"], "spawnError" in enforcement) == (code, error)
            assert (enforcement["nftRulesApplied"], enforcement["supplementaryEgressFilterActive"]) == (False, False)
            site.jsonl.unlink()

    def test_the_books(self, site: Any) -> None:
        site.run("true")
        plain = site.data("compliance.v1.summary")
        assert (plain["secretDeliveryMode"], plain["resourceLimitsPresent"], plain["exportTargetCount"]) == ("env", False, 0)
        assert (plain["commandExitCode"], plain["lifetimeTtlSeconds"]) == (0, 60)
        assert not {"placement", "policyPackId", "policyPackVersion", "policyBundleDigest", "subjectUrns"} & set(plain)
        site.jsonl.unlink()
        site.variables |= {"CELLOS_BROKER": "env", "CELLOS_SECRET_A": "a-value"}
        site.run(
            "sh",
            "-c",
            "exit 5",
            run={"secretDelivery": "runtimeBroker", "limits": {}},
            authority={"secretRefs": ["A"], "egressRules": RULES},
            placement={"poolId": "p"},
            policy={"packId": "ci", "packVersion": "1.2.0", "bundleDigest": "sha256:1"},
            lifetime={"ttlSeconds": 61},
            export={"targets": [{"kind": "s3", "name": "t", "bucket": "b"}]},
        )
        full = site.data("compliance.v1.summary")
        assert (full["secretDeliveryMode"], full["resourceLimitsPresent"], full["exportTargetCount"]) == ("runtimeBroker", True, 1)
        assert (full["commandExitCode"], full["lifetimeTtlSeconds"], full["egressRuleCount"]) == (5, 61, 2)
        assert (full["policyPackId"], full["policyPackVersion"], full["policyBundleDigest"]) == ("ci", "1.2.0", "sha256:1")
        assert full["placement"] == site.data("lifecycle.v1.started")["placement"] == {"poolId": "p"}
        books = site.data("authority.v1.homeostasis")
        assert (books["declaredEgressRules"], books["exercisedEgressConnections"], books["authorityEfficiency"]) == (2, None, 1.0)
        assert books["exercisedEgressReason"] == "telemetry_pending_L2-04"
        assert (books["declaredSecretCount"], books["recommendedRemovals"]) == (1, [{"kind": "secretRef", "name": "A"}])
