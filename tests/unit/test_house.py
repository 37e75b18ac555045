"""The house keeps what it says about itself: locks, reasons of dependencies, links and commands of the pages, variables, events."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from cellos.artifacts.targets import open_targets
from cellos.cli.group import VERBS, cellos
from cellos.cli.up import Files, status
from cellos.client.address import Address
from cellos.controller.config import VARIABLES as CONTROLLER_VARIABLES
from cellos.core import events, observations
from cellos.core.documents import CellSpec, Identity, parse_execution_cell
from cellos.core.events import Draft, RunIdentity
from cellos.eventlog.connect import VARIABLES as NATS_VARIABLES
from cellos.eventlog.stream import VARIABLES as STREAM_VARIABLES
from cellos.fleet.config import VARIABLES as FLEET_VARIABLES
from cellos.fleet.config import read_config as read_fleet_config
from cellos.fleet.config import table as fleet_table
from cellos.http import timeouts
from cellos.node.config import VARIABLES as NODE_VARIABLES
from cellos.ports import Receipt, Residue
from cellos.sandbox.cures import CURES
from cellos.sandbox.probe import OUTSIDE, REQUIRED
from cellos.server.config import VARIABLES as SERVER_VARIABLES
from cellos.supervisor.config import read_config
from cellos.supervisor.variables import SECTIONS, UNUSED, tables

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}


def pins(lock: Path) -> dict[str, str]:
    """Name to the text of its entry."""
    entries = re.findall(r"^([a-z0-9._-]+)==((?:.*\\\n)*.*)", lock.read_text(), re.MULTILINE)
    return dict(entries)


def reasons(heading: str) -> dict[str, str]:
    """Package to reason, from a table of the dependencies page."""
    section = (ROOT / "docs/reference/dependencies.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    [table] = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)  # a line between its rows would cut it in two
    rows = re.findall(r"^\| ([a-z0-9._-]+) \| (.+) \|$", table, re.MULTILINE)
    return {name: reason for name, reason in rows if name != "package"}


@pytest.mark.parametrize(
    ("heading", "requirements"),
    [("Run time", PROJECT["dependencies"]), ("Development", PROJECT["optional-dependencies"]["dev"])],
)
def test_every_dependency_has_its_reason_and_no_other_has(heading: str, requirements: list[str]) -> None:
    assert reasons(heading).keys() == names(requirements)


def test_the_run_time_stays_small() -> None:
    assert len(PROJECT["dependencies"]) <= 20


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_are_hashed_and_name_no_place(lock: Path) -> None:
    entries = pins(lock)
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries.values())
    assert not re.search(r"https?://|file://|--index|--find-links|--trusted|(^|\s)/", lock.read_text())


def test_locks_cover_what_the_project_asks_for() -> None:
    runtime, development = pins(ROOT / "requirements/runtime.txt"), pins(ROOT / "requirements/dev.txt")
    assert names(PROJECT["dependencies"]) <= runtime.keys()
    assert names(PROJECT["optional-dependencies"]["dev"]) <= development.keys()
    assert {name: development.get(name, "").split()[0] for name in runtime} == {name: pin.split()[0] for name, pin in runtime.items()}


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_console_scripts_point_to_a_function(command: str) -> None:
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@by_name
def test_scripts_that_a_page_names_can_be_run(page: Path) -> None:
    for script in set(re.findall(r"\bscripts/[a-z]+\b(?!\.)", page.read_text())):
        assert os.access(ROOT / script, os.X_OK), script


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:] if f"({page.relative_to(ROOT / 'docs')})" not in index] == [
        "index.md"
    ]


# ---------------------------------------------------------------- commands


def of_verb(verb: str) -> str:
    """What the page of commands says of a verb, in code."""
    page = (ROOT / "docs/reference/commands.md").read_text()
    [section] = re.findall(rf"^## `cellos {verb}\b.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"`([^`]+)`", section))


def flags(command: click.Command) -> set[str]:
    """All options of a command and of those below it, but for --help."""
    below = [flags(each) for each in command.commands.values()] if isinstance(command, click.Group) else []
    own = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    return set().union(*below, *({*option.opts, *option.secondary_opts} for option in own))


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_a_verb_are_documented(verb: str) -> None:
    command = cellos.get_command(click.Context(cellos), verb)
    assert command is not None
    written = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", of_verb(verb)))
    assert flags(command) - written == set()
    assert {flag for line in of_verb(verb).splitlines() if line.startswith("-") for flag in line.split()[:1]} <= flags(command) | {"-"}


def test_so_is_the_status_of_up() -> None:
    facts = status(Files("d"), Address(url="u", token=None, given=True), "n", [{"node": "n", "slots": 1, "classes": []}])
    assert {*facts, *facts["nodes"][0]} - {*of_verb("up").splitlines()} == set()
    parts = [f"{part}.log" for part in ("server", "controller", "node")]
    assert {*parts, "nats/", "server/", "node/", "token", "address", "nats-url"} - {*of_verb("up").splitlines()} == set()


# ---------------------------------------------------------------- variables

VARIABLES = {variable.name: variable for section in SECTIONS for variable in section.variables}
OF_DAEMONS = {
    row.name for row in (*SERVER_VARIABLES, *CONTROLLER_VARIABLES, *NODE_VARIABLES, *FLEET_VARIABLES, *NATS_VARIABLES, *STREAM_VARIABLES)
}
"""Listed at other pages: docs/reference/server.md, controller.md, node.md, fleet.md."""
NAME = re.compile(r"\b(?:CELLOS|CELL_OS|NATS|ACTIONS|RUST)_[A-Z0-9_]+|\b(?:HTTPS?|NO)_PROXY\b")
NO_VARIABLES = {
    "CELLOS_EVENTS",  # these three are names of streams
    "CELLOS_LEASES",
    "CELLOS_OUTPUT",
    "CELLOS_ATTEMPT",  # these four are given to the program of a member: docs/reference/formation.md
    "CELLOS_CELL_ID",
    "CELLOS_FORMATION",
    "CELLOS_MEMBER_ID",
    "CELLOS_SERVER",  # of `cellos get` and its like: docs/reference/commands.md
    "CELLOS_EVENT_REQUIRE_SIGNED",  # these three are of `cellos events`: docs/reference/commands.md
    "CELLOS_EVENT_VERIFY_HMAC_KEYS_PATH",
    "CELLOS_EVENT_VERIFY_KEYS_PATH",
}


def pattern(name: str) -> re.Pattern[str]:
    """What a row stands for."""
    anything, target = re.escape("*"), re.escape("[__T]")
    word = re.escape(name).replace(anything, "[A-Z0-9_]+").replace(target, "(?:__[A-Z0-9_]+)?").replace("<KEY>", "[A-Z0-9_]+")
    return re.compile(word)


def is_listed(name: str) -> bool:
    """`name` is a variable of the table, or (it ends in `_`) the beginning of some."""
    if name.endswith("_"):
        return any(row.startswith(name) for row in (*VARIABLES, *OF_DAEMONS))
    return name in OF_DAEMONS or any(pattern(row).fullmatch(name) for row in VARIABLES)


class Spy(dict[str, str]):
    """An environment that notes what it is asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: set[str] = set()

    def get(self, name: str, *default: Any) -> Any:
        self.asked.add(name)
        return super().get(name, *default)

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)


def constants() -> set[str]:
    """Every name of a variable in any text of the code, texts for people included: a misspelt one would mislead them."""
    found: set[str] = set()
    for path in (ROOT / "src/cellos").rglob("*.py"):
        if path.name != "variables.py" or path.parent.name != "supervisor":
            texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            found |= {name for text in texts if isinstance(text, str) for name in NAME.findall(text)}
    return found


def composed() -> set[str]:
    """Names that are put together when they are read."""
    spy = Spy({"CELLOS_EXPORT_HTTP_BASE_URL": "https://h.example", "CELLOS_EXPORT_S3_PRESIGNED_URL__S": "https://b.example/x"})
    targets = [{"kind": "http", "name": "h", "baseUrl": "https://h.example"}, {"kind": "s3", "name": "s", "bucket": "b"}]
    with open_targets(cell(export={"targets": targets}), spy):
        pass
    for prefix in ("CELLOS_EXPORT_HTTP", "CELLOS_EXPORT_S3", "CELLOS_BROKER_OIDC"):
        timeouts(spy, prefix)
    return spy.asked


def cell(**spec: Any) -> CellSpec:
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, **spec}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


def test_the_variables_of_the_supervisor_are_documented() -> None:
    # To renew it: PYTHONPATH=src python scripts/pages.py
    page = (ROOT / "docs/reference/supervisor.md").read_text()
    generated = page.partition("<!-- variables: begin -->\n")[2].partition("<!-- variables: end -->")[0]
    assert generated.strip() == tables().strip()


def test_the_variables_of_the_fleet_are_documented() -> None:
    # To renew it: PYTHONPATH=src python scripts/pages.py
    page = (ROOT / "docs/reference/fleet.md").read_text()
    generated = page.partition("<!-- variables: begin -->\n")[2].partition("<!-- variables: end -->")[0]
    assert generated.strip() == fleet_table().strip()
    spy = Spy({"CELLOS_FLEET_BUCKET": "b"})
    read_fleet_config(spy)
    assert spy.asked | {"RUST_LOG", "CELLOS_GIT_SHA"} == {row.name for row in FLEET_VARIABLES}


def test_the_table_names_every_variable_once_and_says_everything_of_it() -> None:
    rows = [variable for section in SECTIONS for variable in section.variables]
    assert len(VARIABLES) == len(rows)
    assert all(cell.strip() and "|" not in cell and "\n" not in cell for row in rows for cell in row)


@pytest.mark.parametrize("environment", [{}, {"CELLOS_DEPLOYMENT_PROFILE": "hardened", "CELLOS_AUTHORITY_KEYS_PATH": "/keys"}])
def test_what_the_configuration_asks_for_is_in_the_table(environment: dict[str, str]) -> None:
    spy = Spy(environment)
    read_config(spy)
    assert spy.asked >= {"CELLOS_DEPLOYMENT_PROFILE", "CELLOS_AUTHORITY_KEYS_PATH"}
    assert [name for name in sorted(spy.asked) if not is_listed(name)] == []


def test_what_the_code_names_is_in_the_table() -> None:
    names = constants() | composed()
    prefixes = {"CELLOS_EXPORT_HTTP", "CELLOS_EXPORT_S3", "CELLOS_BROKER_OIDC"}
    assert [name for name in sorted(names - NO_VARIABLES - prefixes) if not is_listed(name)] == []
    assert names >= NO_VARIABLES


def test_what_is_in_the_table_is_in_the_code() -> None:
    names = constants() | composed()

    def is_read(row: str) -> bool:
        beginning, key, _ = row.partition("<KEY>")
        return (bool(key) and beginning in names) or any(pattern(row).fullmatch(name) for name in names)

    without_effect = {name for name, variable in VARIABLES.items() if variable.effect == UNUSED}
    assert {row for row in VARIABLES if not is_read(row)} <= without_effect


def test_what_the_doctor_tries_is_documented() -> None:
    tried = REQUIRED | {primitive: what for primitive, (what, _) in OUTSIDE.items()}
    rows = [f"| {primitive} | {what} | {CURES[primitive]} |" for primitive, what in tried.items()]
    page = (ROOT / "docs/reference/doctor.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == rows


# ---------------------------------------------------------------- events

RUN = RunIdentity(cell_id="c", spec_id="s", run_id="r", spec_hash="0" * 64)
FULL_RUN = RunIdentity(
    cell_id="c", spec_id="s", run_id="r", spec_hash="0" * 64, correlation={"platform": None}, tenant_id="acme", placement={"poolId": "p"}
)
IDENTITY = Identity(kind="federatedOidc", provider="p", audience="a", secret_ref="T")
LABELS = {"keysetId": "k", "issuerKid": "i"}
CAPABILITIES = dict.fromkeys(("capEff", "capPrm", "capBnd", "capAmb", "capInh"), "0" * 16)
ISOLATION: dict[str, Any] = {"backend": "linux", "enforced": [], "limits": {}, "unbounded": []}


def drafts() -> Iterator[Draft]:
    """Every event with all that it can have, and with as little as it must."""
    full, plain = (
        cell(
            policy={"packId": "p", "packVersion": "1.0.0", "bundleDigest": "sha256:" + "0" * 64},
            authority={"filesystem": {"mounts": [{"source": "/a", "target": "/b", "mode": "ro"}]}},
        ),
        cell(),
    )
    token = {"derivationVerified": True, "roleRoot": "r", "parentRunId": "p"}
    receipt = Receipt(target_kind="local", target_name=None, destination="d", bytes_written=1)
    residue = (Residue(kind="mount", detail="d"),)
    yield from (
        events.started(FULL_RUN, ttl_seconds=1, isolation=ISOLATION, derivation=token),
        events.started(RUN, ttl_seconds=1, isolation=ISOLATION),
        events.process_spawned(RUN, program="p", argc=1),
        events.command_completed(
            RUN, argv=["a"], exit_code=None, duration_ms=1, spawn_error="e", signal=9, oom_killed=True, output_lost=True
        ),
        events.command_completed(RUN, argv=["a"], exit_code=0, duration_ms=1),
        events.fs_touch(RUN, source_path="p", artifact_name="a"),
        events.export_completed(RUN, artifact_name="a", receipt=receipt, provenance="id"),
        events.export_completed(RUN, artifact_name="a", receipt=receipt, provenance=None),
        events.export_failed(RUN, artifact_name="a", target_kind="s3", reason="r", target_name="t", destination="d", provenance="id"),
        events.export_failed(RUN, artifact_name="a", target_kind="s3", reason="r"),
        events.destroyed(FULL_RUN, ttl_seconds=1, outcome="failed", reason="r", residue_class="x", residue_exception=residue),
        events.destroyed(RUN, ttl_seconds=1, outcome="succeeded", residue_class="none"),
        observations.network_scope(RUN, plain),
        observations.dns_target_set(RUN, digest="d", updated_at="t", labels=LABELS),
        observations.dns_resolution(RUN, fqdn="f", resolved_at="t", targets=[], digest="d", labels=LABELS),
        *(
            observations.l7_egress_decision(
                RUN, decision_id="i", allowed=True, host="h", reason_code="r", rule=rule, digest="d", labels=LABELS
            )
            for rule in ("x", None)
        ),
        observations.container_security(RUN, capabilities=CAPABILITIES, privileged=False, no_new_privs=True, seccomp_mode=2),
        observations.network_policy(RUN, ()),
        observations.network_enforcement(RUN, rule_count=0, exit_code=-1, spawn_error="e"),
        observations.network_enforcement(RUN, rule_count=0, exit_code=0, spawn_error=None),
        observations.command_output(RUN, stream="stdout", offset=0, content={"text": ""}, truncated=True),
        observations.command_output(RUN, stream="stdout", offset=0, content={"base64": ""}, truncated=False),
        observations.identity_materialized(RUN, IDENTITY),
        observations.identity_failed(RUN, IDENTITY, operation="materialize", reason="r"),
        observations.identity_revoked(RUN, IDENTITY, provenance="id"),
        observations.identity_revoked(RUN, IDENTITY, provenance=None),
        observations.universal_token(RUN, role_root="r"),
        observations.compliance_summary(FULL_RUN, full, limits_declared=True, exit_code=0),
        observations.compliance_summary(RUN, plain, limits_declared=False, exit_code=None),
        observations.homeostasis(RUN, full, digest="d", connections=None, fetched_secrets=frozenset()),
        observations.homeostasis(RUN, plain, digest="d", connections=0, fetched_secrets=None),
        observations.policy_rejected(FULL_RUN, full, violations=[]),
        observations.policy_rejected(RUN, plain, violations=[]),
        observations.authz_rejected(FULL_RUN, reason="r", message="m", pool_id="p", pack_id="k"),
        observations.authz_rejected(RUN, reason="r", message="m", pool_id=None, pack_id=None),
        observations.keyset_verified(keyset_id="k", payload_digest="d", signer_kid="k", verified_at="t"),
        observations.keyset_verification_failed(attempted="a", reason="r", failed_at="t"),
    )


def documented() -> dict[str, str]:
    """Type to its list of members, of the page."""
    page = (ROOT / "docs/reference/events.md").read_text().partition("## Types\n")[2].partition("\n### ")[0]
    rows = [[each.strip() for each in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 and all(row) for row in rows)
    return {row[0].strip("`"): row[2] for row in rows}


def test_the_events_are_documented() -> None:
    types = [
        value.removeprefix(events.PREFIX)
        for module in (events, observations)
        for name, value in vars(module).items()
        if name.isupper() and name != "PREFIX" and str(value).startswith(events.PREFIX)
    ]
    assert sorted(documented()) == sorted(types)


def test_so_is_what_is_in_them() -> None:
    always: dict[str, set[str]] = {}
    ever: dict[str, set[str]] = {}
    for draft in drafts():
        kind = draft.type.removeprefix(events.PREFIX)
        always[kind] = always.get(kind, draft.data.keys()) & draft.data.keys()
        ever[kind] = ever.get(kind, set()) | draft.data.keys()
    pages = documented()
    assert pages.keys() == ever.keys()
    for kind, text in pages.items():
        optional, required = set(re.findall(r"`(\w+)`\?", text)), set(re.findall(r"`(\w+)`(?!\?)", text))
        common = {"cellId", "specId", "runId", "correlation"} - optional - required
        known = {"terminalState"} if kind == "lifecycle.v1.destroyed" else set()  # what a sweep adds
        assert required == always[kind] - common, kind
        assert optional | required == (ever[kind] - common) | known, kind


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.json")), ids=lambda path: path.stem)
def test_example_documents_are_valid(path: Path) -> None:
    assert parse_execution_cell(path.read_bytes()).spec.id == path.stem
