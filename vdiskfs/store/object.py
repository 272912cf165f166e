"""What a store is: objects by name. The interface, and what every implementation shares.

No I/O. Implementations: ``local`` (a folder), ``azure`` (Azure Blob Storage). ``retry``
wraps one of them. All pass the same suite, tests/store/test_store_suite.py.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vdiskfs.errors import DamagedError

READ_LIMIT = 64 * 1024 * 1024
"""The largest object that ``read`` takes whole, unless told otherwise."""

# Azure allows 1,024 characters; a component must be a file name (255) of a folder vault.
_NAME_LIMIT = 1024
_NAME = re.compile(r"[A-Za-z0-9._%-]{1,255}(?:/[A-Za-z0-9._%-]{1,255})*")
_PREFIX = re.compile(r"[A-Za-z0-9._%/-]*")
_KEY = re.compile(r"[a-z][a-z0-9]{0,31}")
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# A folder keeps metadata in one extended attribute, which ext4 bounds by a block.
_METADATA_LIMIT = 2048

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object without its bytes.

    ``etag`` differs for every version of a name. ``modified_ns`` is the store's clock.
    ``metadata`` is a hint: a folder that was copied by a program that drops extended
    attributes has none.
    """

    name: str
    size: int
    etag: str
    modified_ns: int
    metadata: dict[str, str] = field(default_factory=dict)


class Store(Protocol):
    """Objects by name, with conditional writes. The consensus of the project is here.

    Every method may raise VaultUnreachableError (worth trying again), RefusedError
    (credentials, permission) and NotFoundError (the container or the folder is absent).
    What a method returned for is durable. A write that was cancelled, or that raised
    VaultUnreachableError, may have been applied or may be applied a little later.

    Data is not checked here: objects carry their own digests.
    """

    @property
    def requests(self) -> int:
        """Requests made so far, those that failed included."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes of objects that were sent whole, without headers."""
        ...

    @property
    def bytes_received(self) -> int:
        """Bytes of objects and listings that were received whole, without headers."""
        ...

    def describe(self) -> str:
        """Name the store for people, without secrets."""
        ...

    async def prepare(self) -> None:
        """Make the container or the folder if it is absent."""
        ...

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """Store a new object and return its etag.

        Raises:
            AlreadyExistsError: the name is taken.
        """
        ...

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """Store a file's bytes as a new object, memory bounded, and return its etag.

        The file must not be changed afterwards: a folder may give it a second name.

        Raises:
            AlreadyExistsError: the name is taken.
            LocalError: the file cannot be read.
        """
        ...

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """Compare and swap: store the object if its etag is still ``etag``.

        ``etag`` is what the caller read; None means that the object must not exist.

        Raises:
            ConflictError: somebody else was faster.
        """
        ...

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """Return an object's bytes, and what it is, of one version.

        Raises:
            NotFoundError: there is no such object.
            DamagedError: it is larger than ``limit``.
        """
        ...

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; no request for none.

        Raises:
            NotFoundError: there is no such object.
            DamagedError: the object ends before.
        """
        ...

    async def stat(self, name: str) -> ObjectInfo:
        """Return what an object is.

        Raises:
            NotFoundError: there is no such object.
        """
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Iterate over the objects whose names begin with ``prefix``, sorted by name."""
        ...

    async def delete(self, name: str) -> None:
        """Delete an object.

        Raises:
            NotFoundError: there is no such object.
        """
        ...

    async def aclose(self) -> None:
        """Close connections. The store cannot be used afterwards."""
        ...


Page = tuple[Sequence[ObjectInfo], str | None]


class Pages:
    """An asynchronous iterator over pages of a listing.

    Not a generator, so that one that is left early needs no closing.
    """

    def __init__(self, fetch: Callable[[str | None], Awaitable[Page]]) -> None:
        """``fetch`` takes a marker (None first), returns objects and the next marker."""
        self._fetch = fetch
        self._marker: str | None = None
        self._objects: Sequence[ObjectInfo] = ()
        self._index = 0
        self._last = False

    def __aiter__(self) -> Pages:
        """Return itself."""
        return self

    async def __anext__(self) -> ObjectInfo:
        """Return the next object. A page that failed is asked for again at the next call."""
        while self._index == len(self._objects):
            if self._last:
                raise StopAsyncIteration
            self._objects, self._marker = await self._fetch(self._marker)
            self._index = 0
            self._last = self._marker is None
        self._index += 1
        return self._objects[self._index - 1]


def check_name(name: str) -> str:
    """Return ``name`` if it can name an object in every store.

    Names are made by ``catalog``, never by users; what fails here is a mistake, or a name
    read from a hostile object.

    Raises:
        DamagedError: it cannot.
    """
    parts = name.split("/")
    if (
        len(name) > _NAME_LIMIT
        or not _NAME.fullmatch(name)
        or name.startswith(".")
        or ".." in parts
        or "." in parts
    ):
        raise DamagedError(f"not the name of an object: {name[:80]!r}")
    return name


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if names can begin with it.

    Raises:
        DamagedError: they cannot.
    """
    parts = prefix.split("/")
    if (
        len(prefix) > _NAME_LIMIT
        or not _PREFIX.fullmatch(prefix)
        or prefix.startswith((".", "/"))
        or "//" in prefix
        or ".." in parts[:-1]
        or "." in parts[:-1]
    ):
        raise DamagedError(f"not the beginning of an object's name: {prefix[:80]!r}")
    return prefix


def check_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of ``metadata`` if every store can keep it.

    Raises:
        ValueError: a key is not ``[a-z][a-z0-9]*``, a value is empty or not printable
            ASCII, or the whole is too large.
    """
    for key, value in metadata.items():
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise ValueError(f"not metadata of an object: {key!r}: {value!r}")
    if sum(len(key) + len(value) + 2 for key, value in metadata.items()) > _METADATA_LIMIT:
        raise ValueError("the metadata of an object is too large")
    return dict(metadata)


def check_range(offset: int, length: int) -> None:
    """Check what ``read_range`` is asked for.

    Raises:
        ValueError: a number is negative or beyond 2**63.
    """
    if offset < 0 or length < 0 or offset + length >= 1 << 63:
        raise ValueError(f"not a range of bytes: {offset}+{length}")
