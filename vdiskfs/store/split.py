"""Two stores as one: what is created once in one, what changes in the other.

Deltas, ledgers and segments are written once and never changed; they may lie where nothing can
be overwritten or deleted. All else is small and changed by compare-and-swap, and lies in the
*control* store. vdiskfs-format(5), "Immutable containers".
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from vdiskfs.store.object import READ_LIMIT, Bytes, ObjectInfo, Store

PROBES = "probes/"
"""What is made to see whether it can be overwritten and deleted: lies where the data lies."""

DATA_MARK = "data/vault.json"
"""Lies where the data lies, and says whose it is."""

_DATA = re.compile(rf"(?:disks/[0-9a-f]{{32}}/g[^/]*|segments|data|{PROBES[:-1]})/.*")
_DATA_PREFIX = re.compile(rf"disks/[0-9a-f]{{32}}/g.*|segments/.*|data/.*|{PROBES}.*")
_KINDS = ("disks/", "segments/", "data/", PROBES)


def is_data(name: str) -> bool:
    """Say whether an object is one that is created once, and never changed."""
    return _DATA.fullmatch(name) is not None


def is_split(store: Store) -> bool:
    """Tell whether a store, or the one that it is around, is a `SplitStore`."""
    inner = getattr(store, "inner", None)
    return isinstance(store, SplitStore) or (inner is not None and is_split(inner))


def control_of(store: Store) -> str | None:
    """Name the container of what changes; None: there is no other one."""
    if isinstance(store, SplitStore):
        return store.control
    inner = getattr(store, "inner", None)
    return None if inner is None else control_of(inner)


class SplitStore:
    """A `Store` over two, which it owns."""

    def __init__(self, data: Store, control: Store) -> None:
        self._data = data
        self._control = control

    @property
    def requests(self) -> int:
        """See `Store`."""
        return self._data.requests + self._control.requests

    @property
    def bytes_sent(self) -> int:
        """See `Store`."""
        return self._data.bytes_sent + self._control.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `Store`."""
        return self._data.bytes_received + self._control.bytes_received

    @property
    def control(self) -> str:
        """Name the one of what changes, without secrets."""
        return self._control.describe()

    def describe(self) -> str:
        """Name both."""
        return f"{self._data.describe()}, control {self._control.describe()}"

    async def prepare(self) -> None:
        """See `Store`."""
        await self._data.prepare()
        await self._control.prepare()

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """See `Store`."""
        return await self._of(name).create(name, data, metadata=metadata)

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""
        return await self._of(name).create_from_file(name, path, metadata=metadata)

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""
        return await self._of(name).replace(name, data, etag=etag, metadata=metadata)

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`."""
        return await self._of(name).read(name, limit=limit)

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`."""
        return await self._of(name).read_range(name, offset, length)

    async def stat(self, name: str) -> ObjectInfo:
        """See `Store`."""
        return await self._of(name).stat(name)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """See `Store`: of one of them, where no name in the other can begin so."""
        if _DATA_PREFIX.fullmatch(prefix):
            return self._data.list(prefix)
        if not any(kind.startswith(prefix) or prefix.startswith(kind) for kind in _KINDS):
            return self._control.list(prefix)
        return _Merged(self._data.list(prefix), self._control.list(prefix))

    async def delete(self, name: str) -> None:
        """See `Store`."""
        await self._of(name).delete(name)

    async def aclose(self) -> None:
        """See `Store`."""
        try:
            await self._data.aclose()
        finally:
            await self._control.aclose()

    def _of(self, name: str) -> Store:
        return self._data if is_data(name) else self._control


class _Merged:
    """Two listings as one, sorted. One that failed is asked again at the next call."""

    def __init__(self, *listings: AsyncIterator[ObjectInfo]) -> None:
        self._listings = list(listings)
        self._heads: list[ObjectInfo | None] = [None] * len(listings)
        self._ended = [False] * len(listings)

    def __aiter__(self) -> _Merged:
        return self

    async def __anext__(self) -> ObjectInfo:
        for number, listing in enumerate(self._listings):
            if self._heads[number] is None and not self._ended[number]:
                try:
                    self._heads[number] = await anext(listing)
                except StopAsyncIteration:
                    self._ended[number] = True
        left = [(head.name, number) for number, head in enumerate(self._heads) if head is not None]
        if not left:
            raise StopAsyncIteration
        _, number = min(left)
        found, self._heads[number] = self._heads[number], None
        assert found is not None
        return found
