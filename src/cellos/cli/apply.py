"""`cellos apply -f FILE`: hand a formation to the control plane."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from typing import Never

import click
import msgspec

from cellos.cli.control_plane import Duration, connected, print_json, server_options
from cellos.cli.timeline import visible
from cellos.core.documents.parse import decode, syntax_of
from cellos.errors import ConfigError, ServerError, ServerProblem, ServerUnreachable, SpecSyntaxError, os_error_text

MAX_BYTES = 262_144
_KEY = re.compile("[!-~]{1,255}")


@click.command(
    epilog="""\b
Examples:
  cellos apply -f formation.yaml
  generate | cellos apply -f -
  cellos apply -f formation.json --key nightly-0042      may be repeated: it makes one formation, whatever happens
  cellos apply -f formation.yaml --wait                  and see it through; Ctrl-C ends the waiting, not the formation

Whatever is sent carries an idempotency key, so that a request whose answer was lost can be repeated; without --key, one of its own.

With --wait the exit code is 0 when the formation has completed, 1 when it has ended otherwise, 124 when the time is over.
"""
)
@click.option(
    "-f", "--file", "path", required=True, metavar="FILE", type=click.Path(allow_dash=True), help="JSON or YAML; - is standard input."
)
@click.option("--key", metavar="KEY", help="The idempotency key: with the same key again, the first answer comes back.")
@click.option("--wait", "waits", is_flag=True, help="Wait until it has ended, and show what its members do.")
@click.option("--timeout", "timeout_ms", type=Duration(), metavar="TIME", help="With --wait: at most so long: 30s, 10m, 2h.")
@click.option(
    "--json", "as_json", is_flag=True, help="The server's answer as JSON; with --wait the formation with its members, at the end."
)
@server_options
@click.pass_context
def apply(
    ctx: click.Context,
    path: str,
    key: str | None,
    waits: bool,
    timeout_ms: int | None,
    as_json: bool,
    server: str | None,
    token_file: str | None,
) -> None:
    """Make the formation of a document."""
    from cellos.client.server import new_key

    if key is not None and not _KEY.fullmatch(key):
        raise click.UsageError("--key takes 1 to 255 visible ASCII characters", ctx)
    if timeout_ms is not None and not waits:
        raise click.UsageError("--timeout goes with --wait", ctx)
    document = to_send(path, read(path))
    key = key or new_key()
    with connected(server, token_file, writes=True) as found:
        try:
            made = found.apply(document, key=key)
        except (ServerUnreachable, ServerProblem) as error:
            if not (error.sent if isinstance(error, ServerUnreachable) else error.status >= 500):
                raise
            raise ServerError(f"{error.text}; whether it was made is not known: repeat this with --key {key}") from error
        if not as_json:
            click.echo(f"formation/{visible(made.name or made.id)} created (state={made.status})")
        elif not waits:
            print_json(msgspec.to_builtins(made))
        if waits:
            from cellos.cli.wait import wait_for

            sys.stdout.flush()
            ctx.exit(wait_for(found, made.id, until=("COMPLETED",), timeout_ms=timeout_ms, as_json=as_json))


def read(path: str) -> bytes:
    """The bytes of a file, or of standard input. Raises ConfigError."""
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            # A link may come to point elsewhere after we looked; a pipe without a writer would never open.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise ConfigError(f"cannot read {path}: not a regular file; `-f -` reads standard input")
                raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"cannot read {path}: refusing to follow symlink; name the file itself, or use `-f - < FILE`") from error
        raise ConfigError(f"cannot read {path}: {os_error_text(error)}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"cannot read {path}: it is too large, the maximum is {MAX_BYTES} bytes")
    return raw


def to_send(path: str, raw: bytes) -> bytes:
    """The JSON of a document. What the file itself shows to be wrong is said here, the rest by the server. Raises ConfigError."""
    syntax = syntax_of(path, raw)
    try:
        value = decode(raw, syntax)
    except SpecSyntaxError as error:
        raise ConfigError(f"{path}: {error.text}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a formation: the document is no {'object' if syntax == 'json' else 'mapping'}")
    kind = value.get("kind")
    if isinstance(kind, str) and kind != "Formation":
        raise ConfigError(
            f"{path}: kind is {kind!r}, not 'Formation'" + ("; `cellos-supervisor` runs it" if kind == "ExecutionCell" else "")
        )
    metadata = value.get("metadata")
    names = (value.get("name"), metadata.get("name") if isinstance(metadata, dict) else None)
    if not any(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: not a formation: it has no name, and no metadata.name")

    def refuse(number: object) -> Never:
        raise ConfigError(f"{path}: {number} does not fit in 64 bits")

    return raw if syntax == "json" else msgspec.json.encode(value, enc_hook=refuse)
