from __future__ import annotations

from decimal import Decimal
from pathlib import PurePath
from typing import Any

import pytest

from cellos.client import arguments
from cellos.client.local import run
from cellos.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"argv": "ls"}, "argv must be a sequence of str or os.PathLike, not str: there is no shell"),
        ({"argv": b"ls"}, "argv must be a sequence of str or os.PathLike, not bytes: there is no shell"),
        ({"argv": PurePath("ls")}, "argv must be a sequence of str or os.PathLike, not PurePosixPath: there is no shell"),
        ({"argv": None}, "argv must be a sequence of str or os.PathLike, not NoneType: there is no shell"),
        ({"argv": [b"echo"]}, "argv[0] must be str or os.PathLike, not bytes"),
        ({"argv": ["echo", 1]}, "argv[1] must be str or os.PathLike, not int"),
        ({"allow": "example.com"}, "allow must be a sequence of str or os.PathLike, not str"),
        ({"secrets": "KEY"}, "secrets must be a mapping, or a sequence of str, not str"),
        ({"secrets": {"A": 1}}, "secrets['A'] must be str, not int"),
        ({"secrets": {1: "A"}}, "a name in secrets must be str or os.PathLike, not int"),
        ({"timeout": "3s"}, "timeout must be a number of seconds, or None, not str"),
        ({"timeout": True}, "timeout must be a number of seconds, or None, not bool"),
        ({"memory": "512M"}, "memory must be a number of bytes, or None, not str"),
        ({"memory": 1e9}, "memory must be a number of bytes, or None, not float"),
        ({"here": "/usr"}, "here must be True or False, not str"),
        ({"read_only": "/usr/share"}, "read_only must be a sequence of str or os.PathLike, not str"),
        ({"read_only": [3]}, "read_only[0] must be str or os.PathLike, not int"),
        ({"out": "result"}, "out must be a mapping, or a sequence of str or os.PathLike, not str"),
        ({"out": {"a": None}}, "out['a'] must be str or os.PathLike, not NoneType"),
        ({"stdin": "text"}, "stdin must be bytes, or None, not str"),
        ({"capture": "x"}, "capture must be a number of bytes, or None, not str"),
        ({"capture": True}, "capture must be a number of bytes, or None, not bool"),
    ],
)
def test_a_wrong_type_is_a_type_error_that_names_the_parameter(given: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError) as caught:
        run(**{"argv": ["true"], **given})
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"argv": ["\ud800"]}, r"argv[0] has characters that no text in UTF-8 can have: '\ud800'"),
        ({"secrets": {"\ud800": "x"}}, "a name in secrets has characters that no text in UTF-8 can have"),
        ({"timeout": 0}, "timeout is above 0 and below 10^9 seconds, not 0"),
        ({"timeout": float("nan")}, "timeout is above 0 and below 10^9 seconds, not nan"),
        ({"timeout": 10**400}, "timeout is above 0 and below 10^9 seconds, not 1000"),
        ({"memory": 0}, "memory is above 0 and below 2^63 bytes, not 0"),
        ({"memory": 1 << 63}, "memory is above 0 and below 2^63 bytes, not 9223372036854775808"),
        ({"read_only": ["/no/such"]}, "read_only[0]: '/no/such': no such directory"),
        ({"read_only": [""]}, "read_only[0]: '': no such directory"),
        ({"capture": -1}, "capture is a number of bytes, 0 or more, or None, not -1"),
    ],
)
def test_a_wrong_value_is_an_error_of_ours_that_names_the_parameter(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(**{"argv": ["true"], **given})
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("value", ["", "hunter2\0", "hunter2\ud800"])
def test_no_error_holds_a_secret(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^secrets\['A'\] is empty, has a NUL byte or is no text") as caught:
        arguments.secrets({"A": value})
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_what_is_as_good() -> None:
    assert arguments.texts("argv", iter(["ls", PurePath("/x")])) == ("ls", "/x")
    assert arguments.places([PurePath("d/a"), "/work/b"]) == (("d/a", "a"), ("/work/b", "b"))
    assert arguments.places({PurePath("d/a"): PurePath("b")}) == (("d/a", "b"),)
    assert [arguments.milliseconds(each) for each in (None, 2, 1.5, Decimal("0.25"), 1e-9)] == [None, 2000, 1500, 250, 1]
    assert arguments.content(memoryview(b"abc")) == b"abc"
    assert arguments.secrets({"A": "x"}) == {"A": "x"}
