"""What a refusal or failure of a blob service means. No I/O."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from vdiskfs.errors import (
    NotFoundError,
    RefusedError,
    VaultUnreachableError,
    VdiskfsError,
)

_SKEW_S = 300
_TEMPORARY_CONFLICTS = frozenset({"ContainerBeingDeleted", "ContainerDisabled"})
_TAKEN = frozenset(
    {
        (409, "BlobAlreadyExists"),
        (412, "ConditionNotMet"),
        (412, "TargetConditionNotMet"),
    }
)


_IMMUTABLE = (
    "the container keeps what is in it; what changes must lie in a second one: "
    "azure://CONTAINER/PREFIX?control=CONTAINER"
)


@dataclass
class Answer:
    """An answer that was not hoped for. ``headers`` have lower case names."""

    status: int
    headers: dict[str, str]

    @property
    def code(self) -> str:
        """The service's own name of an error, or ""."""
        return self.headers.get("x-ms-error-code", "")

    @property
    def is_taken(self) -> bool:
        """Whether a condition was not met; leases and policies answer with other codes."""
        return (self.status, self.code) in _TAKEN

    @property
    def is_immutable(self) -> bool:
        """Whether an immutability policy, or a legal hold, keeps what is there."""
        return self.code.startswith("BlobImmutableDueTo")

    @property
    def retry_after_s(self) -> float | None:
        """What the service asks to wait, given as seconds or as a date."""
        text = self.headers.get("retry-after", "")
        if text.isdecimal():
            return float(text[:9])
        return max(0.0, _seconds(text) - time.time()) if text else None

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
        if self.is_immutable:
            return RefusedError(f"the vault refused: {text}", hint=_IMMUTABLE)
        return RefusedError(f"the vault refused: {text}")

    def _refused_hint(self) -> str:
        if self.code == "AuthenticationFailed":
            skew = abs(_seconds(self.headers.get("date", "")) - time.time())
            if skew > _SKEW_S:
                return f"this host's clock and the vault's differ by {skew:.0f} s"
            return "check AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN: wrong, or expired"
        if self.code == "AuthorizationFailure":
            return "check AZURE_STORAGE_KEY; or this network is not let in"
        if self.code.startswith("Authorization"):
            return "the credential lacks a permission"
        return "check the credential and its permissions"


def _seconds(date: str) -> float:
    """Return the seconds since 1970 of an HTTP date; now, if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return time.time()
