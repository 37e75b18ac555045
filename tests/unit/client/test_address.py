from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellos.client.address import Address, find_server, find_up, read_token
from cellos.errors import ConfigError

URL = "http://127.0.0.1:4711"
NO_URLS = ["localhost:8080", "ftp://h", "http://", "http://h:0", "http://h:x", "http://h/?a", "http://h#a", "//h"]


class Up:
    """What a `cellos up` leaves to be found."""

    def __init__(self, state: Path) -> None:
        self.directory = state / "up"
        self.directory.mkdir(mode=0o700, parents=True)
        self.write("lock", "")
        self.write("address", f"{URL}\n")
        self.write("token", "of-up\n")
        self._lock = os.open(self.directory / "lock", os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def write(self, name: str, text: str, mode: int = 0o600) -> None:
        (self.directory / name).write_text(text)
        (self.directory / name).chmod(mode)

    def end(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"CELLOS_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    (tmp_path / "state").mkdir(mode=0o700)
    found = Up(tmp_path / "state")
    yield found
    found.end()


def token_file(directory: Path, text: str | bytes) -> str:
    path = directory / "given-token"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


class TestWithoutUp:
    def test_nothing_given(self, environment: dict[str, str]) -> None:
        assert find_server(environment) == Address(url="http://127.0.0.1:8080", token=None, given=False)

    def test_variables(self, environment: dict[str, str]) -> None:
        environment |= {"CELLOS_SERVER": "https://cells.example/base/", "CELLOS_SERVER_API_TOKEN": " t "}
        assert find_server(environment) == Address(url="https://cells.example/base", token=" t ", given=True)

    def test_options_go_first(self, environment: dict[str, str], tmp_path: Path) -> None:
        environment |= {"CELLOS_SERVER": "http://a:1", "CELLOS_SERVER_API_TOKEN": "variable"}
        found = find_server(environment, url="http://b:2", token_file=token_file(tmp_path, "option\n"))
        assert found == Address(url="http://b:2", token="option", given=True)

    def test_blank_variables_are_not_set(self, environment: dict[str, str]) -> None:
        environment |= {"CELLOS_SERVER": " ", "CELLOS_SERVER_API_TOKEN": " "}
        assert find_server(environment) == Address(url="http://127.0.0.1:8080", token=None, given=False)

    @pytest.mark.parametrize(
        "url", ["localhost:8080", "ftp://h", "http://", "http://h:0", "http://h:x", "http://h/?a", "http://h#a", "//h"]
    )
    def test_no_url(self, environment: dict[str, str], url: str) -> None:
        with pytest.raises(ConfigError, match="CELLOS_SERVER: not the URL of a server; give http://HOST:PORT"):
            find_server(environment | {"CELLOS_SERVER": url})

    @pytest.mark.parametrize(
        "url", ["http://h", "https://a-b.c_d.example.:1/x/y", "http://[::1]:1", "http://127.0.0.1", f"http://{'a' * 63}.b"]
    )
    def test_a_url(self, environment: dict[str, str], url: str) -> None:
        assert find_server(environment, url=url).url == url

    def test_credentials_do_not_belong_there_and_are_not_shown(self, environment: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="--server: a URL must not hold credentials") as raised:
            find_server(environment, url="http://user:hidden@h")
        assert "hidden" not in str(raised.value)

    def test_an_address_does_not_show_its_token(self) -> None:
        assert "secret" not in repr(Address(url=URL, token="secret", given=True))

    @pytest.mark.parametrize(
        ("url", "here"), [(URL, True), ("http://[::1]:1", True), ("https://localhost", True), ("http://10.0.0.1", False)]
    )
    def test_whether_it_is_this_host(self, url: str, here: bool) -> None:
        assert Address(url=url, token=None, given=True).is_here is here


class TestTokenFile:
    def test_all_but_the_line_feed(self, tmp_path: Path) -> None:
        assert read_token(token_file(tmp_path, " a b \r\n")) == " a b "

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"\n", "no token in it"),
            (b"a\nb", "cannot hold"),
            ("é".encode(), "cannot hold"),
            (b"\xff", "it is no text"),
            (b"x" * 5000, "longer"),
        ],
    )
    def test_unusable(self, tmp_path: Path, content: bytes, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            read_token(token_file(tmp_path, content))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--token-file: cannot read .*No such file"):
            read_token(str(tmp_path / "none"))


class TestWithUp:
    def test_it_is_found(self, environment: dict[str, str], up: Up) -> None:
        assert find_server(environment) == Address(url=URL, token="of-up", given=False)

    def test_a_token_variable_is_for_another_server(self, environment: dict[str, str], up: Up) -> None:
        assert find_server(environment | {"CELLOS_SERVER_API_TOKEN": "other"}).token == "of-up"

    def test_a_token_that_is_given_is_used(self, environment: dict[str, str], up: Up, tmp_path: Path) -> None:
        assert find_server(environment, token_file=token_file(tmp_path, "mine")) == Address(url=URL, token="mine", given=False)

    def test_its_own_address_may_be_named(self, environment: dict[str, str], up: Up) -> None:
        assert find_server(environment | {"CELLOS_SERVER": f"{URL}/"}).token == "of-up"

    def test_its_token_goes_nowhere_else(self, environment: dict[str, str], up: Up) -> None:
        assert find_server(environment, url="http://127.0.0.1:4712").token is None
        assert find_server(environment | {"CELLOS_SERVER": "http://evil.example"}).token is None

    def test_one_that_ended_is_not(self, environment: dict[str, str], up: Up) -> None:
        up.end()
        assert find_up(environment) is None

    @pytest.mark.parametrize("name", ["address", "token", "lock"])
    def test_one_that_has_not_come_that_far_is_not(self, environment: dict[str, str], up: Up, name: str) -> None:
        (up.directory / name).unlink()
        assert find_up(environment) is None

    def test_files_that_others_may_write_to_are_not_believed(self, environment: dict[str, str], up: Up) -> None:
        up.write("address", "http://evil.example", mode=0o622)
        assert find_up(environment) is None

    def test_nor_are_links(self, environment: dict[str, str], up: Up, tmp_path: Path) -> None:
        (up.directory / "address").unlink()
        (tmp_path / "elsewhere").write_text("http://evil.example")
        (up.directory / "address").symlink_to(tmp_path / "elsewhere")
        assert find_up(environment) is None

    def test_a_state_directory_that_cannot_be_used_has_none(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert find_up({"CELLOS_STATE_DIR": str(tmp_path / "file")}) is None
