from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.client.local import Options, build_document, document_bytes, new_cell_id, take_secrets
from cellos.core.documents import parse_execution_cell
from cellos.errors import ConfigError


def options(*argv: str, **members: Any) -> Options:
    return Options(argv=argv or ("true",), cell_id="cell-1", **members)


def test_the_smallest_document() -> None:
    assert build_document(options("true")) == {
        "apiVersion": "cellos.io/v1",
        "kind": "ExecutionCell",
        "spec": {
            "id": "cell-1",
            "run": {"argv": ["true"], "secretDelivery": "env"},
            "authority": {},
            "lifetime": {"ttlSeconds": 3600},
        },
    }


def test_the_largest_document() -> None:
    spec = build_document(
        options(
            "cmd",
            "arg",
            secrets=("TOKEN",),
            timeout_ms=1001,
            memory_bytes=1 << 20,
            here="/here",
            read_only=("/lib/x", "/here", "/lib/x"),
            out=(("a/b.txt", "b.txt"), ("/work/b.txt", "/elsewhere")),
        )
    )["spec"]
    assert spec["run"] == {
        "argv": ["cmd", "arg"],
        "secretDelivery": "env",
        "workingDirectory": "/here",
        "timeoutMs": 1001,
        "limits": {"memoryMaxBytes": 1 << 20},
    }
    assert spec["lifetime"] == {"ttlSeconds": 2}
    assert spec["authority"] == {
        "secretRefs": ["TOKEN"],
        "filesystem": {
            "mounts": [
                {"source": "/here", "target": "/here", "mode": "ro"},
                {"source": "/lib/x", "target": "/lib/x", "mode": "ro"},
            ]
        },
    }
    assert spec["export"] == {"artifacts": [{"name": "out0-b.txt", "path": "a/b.txt"}, {"name": "out1-b.txt", "path": "/work/b.txt"}]}


@given(
    argv=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4),
    timeout_ms=st.none() | st.integers(1, 10**9),
    memory=st.none() | st.integers(1, 2**63 - 1),
    out=st.lists(
        st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=300).filter(
            lambda path: path not in (".", "..")
        ),
        max_size=3,
    ),
)
def test_what_is_built_is_a_document(argv: list[str], timeout_ms: int | None, memory: int | None, out: list[str]) -> None:
    built = Options(
        argv=tuple(argv),
        cell_id=new_cell_id(argv[0]),
        timeout_ms=timeout_ms,
        memory_bytes=memory,
        out=tuple((path, "x") for path in out),
    )
    document = parse_execution_cell(document_bytes(built))
    assert document.spec.run is not None
    assert document.spec.run.argv == tuple(argv)
    assert document.spec.run.timeout_ms == timeout_ms
    names = [artifact.name for artifact in (document.spec.export and document.spec.export.artifacts) or ()]
    assert len(set(names)) == len(out)


def test_bytes_are_the_document() -> None:
    assert json.loads(document_bytes(options("é"))) == build_document(options("é"))


@pytest.mark.parametrize(
    ("allow", "rule"),
    [("example.com", {"host": "example.com", "port": 443}), ("example.com:8080", {"host": "example.com", "port": 8080})],
)
def test_destinations(allow: str, rule: dict[str, Any]) -> None:
    assert build_document(options(allow=(allow,)))["spec"]["authority"]["egressRules"] == [rule]


@pytest.mark.parametrize("allow", [":443", "h:", "h:x", "h:0", "h:65536", "h:²"])
def test_what_is_no_destination(allow: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--allow {re.escape(allow)}: expected HOST or HOST:PORT$"):
        build_document(options(allow=(allow,)))


@pytest.mark.parametrize(
    "members", [{"argv": ("echo", "\udcff")}, {"read_only": ("/\udcff",)}, {"here": "/\udcff"}, {"out": (("\udcff", "x"),)}]
)
def test_what_no_document_can_say(members: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is not UTF-8, and a document is: .*\\xff$"):
        build_document(Options(**{"argv": ("true",), "cell_id": "c", **members}))


@pytest.mark.parametrize(
    ("path", "place", "text"),
    [
        ("../a", "a", "out: '../a' lies outside the work directory: name a file below /work, without '..'"),
        ("d/../a", "a", "out: 'd/../a' lies outside"),
        ("/etc/passwd", "a", "out: '/etc/passwd' lies outside"),
        ("/work", "a", "out: '/work' lies outside"),
        ("", "a", "out: '' lies outside"),
        ("d/", "a", "out: d/ is a directory: name a file, several may be given"),
        ("d/.", "a", "out: d/. is a directory"),
        ("d/a", "new/", "out: cannot copy to 'new/', a directory: name the file, too, as new/a"),
        ("a", "..", "out: cannot copy to '..', a directory: name the file, too, as ../a"),
        ("a", "b\0", "out: a path with a NUL byte names no file: 'a', 'b\\x00'"),
    ],
)
def test_what_cannot_be_copied_out(path: str, place: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        build_document(options(out=((path, place),)))


@pytest.mark.parametrize("place", ["/", "/tmp", "/usr", "/proc", "/etc/ssl"])
@pytest.mark.parametrize("member", ["here", "read_only"])
def test_what_a_cell_has_itself_is_not_shown_to_it(member: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"^cannot show {place} to the cell, which has its own there: choose a directory below it, or"):
        build_document(options(**{member: place if member == "here" else (place,)}))


@pytest.mark.parametrize(
    ("program", "begins"),
    [("/usr/bin/python3.11", "python3-11-"), ("ls", "ls-"), ("", "cell-"), ("...", "cell-"), ("é", "cell-"), ("x" * 200, "x" * 40 + "-")],
)
def test_a_cell_id_tells_what_runs(program: str, begins: str) -> None:
    found = new_cell_id(program)
    assert re.fullmatch(re.escape(begins) + "[0-9a-f]{8}", found)
    assert found != new_cell_id(program)


def test_secrets_are_taken_by_name() -> None:
    assert take_secrets(["A"], {"A": "1", "B": "2"}) == {"A": "1"}
    for environment, why in (({}, "not set"), ({"A": ""}, "empty")):
        with pytest.raises(ConfigError, match=f"secret A is {why} in the environment"):
            take_secrets(["A"], environment)
