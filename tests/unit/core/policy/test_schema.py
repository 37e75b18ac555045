"""The schemas and the reference page say what the code does."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cellos.core.policy.authz import AuthorizationSpec, Reason
from cellos.core.policy.pack import RULES, PackSpec
from cellos.core.policy.schema import authorization_policy_schema, policy_pack_schema

ROOT = Path(__file__).parents[4]
GOLDEN = ROOT / "tests" / "golden" / "policy"
REFERENCE = ROOT / "docs" / "reference"
SCHEMAS = {
    "pack": (REFERENCE / "policy-pack.schema.json", policy_pack_schema()),
    "authorization": (REFERENCE / "authorization-policy.schema.json", authorization_policy_schema()),
}
# What relates members to each other, or to this version, is beyond a schema; what is no JSON has none.
BEYOND = {"version-below-floor", "version-too-large", "egress-contradiction", "duplicate-rule", "cut-off", "blank-pattern"}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_stored_schema_is_the_generated_one(kind: str) -> None:
    # To renew them: python -c 'from cellos.core.policy.schema import *; import json; print(json.dumps(policy_pack_schema(), indent=2))'
    stored, schema = SCHEMAS[kind]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert stored.read_text() == json.dumps(schema, indent=2) + "\n"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_examples_conform(kind: str) -> None:
    examples = sorted((ROOT / "examples" / "policies").glob(f"{kind}*.json"))
    assert examples
    for path in examples:
        jsonschema.Draft202012Validator(SCHEMAS[kind][1]).validate(json.loads(path.read_text()))


def malformed() -> list[Any]:
    paths = [(kind, path) for kind in SCHEMAS for path in sorted((GOLDEN / kind).glob("*.json")) if path.stem not in BEYOND]
    return [pytest.param(kind, json.loads(path.read_text()), id=f"{kind}-{path.stem}") for kind, path in paths]


@pytest.mark.parametrize(("kind", "value"), malformed())
def test_faulty_documents_do_not_conform(kind: str, value: object) -> None:
    assert not jsonschema.Draft202012Validator(SCHEMAS[kind][1]).is_valid(value)


def rows(heading: str) -> list[str]:
    """The rows of the first table under a heading of the page."""
    section = (REFERENCE / "policy.md").read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
    table = section.partition("\n\n")[2] if not section.lstrip().startswith("|") else section
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    return [line for line in lines[start + 1 :] if line.startswith("| `")]


def test_the_rules_are_documented() -> None:
    assert rows("Rules") == [f"| `{rule.name}` | {rule.refuses} |" for rule in RULES]


def test_every_member_is_documented() -> None:
    page = (REFERENCE / "policy.md").read_text()
    for name in (*PackSpec.__struct_encode_fields__, *AuthorizationSpec.__struct_encode_fields__):
        assert f"| `spec.{name}` |" in page
    for reason in Reason.__args__:  # type: ignore[attr-defined]
        assert f"| `{reason}` |" in page
