from __future__ import annotations

import pytest

from cellos.brokers.memory import MemoryBroker
from cellos.errors import SecretBrokerError


def test_it_gives_what_it_was_given() -> None:
    assert MemoryBroker({"TOKEN": "s3cret"}).resolve("TOKEN", cell_id="c") == "s3cret"


@pytest.mark.parametrize(("key", "text"), [("", "empty secret key"), ("OTHER", 'no value was handed over for secret key "OTHER"')])
def test_it_invents_none(key: str, text: str) -> None:
    with pytest.raises(SecretBrokerError) as caught:
        MemoryBroker({"TOKEN": "s3cret"}).resolve(key, cell_id="c")
    assert str(caught.value) == f"secret broker: {text}"


def test_values_never_show() -> None:
    broker = MemoryBroker({"TOKEN": "s3cret"})
    assert "s3cret" not in repr(broker) + str(broker)


def test_later_changes_of_the_mapping_change_nothing() -> None:
    values = {"TOKEN": "s3cret"}
    broker = MemoryBroker(values)
    values.clear()
    assert broker.resolve("TOKEN", cell_id="c") == "s3cret"
