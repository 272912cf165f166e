"""What a vault enforces: probed, not believed. Some services accept a policy and ignore it.

An object is made where the data lies; whether it can be overwritten and deleted says whether
deltas can. Where it cannot it stays, and is the one that is looked at next time.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass

from vdiskfs.errors import ConflictError, NotFoundError, RefusedError
from vdiskfs.store import PROBES, Store

ALLOWED, POLICY, CREDENTIAL = "allowed", "refused by a policy", "refused to this credential"


@dataclass(frozen=True, slots=True)
class Enforced:
    """Whether data can be overwritten and deleted: one of the words above each.

    ``documents`` is what can be done with the objects that change: they must be replaced.
    """

    overwrite: str
    delete: str
    documents: str

    @property
    def is_kept(self) -> bool:
        """Whether nobody with this credential can take a point away."""
        return ALLOWED not in (self.overwrite, self.delete)


async def probe_enforced(store: Store) -> Enforced:
    """Try what a vault lets its writers do with data, and with documents.

    Raises:
        RefusedError: not even an object can be made.
        VaultUnreachableError: it does not answer.
    """
    name = await _left(store)
    if name is None:
        name = f"{PROBES}{secrets.token_hex(16)}"
        await store.create(name, b"vdiskfs\n")
    overwrite = await _overwrite(store, name)
    return Enforced(overwrite, await _delete(store, name), await _documents(store))


async def _left(store: Store) -> str | None:
    """Return the probe that could not be deleted last time, if it still cannot."""
    for name in [info.name async for info in store.list(PROBES)]:
        if await _delete(store, name) != ALLOWED:
            return name
    return None


async def _overwrite(store: Store, name: str) -> str:
    info = await store.stat(name)
    try:
        await store.replace(name, b"vdiskfs, again\n", etag=info.etag)
    except RefusedError as error:
        return _why(error)
    except ConflictError:  # somebody else probes, and was let
        pass
    return ALLOWED


async def _delete(store: Store, name: str) -> str:
    try:
        await store.delete(name)
    except RefusedError as error:
        return _why(error)
    except NotFoundError:  # as above
        pass
    return ALLOWED


async def _documents(store: Store) -> str:
    """Make a document, change it and take it away."""
    name = f"probe-{secrets.token_hex(16)}"
    etag = await store.create(name, b"vdiskfs\n")
    try:
        await store.replace(name, b"vdiskfs, again\n", etag=etag)
    except RefusedError as error:
        return _why(error)
    finally:
        with contextlib.suppress(RefusedError, NotFoundError):
            await store.delete(name)
    return ALLOWED


def _why(error: RefusedError) -> str:
    return POLICY if "BlobImmutable" in error.message else CREDENTIAL
