"""NATS servers that are one: a cluster for tests, each member in a directory of its own below one.

A member can be killed, paused and started again like any `NatsServer`; the others go on, and it catches up.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
from nats.aio.client import Client

from cellos.eventlog.api import STREAM, ask
from cellos.testing.nats_server import START_SECONDS, NatsServer, reserve_port


class NatsCluster:
    """Use with `with`, or `start` and `stop`. Streams have leaders of their own: who comes while one is elected has to try again."""

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
        """All members, and wait until they have a leader, without whom no question is answered."""
        try:
            with ThreadPoolExecutor(len(self.members)) as threads:
                list(threads.map(NatsServer.start, self.members.values()))
            deadline = time.monotonic() + START_SECONDS
            while not all("metadata leader" in member.log for member in self.members.values()):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no leader within {START_SECONDS:g} s: {next(iter(self.members.values())).log[-2000:]}")
                time.sleep(0.02)
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
