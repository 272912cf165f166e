"""A vault in Azure Blob Storage: block blobs, each written by a single Put Blob.

One request for each call, without retries: ``retry`` is around this. Objects are created
with If-None-Match and replaced with If-Match, so the service decides who was first.
A single Put Blob needs no more than the permission to create, and makes a blob that can
lie under an immutability policy; block lists would need the permission to overwrite.

azure-storage-blob's blocking client in trio's threads: its asynchronous client runs under
trio only with a transport that does the same, and there a task cannot leave a request
behind that hangs. A task that is cancelled leaves at once; its request may be applied.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio
from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceRequestTimeoutError,
    ServiceResponseTimeoutError,
)
from azure.storage.blob import BlobClient, BlobProperties, BlobServiceClient, ContentSettings

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
from vdiskfs.store.account import Account
from vdiskfs.store.answer import Answer
from vdiskfs.store.body import Body, size_of
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

T = TypeVar("T")

_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
# As many connections as the SDK's transport keeps; one more would be closed after each use.
_CONCURRENCY = 10
_PAGE_OBJECTS = 5000
# The largest single Put Blob: nothing is ever cut into blocks, however large it is.
_SINGLE_PUT = 5000 * 1024 * 1024
# One slow piece after another must end some time, too: at least 16 KiB/s.
_SLOWEST_BYTES_PER_S = 16 * 1024
_CONTENT = ContentSettings(content_type="application/octet-stream")

# At lower levels the SDK and its transport log URLs, and a SAS token is in the URL.
for _name in ("azure", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect, between two pieces, and for a whole request without its body."""

    connect_s: float = 10.0
    read_s: float = 30.0
    total_s: float = 60.0


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
        self.requests = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._account = account
        self._timeouts = timeouts or Timeouts()
        self._limiter = trio.CapacityLimiter(concurrency)
        # Threads whose task has left go on for a moment: they must not stop new requests.
        self._threads = trio.CapacityLimiter(2 * concurrency)
        self._service = BlobServiceClient(
            account.endpoint,
            credential=account.credential,
            retry_total=0,
            connection_timeout=self._timeouts.connect_s,
            read_timeout=self._timeouts.read_s,
            max_single_put_size=_SINGLE_PUT,
            max_single_get_size=READ_LIMIT,
            # A redirection would carry the signature, or the SAS token, elsewhere.
            permit_redirects=False,
            user_agent="vdiskfs",
        )
        self._client = self._service.get_container_client(container)
        self._container = container

    def describe(self) -> str:
        """Return the vault's URL and the account's endpoint."""
        where = f"azure://{self._container}/{self._prefix}".rstrip("/")
        return f"{where} at {self._account.endpoint}"

    async def prepare(self) -> None:
        """Make the container if it is absent."""
        try:
            await self._call("the container", self._client.get_container_properties)
        except NotFoundError:
            try:
                await self._call("the container", self._client.create_container)
            except AlreadyExistsError:
                return
        except RefusedError as error:
            # "...PermissionMismatch" and the like: a signature for blobs alone may not look
            # at the container. The next call tells whether it is there.
            if "Mismatch" not in error.message:
                raise

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """See `Store`."""
        return await self._create(name, memoryview(data), metadata)

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`: sent in pieces."""
        return await self._create(name, path, metadata)

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`."""
        condition: dict[str, Any] = {"match_condition": MatchConditions.IfMissing}
        if etag is not None:
            condition = {"etag": f'"{etag}"', "match_condition": MatchConditions.IfNotModified}
        try:
            return await self._put(name, memoryview(data), metadata, condition)
        except AlreadyExistsError:
            raise ConflictError(f"{name} was changed by another writer") from None
        except NotFoundError:
            if etag is None or not await self._container_exists():
                raise
            raise ConflictError(f"{name} was deleted by another writer") from None

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`."""
        blob = self._blob(name)

        def read() -> tuple[bytes, BlobProperties]:
            stream = blob.download_blob(max_concurrency=1)
            if stream.size > limit:
                raise DamagedError(f"{name}: {stream.size} bytes, at most {limit} are expected")
            return stream.readall(), stream.properties

        data, found = await self._call(name, read, length=limit)
        self.bytes_received += len(data)
        return data, self._info(found)

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`."""
        check_range(offset, length)
        blob = self._blob(name)
        if not length:
            return b""

        def read() -> bytes:
            return blob.download_blob(offset, length, max_concurrency=1).readall()

        data = await self._call(name, read, length=length)
        if len(data) != length:
            raise DamagedError(f"{name} ends before byte {offset + length}")
        self.bytes_received += len(data)
        return data

    async def stat(self, name: str) -> ObjectInfo:
        """See `Store`."""
        blob = self._blob(name)
        return self._info(await self._call(name, blob.get_blob_properties))

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """See `Store`: a request for every 5,000 objects."""
        full = self._prefix + check_prefix(prefix)

        def read(marker: str | None) -> Page:
            pages = self._client.list_blobs(
                name_starts_with=full, include=["metadata"], results_per_page=_PAGE_OBJECTS
            ).by_page(continuation_token=marker)
            found = [self._info(blob) for blob in next(pages, iter(()))]
            return found, pages.continuation_token or None  # type: ignore[attr-defined]

        async def fetch(marker: str | None) -> Page:
            return await self._call("the listing", lambda: read(marker), length=_PAGE_OBJECTS << 10)

        return Pages(fetch)

    async def delete(self, name: str) -> None:
        """See `Store`."""
        blob = self._blob(name)
        await self._call(name, blob.delete_blob)

    async def aclose(self) -> None:
        """See `Store`."""
        self._service.close()
        await trio.lowlevel.checkpoint()

    # ---- requests ------------------------------------------------------------------------

    def _blob(self, name: str) -> BlobClient:
        return self._client.get_blob_client(self._prefix + check_name(name))

    def _info(self, found: BlobProperties) -> ObjectInfo:
        return ObjectInfo(
            name=found.name.removeprefix(self._prefix),
            size=int(found.size),
            etag=str(found.etag).strip('"'),
            modified_ns=int(found.last_modified.timestamp()) * NS,
            metadata={key.lower(): value for key, value in (found.metadata or {}).items()},
        )

    async def _put(
        self, name: str, body: memoryview | Path, metadata: Mapping[str, str],
        condition: Mapping[str, Any],
    ) -> str:  # fmt: skip
        blob = self._blob(name)
        checked = check_metadata(metadata)
        length = size_of(body) if isinstance(body, Path) else body.nbytes

        def put() -> Mapping[str, Any]:
            with Body(body, length) as sent:
                return blob.upload_blob(
                    b"", length=0, metadata=checked, overwrite=True, max_concurrency=1,
                    content_settings=_CONTENT, raw_request_hook=sent.replace_body, **condition,
                )  # fmt: skip

        answer = await self._call(name, put, length=length)
        self.bytes_sent += length
        return str(answer["etag"]).strip('"')

    async def _create(self, name: str, body: memoryview | Path, metadata: Mapping[str, str]) -> str:
        try:
            return await self._put(
                name, body, metadata, {"match_condition": MatchConditions.IfMissing}
            )
        except RefusedError:
            # With a signature that may create and not overwrite, the service refuses
            # before it looks at the condition.
            if not await self._exists(name):
                raise
        raise AlreadyExistsError(f"{name} exists already")

    async def _exists(self, name: str) -> bool:
        try:
            await self.stat(name)
        except (NotFoundError, RefusedError):
            return False
        return True

    async def _container_exists(self) -> bool:
        try:
            await self._call("the container", self._client.get_container_properties)
        except NotFoundError:
            return False
        except RefusedError:
            pass
        return True

    async def _call(self, what: str, act: Callable[[], T], *, length: int = 0) -> T:
        """Make one request in a thread; whatever fails is one of our errors, without its URL."""
        allowed_s = self._timeouts.total_s + length / _SLOWEST_BYTES_PER_S
        self.requests += 1
        done: list[T] = []
        async with self._limiter:
            with trio.move_on_after(allowed_s):
                done.append(
                    await trio.to_thread.run_sync(
                        self._translated,
                        what,
                        act,
                        abandon_on_cancel=True,
                        limiter=self._threads,
                    )
                )
        if not done:
            raise VaultUnreachableError(f"the vault did not finish {what} in {allowed_s:.0f} s")
        return done[0]

    def _translated(self, what: str, act: Callable[[], T]) -> T:
        try:
            return act()
        except AzureError as error:
            failure = self._failure(what, error)
        except OSError as error:
            failure = VaultUnreachableError(f"the vault: {error.strerror or 'no connection'}")
        # Outside of the handlers: the other error's text and context may hold a URL.
        raise failure

    def _failure(self, what: str, error: AzureError) -> VdiskfsError:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if (
            response is not None
            and isinstance(error, HttpResponseError)
            and int(status or 0) >= 300
        ):
            headers = {key.lower(): value for key, value in response.headers.items()}
            if not headers.get("x-ms-error-code") and error.error_code:  # type: ignore[attr-defined]
                headers["x-ms-error-code"] = str(error.error_code)  # type: ignore[attr-defined]
            answer = Answer(int(status or 0), headers)
            if answer.is_taken or answer.code == "ContainerAlreadyExists":
                return AlreadyExistsError(f"{what} exists already, or was changed")
            if status == 416:
                return DamagedError(f"{what} ends before what is asked for")
            return answer.error(what, account=self._account.name, container=self._container)
        if isinstance(error, ClientAuthenticationError):
            return RefusedError(
                "no usable Azure credential was found", hint="check the account's settings"
            )
        return _no_answer(self._account.endpoint, error)


def _no_answer(endpoint: str, error: AzureError) -> VdiskfsError:
    host = endpoint.partition("://")[2].partition("/")[0]
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return RefusedError(
            f"{host}: its certificate is not trusted",
            hint="check the endpoint, the clock and REQUESTS_CA_BUNDLE",
        )
    if "NameResolutionError" in text or "Name or service not known" in text:
        return VaultUnreachableError(
            f"{host}: the name is not known", hint="check the account's name and the network"
        )
    if isinstance(error, ServiceRequestTimeoutError):
        reason = "no connection in time"
    elif isinstance(error, ServiceRequestError):
        reason = "no connection"
    elif isinstance(error, ServiceResponseTimeoutError):
        reason = "no answer in time"
    elif isinstance(error, IncompleteReadError):
        reason = "the answer was cut off"
    else:
        reason = "the connection was lost"
    return VaultUnreachableError(f"{host}: {reason}")
