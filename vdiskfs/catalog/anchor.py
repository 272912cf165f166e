"""What this site knows that the vault holds, to see that it still does.

A name can come to mean another vault while the mount runs (a container that was deleted
and made again, a folder where something else was mounted), or an older state of the same
one (a restored backup). Deltas that were sent there would hang in the air. So the newest
delta that the vault has accepted is looked at before the next one is sent, and everything
when the heartbeat is not the one that this site has written.
"""

from __future__ import annotations

import contextlib
from typing import Any

from vdiskfs.catalog.documents import DOCUMENT_LIMIT, FORMAT, decode_document, encode_document, take
from vdiskfs.delta import DeltaHead
from vdiskfs.delta.layout import is_id
from vdiskfs.delta.names import slot_name
from vdiskfs.errors import (
    AlreadyExistsError,
    FormatError,
    NotFoundError,
    StateError,
    WrongVaultError,
)
from vdiskfs.sealed import SealedStore
from vdiskfs.store import DATA_MARK, PROBES, Store, control_of, is_split

VAULT = "vault.json"

BACK = "nothing is sent there; bring the vault back"


class Anchor:
    """The newest delta of one disk that the vault is known to hold."""

    def __init__(self, store: Store, vault_id: str, name: str, what: str, digest: str = "") -> None:
        """Begin with an object that was just seen; ``what`` names it for people."""
        self._store = store
        self._vault_id = vault_id
        self._name = name
        self._what = what
        self._digest = digest

    def note(self, head: DeltaHead) -> None:
        """The vault holds this slot now."""
        self._name = slot_name(head.disk_id, head.generation, head.from_epoch)
        self._what = f"epoch {head.to_epoch}"
        self._digest = head.to_digest.hex()

    async def check(self) -> None:
        """Look at it: one request, and one more if it is not there.

        Raises:
            NotFoundError: there is no vault any more.
            WrongVaultError: it is another one, or an older state of this one.
        """
        try:
            found = await self._store.stat(self._name)
        except NotFoundError:
            await check_identity(self._store, self._vault_id)
            raise WrongVaultError(
                f"{self._store.describe()}: the vault has gone back in time: it lacks "
                f"{self._what}, which it has held",
                hint=f"{BACK}, or mount with --accept-rollback to go on from what it holds",
            ) from None
        digest = found.metadata.get("digest", self._digest)
        if self._digest and digest != self._digest:
            await check_identity(self._store, self._vault_id)
            raise WrongVaultError(
                f"{self._store.describe()}: the vault has gone back in time and on without this "
                f"site: {self._name} is not what it was",
                hint=f"{BACK}, or mount again to go on in a new generation",
            )


async def check_identity(store: Store, vault_id: str) -> None:
    """Check that the vault of this id is there; see `Vault.check_identity`."""
    where = f"{store.describe()}: {VAULT}"
    try:
        data, _ = await store.read(VAULT, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        raise NotFoundError(
            f"{store.describe()}: the vault is gone: there is no {VAULT}", hint=BACK
        ) from None
    found = vault_id_in(decode_document(data, where=where), where=where)
    if found != vault_id:
        raise WrongVaultError(
            f"{store.describe()}: another vault, {found[:8]}, is where vault {vault_id[:8]} was",
            hint=BACK,
        )
    await check_data(store, vault_id)


async def check_data(store: Store, vault_id: str) -> None:
    """Check that the data container is this vault's, where it has one of its own.

    Raises:
        WrongVaultError: it is another vault's, or nobody's.
    """
    if not is_split(store):
        return
    found = await whose_data(store)
    if found != vault_id:
        whose = "no vault's" if found is None else f"that of vault {found[:8]}"
        raise WrongVaultError(
            f"{store.describe()}: two containers that do not belong together: control is vault "
            f"{vault_id[:8]}'s, the data is {whose}",
            hint="name the two that the vault was made with",
        )


async def check_unclaimed(store: Store) -> str | None:
    """Check that a vault can be made here: that there is none, and no other one's data.

    Returns the id of one whose making failed halfway, to be made now: its data is marked, by
    the name of its control container, and nothing else is in either.

    Raises:
        StateError: it cannot.
    """
    with contextlib.suppress(NotFoundError):
        await store.stat(VAULT)
        raise StateError(f"{store.describe()} holds a vault already")
    mark = await _data_mark(store)
    if mark is None:
        return None
    found, control = mark
    if control is not None and control == control_of(store) and await _holds_nothing(store):
        return found
    raise StateError(
        f"{store.describe()}: the container is the data of vault {found}",
        hint="open that vault with its control container, azure://CONTAINER?control=CONTROL; "
        "make a new one in an empty container",
    )


async def mark_data(store: Store, vault_id: str) -> None:
    """Let the data container of a vault that is to be made say whose it is.

    Raises:
        StateError: it is another one's by now.
    """
    if not is_split(store):
        return
    mark = {"format": FORMAT, "vault_id": vault_id, "control": control_of(store)}
    try:
        await store.create(DATA_MARK, encode_document(mark))
    except AlreadyExistsError:
        if await whose_data(store) != vault_id:
            raise StateError(f"{store.describe()}: another vault is made there just now") from None


async def whose_data(store: Store) -> str | None:
    """Return the id of the vault whose data lies here, and whose documents lie elsewhere."""
    mark = await _data_mark(store)
    return None if mark is None else mark[0]


async def _data_mark(store: Store) -> tuple[str, str | None] | None:
    """Return a vault's id and the name of its control container, which older marks have not."""
    # It names what is not encrypted: who has no key learns from it what to do.
    plain = store.inner if isinstance(store, SealedStore) else store
    where = f"{store.describe()}: {DATA_MARK}"
    try:
        data, _ = await plain.read(DATA_MARK, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        return None
    values = decode_document(data, where=where)
    control = take(values, "control", str, where=where) if "control" in values else None
    return vault_id_in(values, where=where), control


async def _holds_nothing(store: Store) -> bool:
    """Look whether there is nothing but the mark, and what probes leave."""
    async for info in store.list(""):
        if info.name != DATA_MARK and not info.name.startswith(PROBES):
            return False
    return True


def vault_id_in(values: dict[str, Any], *, where: str) -> str:
    """Return the vault's id that vault.json says; FormatError if it says none."""
    vault_id: str = take(values, "vault_id", str, where=where)
    if not is_id(vault_id):
        raise FormatError("the vault's id is no id", where=where)
    return vault_id
