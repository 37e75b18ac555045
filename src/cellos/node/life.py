"""Whether a node may believe that it is alive: the arithmetic of its lease. Pure.

Others believe it for a lease from the last sign of life that they saw, and a margin of a third. The node itself counts from the moment at
which it sent the last one that was taken, which is earlier, and has no margin: so it has ended its runs before anybody else says so. Times
are seconds of a clock that goes on while the host sleeps (CLOCK_BOOTTIME).
"""

from __future__ import annotations

RENEWALS = 3
"""Signs of life in the time of a lease."""


class Life:
    """From one start of a node, or the loss of the life before, until it is lost itself."""

    def __init__(self, id: str, lease_seconds: float) -> None:
        self.id = id
        self.revision = 0
        """Of its key, as far as we know; 0: it was not written yet."""
        self._lease = lease_seconds
        self._renewed: float | None = None

    def renewed(self, revision: int, sent: float) -> None:
        """The sign that was sent at this time was taken."""
        self.revision = revision
        self._renewed = sent

    def is_sure(self, now: float) -> bool:
        """Whether nobody can have declared it dead."""
        return self._renewed is not None and now < self._renewed + self._lease

    def left(self, now: float) -> float:
        """Seconds until it is not sure any more; 0 where it is not."""
        return 0.0 if self._renewed is None else max(0.0, self._renewed + self._lease - now)

    def until_next(self, now: float) -> float:
        """Seconds until the next sign is due."""
        return 0.0 if self._renewed is None else max(0.0, self._renewed + self._lease / RENEWALS - now)
