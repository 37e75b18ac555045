"""The env broker: the secret `api-key` is the variable CELLOS_SECRET_API_KEY of the supervisor's own environment."""

from __future__ import annotations

from collections.abc import Mapping

from cellos.brokers.variables import variable
from cellos.errors import SecretBrokerError

PREFIX = "CELLOS_SECRET_"


class EnvBroker:
    """SecretBroker over variables. It keeps the mapping that it was given and looks at each resolve."""

    name = "env"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def resolve(self, key: str, *, cell_id: str) -> str:
        """The variable's value, which may be empty."""
        name = variable(PREFIX, key)
        value = self._environment.get(name)
        if value is None:
            raise SecretBrokerError(f'env var {name} not set (required for secret key "{key}")')
        try:
            value.encode()
        except UnicodeEncodeError:  # os.environ keeps bytes that are not UTF-8 as lone surrogates, which JSON cannot carry
            raise SecretBrokerError(f'env var {name} is not valid UTF-8 (required for secret key "{key}")') from None
        return value

    def __repr__(self) -> str:
        return "EnvBroker()"
