from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ConfigError
from cellos.supervisor.config import (
    BACKENDS,
    BROKERS,
    NOT_BUILT,
    SETTINGS_ONLY,
    Config,
    Fallback,
    Labels,
    read_config,
    read_profile,
    refuse_fallbacks,
)

HARDENED = {"CELLOS_DEPLOYMENT_PROFILE": "hardened", "CELLOS_AUTHORITY_KEYS_PATH": "/keys"}
# Member of Config, and the variable that sets it.
TRUTHY = {
    "allow_unknown_fields": "CELLOS_ALLOW_UNKNOWN_FIELDS",
    "allow_downgrade": "CELLOS_POLICY_ALLOW_DOWNGRADE",
    "require_trust_keys": "CELLOS_REQUIRE_TRUST_VERIFY_KEYS",
    "l7_gate": "CELLOS_L7_GATE_OBSERVABILITY",
    "resolve_egress": "CELLOS_RESOLVE_EGRESS_DNS",
    "output_events": "CELLOS_OUTPUT_EVENTS",
    "strict": "CELLOS_STRICT_CONFIG",
}
PRESENT = {
    "require_derivation": "CELLOS_REQUIRE_AUTHORITY_DERIVATION",
    "require_telemetry": "CELLOS_REQUIRE_TELEMETRY_DECLARED",
    "noop_sink": "CELL_OS_USE_NOOP_SINK",
    "require_jetstream": "CELL_OS_REQUIRE_JETSTREAM",
}
ON_BY_DEFAULT = {"require_scoped": "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS", "trust_plane": "CELLOS_TRUST_PLANE_EVENTS"}
PATHS = {
    "authority_keys": "CELLOS_AUTHORITY_KEYS_PATH",
    "policy_pack": "CELLOS_POLICY_PACK_PATH",
    "authz_policy": "CELLOS_AUTHZ_POLICY_PATH",
    "trust_keys": "CELLOS_TRUST_VERIFY_KEYS_PATH",
    "jsonl": "CELL_OS_JSONL_EVENTS",
    "output_dir": "CELLOS_OUTPUT_DIR",
}
TEXTS = {
    "namespace": "CELLOS_K8S_NAMESPACE",
    "nats_url": "NATS_URL",
    "dead_letters": "CELLOS_DLQ_DIR",
    "caller": "CELLOS_CALLER_IDENTITY",
}
LABELS = {
    "keyset_id": "CELLOS_TRUST_KEYSET_ID",
    "resolver_kid": "CELLOS_TRUST_RESOLVER_KID",
    "l7_kid": "CELLOS_TRUST_L7_KID",
}


def settings(config: Config) -> dict[str, Any]:
    """What was read, but for the environment itself."""
    return {name: getattr(config, name) for name in Config.__struct_fields__ if name != "environment"}


def changed(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that an environment makes other than they would be."""
    ordinary = settings(Config())
    return {name: value for name, value in settings(read_config(environment)).items() if value != ordinary[name]}


def refused(environment: Mapping[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(environment)
    return str(caught.value)


def by_name(table: Mapping[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("member", "variable"), table.items(), ids=list(table.values()))


def test_nothing_set() -> None:
    assert read_config({}) == Config()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CELLOS_CELL_BACKEND": "stub"}, {"backend": "stub"}),
        ({"CELLOS_CELL_BACKEND": "gvisor"}, {"backend": "gvisor"}),
        ({"CELLOS_BROKER": "github-oidc"}, {"broker": "github-oidc"}),
        ({"CELLOS_RUN_ID": "run-local-001"}, {"run_id": "run-local-001"}),
        ({"CELLOS_RUN_ID": "x" * 256}, {"run_id": "x" * 256}),
        ({"CELLOS_RUN_ID": "läuft"}, {"run_id": "läuft"}),
        ({"CELLOS_RUN_TIMEOUT_MS": " 1500 "}, {"run_timeout_ms": 1500}),
        ({"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": " /usr/bin/ ,, /opt\\x "}, {"argv0_prefixes": ("/usr/bin", "/opt/x")}),
        ({"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": "/"}, {"argv0_prefixes": ("",)}),
        ({"CELLOS_REDACT_EVENT_FIELDS": "argv, path"}, {"redacted_fields": frozenset({"argv", "path"})}),
        ({"CELLOS_REDACT_EVENT_FIELDS": "Defaults"}, {"redacted_fields": frozenset({"argv", "path", "reason"})}),
        ({"CELLOS_OUTPUT_MAX_BYTES": "0"}, {"output_bytes": 0}),
        ({"CELLOS_OUTPUT_MAX_BYTES": " 4096 "}, {"output_bytes": 4096}),
        ({"CELLOS_TRUST_KEYSET_PATH": " /k "}, {"keyset": ("/k",)}),
        (
            {"CELLOS_TRUST_KEYSET_CHAIN_PATH": "/a, /b\n/c,,\n", "CELLOS_TRUST_KEYSET_PATH": "/k"},
            {"keyset": ("/a", "/b", "/c"), "keyset_variable": "CELLOS_TRUST_KEYSET_CHAIN_PATH"},
        ),
        ({"CELLOS_TRUST_KEYSET_CHAIN_PATH": " , "}, {"keyset_variable": "CELLOS_TRUST_KEYSET_CHAIN_PATH"}),
        ({"CELLOS_DEPLOYMENT_PROFILE": " Portable "}, {"profile": "portable"}),
    ],
)
def test_what_a_variable_sets(environment: dict[str, str], expected: dict[str, Any]) -> None:
    assert changed(environment) == expected


@pytest.mark.parametrize("backend", [*BACKENDS, *SETTINGS_ONLY])
def test_every_backend_has_its_name(backend: str) -> None:
    assert read_config({"CELLOS_CELL_BACKEND": backend}).backend == backend


@pytest.mark.parametrize("broker", BROKERS)
def test_every_broker_has_its_name(broker: str) -> None:
    assert read_config({"CELLOS_BROKER": broker}).broker == broker


@by_name(TRUTHY)
def test_what_has_to_be_turned_on(member: str, variable: str) -> None:
    for word in ("1", "true", "YES", " on "):
        assert changed({variable: word}) == {member: True}
    for word in ("", "0", "false", "no", "off", "2", "enabled", "truee"):
        assert changed({variable: word}) == {}


@by_name(PRESENT)
def test_what_is_on_when_it_is_there(member: str, variable: str) -> None:
    for word in ("1", "", " ", "true", "yes", "anything"):
        assert changed({variable: word}) == {member: True}
    for word in ("0", "false", "No", " OFF "):
        assert changed({variable: word}) == {}, "whoever writes that means it"


@by_name(ON_BY_DEFAULT)
def test_what_has_to_be_turned_off(member: str, variable: str) -> None:
    for word in ("0", "false", "NO", " off "):
        assert changed({variable: word}) == {member: False}
    for word in ("", "1", "true", "none", "disabled"):
        assert changed({variable: word}) == {}


@by_name(PATHS)
def test_paths_are_absolute_and_not_blank(member: str, variable: str) -> None:
    assert changed({variable: "some/file"}) == {member: os.path.abspath("some/file")}
    assert changed({variable: "/some/file"}) == {member: "/some/file"}
    for blank in ("", " "):
        assert refused({variable: blank}) == f"{variable} is set, but empty; unset it or give a path"


@by_name(TEXTS)
def test_texts_are_trimmed_and_blank_is_not_set(member: str, variable: str) -> None:
    assert changed({variable: " here "}) == {member: "here"}
    assert changed({variable: " "}) == {}


@by_name(LABELS)
def test_labels_are_taken_as_they_are(member: str, variable: str) -> None:
    for text in ("cellos:mine", "", " "):
        assert changed({variable: text}) == {"labels": msgspec.structs.replace(Labels(), **{member: text})}


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (
            "CELLOS_CELL_BACKEND",
            "docker",
            "CELLOS_CELL_BACKEND: value 'docker' is none of linux, stub, firecracker, gvisor; nothing is fallen back to",
        ),
        (
            "CELLOS_CELL_BACKEND",
            "Stub",
            "CELLOS_CELL_BACKEND: value 'Stub' is none of linux, stub, firecracker, gvisor; nothing is fallen back to",
        ),
        (
            "CELLOS_BROKER",
            "vault",
            "CELLOS_BROKER: value 'vault' is none of memory, env, file, github-oidc, vault-approle; nothing is fallen back to",
        ),
        ("CELLOS_RUN_TIMEOUT_MS", "soon", 'invalid CELLOS_RUN_TIMEOUT_MS: "soon"'),
        ("CELLOS_RUN_TIMEOUT_MS", "", 'invalid CELLOS_RUN_TIMEOUT_MS: ""'),
        ("CELLOS_RUN_TIMEOUT_MS", "0", "CELLOS_RUN_TIMEOUT_MS must be > 0"),
        (
            "CELLOS_REDACT_EVENT_FIELDS",
            "runId",
            (
                "CELLOS_REDACT_EVENT_FIELDS: cannot redact runId: events could no longer be attributed to their run or verified; "
                "leave it out"
            ),
        ),
        ("CELLOS_RUN_ID", "two words", "CELLOS_RUN_ID: 'two words' is not a run id (at most 256 printable characters, no blanks)"),
        ("CELLOS_RUN_ID", "a\nb", "CELLOS_RUN_ID: 'a\\nb' is not a run id (at most 256 printable characters, no blanks)"),
        ("CELLOS_RUN_ID", "x" * 257, f"CELLOS_RUN_ID: '{'x' * 40}' is not a run id (at most 256 printable characters, no blanks)"),
        (
            "CELLOS_RUN_ARGV0_ALLOW_PREFIXES",
            "/usr/bin,bin",
            "CELLOS_RUN_ARGV0_ALLOW_PREFIXES: 'bin' is not an absolute path; no program could be under it",
        ),
        ("CELLOS_OUTPUT_MAX_BYTES", "", "CELLOS_OUTPUT_MAX_BYTES: '' is not a number of bytes; leave it out for 1048576"),
        ("CELLOS_OUTPUT_MAX_BYTES", "-1", "CELLOS_OUTPUT_MAX_BYTES: '-1' is not a number of bytes; leave it out for 1048576"),
        ("CELLOS_OUTPUT_MAX_BYTES", "1M", "CELLOS_OUTPUT_MAX_BYTES: '1M' is not a number of bytes; leave it out for 1048576"),
        ("CELLOS_OUTPUT_MAX_BYTES", "\u0661", "CELLOS_OUTPUT_MAX_BYTES: '\u0661' is not a number of bytes; leave it out for 1048576"),
        ("CELLOS_OUTPUT_MAX_BYTES", "9" * 13, f"CELLOS_OUTPUT_MAX_BYTES: '{'9' * 13}' is not a number of bytes; leave it out for 1048576"),
        (
            "CELLOS_DEPLOYMENT_PROFILE",
            "Hard",
            "CELLOS_DEPLOYMENT_PROFILE: unknown profile \"Hard\" — expected 'hardened' or 'portable'",
        ),
    ],
)
def test_what_cannot_be_used_is_named(variable: str, value: str, text: str) -> None:
    assert refused({variable: value}) == text


@pytest.mark.parametrize(
    "environment",
    [
        {"CELLOS_BROKER": "memory"},
        {"CELLOS_BROKER": ""},
        {"CELLOS_CELL_BACKEND": ""},
        {"CELLOS_CELL_BACKEND": "linux"},
        {"CELLOS_RUN_ID": ""},
        {"CELLOS_RUN_ARGV0_ALLOW_PREFIXES": " , "},
        {"CELLOS_REDACT_EVENT_FIELDS": " "},
        {"CELLOS_TRUST_KEYSET_PATH": " "},
        {"CELLOS_DEPLOYMENT_PROFILE": ""},
        {"UNRELATED": "x", "HOME": "/home/u"},
    ],
)
def test_what_asks_for_nothing_is_nothing(environment: Mapping[str, str]) -> None:
    assert changed(environment) == {}


def test_the_environment_is_kept_for_those_who_read_their_own() -> None:
    given = {"CELLOS_SECRET_TOKEN": "s3cret", "CELLOS_EXPORT_DIR": "/out"}
    config = read_config(given)
    assert config.environment == given
    assert "s3cret" not in repr(config), "it may end up in a traceback"


class TestNotBuilt:
    @pytest.mark.parametrize(("name", "what", "words"), NOT_BUILT, ids=[name for name, _, _ in NOT_BUILT])
    def test_to_ask_for_it_is_an_error(self, name: str, what: str, words: frozenset[str]) -> None:
        for word in words:
            assert refused({name: f" {word.upper()} "}) == f"{name} is set, but {what} not built yet; unset it to run without"

    @pytest.mark.parametrize("name", [name for name, _, _ in NOT_BUILT])
    @pytest.mark.parametrize("word", ["", "0", "off", "no", "none"])
    def test_not_to_ask_is_none(self, name: str, word: str) -> None:
        assert changed({name: word}) == {}

    @pytest.mark.parametrize("name", ["CELLOS_PER_FLOW_ENFORCEMENT_EVENTS", "CELLOS_PER_FLOW_REALTIME", "CELLOS_FIRECRACKER_PER_FLOW_EBPF"])
    def test_some_know_only_one_word(self, name: str) -> None:
        assert changed({name: "true"}) == {}


class TestProfiles:
    @pytest.mark.parametrize("word", ["hardened", "HARDENED", " Hardened "])
    def test_hardened_asks_for_everything_that_nobody_set(self, word: str) -> None:
        environment = {**HARDENED, "CELLOS_DEPLOYMENT_PROFILE": word}
        assert changed(environment) == {
            "profile": "hardened",
            "authority_keys": "/keys",
            "require_jetstream": True,
            "require_derivation": True,
            "require_telemetry": True,
            "strict": True,
        }
        implied = read_config(environment).environment
        assert {name: implied[name] for name in implied.keys() - environment.keys()} == dict.fromkeys(
            (
                "CELL_OS_REQUIRE_JETSTREAM",
                "CELLOS_REQUIRE_AUTHORITY_DERIVATION",
                "CELLOS_REQUIRE_TELEMETRY_DECLARED",
                "CELLOS_STRICT_CONFIG",
                "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS",
            ),
            "1",
        )

    @pytest.mark.parametrize(
        ("variable", "member"),
        [
            ("CELL_OS_REQUIRE_JETSTREAM", "require_jetstream"),
            ("CELLOS_REQUIRE_AUTHORITY_DERIVATION", "require_derivation"),
            ("CELLOS_REQUIRE_TELEMETRY_DECLARED", "require_telemetry"),
            ("CELLOS_STRICT_CONFIG", "strict"),
        ],
    )
    def test_what_the_operator_set_is_kept(self, variable: str, member: str) -> None:
        assert getattr(read_config({**HARDENED, variable: "0"}), member) is False

    def test_save_for_permissive_tokens(self) -> None:
        assert read_config({**HARDENED, "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS": "0"}).require_scoped is True

    def test_hardened_needs_keys(self) -> None:
        text = "CELLOS_DEPLOYMENT_PROFILE=hardened requires CELLOS_AUTHORITY_KEYS_PATH to be set"
        assert refused({"CELLOS_DEPLOYMENT_PROFILE": "hardened"}) == text

    def test_portable_asks_for_nothing(self) -> None:
        assert changed({"CELLOS_DEPLOYMENT_PROFILE": "portable"}) == {"profile": "portable"}

    def test_no_profile_is_none(self) -> None:
        assert read_profile({}) is None


class TestStrict:
    def test_it_lists_all_that_was_not_followed(self) -> None:
        assert refused({"CELLOS_STRICT_CONFIG": "1", "CELLOS_CELL_BACKEND": "x", "CELLOS_BROKER": "y"}) == (
            "CELLOS_STRICT_CONFIG is set: refusing to start with 2 ignored/misconfigured env var(s): "
            "[CELLOS_CELL_BACKEND=\"x\" (value 'x' is none of linux, stub, firecracker, gvisor; nothing is fallen back to); "
            "CELLOS_BROKER=\"y\" (value 'y' is none of memory, env, file, github-oidc, vault-approle; nothing is fallen back to)]"
        )

    def test_nothing_to_refuse(self) -> None:
        refuse_fallbacks([])

    def test_one(self) -> None:
        with pytest.raises(ConfigError) as caught:
            refuse_fallbacks([Fallback(variable="NATS_URL", value="nats://h", reason="refused")])
        assert str(caught.value) == (
            'CELLOS_STRICT_CONFIG is set: refusing to start with 1 ignored/misconfigured env var(s): [NATS_URL="nats://h" (refused)]'
        )


READ = [
    "CELLOS_CELL_BACKEND", "CELLOS_BROKER", "CELLOS_DEPLOYMENT_PROFILE", "CELLOS_RUN_ID", "CELLOS_RUN_TIMEOUT_MS",
    "CELLOS_RUN_ARGV0_ALLOW_PREFIXES", "CELLOS_OUTPUT_MAX_BYTES", "CELLOS_REDACT_EVENT_FIELDS", *TRUTHY.values(), *PRESENT.values(),
    *PATHS.values(), *TEXTS.values(),
]  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(READ), st.text("019aé \n,/.\\", max_size=6) | st.sampled_from(["hardened", "1", "0", "stub", "/x"]), max_size=4
    )
)
def test_any_environment_is_read_or_refused_by_name(environment: dict[str, str]) -> None:
    named = True
    try:
        read_config(environment)
    except ConfigError as error:
        named = any(name in str(error) for name in environment)
    assert named
