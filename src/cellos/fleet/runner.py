"""From a claim to its receipt: a cell, and beside it the lease without which it may not run."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Mapping
from typing import Any

from cellos.core.ids import UUID_RANDOM_BYTES, uuid7
from cellos.errors import ConfigError, LeaseLost, StoreError
from cellos.fleet.cell import Cell
from cellos.fleet.claims import Claims, Ending, Held
from cellos.fleet.config import Config
from cellos.fleet.records import CANNOT_START, INVALID_SPEC, Receipt

FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 60.0
_log = logging.getLogger("cellos_fleet")


def boottime() -> float:
    """Seconds that go on while the machine sleeps: leases do, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def new_id() -> str:
    """A UUIDv7."""
    return uuid7(time.time_ns() // 1_000_000, os.urandom(UUID_RANDOM_BYTES))


def fields(node: str, **more: object) -> dict[str, Any]:
    """Of a record of the log."""
    return {"fields": {"node": node, **more}}


class Health:
    """Whether the store can be used. It is told when that changes, not at each failure."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._trouble: str | None = None
        self._failures = 0

    @property
    def state(self) -> str:
        """`ok`, or what is wrong."""
        return self._trouble or "ok"

    def went_wrong(self, error: StoreError) -> None:
        self._failures += 1
        if self._trouble is None:
            _log.error("the object store cannot be used; trying again", extra=fields(self._node, error=error.text, code=error.code))
        self._trouble = error.text

    def went_well(self) -> None:
        if self._trouble is not None:
            _log.info("the object store can be used again", extra=fields(self._node, failures=self._failures))
        self._trouble, self._failures = None, 0

    def backoff(self) -> float:
        """How long to wait after so many failures, in seconds."""
        return min(FIRST_BACKOFF * float(1 << min(self._failures, 10)), LONGEST_BACKOFF) * random.uniform(0.5, 1.0)


class Runner:
    """Carries out the claims of one agent, each in a task of its caller."""

    def __init__(self, config: Config, claims: Claims, supervisor: str, environment: Mapping[str, str], health: Health) -> None:
        self._config = config
        self._claims = claims
        self._supervisor = supervisor
        self._environment = environment
        self._health = health

    async def carry_out(self, held: Held) -> None:
        """From a claim to its end."""
        if held.fault is not None:
            ending = Ending(outcome="failed", reason=INVALID_SPEC, detail=held.fault)
            await self._end(held, ending)
            return
        run_id = new_id()
        if not os.access(self._supervisor, os.X_OK):
            raise ConfigError(f"{self._supervisor} cannot be executed any more; {held.id} is left to other agents")
        if not await self._claims.start(held, run_id):
            return
        assert held.spec is not None
        cell: Cell | None = None
        keeper: asyncio.Task[None] | None = None
        try:
            try:
                cell = await Cell.start(self._supervisor, held.spec, run_id, self._environment, held.deadline)
                _log.info("running cell", extra=fields(self._config.node, spec_id=held.id, run_id=run_id, attempt=held.attempt))
            except ConfigError as error:
                ending = Ending(outcome="failed", reason=CANNOT_START, detail=str(error))
            keeper = asyncio.create_task(self._keep(held, cell))
            if cell is not None:
                ending = await cell.wait()
                _log.info("cell completed — finalizing", extra=fields(self._config.node, spec_id=held.id, exit_code=ending.exit_code))
            await self._end(held, ending)
        finally:
            if keeper is not None:
                keeper.cancel()
                await asyncio.wait({keeper})
            if cell is not None:
                cell.kill()

    async def _keep(self, held: Held, cell: Cell | None) -> None:
        """Renew the lease until this is cancelled, or the lease is lost: then the cell goes."""
        wait = self._config.lease_ms / 3000
        while True:
            await asyncio.sleep(wait)
            try:
                await self._claims.renew(held)
                wait = self._config.lease_ms / 3000
                if cell is not None:
                    cell.extend(held.deadline)
            except LeaseLost:
                _log.warning("the lease is lost: the cell is killed", extra=fields(self._config.node, spec_id=held.id, run_id=held.run_id))
                if cell is not None:
                    cell.kill()
                return
            except StoreError as error:
                self._health.went_wrong(error)
                wait = min(1.0, self._config.lease_ms / 10_000)

    async def _end(self, held: Held, ending: Ending) -> None:
        receipt = await self._claims.commit(held, ending)
        await self._claims.finish(held, receipt)
        self._tell(receipt)

    def _tell(self, receipt: Receipt) -> None:
        about = {"spec_id": receipt.id, "run_id": receipt.run_id, "exit_code": receipt.exit_code}
        if receipt.outcome == "completed":
            _log.info("spec completed successfully", extra=fields(self._config.node, **about))
        else:
            about |= {"reason": receipt.reason, "detail": receipt.detail}
            _log.warning("spec completed with failure", extra=fields(self._config.node, **about))
