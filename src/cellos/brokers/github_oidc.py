"""The github-oidc broker: tokens that GitHub Actions issues to a job, for the audience that is the key.

    GET <ACTIONS_ID_TOKEN_REQUEST_URL>&audience=<key>       Authorization: Bearer <ACTIONS_ID_TOKEN_REQUEST_TOKEN>
    200 {"value": "<token>"}

No redirect is followed: the bearer token belongs to that one address. What the server answers is read up to a bound, and what of it
enters an error is masked where it could be a token, and short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from cellos.errors import ConfigError, SecretBrokerError

URL = "ACTIONS_ID_TOKEN_REQUEST_URL"
TOKEN = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
MAX_BODY_BYTES = 64 << 10
SHOWN_BYTES = 512

_MASK = "[masked]"
# A JSON Web Token, whole or cut, and any other run of characters that is as long as a token of GitHub (`ghs_` and 36 letters and digits).
_LIKE_A_TOKEN = re.compile(r"eyJ[\w-]+(?:\.[\w-]*)*|[\w+/=.~-]{40,}", re.ASCII)


class GithubOidcBroker:
    """SecretBroker over the token endpoint of GitHub Actions. It keeps the mapping that it was given and asks at each resolve."""

    name = "github-oidc"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def resolve(self, key: str, *, cell_id: str) -> str:
        """A new token for the audience `key`."""
        if not key:
            raise SecretBrokerError("secret key must not be empty")
        if "\0" in key:
            raise SecretBrokerError("secret key must not contain a NUL byte")
        url, token = self._endpoint()
        status, body = self._get(with_audience(url, key), token)
        if status != 200:
            raise SecretBrokerError(f"oidc token request returned {status}: {excerpt(body, token)}")
        return _value(body)

    def _endpoint(self) -> tuple[str, str]:
        url, token = (self._environment.get(name, "").strip() for name in (URL, TOKEN))
        if not url:
            raise SecretBrokerError(f"{URL} not set — is this a GitHub Actions environment with `permissions: id-token: write`?")
        if not token:
            raise SecretBrokerError(f"{TOKEN} not set")
        # The HTTP library would quote such a value in its complaint.
        if not re.fullmatch(r"[!-~]+", token):
            raise SecretBrokerError(f"{TOKEN} holds characters that no header can carry")
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise SecretBrokerError(f"oidc token request: {URL} must be an http or https URL")
        return url, token

    def _get(self, url: str, token: str) -> tuple[int, bytes]:
        """Status and body, of a body beyond the bound one byte more than the bound."""
        import httpx2

        from cellos.http import client, fault_text, read_body, timeouts

        timeout_ms, connect_timeout_ms = timeouts(self._environment, "CELLOS_BROKER_OIDC")
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        try:
            with (
                client(self._environment, timeout_ms=timeout_ms, connect_timeout_ms=connect_timeout_ms) as http,
                http.stream("GET", url, headers=headers) as response,
            ):
                return response.status_code, read_body(response, MAX_BODY_BYTES + 1)
        except ConfigError as error:
            raise SecretBrokerError(f"oidc token request: {error.text}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:  # the last is a name that no resolver takes
            raise SecretBrokerError(f"oidc token request: {excerpt(fault_text(error).encode(), token)}") from None

    def __repr__(self) -> str:
        return "GithubOidcBroker()"


def with_audience(url: str, audience: str) -> str:
    """The URL with one more parameter in its query, percent-encoded UTF-8. A fragment never reaches a server, and is dropped."""
    from urllib.parse import quote

    try:
        encoded = quote(audience, safe="")
    except UnicodeEncodeError:
        raise SecretBrokerError("secret key is not valid Unicode text") from None
    address = url.partition("#")[0]
    if "?" not in address:
        joint = "?"
    else:
        joint = "" if address.endswith(("?", "&")) else "&"
    return f"{address}{joint}audience={encoded}"


def excerpt(body: bytes, token: str) -> str:
    """The beginning of an answer for an error message: at most 512 bytes, nothing in it that could be a token.

    An answer beyond the bound is not shown at all: the cut could go through a token, and what is left of it would not look like one.
    """
    if len(body) > MAX_BODY_BYTES:
        return f"(more than {MAX_BODY_BYTES} bytes)"
    text = _LIKE_A_TOKEN.sub(_MASK, body.decode(errors="replace").replace(token, _MASK))
    return text.encode()[:SHOWN_BYTES].decode(errors="ignore")


def _value(body: bytes) -> str:
    if len(body) > MAX_BODY_BYTES:
        raise SecretBrokerError(f"oidc token parse: the answer is larger than {MAX_BODY_BYTES} bytes")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise SecretBrokerError("oidc token parse: the answer is not JSON") from None
    value = answer.get("value") if isinstance(answer, dict) else None
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise SecretBrokerError('oidc token parse: the answer has no text "value"')
    return value
