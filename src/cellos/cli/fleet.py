"""`cellos fleet`: what people do with the queue of `cellos-fleet`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from cellos.cli.control_plane import Duration, print_json, print_table, wants_json
from cellos.cli.process import say
from cellos.cli.timeline import visible
from cellos.core.documents import MAX_DOCUMENT_BYTES, parse_execution_cell
from cellos.core.documents.identifiers import PORTABLE_RULE, is_portable
from cellos.core.documents.parse import decode, syntax_of
from cellos.core.objects import IRREGULAR
from cellos.errors import CellosError, ConfigError, FleetError, StoreUnreachable
from cellos.fleet.config import BUCKET, PREFIX, QUEUE, read_bucket, read_layout
from cellos.fleet.records import CANNOT_START

if TYPE_CHECKING:
    from cellos.fleet.queue import AgentRow, Queue, Row, Story
    from cellos.fleet.records import Receipt

FAILED, TIMED_OUT = 1, 124
REQUEST_SECONDS = 15.0
LOOK_SECONDS = 1.0
_Command = TypeVar("_Command", bound=Callable[..., Any])
_T = TypeVar("_T")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"""\b
Examples:
  export {BUCKET}=file:///var/tmp/queue         or the name of a bucket of S3
  cellos-fleet &                                        an agent; start as many as you like, anywhere
  cellos fleet submit spec.json
  cellos fleet wait build-1

Which queue is meant is said by the agent's own variables, or by options: {BUCKET}, {PREFIX}, {QUEUE}.
""",
)
def fleet() -> None:
    """Hand specs to the agents of a bucket, and see what became of them."""


def _queue_options(command: _Command) -> _Command:
    for option in (
        click.option("--queue", metavar="LANE", help=f"The lane; default {QUEUE}."),
        click.option("--prefix", metavar="PATH", help=f"What all keys begin with; default {PREFIX}."),
        click.option("--bucket", metavar="BUCKET", help=f"A bucket, or file:///DIRECTORY; default {BUCKET}."),
    ):
        command = option(command)
    return command


@fleet.command(
    epilog="""\b
Examples:
  cellos fleet submit spec.json other.yaml
  cellos fleet submit --id build-2 spec.json            run the same document under another id
  generate | cellos fleet submit -

May be repeated: a document that waits already is not handed in twice.
"""
)
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(allow_dash=True))
@click.option("--id", "id", metavar="ID", help="Its id in the queue; default spec.id. For one FILE.")
@_queue_options
def submit(files: Sequence[str], id: str | None, **where: str | None) -> int:
    """Hand in documents; - is standard input. One that is refused does not keep the others out."""
    if id is not None and len(files) > 1:
        raise click.UsageError("--id is for one document", click.get_current_context())

    async def hand_in(queue: Queue) -> int:
        code = 0
        for path in files:
            try:
                name, raw = _document(path, id)
                new = await queue.submit(name, raw)
                click.echo(f"spec/{name} {'submitted' if new else 'waits already'}")
            except (ConfigError, FleetError) as error:
                say(f"cellos: {error}")
                code = FAILED
        await _tell_if_alone(queue)
        return code

    return _on_queue(hand_in, where, make=True)


def _document(path: str, id: str | None) -> tuple[str, bytes]:
    """Id and JSON of a document that the supervisor will take. Raises ConfigError."""
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(MAX_DOCUMENT_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    syntax = syntax_of(path, raw)
    try:
        document = parse_execution_cell(raw, allow_unknown_fields=bool(os.environ.get("CELLOS_ALLOW_UNKNOWN_FIELDS")), syntax=syntax)
        name = id if id is not None else document.spec.id
        if not is_portable(name):
            raise ConfigError(f"the id {name[:80]!r} {PORTABLE_RULE}")
        return name, raw if syntax == "json" else msgspec.json.encode(decode(raw, syntax))
    except CellosError as error:
        raise ConfigError(f"{path}: {error}") from error


@fleet.command(name="ls")
@click.option("--state", type=click.Choice(["pending", "claimed", "completed", "failed"]), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="As JSON; the default where no terminal shows it.")
@_queue_options
def list_specs(state: str | None, as_json: bool, **where: str | None) -> None:
    """List the specs of a queue, and its agents."""

    async def look(queue: Queue) -> None:
        every = await queue.rows()
        rows = [row for row in every if state is None or row.state == state]
        agents = await queue.agents(every)
        if wants_json(as_json):
            print_json({"specs": [msgspec.to_builtins(row) for row in rows], "agents": [msgspec.to_builtins(each) for each in agents]})
            return
        if rows:
            print_table(("SPEC", "STATE", "SINCE", "NODE"), [_line(row) for row in rows])
            click.echo()
        if agents:
            told = [
                (each.node, each.state.upper(), f"{each.runs} of {each.slots}", each.pool or "-", each.seen[:19], each.store)
                for each in agents
            ]
            print_table(("AGENT", "STATE", "RUNS", "POOL", "SEEN", "STORE"), told)
        for row in rows:
            if row.damaged is not None:
                say(f"{row.id}: {visible(row.damaged)}")
        if not rows:
            say("no specs here: hand one in with cellos fleet submit FILE" if not every else f"no specs are {state}")
        elif any(row.state == "failed" for row in rows):
            say("why one failed: cellos fleet show SPEC")
        await _tell_if_alone(queue, agents)

    _on_queue(look, where)


def _line(row: Row) -> tuple[str, str, str, str]:
    state = row.state.upper() + (" (DAMAGED)" if row.damaged is not None else "")
    return row.id, state, row.since[:19], row.node or "-"


async def _tell_if_alone(queue: Queue, agents: Sequence[AgentRow] | None = None) -> None:
    """People at a terminal, that nobody is there to run anything."""
    if sys.stderr.isatty() and all(each.state == "lost" for each in (await queue.agents() if agents is None else agents)):
        say("no agent of this queue is there: start one with cellos-fleet")


@fleet.command()
@click.argument("spec")
@click.option("--json", "as_json", is_flag=True, help="As JSON; the default where no terminal shows it.")
@_queue_options
def show(spec: str, as_json: bool, **where: str | None) -> None:
    """Say all that is known of a spec: its attempts, who holds it, why it failed."""

    async def look(queue: Queue) -> None:
        story = await queue.show(_id(spec))
        if wants_json(as_json):
            print_json(msgspec.to_builtins(story))
        else:
            _tell(story)

    _on_queue(look, where)


def _tell(story: Story) -> None:
    since = f" since {story.since[:19]}" if story.since else ""
    click.echo(f"{story.id}: {story.state.upper()}{since}{f', for an agent of pool {visible(story.pool)}' if story.pool else ''}")
    if story.fault is not None:
        unseen = "; agents do not see it, or refuse it" if story.fault == IRREGULAR else ""
        click.echo(f"  cannot be run: {visible(story.fault)}{unseen}")
    if story.memory_bytes or story.cpu_micros:
        click.echo(f"  for an agent that has {story.memory_bytes} bytes and {story.cpu_micros} us/s; one with less logs that it is skipped")
    for receipt in story.receipts:
        ended = "" if receipt.exit_code is None else f", exit {receipt.exit_code}"
        click.echo(f"  attempt {receipt.attempt}: {receipt.outcome}{ended}, by {visible(receipt.node)}, {receipt.written_at[:19]}")
        for name in ("reason", "detail", "run_id"):
            value = getattr(receipt, name)
            if value:
                click.echo(f"    {name}: {visible(value)}")
    if story.asked_again:
        click.echo("  another attempt was asked for")
    if story.claim is not None:
        click.echo(f"  claimed by {visible(str(story.claim['node']))}, {str(story.claim['claimedAt'])[:19]}")
    for epoch, lease in story.leases.items():
        click.echo(f"  lease {epoch}: {visible(lease.node)}, {'runs' if lease.started else 'has not started'}, attempt {lease.attempt}")
    if story.held_until is not None:
        click.echo(f"  another agent may go on with it if this is not renewed: {story.held_until[:19]}")
    if story.state == "failed":
        say(f"another attempt: cellos fleet retry {story.id}")


@fleet.command()
@click.argument("specs", nargs=-1, required=True, metavar="SPEC…")
@_queue_options
def retry(specs: Sequence[str], **where: str | None) -> int:
    """Ask for another attempt of specs that failed."""
    ids = list(dict.fromkeys(_id(spec) for spec in specs))

    async def ask(queue: Queue) -> int:
        code = 0
        for id in ids:
            try:
                click.echo(f"spec/{id} waits for attempt {await queue.retry(id)}")
            except FleetError as error:
                say(f"cellos: {error}")
                code = FAILED
        return code

    return _on_queue(ask, where)


@fleet.command(
    epilog="""\b
Exit code: 0 when all are completed, 1 when one has failed, 124 when the time is over.
"""
)
@click.argument("specs", nargs=-1, required=True, metavar="SPEC…")
@click.option("--timeout", type=Duration(), metavar="TIME", help="How long to wait: 30s, 10m, 2h; default for ever.")
@_queue_options
def wait(specs: Sequence[str], timeout: int | None, **where: str | None) -> int:
    """Wait until specs have ended."""
    ids = list(dict.fromkeys(_id(spec) for spec in specs))
    deadline = time.monotonic() + timeout / 1000 if timeout is not None else None

    async def ended(queue: Queue) -> int:
        code, left = 0, ids
        for id in ids:
            await queue.show(id)  # a misspelt one would be waited for in vain
        await _tell_if_alone(queue)
        while left:
            open_ones = []
            for id in left:
                progress = await _patiently(queue.progress(id))
                if progress is None or progress.is_open or progress.last is None:
                    open_ones.append(id)
                    continue
                why = _why(progress.last)
                click.echo(f"spec/{id} {progress.last.outcome}{why}")
                code = code if progress.last.outcome == "completed" else FAILED
            left = open_ones
            if left and deadline is not None and time.monotonic() >= deadline:
                say(f"not ended: {', '.join(left)} (how one stands: cellos fleet show {left[0]})")
                return TIMED_OUT
            if left:
                await asyncio.sleep(LOOK_SECONDS)
        return code

    return _on_queue(ended, where)


def _why(receipt: Receipt) -> str:
    """Why it failed, on the same line. What has a word of its own has a detail that says more."""
    parts = [receipt.reason, receipt.detail] if receipt.reason == CANNOT_START else [receipt.reason]
    told = ": ".join(visible(part) for part in parts if part)
    return f": {told}" if told and receipt.outcome == "failed" else ""


async def _patiently(answer: Coroutine[Any, Any, _T]) -> _T | None:
    """An outage of the store is waited for. None: not now."""
    try:
        return await answer
    except StoreUnreachable:
        return None


def _id(spec: str) -> str:
    """`spec/build-1`, as it is printed, is taken too."""
    id = spec.removeprefix("spec/")
    if not is_portable(id):
        raise FleetError(f"{id[:80]!r} is no id: it {PORTABLE_RULE}")
    return id


def _on_queue(work: Callable[[Queue], Coroutine[Any, Any, _T]], where: dict[str, str | None], *, make: bool = False) -> _T:
    """Do it with the queue that is meant; `make` the directory, where it is one. Raises CellosError."""
    from cellos.fleet.queue import Queue
    from cellos.fleet.store import open_store

    given = {BUCKET: where["bucket"], PREFIX: where["prefix"], QUEUE: where["queue"]}
    environment = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    if BUCKET not in environment:
        raise ConfigError(f"no bucket is named: set {BUCKET}, or give --bucket; file:///DIRECTORY is one to try it with")
    bucket, layout = read_bucket(environment), read_layout(environment)

    async def run() -> _T:
        store = open_store(bucket, environment, request_seconds=REQUEST_SECONDS, make=make)
        user = os.environ.get("USER") or str(os.geteuid())
        return await work(Queue(store, layout, who=user, wall_ns=time.time_ns, token=os.urandom(16).hex(), pause=asyncio.sleep))

    return asyncio.run(run())
