"""What somebody who can write to the vault, and has not the key, can do: be found out.

Each line of the table is one thing done to the objects as they lie there, and what shows it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tests.catalog.harness import content_at
from tests.sealed.rig import KEY, Target, target
from vdiskfs.catalog import Vault, check
from vdiskfs.catalog.documents import decode_document, encode_document
from vdiskfs.catalog.groups import list_groups, read_group
from vdiskfs.catalog.keys import add_slot
from vdiskfs.catalog.proofs import Proof, list_proven, proof_name, write_proof
from vdiskfs.catalog.vault import name_object
from vdiskfs.crypto import Secrets
from vdiskfs.errors import (
    DamagedError,
    NotFoundError,
    RefusedError,
    VdiskfsError,
    WrongVaultError,
)
from vdiskfs.sealed import Seen
from vdiskfs.sealed.blocks import STORED_BLOCK
from vdiskfs.sealed.names import stored_name

Attack = Callable[[Target], Awaitable[None]]
Look = Callable[[Target], Awaitable[object]]
TIP = 34


# ---- looking -------------------------------------------------------------------------------


async def read_tip(one: Target) -> object:
    """Read the newest point, as somebody who has just come."""
    vault = await one.fresh()
    log = vault.log(await vault.disk(one.disk))
    return await content_at(log, TIP)


async def find_web01(one: Target) -> object:
    return await (await one.fresh()).find_disk("web01")


async def find_disk(one: Target) -> object:
    return await (await one.fresh()).disk(one.disk)


async def see_group(one: Target) -> object:
    return await read_group((await one.fresh()).store, "secretgroup")


async def open_it(one: Target) -> object:
    return await one.fresh()


async def disk_again(one: Target) -> object:
    """Read the disk's record as the site that has seen it."""
    return await (await one.fresh(one.sealed.seen)).disk(one.disk)


async def group_again(one: Target) -> object:
    return await read_group((await one.fresh(one.sealed.seen)).store, "secretgroup")


async def proofs_again(one: Target) -> object:
    """List the proofs as the site that has listed them."""
    return await list_proven((await one.fresh(one.sealed.seen)).store, one.disk)


async def latest_proven_again(one: Target) -> object:
    vault = await one.fresh(one.sealed.seen)
    return await vault.log(await vault.disk(one.disk)).find("latest-proven")


async def disks_again(one: Target) -> object:
    return await (await one.fresh(one.sealed.seen)).disks()


async def open_again(one: Target) -> object:
    return await one.fresh(one.sealed.seen)


async def check_all(one: Target) -> object:
    """Check the whole vault, as ``vault check --read-data`` does."""
    report = await check(await one.fresh(), read_data=True)
    if report.problems:
        raise DamagedError(report.problems[0].message)
    return report


# ---- attacking -----------------------------------------------------------------------------


def slots(one: Target) -> list[str]:
    return one.named(f"disks/{one.disk}/g00000001/")


def joined(one: Target) -> list[str]:
    return one.named(f"disks/{one.disk}/g00000001.")


def hidden(one: Target, kind: str) -> list[str]:
    return one.named(f"{kind}/")


def swap(one: Target, a: str, b: str) -> None:
    objects = one.raw.objects
    objects[a], objects[b] = objects[b], objects[a]


def change(one: Target, name: str, data: bytes) -> None:
    _, metadata, etag = one.raw.objects[name]
    one.raw.objects[name] = (data, metadata, etag)


def data_of(one: Target, name: str) -> bytes:
    return one.raw.objects[name][0]


async def swap_slots(one: Target) -> None:
    swap(one, slots(one)[-1], slots(one)[-2])


async def swap_slots_bytes_alone(one: Target) -> None:
    a, b = slots(one)[-2:]
    data = data_of(one, a), data_of(one, b)
    change(one, a, data[1])
    change(one, b, data[0])


async def swap_segments(one: Target) -> None:
    a, b = one.named("segments/")[:2]
    swap(one, a, b)


async def swap_joined(one: Target) -> None:
    a, b = joined(one)[:2]
    swap(one, a, b)


async def slot_for_joined(one: Target) -> None:
    one.raw.objects[joined(one)[0]] = one.raw.objects[slots(one)[3]]


async def slot_of_another_disk(one: Target) -> None:
    name = f"disks/{one.other.id}/g00000001/{0:016x}"
    one.raw.objects[name] = one.raw.objects[slots(one)[0]]


async def read_other(one: Target) -> object:
    vault = await one.fresh()
    return await content_at(vault.log(one.other), 1)


async def slot_at_another_epoch(one: Target) -> None:
    """Replay an old delta at the tip."""
    one.raw.objects[slots(one)[-1]] = one.raw.objects[slots(one)[5]]


async def object_of_another_vault(one: Target) -> None:
    other = Vault.reopened(one.raw, "9" * 32, "", type(one.sealed.key)(b"k" * 32, "9" * 32), Seen())
    name = slots(one)[-1]
    del one.raw.objects[name]
    await other.store.create(name, b"forged")


async def same_key_of_another_vault(one: Target) -> None:
    """What was sealed with the same key for another vault's id is not this vault's."""
    key = type(one.sealed.key)(one.sealed.key.secret, "9" * 32)
    other = Vault.reopened(one.raw, "9" * 32, "", key, Seen())
    name = f"disks/{one.disk}/disk.json"
    document, _ = await one.sealed.read(name)
    del one.raw.objects[name]
    await other.store.create(name, document)


async def record_of_another_disk(one: Target) -> None:
    swap(one, f"disks/{one.disk}/disk.json", f"disks/{one.other.id}/disk.json")


async def group_as_record(one: Target) -> None:
    one.raw.objects[f"disks/{one.disk}/disk.json"] = one.raw.objects[hidden(one, "groups")[0]]


async def swap_names(one: Target) -> None:
    a, b = hidden(one, "names")
    swap(one, a, b)


async def rename_group(one: Target) -> None:
    """Give an object another name: nobody finds it, and a listing shows it as unreadable."""
    name = hidden(one, "groups")[0]
    one.raw.objects[f"groups/{'7' * 32}"] = one.raw.objects.pop(name)


async def unreadable_groups(one: Target) -> object:
    found = await list_groups((await one.fresh()).store)
    for listed in found:
        if listed.error is not None:
            raise listed.error
    return found


async def plain_record(one: Target) -> None:
    """Put a document that is not sealed in the place of one that is."""
    document, _ = await one.sealed.read(f"disks/{one.disk}/disk.json")
    change(one, f"disks/{one.disk}/disk.json", document)


async def cut_slot(one: Target) -> None:
    name = slots(one)[-1]
    change(one, name, data_of(one, name)[:-1])


async def cut_at_a_block(one: Target) -> None:
    name = max(slots(one), key=lambda name: len(data_of(one, name)))
    change(one, name, data_of(one, name)[:STORED_BLOCK])


async def cut_segment_at_a_block(one: Target) -> None:
    name = max(one.named("segments/"), key=lambda name: len(data_of(one, name)))
    change(one, name, data_of(one, name)[:STORED_BLOCK])


async def empty_slot(one: Target) -> None:
    change(one, slots(one)[-1], b"")


async def empty_record(one: Target) -> None:
    change(one, f"disks/{one.disk}/disk.json", b"")


async def append_to_record(one: Target) -> None:
    name = f"disks/{one.disk}/disk.json"
    change(one, name, data_of(one, name) + bytes(100))


async def append_to_slot(one: Target) -> None:
    name = slots(one)[-1]
    change(one, name, data_of(one, name) + data_of(one, name))


async def reorder_blocks(one: Target) -> None:
    name = max(one.named("segments/"), key=lambda name: len(data_of(one, name)))
    data = data_of(one, name)
    a, b = data[:STORED_BLOCK], data[STORED_BLOCK : 2 * STORED_BLOCK]
    change(one, name, b + a + data[2 * STORED_BLOCK :])


async def replay_block_of_another_segment(one: Target) -> None:
    a, b = sorted(one.named("segments/"), key=lambda name: -len(data_of(one, name)))[:2]
    change(one, a, data_of(one, b)[:STORED_BLOCK] + data_of(one, a)[STORED_BLOCK:])


async def mix_two_versions(one: Target) -> None:
    """Put two versions of one object together, block by block."""
    name = f"boot/{one.disk}.json"
    await one.sealed.create(name, b"a" * 100_000)
    old = data_of(one, name)
    etag = (await one.sealed.stat(name)).etag
    await one.sealed.replace(name, b"b" * 100_000, etag=etag)
    change(one, name, old[:STORED_BLOCK] + data_of(one, name)[STORED_BLOCK:])


async def read_boot_object(one: Target) -> object:
    return await (await one.fresh()).store.read(f"boot/{one.disk}.json")


async def delete_middle_slot(one: Target) -> None:
    del one.raw.objects[slots(one)[-2]]
    for name in joined(one):
        del one.raw.objects[name]


async def delete_segment(one: Target) -> None:
    for name in one.named("segments/"):
        del one.raw.objects[name]


async def delete_record(one: Target) -> None:
    del one.raw.objects[f"disks/{one.disk}/disk.json"]


async def delete_name(one: Target) -> None:
    for name in hidden(one, "names"):
        del one.raw.objects[name]


async def delete_tip(one: Target) -> None:
    """Take the newest points away: only who has seen them can know."""
    for name in slots(one)[-1:]:
        del one.raw.objects[name]


async def anchor(one: Target) -> object:
    from vdiskfs.catalog import Anchor

    name = f"disks/{one.disk}/g00000001/{TIP - 1:016x}"
    held = Anchor(one.sealed, one.bench.vault.vault_id, name, "epoch 34")
    await held.check()
    return held


async def roll_back_record(one: Target) -> None:
    name = f"disks/{one.disk}/disk.json"
    old = one.raw.objects[name]
    await one.bench.vault.update_disk(one.disk, lambda found: replace(found, site="elsewhere"))
    one.raw.objects[name] = (*old[:2], "e999999")


async def roll_back_group(one: Target) -> None:
    name = hidden(one, "groups")[0]
    old = one.raw.objects[name]
    found, info = await one.sealed.read("groups/secretgroup.json")
    await one.sealed.replace("groups/secretgroup.json", found, etag=info.etag)
    one.raw.objects[name] = (*old[:2], "e999999")


async def roll_back_proof(one: Target) -> None:
    """Put a proof that passed in the place of one that another site has seen fail."""
    name = proof_name(one.disk, (1, TIP))
    other = (await one.fresh()).store
    proof = Proof("hashed", "pass", "", "2026-11-22T04:00:00Z", 1.5, "here")
    await write_proof(other, one.disk, (1, TIP), proof)
    old = one.raw.objects[name]
    await write_proof(other, one.disk, (1, TIP), replace(proof, outcome="fail", reason="rotten"))
    assert (await list_proven(one.sealed, one.disk))[1, TIP].has_failed
    one.raw.objects[name] = (*old[:2], "e999999")


async def roll_back_name(one: Target) -> None:
    """Give a name back to the disk that had it before."""
    name = name_object("web01")
    stored = stored_name(one.sealed.key, name)
    old = one.raw.objects[stored]
    document, info = await one.sealed.read(name)
    await one.sealed.replace(name, document, etag=info.etag, metadata={"disk": one.other.id})
    one.raw.objects[stored] = (*old[:2], "e999999")


async def put_deleted_group_back(one: Target) -> None:
    name = hidden(one, "groups")[0]
    old = one.raw.objects[name]
    await read_group(one.sealed, "secretgroup")
    await one.sealed.delete("groups/secretgroup.json")
    one.raw.objects[name] = old


async def roll_back_keys(one: Target) -> None:
    old = one.raw.objects["vault.json"]
    await add_slot(one.bench.vault, Secrets(file_key=b"2" * 32))
    await one.fresh(one.sealed.seen)  # the site has seen the new ones
    one.raw.objects["vault.json"] = old


def edit_vault(edit: Callable[[dict[str, object]], object]) -> Attack:
    async def attack(one: Target) -> None:
        values = decode_document(data_of(one, "vault.json"), where="x")
        edit(values)
        change(one, "vault.json", encode_document(values))

    return attack


def copy_slot(values: dict[str, object]) -> None:
    slots = values["encryption"]["slots"]  # type: ignore[index]
    slots.append({**slots[0], "id": "00000000"})


def weaken(values: dict[str, object]) -> None:
    slot = values["encryption"]["slots"][0]  # type: ignore[index]
    slot |= {"kind": "passphrase", "scrypt": [2, 1, 1]}


async def swap_metadata(one: Target) -> None:
    """Swap what stands beside two deltas: what is listed is then read from the deltas."""
    a, b = slots(one)[-2:]
    (one_data, one_meta, e1), (two_data, two_meta, e2) = one.raw.objects[a], one.raw.objects[b]
    one.raw.objects[a] = (one_data, two_meta, e1)
    one.raw.objects[b] = (two_data, one_meta, e2)


TABLE: dict[str, tuple[Attack, Look, type[VdiskfsError]]] = {
    "two slots swapped": (swap_slots, read_tip, DamagedError),
    "the bytes of two slots swapped": (swap_slots_bytes_alone, read_tip, DamagedError),
    "two segments swapped": (swap_segments, check_all, DamagedError),
    "two joined deltas swapped": (swap_joined, check_all, DamagedError),
    "a slot in the place of a joined delta": (slot_for_joined, check_all, DamagedError),
    "a slot of another disk": (slot_of_another_disk, read_other, DamagedError),
    "an old slot replayed as the newest": (slot_at_another_epoch, read_tip, DamagedError),
    "an object of another vault": (object_of_another_vault, read_tip, DamagedError),
    "the same key, another vault's id": (same_key_of_another_vault, find_disk, DamagedError),
    "the records of two disks swapped": (record_of_another_disk, find_disk, DamagedError),
    "a group in the place of a record": (group_as_record, find_disk, DamagedError),
    "two names swapped": (swap_names, find_web01, DamagedError),
    "a group renamed": (rename_group, see_group, NotFoundError),
    "a group renamed, listed": (rename_group, unreadable_groups, DamagedError),
    "a record that is not sealed": (plain_record, find_disk, DamagedError),
    "a slot cut short": (cut_slot, read_tip, DamagedError),
    "a slot cut at the border of a block": (cut_at_a_block, check_all, DamagedError),
    "a segment cut at the border of a block": (cut_segment_at_a_block, check_all, DamagedError),
    "a slot emptied": (empty_slot, read_tip, DamagedError),
    "a record emptied": (empty_record, find_disk, DamagedError),
    "bytes appended to a record": (append_to_record, find_disk, DamagedError),
    "a slot doubled": (append_to_slot, read_tip, DamagedError),
    "blocks of a segment reordered": (reorder_blocks, check_all, DamagedError),
    "a block of another segment": (replay_block_of_another_segment, check_all, DamagedError),
    "two versions of one object mixed": (mix_two_versions, read_boot_object, DamagedError),
    "a slot deleted": (delete_middle_slot, read_tip, VdiskfsError),
    "a slot deleted, checked": (delete_middle_slot, check_all, DamagedError),
    "segments deleted": (delete_segment, check_all, DamagedError),
    "a record deleted": (delete_record, find_web01, DamagedError),
    "a name deleted": (delete_name, find_web01, NotFoundError),
    "the newest slot deleted": (delete_tip, anchor, WrongVaultError),
    "a record rolled back": (roll_back_record, disk_again, WrongVaultError),
    "a group rolled back": (roll_back_group, group_again, WrongVaultError),
    "a proof rolled back, listed": (roll_back_proof, proofs_again, WrongVaultError),
    "a proof rolled back, asked for": (roll_back_proof, latest_proven_again, WrongVaultError),
    "a name rolled back, listed": (roll_back_name, disks_again, WrongVaultError),
    "a group put back that was deleted": (put_deleted_group_back, group_again, WrongVaultError),
    "the keys rolled back": (roll_back_keys, open_again, WrongVaultError),
    "a key slot added": (edit_vault(copy_slot), open_it, DamagedError),
    "a key slot weakened": (edit_vault(weaken), open_it, RefusedError),
    "the key slots removed": (
        edit_vault(lambda values: values["encryption"].update(slots=[])),  # type: ignore[attr-defined]
        open_it, DamagedError,
    ),
    "encryption switched off": (
        edit_vault(lambda values: values.update(encryption={"scheme": "none"})),
        open_it, RefusedError,
    ),
    "the vault's id changed": (
        edit_vault(lambda values: values.update(vault_id="8" * 32)), open_it, RefusedError,
    ),
    "the vault's age changed": (
        edit_vault(lambda values: values.update(created="yesterday")), open_it, DamagedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLE)
async def test_it_is_found_out(kind: str) -> None:
    """Before the attack all is well; after it what is looked at is refused."""
    attack, look, error = TABLE[kind]
    async with target() as one:
        if look not in (read_other, read_boot_object, unreadable_groups, latest_proven_again):
            await look(one)
        await attack(one)
        with pytest.raises(error) as caught:
            await look(one)
        assert "Traceback" not in str(caught.value)


def test_there_are_at_least_twenty_kinds() -> None:
    assert len(TABLE) >= 20


async def test_swapped_hints_change_nothing() -> None:
    """What stands beside an object is authenticated with its name: swapped, it is not believed."""
    async with target() as one:
        wanted = await (await one.fresh()).log(one.bench.record).points()
        await swap_metadata(one)
        log = (await one.fresh()).log(one.bench.record)
        assert await log.points() == wanted
        assert await content_at(log, TIP) == one.bench.model.states[TIP]


async def test_without_a_key_for_it_a_plain_vault_is_not_taken_for_an_encrypted_one() -> None:
    """Who gives a key is not served from a vault without: it may have been put there."""
    async with target() as one:
        one.raw.objects.clear()
        await Vault.init(one.raw)
        with pytest.raises(RefusedError, match="not encrypted, and a key was given"):
            await Vault.open(one.raw, KEY)
