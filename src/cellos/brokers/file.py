"""The file broker: CELLOS_SECRET_FILE_API_KEY names the file that holds the secret `api-key`.

The file is read at each resolve. It must be a regular file under its own name: a link could be changed to show another file, and the
end of a pipe never comes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from cellos.brokers.variables import variable
from cellos.errors import SecretBrokerError, os_error_text

PREFIX = "CELLOS_SECRET_FILE_"
MAX_BYTES = 1 << 20

# O_NONBLOCK: opening a FIFO must not wait for its writer. O_NOCTTY: a terminal must not become ours.
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


class FileBroker:
    """SecretBroker over files. It keeps the mapping that it was given and looks at each resolve."""

    name = "file"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def resolve(self, key: str, *, cell_id: str) -> str:
        """The file's text without one line feed at its end."""
        name = variable(PREFIX, key)
        path = self._environment.get(name)
        if path is None:
            raise SecretBrokerError(f'env var {name} not set (no file path configured for secret key "{key}")')
        try:
            return _text(path)
        except OSError as error:
            why = os_error_text(error)
        except ValueError as error:
            why = str(error)
        raise SecretBrokerError(f'read secret file for key "{key}" at "{path}": {why}')

    def __repr__(self) -> str:
        return "FileBroker()"


def _text(path: str) -> str:
    """The file as text. Raises OSError, and ValueError with words that hold nothing of the file."""
    if "\0" in path:
        raise ValueError("a path must not contain a NUL byte")
    descriptor = os.open(path, _OPEN)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        data = bytearray()
        while chunk := os.read(descriptor, MAX_BYTES + 1 - len(data)):
            data += chunk
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None
    return text.removesuffix("\n")
