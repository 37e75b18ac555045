"""A set of ids in ascending order, that is cheap to change and cheap to read from anywhere.

A plain sorted list moves half of itself for every insertion; one that is sorted when it is read sorts for every reader. This one is a list
of short sorted lists: an insertion moves part of one of them, and a page is found by two binary searches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

_HALF = 512
"""Ids in each half of a list that was split. Twice that is the most that an insertion moves."""


class SortedIds:
    """Ids in code point order, which is also the order of their UTF-8 bytes.

    `add` takes only an id that is not there, `remove` only one that is: whoever keeps the records knows which.
    """

    __slots__ = ("_chunks", "_count", "_lasts")

    def __init__(self, ascending: list[str] | None = None) -> None:
        """`ascending`: ids to begin with, in order and each once."""
        ids = ascending or []
        self._chunks = [ids[start : start + _HALF] for start in range(0, len(ids), _HALF)]
        self._lasts = [chunk[-1] for chunk in self._chunks]
        self._count = len(ids)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            yield from chunk

    def add(self, id: str) -> None:
        self._count += 1
        lasts = self._lasts
        if not lasts:
            self._chunks.append([id])
            lasts.append(id)
            return
        index = bisect_left(lasts, id)
        if index == len(lasts):
            index -= 1
        chunk = self._chunks[index]
        insort(chunk, id)
        lasts[index] = chunk[-1]
        if len(chunk) > 2 * _HALF:
            self._chunks.insert(index + 1, chunk[_HALF:])
            lasts.insert(index, chunk[_HALF - 1])
            del chunk[_HALF:]

    def remove(self, id: str) -> None:
        index = bisect_left(self._lasts, id)
        chunk = self._chunks[index]
        del chunk[bisect_left(chunk, id)]
        self._count -= 1
        if chunk:
            self._lasts[index] = chunk[-1]
        else:
            del self._chunks[index], self._lasts[index]

    def after(self, id: str | None, limit: int | None) -> list[str]:
        """At most `limit` ids that follow `id`, which need not be there; from the first where it is None, all where `limit` is None."""
        index = 0 if id is None else bisect_right(self._lasts, id)
        if index == len(self._chunks):
            return []
        found = self._chunks[index][0 if id is None else bisect_right(self._chunks[index], id) :]
        for chunk in self._chunks[index + 1 :] if limit is None else self._from(index + 1):
            if limit is not None and len(found) >= limit:
                break
            found += chunk
        return found if limit is None else found[:limit]

    def _from(self, index: int) -> Iterator[list[str]]:
        """Without the copy of a slice: a page takes one or two of thousands."""
        for place in range(index, len(self._chunks)):
            yield self._chunks[place]
