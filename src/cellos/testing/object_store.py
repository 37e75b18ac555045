"""A bucket in memory, as strict as a good one: whatever was answered is seen by every request that begins afterwards."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from cellos.core.objects import Entry, Stored


class MemoryStore:
    """ObjectStore. `now_ns` is its clock; `page` is how many entries a page of a listing has."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns, *, page: int = 1000) -> None:
        self.objects: dict[str, tuple[bytes, Entry]] = {}
        self._now_ns = now_ns
        self._page = page

    async def create(self, key: str, body: bytes) -> bool:
        if key in self.objects:
            return False
        self.put(key, body)
        return True

    async def write(self, key: str, body: bytes) -> None:
        self.put(key, body)

    async def read(self, key: str, most: int) -> Stored | None:
        if key not in self.objects:
            return None
        body, entry = self.objects[key]
        if len(body) > most:
            return Stored(body=b"", entry=entry, fault=f"{len(body)} bytes; at most {most} are read", too_large=True)
        return Stored(body=body, entry=entry)

    async def look(self, key: str) -> Entry | None:
        return self.objects[key][1] if key in self.objects else None

    async def copy(self, source: str, target: str) -> None:
        if source in self.objects:
            self.put(target, self.objects[source][0])

    async def remove(self, key: str) -> None:
        self.objects.pop(key, None)

    async def pages(self, prefix: str) -> AsyncIterator[Sequence[Entry]]:
        last = ""
        while True:
            page = self.page_after(prefix, last)
            if not page:
                return
            yield page
            last = page[-1].key

    def page_after(self, prefix: str, key: str) -> list[Entry]:
        """The next page, as things are now."""
        keys = sorted(each for each in self.objects if each.startswith(prefix) and each > key)
        return [self.objects[each][1] for each in keys[: self._page]]

    def put(self, key: str, body: bytes) -> None:
        entry = Entry(key=key, size=len(body), modified_ns=self._now_ns(), etag=hashlib.sha256(body).hexdigest())
        self.objects[key] = (body, entry)
