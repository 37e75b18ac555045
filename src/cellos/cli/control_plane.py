"""What the verbs that talk to a control plane share: which one, what to do next where it does not answer, and how records are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cellos.cli.run_options import duration
from cellos.cli.timeline import visible
from cellos.errors import CellosError, ConfigError, ServerError, ServerProblem, ServerUnreachable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from cellos.client.address import Address
    from cellos.client.server import Server

_Command = TypeVar("_Command", bound=Callable[..., Any])
_COMPLETION_MS = 1000
COLOURS = {
    "PENDING": "bright_blue",
    "LAUNCHING": "green",
    "RUNNING": "green",
    "DEGRADED": "yellow",
    "COMPLETED": "cyan",
    "SUCCEEDED": "cyan",
    "FAILED": "red",
    "CANCELLED": "red",
}
"""Of a status word in capitals."""


class Duration(click.ParamType[int]):
    """`30s`, `10m`, `2h`, as milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SERVER_HELP = "The control plane; default CELLOS_SERVER, else that of `cellos up`, else http://127.0.0.1:8080."
TOKEN_HELP = "A file that holds the API token; default CELLOS_SERVER_API_TOKEN, or the token of `cellos up`."


def server_options(command: _Command) -> _Command:
    """`--server` and `--token-file`, of every verb that needs them."""
    command = click.option("--token-file", metavar="FILE", help=TOKEN_HELP)(command)
    return click.option("--server", metavar="URL", help=SERVER_HELP)(command)


@contextmanager
def connected(server: str | None, token_file: str | None, *, writes: bool = False) -> Iterator[Server]:
    """The control plane that is meant; what goes wrong there says what to do next.

    Where a state directory is named and no `cellos up` runs there, another one may be asked, but nothing of it is changed: `writes`.
    """
    from cellos.client.address import find_server
    from cellos.client.server import Server

    address = find_server(os.environ, url=server, token_file=token_file)
    if writes and os.environ.get("CELLOS_STATE_DIR", "").strip() and (why := _stands_in(address)):
        raise ConfigError(f"{why}; start one, or name the control plane that is meant: --server {address.url}")
    with Server(address) as found:
        try:
            yield found
        except (ServerUnreachable, ServerProblem) as error:
            step = next_step(error, address)
            if step:
                raise ServerError(f"{error.text}; {step}") from error
            raise


def next_step(error: CellosError, address: Address) -> str:
    """What a user can do about it; empty where the error itself says all."""
    from httpx2 import ProxyError, RemoteProtocolError

    if isinstance(error, ServerUnreachable):
        if isinstance(error.__cause__, ProxyError):
            return (
                "the proxy refused it: see HTTP_PROXY and HTTPS_PROXY (http://USER:PASSWORD@HOST:PORT, where it asks for them) and NO_PROXY"
            )
        if isinstance(error.__cause__, RemoteProtocolError):
            return "something listens there, but does not answer as cellos-server does"
        return "start one: cellos up" if address.is_here else "is the address right (--server, CELLOS_SERVER), and does a server run there?"
    if isinstance(error, ServerProblem) and error.status == 401:
        what = "give another" if address.token else "give one"
        why = _stands_in(address)
        return f"{what} token with --token-file or CELLOS_SERVER_API_TOKEN{f'; asked {address.url}, for {why}' if why else ''}"
    return ""


def _stands_in(address: Address) -> str:
    """Why the usual address was asked, though nobody named it; empty where somebody did, or a `cellos up` has it."""
    from cellos.client.address import find_up

    if address.given or find_up(os.environ) is not None:
        return ""
    chosen = os.environ.get("CELLOS_STATE_DIR", "").strip()
    return f"no `cellos up` runs for {chosen} (CELLOS_STATE_DIR)" if chosen else "no `cellos up` of yours runs"


def wants_json(as_json: bool) -> bool:
    """Whether records are shown as JSON: where it was asked for, and where no terminal shows them."""
    return as_json or not sys.stdout.isatty()


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text from anybody, on a terminal; words that are a status have its colour."""
    shown = [[visible(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *shown, strict=True)]
    for row in [heads, *shown]:
        cells = [painted(text, text.ljust(width)) for text, width in zip(row, widths, strict=True)]
        click.echo("   ".join(cells).rstrip())


def painted(word: str, text: str) -> str:
    """`text` in the colour of a status word, if it is one and colours are wanted."""
    colour = COLOURS.get(word.upper())
    return text if colour is None or "NO_COLOR" in os.environ else click.style(text, fg=colour)


def complete(list_names: Callable[[Server], Sequence[str]], ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Names that the server has, for a shell; none where it does not answer at once: a completion has nobody to tell."""
    from click.shell_completion import CompletionItem

    from cellos.client.address import find_server
    from cellos.client.server import Server

    try:
        address = find_server(os.environ, url=ctx.params.get("server"), token_file=ctx.params.get("token_file"))
        with Server(address, timeout_ms=_COMPLETION_MS, pauses=()) as server:
            return [CompletionItem(name) for name in list_names(server) if name.startswith(incomplete)]
    except CellosError:
        return []
