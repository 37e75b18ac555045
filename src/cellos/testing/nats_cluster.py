"""NATS servers that are one: a cluster for tests, each member in a directory of its own below one.

A member can be killed, paused and started again like any `NatsServer`; the others go on, and it catches up.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec
from nats.aio.client import Client

from cellos.eventlog.api import STREAM, ask
from cellos.testing.nats_server import NatsServer, reserve_port


class NatsCluster:
    """Use with `with`, or `start` and `stop`. Members elect their leaders after the start: who comes at once has to try again."""

    def __init__(self, directory: str, *, size: int = 3) -> None:
        ports = {f"n{number}": reserve_port(self) for number in range(1, size + 1)}
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports.values())
        self.members = {
            name: NatsServer(
                f"{directory}/{name}",
                settings=f'server_name: {name}\ncluster {{ name: cellos, listen: "127.0.0.1:{port}", routes: [{routes}] }}',
            )
            for name, port in ports.items()
        }

    @property
    def url(self) -> str:
        """All members, as CELLOS_NATS_URL names them."""
        return ",".join(member.url for member in self.members.values())

    def __enter__(self) -> NatsCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """All members."""
        try:
            with ThreadPoolExecutor(len(self.members)) as threads:
                list(threads.map(NatsServer.start, self.members.values()))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """In order. Idempotent."""
        for member in self.members.values():
            member.stop()


class _Cluster(msgspec.Struct):
    leader: str = ""


class _Info(msgspec.Struct):
    cluster: _Cluster


async def leader_of(client: Client, stream: str = STREAM) -> str:
    """The name of the member that takes the writes of a stream; empty while there is none. Raises EventLogError."""
    return msgspec.json.decode(await ask(client, f"STREAM.INFO.{stream}"), type=_Info).cluster.leader
