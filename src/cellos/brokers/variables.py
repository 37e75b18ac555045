"""How the key of a secret becomes the name of a variable, for the brokers that look in the environment."""

from __future__ import annotations

from cellos.errors import SecretBrokerError

_UPPER = {lower: lower - 32 for lower in range(ord("a"), ord("z") + 1)} | {ord("-"): "_"}


def variable(prefix: str, key: str) -> str:
    """`prefix` and the key in upper case, `-` as `_`. Raises SecretBrokerError for a key that no variable can be named after."""
    if not key:
        raise SecretBrokerError("secret key must not be empty")
    if "\0" in key:
        raise SecretBrokerError("secret key must not contain a NUL byte")
    if "=" in key:
        raise SecretBrokerError("secret key must not contain a '=' character")
    return prefix + key.translate(_UPPER)
