"""The chain of a run: every event names the one before it, so that a change to the record shows.

`data.chain` of event n is `{"seq": n, "prev": P}`. P is the sha256 of the canonical bytes of event n-1, in hex. For event 0 it is the
sha256 of the lines `cellos-chain-v1`, run id, spec hash (hex) and nonce, joined by line feeds, and the chain has the `nonce` too.
The last event, `destroyed`, has `count`, the number of events including itself. Signed or not, the canonical bytes are those of the
event itself, never of the envelope around it. `verify` (beside this module) reads such a record.
"""

from __future__ import annotations

from typing import Any

from cellos.core.events import canonical_bytes, parse_event
from cellos.core.sha256 import sha256
from cellos.errors import EvidenceError

VERSION = "cellos-chain-v1"
NONCE_BYTES = 32


def digest(line: bytes) -> str:
    """The sha256 of an event's canonical bytes, in hex."""
    return sha256(line).hexdigest()


def genesis(run_id: str, spec_hash: str, nonce: str) -> str:
    """What event 0 names as its predecessor."""
    return digest(f"{VERSION}\n{run_id}\n{spec_hash}\n{nonce}".encode())


class Chain:
    """The writing end of one run's chain: for each event `link`, then `advance` with the bytes that came of it."""

    __slots__ = ("_nonce", "prev", "seq")

    def __init__(self, seq: int, prev: str, nonce: str | None) -> None:
        self.seq = seq
        """Number of the next event."""
        self.prev = prev
        """What the next event names as its predecessor."""
        self._nonce = nonce

    @classmethod
    def first(cls, run_id: str, spec_hash: str, nonce: str) -> Chain:
        """The chain of a new run. `spec_hash` and `nonce` are 64 hex digits; the nonce is random and used once."""
        return cls(0, genesis(run_id, spec_hash, nonce), nonce)

    @classmethod
    def resumed(cls, seq: int, prev: str) -> Chain:
        """The chain of a run that somebody else began: `seq` of the next event, `prev` the digest of the last one."""
        return cls(seq, prev, None)

    @classmethod
    def after(cls, line: bytes) -> Chain:
        """The chain as it continues after a recorded event. Raises EvidenceError for a line without a link."""
        event = parse_event(line)
        link = event.members.get("chain")
        seq = link.get("seq") if isinstance(link, dict) else None
        if not isinstance(seq, int) or isinstance(seq, bool):
            raise EvidenceError(f"event {event.id} carries no chain, so no event can be added after it")
        return cls.resumed(seq + 1, digest(canonical_bytes(event)))

    def link(self, data: dict[str, Any], *, final: bool = False) -> dict[str, Any]:
        """`data` with its link. `final` for `destroyed`, which also says how many events there are."""
        link: dict[str, Any] = {"seq": self.seq, "prev": self.prev}
        if self._nonce is not None:
            link["nonce"] = self._nonce
        if final:
            link["count"] = self.seq + 1
        return {**data, "chain": link}

    def advance(self, line: bytes) -> None:
        """The canonical bytes of the event that was just linked are final."""
        self.seq += 1
        self.prev = digest(line)
        self._nonce = None
