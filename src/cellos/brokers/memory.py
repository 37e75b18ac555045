"""The memory broker: secrets that somebody handed over, and no others. It invents none: a key it does not hold is an error."""

from __future__ import annotations

from collections.abc import Mapping

from cellos.errors import SecretBrokerError


class MemoryBroker:
    """SecretBroker over a mapping of key to value."""

    name = "memory"

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = dict(values or {})

    def resolve(self, key: str, *, cell_id: str) -> str:
        """The value that was handed over for `key`."""
        if not key:
            raise SecretBrokerError("empty secret key")
        try:
            return self._values[key]
        except KeyError:
            raise SecretBrokerError(f'no value was handed over for secret key "{key}"') from None

    def __repr__(self) -> str:
        return f"MemoryBroker({len(self._values)} keys)"
