"""``SealedStore``: a store whose objects are sealed, around one that sees only that.

Passes tests/store/test_store_suite.py as every store does. The bytes of a file are sealed
into a temporary one beside it where they are many, so that memory is bounded.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import trio

from vdiskfs.crypto import DataKey
from vdiskfs.errors import DamagedError, FormatError, LocalError
from vdiskfs.sealed.blocks import (
    BLOCK,
    Beside,
    Opener,
    Sealer,
    Subject,
    name_size,
    open_metadata,
    open_range,
    open_whole,
    plain_size,
    seal_bytes,
    seal_file,
    stored_range,
    stored_size,
    with_name,
    without_name,
)
from vdiskfs.sealed.edges import Edges
from vdiskfs.sealed.names import (
    VAULT,
    is_bulk,
    is_hidden,
    stored_name,
    stored_prefix,
    unreadable_name,
)
from vdiskfs.sealed.seen import Seen
from vdiskfs.store.object import (
    READ_LIMIT,
    Bytes,
    ObjectInfo,
    Page,
    Pages,
    Store,
    check_metadata,
    check_name,
    check_prefix,
    check_range,
)

_KEY = "sealed"
# Up to this much is sealed in memory at once, and in the caller's thread: 64 blocks, 1 ms.
_IN_MEMORY = 8 << 20
# Where there is no room for it: more than a segment has.
_IN_MEMORY_AT_WORST = 72 << 20
_AT_ONCE = 2 << 20
_SIZES = 65536
_LISTED_AT_ONCE = 64

T = TypeVar("T")


class SealedStore:
    """A `Store` around another one, which it owns."""

    def __init__(self, store: Store, key: DataKey, seen: Seen | None = None) -> None:
        """Seal with the key of a vault; ``seen`` is what a site remembers of it."""
        self.inner = store
        self.key = key
        self.seen = seen or Seen()
        # Sizes in the store, of objects that were listed or that others refer to.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._edges = Edges()

    @property
    def retries(self) -> int:
        """How often requests were made again."""
        return int(getattr(self.inner, "retries", 0))

    @property
    def requests(self) -> int:
        """See `Store`."""
        return self.inner.requests

    @property
    def bytes_sent(self) -> int:
        """See `Store`."""
        return self.inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `Store`."""
        return self.inner.bytes_received

    def describe(self) -> str:
        """See `Store`."""
        return self.inner.describe()

    async def prepare(self) -> None:
        """See `Store`."""
        await self.inner.prepare()

    # ---- writing -----------------------------------------------------------------------

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """See `Store`."""
        if check_name(name) == VAULT:
            return await self.inner.create(name, data, metadata=metadata)
        stored, revision = self._new(name)
        sealed, beside = await self._seal(name, stored, revision, data, metadata)
        etag = await self.inner.create(stored, sealed, metadata=beside)
        await self._written(stored, revision)
        return etag

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""
        size = await trio.to_thread.run_sync(_file_size, path)
        if is_hidden(check_name(name)) or size <= _IN_MEMORY:
            data = await trio.to_thread.run_sync(_read_file, path)
            return await self.create(name, data, metadata=metadata)
        stored, revision = self._new(name)
        sealer = Sealer(self.key, self._subject(stored), size, revision)
        beside = _beside(sealer, check_metadata(metadata), "")
        # The spool removes files of this name when it is opened (vdiskfs.delta.leftovers).
        target = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            await trio.to_thread.run_sync(seal_file, sealer, path, size, target)
            etag = await self.inner.create_from_file(stored, target, metadata=beside)
        except LocalError:
            target.unlink(missing_ok=True)
            if size > _IN_MEMORY_AT_WORST:
                raise
            # There is no room, and what is sent away makes some.
            data = await trio.to_thread.run_sync(_read_file, path)
            return await self.create(name, data, metadata=metadata)
        finally:
            target.unlink(missing_ok=True)
        await self._written(stored, revision)
        return etag

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""
        if check_name(name) == VAULT:
            return await self.inner.replace(name, data, etag=etag, metadata=metadata)
        stored, revision = self._new(name)
        sealed, beside = await self._seal(name, stored, revision, data, metadata)
        new = await self.inner.replace(stored, sealed, etag=etag, metadata=beside)
        await self._written(stored, revision)
        return new

    async def delete(self, name: str) -> None:
        """See `Store`."""
        stored = stored_name(self.key, check_name(name))
        await self.inner.delete(stored)
        self._sizes.pop(stored, None)
        self.seen.gone(stored)

    # ---- reading -----------------------------------------------------------------------

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`.

        Raises:
            FormatError: it is not what was sealed under this name.
            WrongVaultError: it is older than what was seen.
        """
        if check_name(name) == VAULT:
            return await self.inner.read(name, limit=limit)
        stored = stored_name(self.key, name)
        since = self.seen.get(stored)
        most = stored_size(limit + (name_size(name) if is_hidden(name) else 0))
        sealed, info = await self.inner.read(stored, limit=most)
        opener = Opener(self.key, self._subject(stored))
        data = await _apart(lambda: open_whole(opener, sealed), len(sealed))
        if is_hidden(name):
            said, data = without_name(data, where=name)
            if said != name:
                raise FormatError("the object of another name", where=name)
        if not is_bulk(name):
            await self._check(stored, opener.revision, since, name)
        beside = self._open_beside(info)
        metadata = beside.metadata if beside else {}
        return data, ObjectInfo(name, len(data), info.etag, info.modified_ns, metadata)

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`; one request more where the object's size is not known.

        Raises:
            FormatError: a block that holds some of it is not what was sealed.
        """
        check_range(offset, length)
        if check_name(name) == VAULT:
            return await self.inner.read_range(name, offset, length)
        if not length:
            return b""
        if is_hidden(name):
            offset += name_size(name)
        stored = stored_name(self.key, name)
        size = self._sizes.get(stored)
        if size is not None:
            try:
                return await self._read_blocks(name, stored, size, offset, length)
            except DamagedError:
                # What a listing or another object said of its size may be wrong.
                if await self._size_of(stored) == size:
                    raise
        return await self._read_blocks(name, stored, await self._size_of(stored), offset, length)

    async def stat(self, name: str) -> ObjectInfo:
        """See `Store`."""
        if check_name(name) == VAULT:
            return await self.inner.stat(name)
        stored = stored_name(self.key, name)
        since = self.seen.get(stored)
        info = await self.inner.stat(stored)
        beside = self._open_beside(info)
        if beside is not None and not is_bulk(name):
            await self._check(stored, beside.revision, since, name)
        return self._shown(name, info, beside)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """See `Store`: where names are hidden, all of their kind are listed and sorted.

        What is older than was seen is listed without its metadata: it may have been replaced
        since the listing began, or was rolled back. Whoever reads it learns which.
        """
        inner = self.inner.list(stored_prefix(check_prefix(prefix)))
        if stored_prefix(prefix) == prefix and not _hides(prefix):
            return _Listing(inner, self._listed)

        async def fetch(_: str | None) -> Page:
            found = [await self._named(info) async for info in _Listing(inner, lambda info: info)]
            fitting = [info for info in found if info is not None and info.name.startswith(prefix)]
            return sorted(fitting, key=lambda info: info.name), None

        return Pages(fetch)

    async def aclose(self) -> None:
        """See `Store`."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.seen.save)
        await self.inner.aclose()

    def expect(self, name: str, size: int) -> None:
        """Learn how large an object is, from what refers to it: it saves asking."""
        if 0 <= size < 1 << 62 and not is_hidden(name):
            self._know(name, stored_size(size))

    # ---- the parts ---------------------------------------------------------------------

    def _subject(self, stored: str) -> Subject:
        return Subject(self.key.vault_id, stored)

    def _new(self, name: str) -> tuple[str, int]:
        """Return where a new version goes, and its revision."""
        stored = stored_name(self.key, name)
        return stored, 0 if is_bulk(name) else self.seen.next(stored)

    async def _seal(
        self, name: str, stored: str, revision: int, data: Bytes, metadata: Mapping[str, str]
    ) -> tuple[bytes, dict[str, str]]:
        hidden = is_hidden(name)
        whole = with_name(name, data) if hidden else data
        size = memoryview(whole).nbytes
        sealer = Sealer(self.key, self._subject(stored), size, revision)
        kept = check_metadata(metadata)
        beside = {} if is_bulk(name) and not kept else _beside(sealer, kept, name if hidden else "")
        return await _apart(lambda: seal_bytes(sealer, whole), size), beside

    async def _written(self, stored: str, revision: int) -> None:
        self._sizes.pop(stored, None)
        if revision:
            self.seen.note(stored, revision)
            await self._save()

    async def _check(self, stored: str, revision: int, since: int, name: str) -> None:
        self.seen.check(stored, revision, since, where=self.describe(), name=name)
        await self._save()

    async def _save(self) -> None:
        if self.seen.due:
            await trio.to_thread.run_sync(self.seen.save)

    async def _read_blocks(
        self, name: str, stored: str, size: int, offset: int, length: int
    ) -> bytes:
        plain = plain_size(size)
        if offset + length > plain:
            raise DamagedError(f"{name} ends before byte {offset + length}")
        edge = self._edges.take(stored, offset)
        start, span = stored_range(offset, length, plain)
        more = span - len(edge)
        sealed = edge + (await self.inner.read_range(stored, start + len(edge), more)
                         if more else b"")  # fmt: skip
        opener = Opener(self.key, self._subject(stored))
        try:
            found = await _apart(lambda: open_range(opener, sealed, offset, length), span)
        except FormatError:
            if not edge:
                raise
            # Another version of it was put there meanwhile, healed perhaps.
            return await self._read_blocks(name, stored, size, offset, length)
        if is_bulk(name) and offset + length < plain:
            self._edges.keep(stored, offset + length, sealed)
        return found

    async def _size_of(self, stored: str) -> int:
        size = (await self.inner.stat(stored)).size
        self._know(stored, size)
        return size

    def _know(self, stored: str, size: int) -> None:
        self._sizes[stored] = size
        self._sizes.move_to_end(stored)
        if len(self._sizes) > _SIZES:
            self._sizes.popitem(last=False)

    def _open_beside(self, info: ObjectInfo) -> Beside | None:
        """Return what stood beside an object; None: it is lost, or not what was sealed."""
        text = info.metadata.get(_KEY)
        if text is None:
            return None
        try:
            sealed = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
        return open_metadata(self.key, self._subject(info.name), sealed)

    def _listed(self, info: ObjectInfo) -> ObjectInfo:
        """Return what a listing says of an object whose name is seen."""
        if info.name == VAULT:
            return info
        self._know(info.name, info.size)
        return self._shown(info.name, info, self._believed(info, self._open_beside(info)))

    def _believed(self, info: ObjectInfo, beside: Beside | None) -> Beside | None:
        """Return what a listing may believe of what stood beside an object."""
        if beside is None or is_bulk(info.name):
            return beside
        if beside.revision < self.seen.get(info.name):
            return None
        self.seen.note(info.name, beside.revision)
        return beside

    async def _named(self, info: ObjectInfo) -> ObjectInfo | None:
        """Return what a listing says of an object, under its own name; None: it is nobody's."""
        if not is_hidden(info.name):
            return self._listed(info)
        placeholder = unreadable_name(info.name)
        if placeholder is None:
            return None
        beside = self._open_beside(info)
        name = beside.name if beside is not None else await self._name_inside(info)
        if name is None or stored_name(self.key, name) != info.name:
            name = placeholder
        return self._shown(name, info, self._believed(info, beside))

    async def _name_inside(self, info: ObjectInfo) -> str | None:
        """Read the name out of an object that has lost what stood beside it."""
        try:
            start, span = stored_range(0, 1, plain_size(info.size))
            sealed = await self.inner.read_range(info.name, start, span)
            block = Opener(self.key, self._subject(info.name)).open(0, memoryview(sealed))
            return without_name(block, where=info.name)[0]
        except DamagedError:
            return None

    def _shown(self, name: str, info: ObjectInfo, beside: Beside | None) -> ObjectInfo:
        size = plain_size(info.size) - (name_size(name) if is_hidden(name) else 0)
        metadata = beside.metadata if beside else {}
        return ObjectInfo(name, max(0, size), info.etag, info.modified_ns, metadata)


class _Listing:
    """A listing, each object changed. Not a generator: it needs no closing."""

    def __init__(
        self, inner: AsyncIterator[ObjectInfo], change: Callable[[ObjectInfo], ObjectInfo]
    ) -> None:
        self._inner = inner
        self._change = change
        self._count = 0

    def __aiter__(self) -> _Listing:
        return self

    async def __anext__(self) -> ObjectInfo:
        self._count += 1
        if self._count % _LISTED_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()  # opening 64 takes a millisecond
        return self._change(await anext(self._inner))


def expect_size(store: Store, name: str, size: int) -> None:
    """Tell an encrypted vault's store how large an object is that is read next."""
    if isinstance(store, SealedStore):
        store.expect(name, size)


def _hides(prefix: str) -> bool:
    """Say whether names that begin so may be hidden."""
    return is_hidden(f"{prefix}0.json") if prefix else True


def _beside(sealer: Sealer, metadata: Mapping[str, str], name: str) -> dict[str, str]:
    return {_KEY: base64.b64encode(sealer.seal_metadata(metadata, name)).decode()}


async def _apart(work: Callable[[], T], size: int) -> T:
    """Do what takes a while in a thread."""
    return work() if size <= _AT_ONCE else await trio.to_thread.run_sync(work)


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error


assert _AT_ONCE % BLOCK == 0
