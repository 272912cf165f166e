"""A vault in Azure Blob Storage: block blobs, each written by a single Put Blob.

One request for each call, without retries: ``retry`` is around this. Objects are created
with If-None-Match and replaced with If-Match, so the service decides who was first.
A single Put Blob needs no more than the permission to create, and makes a blob that can
lie under an immutability policy; block lists would need the permission to overwrite.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import trio

from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    UsageError,
    VdiskfsError,
)
from vdiskfs.store.account import Account, Request
from vdiskfs.store.answer import METADATA, Answer, parse_page
from vdiskfs.store.connection import Connection, Timeouts
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

_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_CONCURRENCY = 16
_PAGE_OBJECTS = 5000
# 5,000 names of 1,024 characters with 2 KiB of metadata each, as XML.
_PAGE_LIMIT = 32 * 1024 * 1024


class AzureStore:
    """A `Store` in a container, below a prefix."""

    def __init__(
        self,
        account: Account,
        container: str,
        prefix: str = "",
        *,
        timeouts: Timeouts | None = None,
        concurrency: int = _CONCURRENCY,
    ) -> None:
        """Nothing is sent yet.

        Raises:
            UsageError: the container or the prefix cannot be one.
        """
        if not _CONTAINER.fullmatch(container):
            raise UsageError(
                f"not the name of a container: {container[:80]!r}",
                hint="3 to 63 lower case letters, digits and single hyphens",
            )
        prefix = prefix.strip("/")
        try:
            self._prefix = f"{check_name(prefix)}/" if prefix else ""
        except DamagedError:
            raise UsageError(
                f"not a prefix for a vault: {prefix[:80]!r}",
                hint="use letters, digits, '.', '-', '_' and '/'",
            ) from None
        self._account = account
        self._container = container
        self._connection = Connection(
            account, concurrency=concurrency, timeouts=timeouts or Timeouts()
        )

    @property
    def requests(self) -> int:
        """See `Store`."""
        return self._connection.requests

    @property
    def bytes_sent(self) -> int:
        """See `Store`: bodies."""
        return self._connection.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `Store`: bodies."""
        return self._connection.bytes_received

    def describe(self) -> str:
        """Return the vault's URL and the account's endpoint."""
        where = f"azure://{self._container}/{self._prefix}".rstrip("/")
        return f"{where} at {self._account.endpoint}"

    async def prepare(self) -> None:
        """Make the container if it is absent."""
        query = {"restype": "container"}
        path = f"/{self._container}"
        found = await self._connection.send(Request("HEAD", path, query))
        if found.status == 404:
            answer = await self._connection.send(Request("PUT", path, query))
            if answer.status != 201 and answer.code != "ContainerAlreadyExists":
                raise self._error("the container", answer)
            return
        # A signature for blobs alone may not look at the container: the next call tells.
        may_be_there = found.status == 403 and found.code != "AuthenticationFailed"
        if found.status != 200 and not may_be_there:
            raise self._error("the container", found)

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """See `Store`."""
        return await self._create(name, data, metadata)

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`: sent in pieces."""
        return await self._create(name, path, metadata)

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""
        condition = {"If-None-Match": "*"} if etag is None else {"If-Match": f'"{etag}"'}
        answer = await self._put(name, data, metadata, condition)
        if answer.status == 201:
            return answer.etag
        if answer.is_taken or (answer.status == 404 and answer.code == "BlobNotFound"):
            raise ConflictError(f"{name} was changed by another writer")
        raise self._error(name, answer)

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`."""
        answer = await self._connection.send(Request("GET", self._path(name)), limit=limit)
        if answer.status != 200:
            raise self._error(name, answer)
        return answer.body, answer.info(name)

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`."""
        check_range(offset, length)
        path = self._path(name)
        if not length:
            return b""
        headers = {"x-ms-range": f"bytes={offset}-{offset + length - 1}"}
        answer = await self._connection.send(Request("GET", path, headers=headers), limit=length)
        if answer.status == 416 or (answer.status == 206 and len(answer.body) < length):
            raise DamagedError(f"{name} ends before byte {offset + length}")
        if answer.status != 206:
            raise self._error(name, answer)
        return answer.body

    async def stat(self, name: str) -> ObjectInfo:
        """See `Store`."""
        answer = await self._connection.send(Request("HEAD", self._path(name)))
        if answer.status != 200:
            raise self._error(name, answer)
        return answer.info(name)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """See `Store`: a request for every 5,000 objects."""
        full = self._prefix + check_prefix(prefix)

        async def fetch(marker: str | None) -> Page:
            query = {
                "restype": "container",
                "comp": "list",
                "prefix": full,
                "include": "metadata",
                "maxresults": str(_PAGE_OBJECTS),
            }
            if marker:
                query["marker"] = marker
            request = Request("GET", f"/{self._container}", query)
            answer = await self._connection.send(request, limit=_PAGE_LIMIT)
            if answer.status != 200:
                raise self._error("the listing", answer)
            return parse_page(answer.body, len(self._prefix))

        return Pages(fetch)

    async def delete(self, name: str) -> None:
        """See `Store`."""
        answer = await self._connection.send(Request("DELETE", self._path(name)))
        if answer.status != 202:
            raise self._error(name, answer)

    async def aclose(self) -> None:
        """See `Store`."""
        self._connection.close()
        await trio.lowlevel.checkpoint()

    def _path(self, name: str) -> str:
        return f"/{self._container}/{self._prefix}{check_name(name)}"

    async def _put(
        self,
        name: str,
        body: Bytes | Path,
        metadata: Mapping[str, str],
        condition: Mapping[str, str],
    ) -> Answer:
        headers = {"x-ms-blob-type": "BlockBlob", **condition}
        headers.update({METADATA + key: value for key, value in check_metadata(metadata).items()})
        return await self._connection.send(Request("PUT", self._path(name), headers=headers), body)

    async def _create(self, name: str, body: Bytes | Path, metadata: Mapping[str, str]) -> str:
        answer = await self._put(name, body, metadata, {"If-None-Match": "*"})
        if answer.status == 201:
            return answer.etag
        if answer.is_taken or (answer.status == 403 and await self._exists(name)):
            # 403: with a signature that may create and not overwrite, the service refuses
            # before it looks at the condition.
            raise AlreadyExistsError(f"{name} exists already")
        raise self._error(name, answer)

    async def _exists(self, name: str) -> bool:
        found = await self._connection.send(Request("HEAD", self._path(name)))
        return found.status == 200

    def _error(self, what: str, answer: Answer) -> VdiskfsError:
        return answer.error(what, account=self._account.name, container=self._container)
