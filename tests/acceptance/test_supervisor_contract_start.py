"""How `cellos-supervisor` starts: profiles, strict configuration, `--validate`, the gates before a cell and their order."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

MISSING = "CELLOS_TEST_FORCE_MISSING_ISOLATION_PRIMITIVES"
TELEMETRY = {"channel": "vsock-cbor", "events": ["process.spawned"], "agentVersion": "1.2.0-rc.1"}
NO_DERIVATION = (
    "CELLOS_REQUIRE_AUTHORITY_DERIVATION is set: spec declares authority (egressRules or secretRefs) without an authorityDerivation token"
    " — cryptographic authority proof is required"
)
NO_TELEMETRY = (
    "CELLOS_REQUIRE_TELEMETRY_DECLARED is set: spec.telemetry block is required — every admitted cell must declare its telemetry intent"
    " (channel, events, agent version) under hardened deployments"
)
RULE = {"host": "pkg.example.org", "port": 443, "protocol": "tls"}
YAML = """\
# a cell
apiVersion: cellos.io/v1
kind: ExecutionCell
spec:
  id: from-yaml
  authority: {}
  lifetime: {ttlSeconds: 60}
  run:
    argv: [sh, -c, "echo yaml"]
    secretDelivery: env
"""


class TestProfiles:
    @pytest.mark.parametrize(
        ("profile", "banner"),
        [
            ({}, "Hardened (isolation enforced (unshare/seccomp/cgroup v2 required) — 1.0 default)"),
            (
                {"CELLOS_DEPLOYMENT_PROFILE": "portable"},
                "Portable (isolation NOT enforced — explicit operator opt-out via CELLOS_DEPLOYMENT_PROFILE=portable)",
            ),
            ({"CELLOS_DEPLOYMENT_PROFILE": " PORTABLE "}, "Portable "),
        ],
    )
    def test_a_start_says_which_it_is(self, site: Any, profile: dict[str, str], banner: str) -> None:
        done = site.run("true", variables={"RUST_LOG": "info", **profile})
        assert done.returncode == 0
        assert f"[cellos-supervisor] startup-profile: {banner}" in done.stderr

    @pytest.mark.parametrize("profile", [{}, {"CELLOS_DEPLOYMENT_PROFILE": "HARDENED", "CELLOS_AUTHORITY_KEYS_PATH": "/dev/null"}])
    @pytest.mark.parametrize(
        ("forced", "listed"),
        [
            ("unshare", '["unshare"]'),
            ("cgroup_v2, seccomp", '["seccomp", "cgroup-v2"]'),
            ("CGROUPV2", '["cgroup-v2"]'),
            ("all", '["unshare", "seccomp", "cgroup-v2"]'),
            ("*", '["unshare", "seccomp", "cgroup-v2"]'),
        ],
    )
    def test_a_host_that_cannot_isolate_runs_nothing(self, site: Any, profile: dict[str, str], forced: str, listed: str) -> None:
        done = site.run("true", variables={MISSING: forced, **profile})
        site.refused(
            done,
            f"Error: CELLOS_DEPLOYMENT_PROFILE=hardened (1.0 default): host is missing isolation primitives: {listed}. Set "
            "CELLOS_DEPLOYMENT_PROFILE=portable to run without isolation enforcement (audit-trail-only mode).",
        )

    def test_unless_that_is_wanted(self, site: Any) -> None:
        done = site.run("true", variables={MISSING: "all", "CELLOS_DEPLOYMENT_PROFILE": "portable"})
        assert done.returncode == 0
        assert "host is missing isolation primitives: " in done.stderr

    def test_words_that_are_no_primitive_take_nothing_away(self, site: Any) -> None:
        assert site.run("true", variables={MISSING: "gravity"}).returncode == 0

    def test_an_unknown_one_is_refused(self, site: Any) -> None:
        text = "Error: CELLOS_DEPLOYMENT_PROFILE: unknown profile \"hardend\" — expected 'hardened' or 'portable'"
        site.refused(site.run("true", variables={"CELLOS_DEPLOYMENT_PROFILE": "hardend"}), text)


class TestHardened:
    @pytest.fixture
    def hardened(self, site: Any) -> Any:
        keys = site.written("keys.json", {})
        site.variables |= {"CELLOS_DEPLOYMENT_PROFILE": "hardened", "CELLOS_AUTHORITY_KEYS_PATH": keys, "NATS_URL": "nats://127.0.0.1:1"}
        return site

    def test_it_needs_authority_keys(self, hardened: Any) -> None:
        del hardened.variables["CELLOS_AUTHORITY_KEYS_PATH"]
        text = "Error: CELLOS_DEPLOYMENT_PROFILE=hardened requires CELLOS_AUTHORITY_KEYS_PATH to be set"
        hardened.refused(hardened.run("true"), text)

    def test_without_it_nothing_of_that_is_asked(self, site: Any) -> None:
        done = site.run("true", authority={"egressRules": [RULE]})
        assert done.returncode == 0

    def test_authority_needs_a_token_and_cells_telemetry(self, hardened: Any) -> None:
        hardened.refused(hardened.run("true", authority={"egressRules": [RULE]}), NO_DERIVATION)
        hardened.refused(hardened.run("true"), NO_TELEMETRY)
        hardened.refused(hardened.validate("true"), NO_TELEMETRY)

    def test_and_runs_jetstream(self, hardened: Any) -> None:
        done = hardened.run("true", telemetry=TELEMETRY)
        hardened.refused(done, "Error: CELL_OS_REQUIRE_JETSTREAM is set but JetStream connect failed (broker nats://127.0.0.1:1): ")

    def test_which_the_noop_sink_does_not_get_around(self, hardened: Any) -> None:
        done = hardened.run("true", telemetry=TELEMETRY, variables={"CELL_OS_USE_NOOP_SINK": "1"})
        hardened.refused(done, "CELL_OS_USE_NOOP_SINK contradicts CELLOS_DEPLOYMENT_PROFILE=hardened")

    @pytest.mark.linux_backend
    @pytest.mark.needs("limit memory", "limit processor time")
    def test_what_the_operator_says_himself_is_kept(self, hardened: Any) -> None:
        """Each of these would refuse the run if the profile's own value were used."""
        spec: dict[str, Any] = {"authority": {"secretRefs": ["A"]}}
        hardened.variables |= {"CELLOS_CELL_BACKEND": "linux", "CELLOS_BROKER": "env", "CELLOS_SECRET_A": "x"}
        said = {
            "CELL_OS_REQUIRE_JETSTREAM": "0",
            "CELLOS_REQUIRE_AUTHORITY_DERIVATION": "0",
            "CELLOS_REQUIRE_TELEMETRY_DECLARED": "0",
            "CELLOS_STRICT_CONFIG": "0",
            "CELLOS_DLQ_DIR": "/nowhere",
        }
        done = hardened.run("true", **spec | {"variables": said})
        assert done.returncode == 0, done.stderr
        assert 'not followed: CELLOS_DLQ_DIR="/nowhere"' in done.stderr
        for name in list(said)[:4]:
            done = hardened.run("true", **spec | {"variables": {other: value for other, value in said.items() if other != name}})
            assert f"Error: {name} is set" in done.stderr


class TestStrictConfiguration:
    def test_everything_that_was_not_followed_is_listed(self, site: Any) -> None:
        target = {"kind": "http", "name": "drop-1", "baseUrl": "http://127.0.0.1:1/in"}
        variables = {"CELLOS_STRICT_CONFIG": " Yes ", "CELLOS_DLQ_DIR": "/nowhere", "CELL_OS_USE_NOOP_SINK": "1"}
        done = site.run("true", export={"targets": [target]}, variables=variables)
        site.refused(done, "Error: CELLOS_STRICT_CONFIG is set: refusing to start with 2 ignored/misconfigured env var(s): [")
        assert re.search(r'CELLOS_EXPORT_HTTP_BASE_URL__DROP_1="" \(.+\); CELLOS_DLQ_DIR="/nowhere" \(.+\)\]\n$', done.stderr)

    @pytest.mark.parametrize("variable", ["CELLOS_CELL_BACKEND", "CELLOS_BROKER"])
    @pytest.mark.parametrize("strict", ["0", "1"])
    def test_an_unknown_backend_or_broker_is_never_fallen_back_from(self, site: Any, variable: str, strict: str) -> None:
        done = site.run("true", variables={variable: "Stub", "CELLOS_STRICT_CONFIG": strict})
        site.refused(done, f'{variable}="Stub"' if strict == "1" else f"{variable}: value 'Stub' is none of ")

    def test_a_server_of_events_that_is_not_there(self, site: Any) -> None:
        done = site.run("true", variables={"CELLOS_STRICT_CONFIG": "1", "NATS_URL": "nats://user:pass@127.0.0.1:1"})
        site.refused(done, 'refusing to start with 1 ignored/misconfigured env var(s): [NATS_URL="nats://127.0.0.1:1" (')

    def test_a_key_that_cannot_sign_is_refused_without_it_too(self, site: Any) -> None:
        variables = {
            "CELLOS_EVENT_SIGNING": "ed25519",
            "CELLOS_EVENT_SIGNING_KID": "k1",
            "CELLOS_EVENT_SIGNING_KEY_BASE64": "bm90LWEta2V5",
        }
        done = site.run("true", variables=variables)
        site.refused(done, 'CELLOS_EVENT_SIGNING_KEY_BASE64="<9 bytes>": CELLOS_EVENT_SIGNING=ed25519 requires a 32-byte key, got 9')
        assert "bm90" not in done.stderr


class TestGates:
    def test_a_token_is_asked_for_before_telemetry_and_that_before_the_namespace(self, site: Any) -> None:
        site.variables |= {
            "CELLOS_REQUIRE_AUTHORITY_DERIVATION": "",
            "CELLOS_REQUIRE_TELEMETRY_DECLARED": "",
            "CELLOS_K8S_NAMESPACE": " ci ",
        }
        where = {"placement": {"kubernetesNamespace": "prod"}}
        site.refused(site.run("true", authority={"egressRules": [RULE]}, **where), NO_DERIVATION)
        site.refused(site.run("true", authority={"secretRefs": ["A"]}, **where), NO_DERIVATION)
        site.refused(site.run("true", **where), NO_TELEMETRY)
        wrong = "CELLOS_K8S_NAMESPACE=ci: spec.placement.kubernetesNamespace=prod does not match — refusing to admit cell cell-1"
        site.refused(site.run("true", telemetry=TELEMETRY, **where), f"Error: {wrong}\n".rstrip())
        assert site.run("true", telemetry=TELEMETRY, placement={"kubernetesNamespace": "ci"}).returncode == 0

    @pytest.mark.parametrize("authority", [{}, {"egressRules": [], "secretRefs": []}])
    def test_an_empty_bundle_needs_no_token(self, site: Any, authority: dict[str, Any]) -> None:
        site.variables["CELLOS_REQUIRE_AUTHORITY_DERIVATION"] = "1"
        assert site.run("true", authority=authority).returncode == 0
        assert site.validate("true", authority=authority).returncode == 0

    @pytest.mark.parametrize("spec", [{}, {"placement": {"poolId": "a"}}])
    def test_a_document_that_names_no_namespace_may_be_run_in_any(self, site: Any, spec: dict[str, Any]) -> None:
        assert site.run("true", **spec, variables={"CELLOS_K8S_NAMESPACE": "ci"}).returncode == 0

    def test_a_document_is_checked_before_any_of_them(self, site: Any) -> None:
        done = site.run("true", id="../x", variables={"CELLOS_REQUIRE_TELEMETRY_DECLARED": "1"})
        site.refused(done, "Error: invalid cell specification: spec.id must match ")


class TestPrograms:
    @pytest.mark.parametrize(
        ("program", "text"),
        [
            (
                "true",
                (
                    "CELLOS_RUN_ARGV0_ALLOW_PREFIXES is set but argv[0] is not an absolute path"
                    ' (got "true"); use a full path such as /usr/bin/true'
                ),
            ),
            (
                "/bin/true",
                'argv[0] "/bin/true" is not under any allowed prefix from CELLOS_RUN_ARGV0_ALLOW_PREFIXES: ["/usr/bin", "/opt"]',
            ),
            ("/usr/binary", 'argv[0] "/usr/binary" is not under any allowed prefix'),
            ("/usr/bin/../../bin/true", 'argv[0] "/usr/bin/../../bin/true" is not under any allowed prefix'),
        ],
    )
    def test_only_those_under_a_prefix_are_run(self, site: Any, program: str, text: str) -> None:
        done = site.run(program, variables={"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": " /usr/bin/ ,/opt"})
        assert done.returncode == 1
        assert f"Error: {text}" in done.stderr
        assert text in site.data("lifecycle.v1.destroyed")["reason"]
        assert not {"observability.v1.process_spawned", "command.v1.completed"} & set(site.types)

    @pytest.mark.parametrize("prefixes", ["", " , ", "/usr/bin", "/usr/bin/true", "\\usr\\bin\\", "/"])
    def test_others_pass(self, site: Any, prefixes: str) -> None:
        assert site.run("/usr/bin/true", variables={"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": prefixes}).returncode == 0


class TestValidate:
    def summary(self, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        assert done.stdout == json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return said

    def test_what_it_says(self, site: Any) -> None:
        targets = [
            {"kind": "s3", "name": "archive", "bucket": "b"},
            {"kind": "http", "name": "drop", "baseUrl": "http://127.0.0.1:1/in"},
        ]
        site.variables |= {"CELLOS_RUN_ID": "run-7", "CELLOS_TENANT_ID": " acme ", "CELLOS_EXPORT_DIR": "out", "CELLOS_BROKER": "env"}
        done = site.validate("touch", "was-run", id="cell-7", export={"targets": targets})
        assert '"mode": "validate"' in done.stdout
        assert '"specId": "cell-7"' in done.stdout
        path = site.place / "spec.json"
        assert self.summary(done) == {
            "authorityKeysConfigured": False,
            "deploymentProfile": "hardened",
            "eventSink": {
                "jsonlMirrorEnabled": True,
                "primary": "jetstream-or-noop-fallback",
                "subject": "cellos.events.acme.cell-7.run-7",
            },
            "export": {"defaultSink": "local", "namedTargets": [{"kind": "s3", "name": "archive"}, {"kind": "http", "name": "drop"}]},
            "hostBackend": "stub",
            "mode": "validate",
            "policyPackConfigured": False,
            "runId": "run-7",
            "secretBroker": "env",
            "specId": "cell-7",
            "specPath": str(path),
            "specSha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        assert not site.jsonl.exists()
        assert site.left == []
        assert not (site.place / "was-run").exists()

    def test_from_standard_input(self, site: Any) -> None:
        text = json.dumps(site.document("true"))
        with (site.place / "input").open("w+") as file:
            file.write(text)
            file.seek(0)
            said = self.summary(site.on("--validate", "-", stdin=file))
        assert (said["specPath"], said["specSha256"], said["runId"]) == ("-", hashlib.sha256(text.encode()).hexdigest(), "validate")

    def test_the_default_document(self, site: Any) -> None:
        place = site.place / "contracts/examples"
        place.mkdir(parents=True)
        name = "contracts/examples/execution-cell-minimal.valid.json"
        (site.place / name).write_text(json.dumps(site.document("sh", "-c", "echo ran")))
        assert self.summary(site.on("--validate"))["specPath"] == name
        assert site.on().stdout == "ran\n"

    @pytest.mark.parametrize(
        ("variables", "member", "value"),
        [
            ({"CELLOS_CELL_BACKEND": "gvisor"}, "hostBackend", "gvisor"),
            ({"CELLOS_DEPLOYMENT_PROFILE": "portable"}, "deploymentProfile", "portable"),
            ({"CELL_OS_USE_NOOP_SINK": ""}, "eventSink", {"jsonlMirrorEnabled": True, "primary": "noop", "subject": "cellos.events.v1"}),
            ({"CELLOS_EXPORT_HTTP_BASE_URL": "http://127.0.0.1:1/"}, "export", {"defaultSink": "http", "namedTargets": []}),
            ({}, "secretBroker", "memory"),
        ],
    )
    def test_what_is_configured(self, site: Any, variables: dict[str, str], member: str, value: object) -> None:
        assert self.summary(site.validate("true", variables=variables))[member] == value

    @pytest.mark.parametrize(
        ("variables", "spec"),
        [
            ({}, {"authority": {"network": {}}}),
            ({}, {"run": {"timeoutMs": 60_001}}),
            ({}, {"authority": {"secretRefs": ["LD_PRELOAD"]}}),
            ({}, {"run": {"limits": {"gracefulShutdownSeconds": 121}}}),
            ({}, {"export": {"artifacts": [{"name": "a", "path": "a"}]}}),
            ({"CELLOS_CELL_BACKEND": "linux"}, {"authority": {"egressRules": [RULE]}}),
            ({"CELLOS_CELL_BACKEND": "linux"}, {"telemetry": TELEMETRY}),
            ({"CELLOS_CELL_BACKEND": "linux", "CELLOS_SUBPROCESS_SECCOMP": "x"}, {}),
            ({"CELLOS_SUBPROCESS_UNSHARE": "1"}, {}),
            ({"CELLOS_CELL_BACKEND": "firecracker"}, {}),
            ({"CELLOS_BROKER": "vault-approle"}, {}),
            ({"CELLOS_RUN_TIMEOUT_MS": "0"}, {}),
            ({"CELLOS_EXPORT_HTTP_BASE_URL": "ftp://127.0.0.1/"}, {"export": {}}),
            ({"CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": "0", "CELLOS_EXPORT_HTTP_BASE_URL": "http://127.0.0.1:1/"}, {"export": {}}),
            (
                {"CELLOS_CA_BUNDLE": "/nowhere", "CELLOS_EXPORT_HTTP_BASE_URL": "https://127.0.0.1:1/"},
                {"export": {"artifacts": [{"name": "a", "path": "a"}]}},
            ),
            ({"CELLOS_POLICY_PACK_PATH": "/nowhere"}, {}),
            ({"CELLOS_AUTHORITY_KEYS_PATH": "/nowhere"}, {}),
            ({"CELLOS_AUTHZ_POLICY_PATH": "/nowhere"}, {}),
            ({"CELLOS_TRUST_VERIFY_KEYS_PATH": "/nowhere"}, {}),
            ({"CELLOS_EVENT_SIGNING": "rsa"}, {}),
            ({"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": "/opt"}, {}),
            ({"CELLOS_EVENTS_SUBJECT_TEMPLATE": "a..b"}, {}),
            ({MISSING: "unshare"}, {}),
        ],
    )
    def test_what_a_run_would_refuse_is_refused_in_the_same_words(self, site: Any, variables: dict[str, str], spec: dict[str, Any]) -> None:
        done = site.validate("true", **spec, variables=variables)
        site.refused(done, "Error: ")
        assert done.stderr.splitlines()[-1] == site.run("true", **spec, variables=variables).stderr.splitlines()[-1]


class TestDocuments:
    @pytest.mark.parametrize("name", ["cell.yaml", "cell.yml"])
    def test_yaml(self, site: Any, name: str) -> None:
        done = site.on(site.written(name, YAML))
        assert (done.returncode, done.stdout) == (0, "yaml\n"), done.stderr
        assert site.data("lifecycle.v1.started")["specHash"] == hashlib.sha256(YAML.encode()).hexdigest()
        assert json.loads(site.on("--validate", site.written(name, YAML)).stdout)["specId"] == "from-yaml"

    def test_yaml_is_held_to_the_same_rules(self, site: Any) -> None:
        site.refused(site.on(site.written("cell.yaml", YAML + "  id: again\n")), "line 11 column ")
        site.refused(site.on(site.written("cell.yaml", YAML.replace("argv:", "argb:"))), "spec.run.argb")

    def test_a_document_that_comes_late_is_waited_for(self, site: Any, ends: Any) -> None:
        process = site.commands.start("cellos-supervisor", "-", variables=site.variables, stdin=subprocess.PIPE)
        ends(process)
        for character in json.dumps(site.document("sh", "-c", "cat; echo done")):
            process.stdin.write(character)
            process.stdin.flush()
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "done\n"), "the command has no input of its own"


def test_errors_name_no_python(site: Any, tmp_path: Path) -> None:
    for arguments in ([str(tmp_path)], ["/nowhere"], ["--validate", "/nowhere"], ["a", "b"], ["--wat"], [""], ["-x"]):
        done = site.on(*arguments)
        site.refused(done, "Error: ")
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
