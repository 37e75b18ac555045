import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cellos.core.documents.schema import DIALECT
from cellos.core.documents.yaml import decode
from cellos.core.formation.schema import formation_schema

ROOT = Path(__file__).parents[4]
GOLDEN = ROOT / "tests/golden/formations"
STORED = ROOT / "docs/reference/formation.schema.json"
BEYOND_JSON = {"duplicate-key", "duplicate-key-in-member", "not-json", "not-utf-8", "lone-surrogate", "nan", "infinite", "beyond-64-bits"}
BEYOND_A_SCHEMA = {
    "coordinator-elsewhere", "coordinator-control-characters", "duplicate-member", "duplicate-coordinator", "coordinator-authorized",
    "member-unauthorized", "orphan", "self-loop", "two-cycle", "cycle-further-up", "pool-twice",
    "wider-secret", "wider-egress", "wider-name", "wider-mount", "wider-memory", "wider-lifetime",
    "after-unknown", "after-unknown-far", "after-itself", "after-circle", "after-circle-further-on",
    "use-unknown", "use-without-templates", "use-pool-twice", "use-wider", "use-secret", "backoff-shrinking",
    # What nobody knows is carried along, and only a person sees that it is misspelt.
    "after-misspelt", "critical-misspelt", "retries-misspelt", "on-node-lost-misspelt", "templates-misspelt", "on-disconnect-misspelt",
    "name-newline",  # only to this library: the `$` of Python also matches before a last line feed
}  # fmt: skip


@cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(formation_schema())


def accepts(value: object) -> bool:
    return validator().is_valid(value)


def test_it_is_a_schema() -> None:
    schema = formation_schema()
    assert schema["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_stored_schema_is_the_generated_one() -> None:
    # To renew it: python -c 'from cellos.core.formation.schema import *; import json; print(json.dumps(formation_schema(), indent=2))'
    assert STORED.read_text() == json.dumps(formation_schema(), indent=2) + "\n"


@pytest.mark.parametrize("path", sorted((GOLDEN / "valid").glob("*.json")), ids=lambda path: path.stem)
def test_valid_documents_conform_and_so_does_what_is_kept(path: Path) -> None:
    assert accepts(json.loads(path.read_text()))
    assert accepts(json.loads(path.with_suffix(".flat").read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "examples/formations").iterdir()), ids=lambda path: path.name)
def test_examples_conform(path: Path) -> None:
    assert accepts(decode(path.read_bytes()))


def malformed() -> list[Any]:
    paths = sorted((GOLDEN / "malformed").glob("*.json"))
    stems = {path.stem for path in paths}
    assert stems >= BEYOND_JSON | BEYOND_A_SCHEMA
    return [pytest.param(path, id=path.stem) for path in paths if path.stem not in BEYOND_JSON]


@pytest.mark.parametrize("path", malformed())
def test_malformed_documents_do_not_conform(path: Path) -> None:
    assert accepts(json.loads(path.read_text())) is (path.stem in BEYOND_A_SCHEMA)
