"""The settings of the vault-approle broker. The broker itself is not built: a supervisor that is told to use it checks these, and stops."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cellos.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def check_vault_settings(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for the first setting that is missing or unusable; it never holds a setting's value but the address's scheme."""
    _check_address(environment.get("CELLOS_VAULT_ADDR"))
    for name in ("CELLOS_VAULT_ROLE_ID", "CELLOS_VAULT_SECRET_ID"):
        value = environment.get(name)
        if value is None:
            raise _unusable(f"{name} not set")
        if not value.strip():
            raise _unusable(f"{name} is empty")


def _check_address(written: str | None) -> None:
    if written is None:
        raise _unusable("CELLOS_VAULT_ADDR not set")
    address = written.strip()
    if not address:
        raise _unusable("CELLOS_VAULT_ADDR is empty after trim")
    found = _SCHEME.match(address)
    if found is None:
        raise _unusable("CELLOS_VAULT_ADDR invalid URL: relative URL without a base")
    scheme = found[1].lower()
    if scheme not in ("http", "https"):
        raise _unusable(f"CELLOS_VAULT_ADDR scheme must be http or https, got {scheme}")
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _unusable("CELLOS_VAULT_ADDR invalid URL: invalid host or port") from None
    if not host:
        raise _unusable("CELLOS_VAULT_ADDR invalid URL: empty host")


def _unusable(text: str) -> ConfigError:
    return ConfigError(f"secret broker: {text}")
