"""Waiting and trying again: blips inside one call, for seconds.

Only VaultUnreachableError is tried again. What lasts longer than ``budget_s`` is raised:
the replicator waits for minutes, and says so.

An answer can be lost although the write was applied. A conditional write that is tried
again would then find its own effect and believe that somebody else was faster. So every
write carries a nonce in its metadata (key ``try``), and a conflict after a lost answer is
looked at: our nonce there means that we were the one. A nonce and not the bytes: it is one
small request, and it also tells two writers of the same bytes apart.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import trio

from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    VaultUnreachableError,
)
from vdiskfs.store.object import READ_LIMIT, Bytes, ObjectInfo, Store

T = TypeVar("T")

NONCE = "try"
"""The key in the metadata; callers never see it."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait between tries, and when to give up."""

    first_s: float = 0.1
    limit_s: float = 4.0
    budget_s: float = 15.0
    sleep: Callable[[float], Awaitable[None]] = trio.sleep
    jitter: Callable[[], float] = random.random

    def delay_s(self, tries: int, retry_after_s: float | None) -> float:
        """Return the wait after this many failed tries: doubling, half of it by chance."""
        step = min(self.limit_s, self.first_s * 2.0 ** min(tries - 1, 16))
        wait = step * (0.5 + 0.5 * self.jitter())
        # Never earlier than asked; a little later each, so that not all come at once.
        return wait if retry_after_s is None else max(wait, retry_after_s + wait / 4)

    async def run(self, call: Callable[[int], Awaitable[T]]) -> T:
        """Call with the number of failed tries, until it is something else than unreachable.

        Raises:
            VaultUnreachableError: the last one, when the next wait would pass the budget.
        """
        started = trio.current_time()
        waited = 0.0
        tries = 0
        while True:
            try:
                return await call(tries)
            except VaultUnreachableError as error:
                tries += 1
                delay = self.delay_s(tries, error.retry_after_s)
                spent = max(waited, trio.current_time() - started)
                if spent + delay > self.budget_s:
                    raise
            waited += delay
            await self.sleep(delay)


class RetryingStore:
    """A `Store` around another one, which it owns."""

    def __init__(self, store: Store, policy: RetryPolicy | None = None) -> None:
        self._store = store
        self.retries = 0
        """Calls that were made again, since the start."""
        policy = policy or RetryPolicy()
        self._sleep = policy.sleep
        self._policy = replace(policy, sleep=self._counted)

    @property
    def inner(self) -> Store:
        """The store that it is around."""
        return self._store

    async def _counted(self, delay_s: float) -> None:
        self.retries += 1
        await self._sleep(delay_s)

    @property
    def requests(self) -> int:
        """See `Store`."""
        return self._store.requests

    @property
    def bytes_sent(self) -> int:
        """See `Store`."""
        return self._store.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `Store`."""
        return self._store.bytes_received

    def describe(self) -> str:
        """See `Store`."""
        return self._store.describe()

    async def prepare(self) -> None:
        """See `Store`."""
        await self._policy.run(lambda _: self._store.prepare())

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """See `Store`."""

        def write(tagged: Mapping[str, str]) -> Awaitable[str]:
            return self._store.create(name, data, metadata=tagged)

        return await self._write_once(name, write, metadata)

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""

        def write(tagged: Mapping[str, str]) -> Awaitable[str]:
            return self._store.create_from_file(name, path, metadata=tagged)

        return await self._write_once(name, write, metadata)

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`.

        When our answer was lost, and another writer replaced what we wrote before we looked,
        this is a ConflictError, too: what the caller must do is the same.
        """

        def write(tagged: Mapping[str, str]) -> Awaitable[str]:
            return self._store.replace(name, data, etag=etag, metadata=tagged)

        return await self._write_once(name, write, metadata)

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`."""
        data, info = await self._policy.run(lambda _: self._store.read(name, limit=limit))
        return data, _untagged(info)

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`."""
        return await self._policy.run(lambda _: self._store.read_range(name, offset, length))

    async def stat(self, name: str) -> ObjectInfo:
        """See `Store`."""
        return _untagged(await self._policy.run(lambda _: self._store.stat(name)))

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """See `Store`."""
        return _RetriedListing(self._store.list(prefix), self._policy)

    async def delete(self, name: str) -> None:
        """See `Store`."""

        async def attempt(tries: int) -> None:
            try:
                await self._store.delete(name)
            except NotFoundError:
                if not tries:
                    raise
                # Gone is what was asked for; an earlier try of ours may have done it.

        await self._policy.run(attempt)

    async def aclose(self) -> None:
        """See `Store`."""
        await self._store.aclose()

    async def _write_once(
        self,
        name: str,
        write: Callable[[Mapping[str, str]], Awaitable[str]],
        metadata: Mapping[str, str],
    ) -> str:
        """Try a conditional write, and recognise our own effect after a lost answer."""
        if NONCE in metadata:
            raise ValueError(f"the key {NONCE!r} of the metadata is taken")
        nonce = secrets.token_hex(8)
        tagged = {**metadata, NONCE: nonce}

        async def attempt(tries: int) -> str:
            try:
                return await write(tagged)
            except (AlreadyExistsError, ConflictError):
                etag = await self._etag_of_ours(name, nonce) if tries else None
                if etag is None:
                    raise
                return etag

        return await self._policy.run(attempt)

    async def _etag_of_ours(self, name: str, nonce: str) -> str | None:
        try:
            info = await self._store.stat(name)
        except NotFoundError:
            return None
        return info.etag if info.metadata.get(NONCE) == nonce else None


class _RetriedListing:
    """A listing that asks again for the page that failed."""

    def __init__(self, inner: AsyncIterator[ObjectInfo], policy: RetryPolicy) -> None:
        self._inner = inner
        self._policy = policy

    def __aiter__(self) -> _RetriedListing:
        return self

    async def __anext__(self) -> ObjectInfo:
        return _untagged(await self._policy.run(lambda _: anext(self._inner)))


def _untagged(info: ObjectInfo) -> ObjectInfo:
    if NONCE not in info.metadata:
        return info
    rest = {key: value for key, value in info.metadata.items() if key != NONCE}
    return replace(info, metadata=rest)
