"""``vault.json``: what a vault is, and how it is opened. The one object that is never sealed.

Of an encrypted vault it is authenticated as a whole by a key that is derived from the data
key: a slot that somebody without the key has added, removed or changed is noticed.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import trio

from vdiskfs.catalog.anchor import VAULT, vault_id_in
from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.crypto import (
    SCHEME_AES_256_GCM,
    SCHEME_NONE,
    SLOTS_MAX,
    DataKey,
    Secrets,
    Slot,
    decode_slot,
    encode_slot,
    open_slots,
    opened_slots,
)
from vdiskfs.errors import FormatError, NotFoundError, RefusedError
from vdiskfs.store import Store


@dataclass(frozen=True, slots=True)
class VaultFile:
    """What vault.json says. ``slots`` is None where the vault is not encrypted.

    ``revision`` grows with every change; 0 and no meaning where it is not encrypted. ``format``
    is that of the document that was read.
    """

    vault_id: str
    created: str
    slots: tuple[Slot, ...] | None = None
    revision: int = 0
    mac: str = ""
    format: int = FORMAT

    def to_values(self) -> dict[str, Any]:
        """Return the document."""
        values: dict[str, Any] = {
            "format": self.format,
            "vault_id": self.vault_id,
            "created": self.created,
        }
        if self.slots is None:
            return values | {"encryption": {"scheme": SCHEME_NONE}}
        encryption = {
            "scheme": SCHEME_AES_256_GCM,
            "slots": [encode_slot(slot) for slot in self.slots],
        }
        return values | {"revision": self.revision, "encryption": encryption, "mac": self.mac}

    def encode(self, key: DataKey | None) -> bytes:
        """Return the object's bytes; with the key, what shows that we had it."""
        fresh = replace(self, format=FORMAT)
        return encode_document((fresh if key is None else fresh.with_mac(key)).to_values())

    def with_mac(self, key: DataKey) -> VaultFile:
        """Return the same with what shows that we had the key."""
        return replace(self, mac=key.seal_slots(self._authenticated()))

    def check(self, key: DataKey, *, where: str) -> None:
        """Check that whoever wrote it had the key.

        Raises:
            FormatError: it is not so.
        """
        if not hmac.compare_digest(key.seal_slots(self._authenticated()), self.mac):
            raise FormatError(
                "was changed by somebody who has not the key, or is damaged", where=where,
                hint="bring back the file as it was; the key itself is right",
            )  # fmt: skip

    def _authenticated(self) -> bytes:
        values = {key: value for key, value in self.to_values().items() if key != "mac"}
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def decode_vault_file(data: bytes, *, where: str) -> VaultFile:
    """Return what vault.json says, bounded. Nothing of it is authenticated yet.

    Raises:
        FormatError: it is not one, or of a newer format.
    """
    values = decode_document(data, where=where)
    vault_id = vault_id_in(values, where=where)
    created = take(values, "created", str, where=where)
    encryption = take(values, "encryption", dict, where=where)
    scheme = encryption.get("scheme")
    if scheme == SCHEME_NONE:
        return VaultFile(vault_id, created)
    if scheme != SCHEME_AES_256_GCM:
        shown = repr(scheme[:40]) if isinstance(scheme, str) else type(scheme).__name__
        raise FormatError(
            f"unknown encryption scheme {shown}", where=where,
            hint="the vault was made by a newer vdiskfs, or is damaged",
        )  # fmt: skip
    slots = take(encryption, "slots", list, where=where)
    if not 0 < len(slots) <= SLOTS_MAX:
        raise FormatError(f"a vault has 1 to {SLOTS_MAX} key slots", where=where)
    found = tuple(decode_slot(slot, where=where) for slot in slots)
    revision, mac = (
        take(values, "revision", int, where=where),
        take(values, "mac", str, where=where),
    )
    file = VaultFile(vault_id, created, found, revision, mac, values.get("format", 1))
    if file.to_values() != values:
        raise FormatError("has other parts than it should", where=where)
    return file


async def read_vault_file(store: Store) -> tuple[VaultFile, str]:
    """Return what vault.json says, and its etag.

    Raises:
        NotFoundError: there is no vault.
        FormatError: it is damaged, or of a newer format.
    """
    try:
        data, info = await store.read(VAULT, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        raise NotFoundError(
            f"no vault at {store.describe()}", hint="make one with `vdiskfs vault init`"
        ) from None
    return decode_vault_file(data, where=f"{store.describe()}: {VAULT}"), info.etag


async def unlock(file: VaultFile, given: Secrets | DataKey | None, *, where: str) -> DataKey | None:
    """Return the vault's data key; None: it is not encrypted. Takes a second.

    Raises:
        KeyNeededError, RefusedError: it is not opened by what is given; or it is not encrypted,
            and a key is given all the same: somebody may have put another one in its place.
        FormatError: vault.json was changed by somebody without the key.
    """
    if file.slots is None:
        if given:
            raise RefusedError(
                f"{where}: the vault is not encrypted, and a key was given for it",
                hint="if that is right, give no key (VDISKFS_PASSPHRASE, --key-file, key_file)",
            )
        return None
    if isinstance(given, DataKey):
        key = given
    else:
        key = (await _open(file.slots, given or Secrets(), file.vault_id, where))[0]
    file.check(key, where=where)
    return key


async def slots_opened(file: VaultFile, given: Secrets) -> list[Slot]:
    """Return all slots that what is given opens; takes seconds."""
    slots = file.slots or ()
    return await trio.to_thread.run_sync(opened_slots, slots, given, file.vault_id)


async def _open(
    slots: Sequence[Slot], given: Secrets, vault_id: str, where: str
) -> tuple[DataKey, Slot]:
    def work() -> tuple[DataKey, Slot]:
        return open_slots(slots, given, vault_id, where=where)

    return await trio.to_thread.run_sync(work)
