from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.brokers.env import EnvBroker
from cellos.brokers.variables import variable
from cellos.errors import SecretBrokerError


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("api-key", "CELLOS_SECRET_API_KEY"),
        ("API_KEY", "CELLOS_SECRET_API_KEY"),
        ("a.b-c", "CELLOS_SECRET_A.B_C"),
        ("\u0131", "CELLOS_SECRET_\u0131"),
    ],
)
def test_the_name_of_the_variable(key: str, name: str) -> None:
    assert EnvBroker({name: "value"}).resolve(key, cell_id="c") == "value"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "secret key must not be empty"),
        ("a\0b", "secret key must not contain a NUL byte"),
        ("a=b", "secret key must not contain a '=' character"),
        ("api-key", 'env var CELLOS_SECRET_API_KEY not set (required for secret key "api-key")'),
    ],
)
def test_its_refusals(key: str, text: str) -> None:
    with pytest.raises(SecretBrokerError) as caught:
        EnvBroker({"CELLOS_SECRET_OTHER": "s3cret"}).resolve(key, cell_id="c")
    assert str(caught.value) == f"secret broker: {text}"


def test_bytes_that_are_no_text_are_refused_and_not_shown() -> None:
    with pytest.raises(SecretBrokerError) as caught:
        EnvBroker({"CELLOS_SECRET_KEY": "s3cret\udcff"}).resolve("key", cell_id="c")
    assert str(caught.value) == 'secret broker: env var CELLOS_SECRET_KEY is not valid UTF-8 (required for secret key "key")'


def test_it_sees_what_changes() -> None:
    environment = {"CELLOS_SECRET_KEY": "old"}
    broker = EnvBroker(environment)
    environment["CELLOS_SECRET_KEY"] = "new"
    assert broker.resolve("key", cell_id="c") == "new"


@given(st.text(min_size=1))
def test_a_key_either_names_a_variable_that_can_exist_or_is_refused(key: str) -> None:
    try:
        name = variable("X_", key)
    except SecretBrokerError:
        assert {"\0", "="} & set(key)
    else:
        assert name.startswith("X_")
        assert not {"\0", "="} & set(name)
        assert len(name) == len(key) + 2
