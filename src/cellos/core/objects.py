"""What a program may ask of an object store, and what the answers are.

Everything that must happen once is `create`. A store is fit for that if a reader sees what was written before its request began, and a
key that exists is never created again. Keys are relative to the store and have no empty parts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from msgspec import Struct

IRREGULAR = "not a regular file"
"""The fault of what lies in a directory under the name of an object."""


class Entry(Struct, frozen=True, kw_only=True):
    """An object without its content. `modified_ns` is by the store's own clock, often in whole seconds."""

    key: str
    size: int
    modified_ns: int
    etag: str


class Stored(Struct, frozen=True, kw_only=True):
    """An object. `fault` is set where its content was not read, and says why; `too_large` where only its size was the reason."""

    body: bytes
    entry: Entry
    fault: str | None = None
    too_large: bool = False


class ObjectStore(Protocol):
    """A bucket. Async; any number of calls at the same time.

    Every method raises StoreUnreachable where nobody knows what came of it: a write may have been done, or be done yet. Any other
    StoreError means that nothing was done.
    """

    async def create(self, key: str, body: bytes) -> bool:
        """Write an object that does not exist. False: it was not written now; most likely it exists, but a look has to tell."""
        ...

    async def write(self, key: str, body: bytes) -> None:
        """Write an object, whatever is there."""
        ...

    async def read(self, key: str, most: int) -> Stored | None:
        """An object of at most `most` bytes, that is no link to something else; None where there is none."""
        ...

    async def look(self, key: str) -> Entry | None:
        """Whether an object exists."""
        ...

    async def copy(self, source: str, target: str) -> None:
        """Write an object with the content of another one, which need not pass through here. Nothing where there is no source."""
        ...

    async def remove(self, key: str) -> None:
        """No object has this key any more; it need not have been there."""
        ...

    def pages(self, prefix: str) -> AsyncIterator[Sequence[Entry]]:
        """The objects below `prefix`, which ends in a slash, in pages, each sorted by key. Each page is asked for when it is wanted."""
        ...
