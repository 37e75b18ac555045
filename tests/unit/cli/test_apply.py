from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cellos.cli.apply import MAX_BYTES, read, to_send
from cellos.errors import ConfigError

FLAT = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}]}
KUBECTL = {
    "apiVersion": "cellos.dev/v1",
    "kind": "Formation",
    "metadata": {"name": "demo"},
    "spec": {"coordinator": "a", "members": [{"name": "a"}]},
}
YAML = b"""
apiVersion: cellos.dev/v1
kind: Formation
metadata: {name: demo}
spec:
  coordinator: a
  members:
  - name: a   # the only one
"""


class TestRead:
    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"\x00\xff")
        assert read(str(tmp_path / "f")) == b"\x00\xff"

    def test_a_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"{}")
        (tmp_path / "link").symlink_to(tmp_path / "f")
        with pytest.raises(ConfigError, match="refusing to follow symlink"):
            read(str(tmp_path / "link"))

    @pytest.mark.parametrize("kind", ["device", "pipe", "directory"])
    def test_what_is_no_file_is_refused_at_once(self, tmp_path: Path, kind: str) -> None:
        path = {"device": "/dev/zero", "pipe": str(tmp_path / "pipe"), "directory": str(tmp_path)}[kind]
        if kind == "pipe":
            os.mkfifo(path)
        with pytest.raises(ConfigError, match=r"not a regular file|Is a directory"):
            read(path)

    def test_a_missing_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            read(str(tmp_path / "none"))

    def test_the_size_has_a_limit(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b" " * MAX_BYTES)
        assert len(read(str(tmp_path / "f"))) == MAX_BYTES
        (tmp_path / "f").write_bytes(b" " * (MAX_BYTES + 1))
        with pytest.raises(ConfigError, match="the maximum is 262144 bytes"):
            read(str(tmp_path / "f"))


class TestToSend:
    @pytest.mark.parametrize("document", [FLAT, KUBECTL])
    def test_json_goes_as_it_is(self, document: object) -> None:
        raw = json.dumps(document, indent=3).encode()
        assert to_send("f.json", raw) == raw
        assert to_send("-", raw) == raw

    def test_yaml_goes_as_the_same_document_in_json(self) -> None:
        assert json.loads(to_send("f.yml", YAML)) == json.loads(to_send("-", YAML)) == KUBECTL

    @pytest.mark.parametrize(
        ("raw", "words"),
        [
            (b"", "f.yaml: "),
            (b"name: a\nname: b\n", "name"),
            (b"name: a\n---\nname: b\n", "document"),
            (b"[1]", "not a formation: the document is no mapping"),
            (b"kind: formation\nname: a\n", "kind is 'formation', not 'Formation'"),
            (b"kind: ExecutionCell\nname: a\n", "`cellos-supervisor` runs it"),
            (b"coordinator: a\n", "it has no name, and no metadata.name"),
            (b"name: 1\nmetadata: 2\n", "it has no name, and no metadata.name"),
            (b"name: a\nx: 99999999999999999999999\n", "the integer 99999999999999999999999 does not fit in 64 bits"),
        ],
    )
    def test_what_the_file_shows_to_be_wrong(self, raw: bytes, words: str) -> None:
        with pytest.raises(ConfigError) as raised:
            to_send("f.yaml", raw)
        assert str(raised.value).startswith("f.yaml: ")
        assert words in str(raised.value)

    def test_wrong_json(self) -> None:
        with pytest.raises(ConfigError, match=r"f.json: .*line 1"):
            to_send("f.json", b'{"name": }')
