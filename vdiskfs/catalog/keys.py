"""The keys of an encrypted vault: added, removed, changed by compare-and-swap of vault.json.

The data key stays what it is: who has had it, or has a copy of an older vault.json and an old
passphrase, can read the vault. vdiskfs-format(5), "Threat model".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio

from vdiskfs.catalog.anchor import VAULT
from vdiskfs.catalog.vault import Vault, now_text
from vdiskfs.catalog.vaultfile import VaultFile, read_vault_file, slots_opened, unlock
from vdiskfs.crash import hook
from vdiskfs.crypto import SLOTS_MAX, DataKey, Secrets, Slot, make_slot
from vdiskfs.errors import ConflictError, NotFoundError, StateError, UsageError
from vdiskfs.sealed import SealedStore

_TRIES = 20


async def list_slots(vault: Vault) -> tuple[Slot, ...]:
    """Return the key slots of a vault; none where it is not encrypted."""
    file, _ = await read_vault_file(vault.store)
    return file.slots or ()


async def add_slot(
    vault: Vault, given: Secrets, *, label: str = "", sending: Callable[[], None] = lambda: None
) -> Slot:
    """Let what is given open the vault too; durable on return.

    ``sending`` is called before anything is.

    Raises:
        UsageError: the vault is not encrypted.
        StateError: it has as many slots as it may have.
    """
    key = _key(vault)
    slot = await _make(key, given, label)

    def add(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        _check_room(slots)
        sending()
        return (*slots, slot)

    await _change(vault, key, add)
    return slot


async def check_room(vault: Vault) -> None:
    """Check that a key may be added.

    Raises:
        UsageError, StateError: as `add_slot`.
    """
    _check_room((await _file(vault)).slots or ())


def _check_room(slots: tuple[Slot, ...]) -> None:
    if len(slots) >= SLOTS_MAX:
        raise StateError(f"the vault has {SLOTS_MAX} keys already", hint="vdiskfs vault key remove")


async def remove_slot(vault: Vault, slot_id: str, *, dry_run: bool = False) -> None:
    """Let a slot open the vault no more; durable on return. ``dry_run``: only look.

    Raises:
        NotFoundError: there is no such slot.
        StateError: it is the last one.
    """

    def remove(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        left = tuple(slot for slot in slots if slot.id != slot_id)
        if len(left) == len(slots):
            raise _no_slot(slot_id)
        if not left:
            raise StateError("the last key cannot be removed", hint="add another one first")
        return left

    if dry_run:
        remove((await _file(vault)).slots or ())
        return
    await _change(vault, _key(vault), remove)


async def find_slot(vault: Vault, slot_id: str) -> Slot:
    """Return a slot by its id; NotFoundError."""
    for slot in (await _file(vault)).slots or ():
        if slot.id == slot_id:
            return slot
    raise _no_slot(slot_id)


async def opened_slot(vault: Vault, given: Secrets, kind: str) -> Slot:
    """Return the slot of a kind that opens with what is given.

    What is given may open several: a key file is often given by the configuration. Which one
    is to go is never guessed.

    Raises:
        UsageError: none of that kind opens with it, or more than one.
    """
    file = await _file(vault)
    opened = await slots_opened(file, given)
    found = [slot for slot in opened if slot.kind == kind]
    if len(found) == 1:
        return found[0]
    what = f"{'no' if not found else 'more than one'} key of the new one's kind, {kind}"
    listed = ", ".join(f"{slot.id} ({slot.kind})" for slot in opened) or "none"
    raise UsageError(
        f"what is given opens {what}: {listed}",
        hint="give the key that is to go, or name it: vdiskfs vault key change KEY",
    )


async def change_slot(
    vault: Vault, old: Slot, new: Secrets, *, sending: Callable[[], None] = lambda: None
) -> Slot:
    """Let ``new`` open the vault in the place of a slot; one step, durable on return.

    ``sending`` is called before anything is.

    Raises:
        ConflictError: the slot is there no more.
    """
    key = _key(vault)
    slot = await _make(key, new, old.label)

    def change(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        if old not in slots:
            raise ConflictError("the key was changed by somebody else meanwhile")
        sending()
        return tuple(slot if one == old else one for one in slots)

    await _change(vault, key, change)
    return slot


async def _file(vault: Vault) -> VaultFile:
    """Return what vault.json says now, authenticated."""
    key = _key(vault)
    file, _ = await read_vault_file(vault.store)
    await unlock(file, key, where=f"{vault.store.describe()}: {VAULT}")
    return file


def _no_slot(slot_id: str) -> NotFoundError:
    return NotFoundError(f"no key {slot_id!r}", hint="see `vdiskfs vault key list`")


async def _make(key: DataKey, given: Secrets, label: str) -> Slot:
    def work() -> Slot:
        return make_slot(key, given, label=label, created=now_text())

    return await trio.to_thread.run_sync(work)


async def _change(
    vault: Vault, key: DataKey, change: Callable[[tuple[Slot, ...]], tuple[Slot, ...]]
) -> VaultFile:
    """Change the slots by compare-and-swap; ``change`` may be called again."""
    where = f"{vault.store.describe()}: {VAULT}"
    for _ in range(_TRIES):
        file, etag = await read_vault_file(vault.store)
        await unlock(file, key, where=where)
        changed = replace(file, slots=change(file.slots or ()), revision=file.revision + 1)
        try:
            await vault.store.replace(VAULT, changed.encode(key), etag=etag)
        except ConflictError:
            continue
        hook("keys.changed")
        return changed
    raise ConflictError("the keys are changed by others all the time")


def _key(vault: Vault) -> DataKey:
    if not isinstance(vault.store, SealedStore):
        raise UsageError(f"{vault.store.describe()}: the vault is not encrypted: it has no keys")
    return vault.store.key
