"""What a blob service answers, and what it means. No I/O."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from vdiskfs.errors import (
    DamagedError,
    NotFoundError,
    RefusedError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store.object import ObjectInfo, Page
from vdiskfs.units import NS

METADATA = "x-ms-meta-"
"""What the headers of an object's metadata begin with."""

_SKEW_S = 300
_TEMPORARY_CONFLICTS = frozenset({"ContainerBeingDeleted", "ContainerDisabled"})
_TAKEN = frozenset(
    {
        (409, "BlobAlreadyExists"),
        (412, "ConditionNotMet"),
        (412, "TargetConditionNotMet"),
    }
)


@dataclass
class Answer:
    """One answer. ``headers`` have lower case names; ``body`` is as long as was announced."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    sent: int = 0

    @property
    def code(self) -> str:
        """The service's own name of an error, or ""."""
        return self.headers.get("x-ms-error-code", "")

    @property
    def is_taken(self) -> bool:
        """Whether a condition was not met; leases and policies answer with other codes."""
        return (self.status, self.code) in _TAKEN

    @property
    def etag(self) -> str:
        """The version of the object, without quotes."""
        etag = self.headers.get("etag", "").strip('"')
        if not etag:
            raise VaultUnreachableError("the vault answered without an ETag")
        return etag

    @property
    def retry_after_s(self) -> float | None:
        """What the service asks to wait, given as seconds or as a date."""
        text = self.headers.get("retry-after", "")
        if text.isdecimal():
            return float(text[:9])
        return max(0.0, _seconds(text) - time.time()) if text else None

    def info(self, name: str) -> ObjectInfo:
        """Read what an object is from the headers of GET or HEAD."""
        size = self.headers.get("content-length", "")
        return ObjectInfo(
            name=name,
            size=int(size) if size.isdecimal() else len(self.body),
            etag=self.etag,
            modified_ns=int(_seconds(self.headers.get("last-modified", ""))) * NS,
            metadata={
                key.removeprefix(METADATA): value
                for key, value in self.headers.items()
                if key.startswith(METADATA)
            },
        )

    def error(self, what: str, *, account: str, container: str) -> VdiskfsError:
        """Say what an answer means that is not the one hoped for."""
        where = f"{account}/{container}"
        text = f"{where}: {what}: {self.code or f'status {self.status}'}"
        if self.code == "ContainerNotFound":
            return NotFoundError(
                f"there is no container {container} in the account {account}",
                hint="vdiskfs vault init makes it",
            )
        if self.status == 404:
            return NotFoundError(f"there is no object {what} in {where}")
        if self.status in (401, 403):
            return RefusedError(f"the vault refused: {text}", hint=self._refused_hint())
        if self.status in (408, 429) or self.status >= 500 or self.code in _TEMPORARY_CONFLICTS:
            return VaultUnreachableError(
                f"the vault cannot now: {text}", retry_after_s=self.retry_after_s
            )
        return RefusedError(f"the vault refused: {text}")

    def _refused_hint(self) -> str:
        if self.code == "AuthenticationFailed":
            skew = abs(_seconds(self.headers.get("date", "")) - time.time())
            if skew > _SKEW_S:
                return f"this host's clock and the vault's differ by {skew:.0f} s"
            return "check AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN: wrong, or expired"
        if self.code.startswith("Authorization"):
            return "the credential lacks a permission, or this network is not let in"
        return "check the credential and its permissions"


def _seconds(date: str) -> float:
    """Return the seconds since 1970 of an HTTP date; now, if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return time.time()


def parse_page(body: bytes, skip: int) -> Page:
    """Parse the answer to List Blobs.

    Args:
        body: XML; expat bounds what entities may expand to.
        skip: the length of the vault's own prefix, which names lose.

    Raises:
        DamagedError: it is not a listing.
    """
    try:
        root = ET.fromstring(body)  # noqa: S314 - bounded, see above
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
