"""A vault in Azure Blob Storage: block blobs, each written by a single Put Blob.

One request for each call, without retries: ``retry`` is around this. Objects are created
with If-None-Match and replaced with If-Match, so the service decides who was first.
A single Put Blob needs no more than the permission to create, and makes a blob that can
lie under an immutability policy; block lists would need the permission to overwrite.
"""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET  # noqa: S405 - expat bounds what entities expand to
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

import trio

from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store.account import Account, Request
from vdiskfs.store.connection import Answer, Connection, Timeouts
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
from vdiskfs.units import NS

_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_CONCURRENCY = 16
_PAGE_OBJECTS = 5000
# 5,000 names of 1,024 characters with 2 KiB of metadata each, as XML.
_PAGE_LIMIT = 32 * 1024 * 1024
_META = "x-ms-meta-"
_SKEW_S = 300
_TEMPORARY_CONFLICTS = frozenset({"ContainerBeingDeleted", "ContainerDisabled", "ServerBusy"})


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
        elif found.status != 200:
            # A signature for blobs alone may not look at the container: the next call tells.
            if found.status != 403:
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
            return _etag(answer)
        if _is_taken(answer) or (answer.status == 404 and answer.code == "BlobNotFound"):
            raise ConflictError(f"{name} was changed by another writer")
        raise self._error(name, answer)

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`."""
        answer = await self._connection.send(Request("GET", self._path(name)), limit=limit)
        if answer.status != 200:
            raise self._error(name, answer)
        return answer.body, _info(name, answer)

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
        return _info(name, answer)

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
            return _parse_page(answer.body, len(self._prefix))

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
        headers.update({_META + key: value for key, value in check_metadata(metadata).items()})
        return await self._connection.send(Request("PUT", self._path(name), headers=headers), body)

    async def _create(self, name: str, body: Bytes | Path, metadata: Mapping[str, str]) -> str:
        answer = await self._put(name, body, metadata, {"If-None-Match": "*"})
        if answer.status == 201:
            return _etag(answer)
        if _is_taken(answer) or (answer.status == 403 and await self._exists(name)):
            # 403: with a signature that may create and not overwrite, the service refuses
            # before it looks at the condition.
            raise AlreadyExistsError(f"{name} exists already")
        raise self._error(name, answer)

    async def _exists(self, name: str) -> bool:
        found = await self._connection.send(Request("HEAD", self._path(name)))
        return found.status == 200

    def _error(self, what: str, answer: Answer) -> VdiskfsError:
        """Say what an answer means that is not the one hoped for."""
        status, code = answer.status, answer.code or f"status {answer.status}"
        where = f"{self._account.name}/{self._container}"
        text = f"{where}: {what}: {code}"
        if answer.code == "ContainerNotFound":
            return NotFoundError(
                f"there is no container {self._container} in the account {self._account.name}",
                hint="vdiskfs vault init makes it",
            )
        if status == 404:
            return NotFoundError(f"there is no object {what} in {where}")
        if status in (401, 403):
            return RefusedError(f"the vault refused: {text}", hint=_refused_hint(answer))
        if status in (408, 429) or status >= 500 or answer.code in _TEMPORARY_CONFLICTS:
            return VaultUnreachableError(
                f"the vault cannot now: {text}", retry_after_s=_retry_after_s(answer)
            )
        return RefusedError(f"the vault refused: {text}")


def _is_taken(answer: Answer) -> bool:
    """Tell whether a condition was not met; leases and policies answer alike, with other codes."""
    return (answer.status, answer.code) in {
        (409, "BlobAlreadyExists"),
        (412, "ConditionNotMet"),
        (412, "TargetConditionNotMet"),
    }


def _refused_hint(answer: Answer) -> str:
    skew = abs(_seconds(answer.headers.get("date", "")) - time.time())
    if answer.code == "AuthenticationFailed":
        if skew > _SKEW_S:
            return f"this host's clock and the vault's differ by {skew:.0f} s"
        return "check AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN: wrong, or expired"
    if answer.code.startswith("Authorization"):
        return "the credential lacks a permission, or this network is not let in"
    return "check the credential and its permissions"


def _seconds(date: str) -> float:
    """Return the seconds since 1970 of an HTTP date; now, if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return time.time()


def _retry_after_s(answer: Answer) -> float | None:
    text = answer.headers.get("retry-after", "")
    if text.isdecimal():
        return float(text[:9])
    return max(0.0, _seconds(text) - time.time()) if text else None


def _etag(answer: Answer) -> str:
    etag = answer.headers.get("etag", "").strip('"')
    if not etag:
        raise VaultUnreachableError("the vault answered without an ETag")
    return etag


def _info(name: str, answer: Answer) -> ObjectInfo:
    headers = answer.headers
    size = headers.get("content-length", "")
    return ObjectInfo(
        name=name,
        size=int(size) if size.isdecimal() else len(answer.body),
        etag=_etag(answer),
        modified_ns=int(_seconds(headers.get("last-modified", ""))) * NS,
        metadata={
            key.removeprefix(_META): value
            for key, value in headers.items()
            if key.startswith(_META)
        },
    )


def _parse_page(body: bytes, skip: int) -> Page:
    """Parse List Blobs. ``skip`` is the length of the vault's own prefix."""
    try:
        root = ET.fromstring(body)  # noqa: S314 - see the import
        objects = [_parse_blob(blob, skip) for blob in root.iterfind("Blobs/Blob")]
    except (ET.ParseError, ValueError, TypeError) as error:
        raise DamagedError("the vault sent a listing that cannot be read") from error
    return objects, root.findtext("NextMarker") or None


def _parse_blob(blob: ET.Element, skip: int) -> ObjectInfo:
    properties = blob.find("Properties")
    name = blob.findtext("Name")
    if properties is None or name is None:
        raise ValueError("a blob without a name or properties")
    moment = parsedate_to_datetime(properties.findtext("Last-Modified") or "")
    return ObjectInfo(
        name=name[skip:],
        size=int(properties.findtext("Content-Length") or ""),
        etag=(properties.findtext("Etag") or "").strip('"'),
        modified_ns=int(moment.timestamp()) * NS,
        metadata={item.tag.lower(): item.text or "" for item in blob.iterfind("Metadata/*")},
    )
