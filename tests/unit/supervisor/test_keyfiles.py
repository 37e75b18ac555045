import os
from pathlib import Path

import pytest

from cellos.core.documents.strict import MAX_DOCUMENT_BYTES
from cellos.errors import ConfigError
from cellos.supervisor.keyfiles import load_keyring, read_unlinked

PUBLIC = b'{"k1": "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"}'


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_keyring(str(path), None)
    return str(caught.value)


def test_both_files(tmp_path: Path) -> None:
    (tmp_path / "public").write_bytes(PUBLIC)
    (tmp_path / "shared").write_bytes(b'{"k2": "AA"}')
    ring = load_keyring(str(tmp_path / "public"), str(tmp_path / "shared"))
    assert (list(ring.ed25519), dict(ring.hmac)) == (["k1"], {"k2": b"\0"})
    assert not load_keyring(None, None)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "public").write_bytes(PUBLIC)
    (tmp_path / "link").symlink_to("public")
    assert refusal(tmp_path / "link") == (
        f"trust verify keys: cannot open {tmp_path}/link: Too many levels of symbolic links (os error 40)"
        "; it is a link, and key files are not opened through links"
    )
    (tmp_path / "directory").symlink_to(".")
    assert load_keyring(str(tmp_path / "directory" / "public"), None), "only the last place of the path matters"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"trust verify keys: cannot open {tmp_path}/none: No such file or directory (os error 2)"
    with pytest.raises(ConfigError, match=r"^HMAC verify keys: cannot open "):
        load_keyring(None, str(tmp_path / "none"))


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "trust verify keys: JSON parse error: the document is empty"
    with pytest.raises(ConfigError, match="cannot open"):
        load_keyring("a\0b", None)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b'{"\xff": 1}')
    assert refusal(tmp_path / "keys") == f"trust verify keys: cannot read {tmp_path}/keys: byte 2 is not UTF-8"


def test_a_file_without_end(tmp_path: Path) -> None:
    assert len(read_unlinked("/dev/zero")) == MAX_DOCUMENT_BYTES + 1
