from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cellos.brokers.file import MAX_BYTES, FileBroker
from cellos.errors import SecretBrokerError


def resolve(path: object, key: str = "api-key") -> str:
    return FileBroker({"CELLOS_SECRET_FILE_API_KEY": str(path)}).resolve(key, cell_id="c")


def refusal(path: object, key: str = "api-key") -> str:
    with pytest.raises(SecretBrokerError) as caught:
        resolve(path, key)
    return str(caught.value)


def at(path: object) -> str:
    return f'secret broker: read secret file for key "api-key" at "{path}": '


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"s3cret\n", "s3cret"),
        (b"s3cret", "s3cret"),
        (b"s3cret\n\n", "s3cret\n"),
        (b"s3cret\r\n", "s3cret\r"),
        (b"one\ntwo\n", "one\ntwo"),
        (b"\n", ""),
        (b"", ""),
        (b" s3cret ", " s3cret "),
        ("é✓\n".encode(), "é✓"),
        (b"a\0b", "a\0b"),
    ],
)
def test_exactly_one_line_feed_is_taken_off(tmp_path: Path, content: bytes, value: str) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    assert resolve(file) == value


def test_it_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("old")
    broker = FileBroker({"CELLOS_SECRET_FILE_KEY": str(file)})
    assert broker.resolve("key", cell_id="c") == "old"
    file.write_text("new")
    assert broker.resolve("key", cell_id="c") == "new"


def test_no_path() -> None:
    with pytest.raises(SecretBrokerError) as caught:
        FileBroker({}).resolve("api-key", cell_id="c")
    expected = 'env var CELLOS_SECRET_FILE_API_KEY not set (no file path configured for secret key "api-key")'
    assert str(caught.value) == f"secret broker: {expected}"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "secret key must not be empty"),
        ("a\0b", "secret key must not contain a NUL byte"),
        ("a=b", "secret key must not contain a '=' character"),
    ],
)
def test_keys_that_name_no_variable(key: str, text: str) -> None:
    assert refusal("/nowhere", key) == f"secret broker: {text}"


def test_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == at(tmp_path / "none") + "No such file or directory (os error 2)"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    link = tmp_path / "link"
    link.symlink_to("secret")
    assert refusal(link) == at(link) + "Too many levels of symbolic links (os error 40)"


def test_links_on_the_way_to_it_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/secret").write_text("s3cret")
    (tmp_path / "way").symlink_to("real")
    assert resolve(tmp_path / "way/secret") == "s3cret"


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == at(tmp_path / "fifo") + "not a regular file"
    assert refusal(tmp_path) == at(tmp_path) + "not a regular file"
    assert refusal("/dev/zero") == at("/dev/zero") + "not a regular file"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        assert refusal(tmp_path / "socket") == at(tmp_path / "socket") + "No such device or address (os error 6)"


def test_a_refusal_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    refusal(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_its_size_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"x" * MAX_BYTES)
    assert resolve(file) == "x" * MAX_BYTES
    file.write_bytes(b"x" * (MAX_BYTES + 1))
    assert refusal(file) == at(file) + "larger than 1048576 bytes"


def test_what_is_not_utf_8_is_refused_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"s3cret\xff")
    assert refusal(file) == at(file) + "not valid UTF-8"


def test_a_path_with_nul() -> None:
    assert refusal("a\0b") == at("a\0b") + "a path must not contain a NUL byte"
