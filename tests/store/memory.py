"""A `Store` in memory, for faults. It passes the same suite as the real ones.

store = MemoryStore()
fault = store.fail("create", after=True)   # applied, then the answer is lost, once
...
assert fault.fired == 1
store.away = True                          # no method gets an answer
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    LocalError,
    NotFoundError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store.object import (
    READ_LIMIT,
    Bytes,
    ObjectInfo,
    Page,
    Pages,
    check_metadata,
    check_name,
    check_prefix,
    check_range,
)


@dataclass
class Fault:
    """What happens to the next ``count`` calls of a method, on names that begin so."""

    method: str
    error: VdiskfsError
    after: bool
    count: int
    prefix: str
    fired: int = 0


class MemoryStore:
    """Objects in a dictionary; ``objects`` may be looked at and damaged."""

    def __init__(self, name: str = "memory:") -> None:
        self._name = name
        self.objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self.requests = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.away = False
        self.exists = True
        self.calls: list[tuple[str, str]] = []
        self._faults: list[Fault] = []
        self._versions = itertools.count(1)

    def fail(
        self,
        method: str,
        error: VdiskfsError | None = None,
        *,
        after: bool = False,
        count: int = 1,
        prefix: str = "",
    ) -> Fault:
        """Let calls fail, before or after they are applied. Default: unreachable."""
        error = error or VaultUnreachableError("the memory store was told to fail")
        fault = Fault(method, error, after, count, prefix)
        self._faults.append(fault)
        return fault

    def describe(self) -> str:
        return self._name

    async def prepare(self) -> None:
        await self._begin("prepare", "", needs_container=False)
        self.exists = True
        self._end("prepare", "")

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        check_name(name)
        kept = check_metadata(metadata)
        await self._begin("create", name)
        if name in self.objects:
            raise AlreadyExistsError(f"{name} exists already")
        etag = self._put(name, data, kept)
        self._end("create", name)
        return etag

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LocalError(f"{path}: {error.strerror}") from error
        return await self.create(name, data, metadata=metadata)

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        check_name(name)
        kept = check_metadata(metadata)
        await self._begin("replace", name)
        current = self.objects[name][1].etag if name in self.objects else None
        if current != etag:
            raise ConflictError(f"{name} was changed by another writer")
        new = self._put(name, data, kept)
        self._end("replace", name)
        return new

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        check_name(name)
        await self._begin("read", name)
        data, info = self._get(name)
        if len(data) > limit:
            raise DamagedError(f"{name} has {len(data)} bytes, at most {limit} are expected")
        self.bytes_received += len(data)
        self._end("read", name)
        return data, info

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        check_name(name)
        check_range(offset, length)
        if not length:
            return b""
        await self._begin("read_range", name)
        data = self._get(name)[0][offset : offset + length]
        if len(data) != length:
            raise DamagedError(f"{name} ends before byte {offset + length}")
        self.bytes_received += length
        self._end("read_range", name)
        return data

    async def stat(self, name: str) -> ObjectInfo:
        check_name(name)
        await self._begin("stat", name)
        info = self._get(name)[1]
        self._end("stat", name)
        return info

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)

        async def fetch(marker: str | None) -> Page:
            await self._begin("list", prefix)
            names = sorted(name for name in self.objects if name.startswith(prefix))
            rest = [name for name in names if marker is None or name > marker]
            self._end("list", prefix)
            page = [self.objects[name][1] for name in rest[:100]]
            return page, (page[-1].name if len(rest) > 100 else None)

        return Pages(fetch)

    async def delete(self, name: str) -> None:
        check_name(name)
        await self._begin("delete", name)
        self._get(name)
        del self.objects[name]
        self._end("delete", name)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _begin(self, method: str, name: str, *, needs_container: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        self.requests += 1
        self.calls.append((method, name))
        if self.away:
            raise VaultUnreachableError("the memory store is away")
        self._fire(method, name, after=False)
        if needs_container and not self.exists:
            raise NotFoundError("there is no memory store")

    def _end(self, method: str, name: str) -> None:
        self._fire(method, name, after=True)

    def _fire(self, method: str, name: str, *, after: bool) -> None:
        for fault in self._faults:
            hit = (fault.method, fault.after) == (method, after) and name.startswith(fault.prefix)
            if hit and fault.fired < fault.count:
                fault.fired += 1
                raise fault.error

    def _put(self, name: str, data: Bytes, metadata: dict[str, str]) -> str:
        kept = bytes(data)
        etag = f"m{next(self._versions)}"
        info = ObjectInfo(name, len(kept), etag, time.time_ns(), metadata)
        self.objects[name] = (kept, info)
        self.bytes_sent += len(kept)
        return etag

    def _get(self, name: str) -> tuple[bytes, ObjectInfo]:
        if name not in self.objects:
            raise NotFoundError(f"there is no object {name}")
        return self.objects[name]
