"""Which control plane is meant, and the token for it.

The address, first that applies: the one that is given (`--server`); CELLOS_SERVER; that of a `cellos up` of this user, where one runs;
http://127.0.0.1:8080. The token: the file that is given (`--token-file`); CELLOS_SERVER_API_TOKEN. The token of `cellos up` goes to its own
address and to no other, and where its address was found, no variable stands for it.

`cellos up` keeps these in the directory `up` of the state directory, for as long as it holds the lock:

    lock      locked by the `cellos up` that runs
    address   its URL
    token     the API token, mode 0600; it stays when `cellos up` ends
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

import msgspec

from cellos.errors import ConfigError, os_error_text

SERVER = "CELLOS_SERVER"
TOKEN = "CELLOS_SERVER_API_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8080"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_LONGEST_TOKEN = 4096
_URL = re.compile("[!-~]+")
_LABEL = re.compile("[A-Za-z0-9_-]{1,63}")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """`url` has no slash at its end. `given`: somebody named the address, it was not found."""

    url: str
    token: str | None
    given: bool

    def __repr__(self) -> str:
        return f"Address(url={self.url!r})"  # never the token

    @property
    def is_here(self) -> bool:
        """Whether the server is, or would be, on this host."""
        return urlsplit(self.url).hostname in LOOPBACK


def find_server(environment: Mapping[str, str], *, url: str | None = None, token_file: str | None = None) -> Address:
    """The control plane that options, variables or a running `cellos up` name. Raises ConfigError."""
    named = _url("--server", url) if url else _url(SERVER, environment[SERVER]) if environment.get(SERVER, "").strip() else None
    running = None if named and token_file else find_up(environment)
    token = read_token(token_file) if token_file else None
    if running is not None and named in (None, running.url):
        return Address(url=running.url, token=token or running.token, given=named is not None)
    if token is None and environment.get(TOKEN, "").strip():
        token = _usable(TOKEN, environment[TOKEN])
    return Address(url=named or DEFAULT_URL, token=token, given=named is not None)


def find_up(environment: Mapping[str, str]) -> Address | None:
    """The server of a `cellos up` of this user that runs."""
    from cellos.supervisor.state import find_state_directory

    try:
        state = find_state_directory(environment)
        if state is None or not is_running(directory := up_directory(state.path)):
            return None
        return Address(url=_own_text(f"{directory}/address").strip(), token=_own_text(f"{directory}/token").strip(), given=False)
    except (ConfigError, OSError):  # none can have been started there, or it has not come that far
        return None


def up_directory(state: str) -> str:
    """Where `cellos up` keeps what it is, in a state directory."""
    return f"{state}/up"


def is_running(directory: str) -> bool:
    """Whether a `cellos up` holds the lock. OSError: none ever has."""
    descriptor = os.open(f"{directory}/lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_token(path: str) -> str:
    """The token that a file holds, without the line feed at its end. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST_TOKEN + 1)
    except (OSError, ValueError) as error:
        why = os_error_text(error) if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--token-file: cannot read {path}: {why}") from error
    return _usable(f"--token-file {path}", text.rstrip("\r\n"))


def _usable(where: str, token: str) -> str:
    if not token.strip() or len(token) > _LONGEST_TOKEN:
        raise ConfigError(f"{where}: no token in it" if not token.strip() else f"{where}: longer than {_LONGEST_TOKEN} characters")
    if not all(" " <= character <= "~" for character in token):
        raise ConfigError(f"{where}: the token has characters that an HTTP header cannot hold")
    return token


def _url(where: str, text: str) -> str:
    """The URL of a server, without the slash at its end. Raises ConfigError."""
    text = text.strip()
    try:
        parts = urlsplit(text)
        usable = (
            parts.scheme in ("http", "https") and parts.port != 0 and _is_host(parts.hostname or "") and _URL.fullmatch(text) is not None
        )
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"{where}: not the URL of a server; give http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{where}: a URL must not hold credentials; give the token with --token-file or {TOKEN}")
    return text.rstrip("/")


def _is_host(host: str) -> bool:
    """An address, or a name as the resolver takes it: labels of 1 to 63 characters (RFC 1035, 2.3.4), the last one no number."""
    labels = host.removesuffix(".").split(".")
    if ":" in host or labels[-1].isdigit():
        try:
            ip_address(host)
        except ValueError:
            return False
        return True
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)


def _own_text(path: str) -> str:
    """The text of a small file, where it is ours and nobody else may write to it. OSError: it is not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(1, os.strerror(1), path)
        return file.read(_LONGEST_TOKEN)
