"""Where things lie in the bucket. `<base>` is the prefix, or prefix and lane; ids are portable identifiers.

<base>/pending/<id>.json              what was submitted
<base>/claimed/<id>.json              an agent has taken it
<base>/completed/<id>.json            it ended well; the bytes that were submitted
<base>/failed/<id>.json               it did not; the bytes that were submitted
<base>/leases/<id>/<epoch>.json       who holds the claim, and until when; the highest epoch counts
<base>/receipts/<id>/<attempt>.json   how an attempt ended; attempts count from 1
<base>/receipts/<id>/<attempt>.again.json   another attempt was asked for after this one
<base>/agents/<life>.json             an agent that runs
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from cellos.core.documents.identifiers import is_portable

Outcome = Literal["completed", "failed"]
PARTS = ("pending", "claimed", "completed", "failed", "leases", "receipts", "agents")
"""No lane is called one of these: it would lie in the middle of the default lane."""
SUFFIX = ".json"
AGAIN = ".again"


class Layout(Struct, frozen=True):
    """Keys below a base."""

    base: str

    def within(self, part: str) -> str:
        """The prefix of one of PARTS."""
        return f"{self.base}/{part}/" if self.base else f"{part}/"

    def pending(self, id: str) -> str:
        return f"{self.within('pending')}{id}{SUFFIX}"

    def claimed(self, id: str) -> str:
        return f"{self.within('claimed')}{id}{SUFFIX}"

    def result(self, id: str, outcome: Outcome) -> str:
        return f"{self.within(outcome)}{id}{SUFFIX}"

    def leases(self, id: str) -> str:
        return f"{self.within('leases')}{id}/"

    def lease(self, id: str, epoch: int) -> str:
        return f"{self.leases(id)}{epoch}{SUFFIX}"

    def receipts(self, id: str) -> str:
        return f"{self.within('receipts')}{id}/"

    def receipt(self, id: str, attempt: int) -> str:
        return f"{self.receipts(id)}{attempt}{SUFFIX}"

    def again(self, id: str, attempt: int) -> str:
        return f"{self.receipts(id)}{attempt}{AGAIN}{SUFFIX}"

    def agent(self, life: str) -> str:
        return f"{self.within('agents')}{life}{SUFFIX}"

    def id_in(self, part: str, key: str) -> str | None:
        """The id that an object of a part is about; None where its key is none that we would make. One suffix is taken off, once."""
        prefix = self.within(part)
        name = key[len(prefix) :] if key.startswith(prefix) else ""
        name = name.partition("/")[0] if part in {"leases", "receipts"} else name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else ""
        return name if is_portable(name) else None


def numbers(keys: Iterable[str], *, again: bool = False) -> frozenset[int]:
    """The epochs or attempts that keys of leases or receipts name; `again`: those of the marks for another attempt."""
    suffix = AGAIN + SUFFIX if again else SUFFIX
    names = (key.rpartition("/")[2] for key in keys)
    texts = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return frozenset(int(text) for text in texts if text.isascii() and text.isdigit() and (text == "0" or text[0] != "0"))
