from __future__ import annotations

import pytest

from cellos.brokers.vault import check_vault_settings
from cellos.errors import ConfigError

GOOD = {"CELLOS_VAULT_ADDR": " https://vault.example.net:8200/ ", "CELLOS_VAULT_ROLE_ID": "r0le", "CELLOS_VAULT_SECRET_ID": "s3cret"}


def test_good_settings() -> None:
    check_vault_settings(GOOD)
    check_vault_settings(GOOD | {"CELLOS_VAULT_ADDR": "http://[::1]:8200", "CELLOS_VAULT_KV_MOUNT": "/", "CELLOS_VAULT_TIMEOUT_MS": "no"})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"CELLOS_VAULT_ADDR": None}, "CELLOS_VAULT_ADDR not set"),
        ({"CELLOS_VAULT_ADDR": " \t"}, "CELLOS_VAULT_ADDR is empty after trim"),
        ({"CELLOS_VAULT_ADDR": "vault.example.net"}, "CELLOS_VAULT_ADDR invalid URL: relative URL without a base"),
        ({"CELLOS_VAULT_ADDR": "https://"}, "CELLOS_VAULT_ADDR invalid URL: empty host"),
        ({"CELLOS_VAULT_ADDR": "https://u:pa55@h:x"}, "CELLOS_VAULT_ADDR invalid URL: invalid host or port"),
        ({"CELLOS_VAULT_ADDR": "https://[::1"}, "CELLOS_VAULT_ADDR invalid URL: invalid host or port"),
        ({"CELLOS_VAULT_ADDR": "ftp://h"}, "CELLOS_VAULT_ADDR scheme must be http or https, got ftp"),
        ({"CELLOS_VAULT_ROLE_ID": None}, "CELLOS_VAULT_ROLE_ID not set"),
        ({"CELLOS_VAULT_ROLE_ID": " "}, "CELLOS_VAULT_ROLE_ID is empty"),
        ({"CELLOS_VAULT_SECRET_ID": None}, "CELLOS_VAULT_SECRET_ID not set"),
        ({"CELLOS_VAULT_SECRET_ID": ""}, "CELLOS_VAULT_SECRET_ID is empty"),
    ],
)
def test_the_first_fault_is_named_without_its_value(change: dict[str, str | None], text: str) -> None:
    settings = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        check_vault_settings(settings)
    assert str(caught.value) == f"secret broker: {text}"


def test_the_order_of_the_checks() -> None:
    found: dict[str, str] = {}
    for name, value in GOOD.items():
        with pytest.raises(ConfigError) as caught:
            check_vault_settings(found)
        assert str(caught.value) == f"secret broker: {name} not set"
        found[name] = value
    check_vault_settings(found)
