"""A store in memory, for tests of what lies above stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import trio

from vdiskfs.errors import AlreadyExistsError, ConflictError, DamagedError, NotFoundError
from vdiskfs.store import ObjectInfo


class MemoryStore:
    """Objects in a dict; every request is counted."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str], str]] = {}
        self.requests = 0
        self.lists = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._stamp = 0
        self.now_ns = 0
        self.modified: dict[str, int] = {}

    def describe(self) -> str:
        return "memory"

    async def prepare(self) -> None:
        await trio.lowlevel.checkpoint()

    async def create(
        self, name: str, data: bytes | bytearray | memoryview, *, metadata: Mapping[str, str] = {}
    ) -> str:
        await self._request()
        if name in self.objects:
            raise AlreadyExistsError(f"{name}: exists")
        return self.put(name, data, metadata)

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        return await self.create(name, path.read_bytes(), metadata=metadata)

    async def replace(
        self,
        name: str,
        data: bytes | bytearray | memoryview,
        *,
        etag: str | None,
        metadata: Mapping[str, str] = {},
    ) -> str:
        await self._request()
        found = self.objects.get(name)
        if (found[2] if found else None) != etag:
            raise ConflictError(f"{name}: changed")
        return self.put(name, data, metadata)

    def put(
        self, name: str, data: bytes | bytearray | memoryview, metadata: Mapping[str, str] = {}
    ) -> str:
        self._stamp += 1
        self.objects[name] = (bytes(data), dict(metadata), f"e{self._stamp}")
        self.modified[name] = self.now_ns
        self.bytes_sent += len(data)
        return f"e{self._stamp}"

    async def read(self, name: str, *, limit: int = 64 << 20) -> tuple[bytes, ObjectInfo]:
        await self._request()
        data, _, _ = self._get(name)
        if len(data) > limit:
            raise DamagedError(f"{name}: larger than {limit}")
        return data, self._info(name)

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        await self._request()
        data = self._get(name)[0]
        if offset + length > len(data):
            raise DamagedError(f"{name}: too short")
        self.bytes_received += length
        return data[offset : offset + length]

    async def stat(self, name: str) -> ObjectInfo:
        await self._request()
        self._get(name)
        return self._info(name)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        self.lists += 1
        await self._request()
        found = sorted(name for name in self.objects if name.startswith(prefix))
        for index, name in enumerate(found):
            if index and index % 5000 == 0:
                await self._request()
            yield self._info(name)

    async def delete(self, name: str) -> None:
        await self._request()
        self._get(name)
        del self.objects[name]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _request(self) -> None:
        self.requests += 1
        await trio.lowlevel.checkpoint()

    def _get(self, name: str) -> tuple[bytes, dict[str, str], str]:
        if name not in self.objects:
            raise NotFoundError(f"{name}: no such object")
        return self.objects[name]

    def _info(self, name: str) -> ObjectInfo:
        data, metadata, etag = self.objects[name]
        return ObjectInfo(name, len(data), etag, self.modified.get(name, 0), dict(metadata))
