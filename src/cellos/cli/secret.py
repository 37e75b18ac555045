"""`cellos-supervisor secret get KEY`: fetch one secret, in a cell whose document asks for delivery at run time.

Python's standard library and nothing of CellOS, in words that old interpreters know: this one file can be shown to a cell as it is,
and `python3 secret.py get KEY` does the same.

The variables that the cell's command was given say where the socket is and what opens it:

    CELLOS_RUNTIME_SECRET_SOCKET    path of the socket
    CELLOS_RUNTIME_SECRET_TOKEN     sent with each request
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = "usage: cellos-supervisor secret get <KEY> (requires runtimeBroker or runtimeLeasedBroker secret delivery)"
TIMEOUT_SECONDS = 30.0


class SecretError(Exception):
    """Why there is no value. Never holds one."""


def main(arguments: Sequence[str]) -> int:
    """`arguments` follow the word `secret`. The value goes to standard output as it is, without a line feed. 0, or 1 for every error."""
    try:
        if len(arguments) != 2 or arguments[0] != "get" or not arguments[1]:
            raise SecretError(USAGE)
        _write(fetch(arguments[1]))
    except SecretError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(key: str) -> bytes:
    """The value of a secret, UTF-8. Raises SecretError."""
    import json

    path, token = _variable("CELLOS_RUNTIME_SECRET_SOCKET"), _variable("CELLOS_RUNTIME_SECRET_TOKEN")
    request = json.dumps({"token": token, "key": key}).encode() + b"\n"
    line = _ask(path, request)
    if not line:
        raise SecretError("runtime secret broker returned empty response")
    try:
        answer = json.loads(line.decode())
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        if isinstance(answer.get("error"), str):
            raise SecretError(answer["error"])
        if isinstance(answer.get("value"), str):
            return str(answer["value"]).encode()
    raise SecretError("runtime secret broker returned malformed response")


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise SecretError(f"{name} not set")
    return value


def _ask(path: str, request: bytes) -> bytes:
    """Everything up to the line feed of the answer, or to its end. Raises SecretError."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_SECONDS)
        try:
            connection.connect(path)
        except OSError as error:
            raise SecretError(f"connect runtime secret socket {path}: {error.strerror or error}") from None
        answer = bytearray()
        try:
            connection.sendall(request)
            while not answer.endswith(b"\n") and (data := connection.recv(1 << 16)):
                answer += data
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed without an answer, or with all that it will get
        except OSError as error:
            raise SecretError(f"read runtime secret socket {path}: {error.strerror or error}") from None
    return bytes(answer).strip()


def _write(value: bytes) -> None:
    view = memoryview(value)
    try:
        while view:
            view = view[os.write(1, view) :]
    except OSError as error:
        raise SecretError(f"cannot write to standard output: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
