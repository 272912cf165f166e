"""groups: what a mount knows of its groups while the vault says nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.catalog.memory import MemoryStore
from vdiskfs.catalog import Group, Vault
from vdiskfs.catalog.groups import GroupDisk, create_group, delete_group
from vdiskfs.errors import NotFoundError, WrongVaultError
from vdiskfs.groups import Groups
from vdiskfs.state import read_record, write_record

A, B = GroupDisk("a" * 32, "web"), GroupDisk("b" * 32, "db")
OLD = Group("old", "1" * 32, "2026-11-21T01:40:05Z", (A,))
YOUNG = Group("young", "2" * 32, "2026-11-22T01:40:05Z", (B, A))


async def vault_with(*groups: Group) -> tuple[MemoryStore, Vault]:
    store = MemoryStore()
    vault = await Vault.init(store)
    for group in groups:
        await create_group(store, group)
    return store, vault


def of_disks(groups: Groups) -> tuple[str | None, str | None]:
    joints = [groups.joint_of(disk.id) for disk in (A, B)]
    return tuple(None if one is None else one.name for one in joints)  # type: ignore[return-value]


async def test_what_was_learned_is_there_again_without_the_vault(tmp_path: Path) -> None:
    store, vault = await vault_with(OLD)
    first = Groups(vault, tmp_path / "groups.json", 1)
    assert first.all() == []
    await first.learn()
    before = store.requests
    second = Groups(vault, tmp_path / "groups.json", 1)
    assert (second.all(), of_disks(second)) == ([OLD], ("old", None))
    assert store.requests == before
    await first.learn()
    assert store.requests == before + 1, "one listing where nothing changed"
    await delete_group(store, "old")
    await second.learn()
    assert (second.all(), of_disks(second)) == ([], (None, None))
    assert Groups(vault, tmp_path / "groups.json", 1).all() == []


async def test_what_another_vault_said_is_not_believed(tmp_path: Path) -> None:
    _, vault = await vault_with(OLD)
    await Groups(vault, tmp_path / "groups.json", 1).learn()
    _, other = await vault_with()
    assert Groups(other, tmp_path / "groups.json", 1).all() == []


@pytest.mark.parametrize("how", ["torn", "format", "group", "type"])
async def test_a_damaged_note_is_not_believed(
    tmp_path: Path, how: str, expect_log: Callable[[str], None]
) -> None:
    """The vault is asked."""
    _, vault = await vault_with(OLD)
    path = tmp_path / "groups.json"
    await Groups(vault, path, 1).learn()
    body = read_record(path)
    if how == "torn":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        changed: dict[str, dict[str, Any]] = {
            "format": {"format": 9},
            "group": {"groups": [{"name": 3}]},
            "type": {"groups": 3},
        }
        write_record(path, {**body, **changed[how]})
    if how != "format":
        expect_log("not believed")
    groups = Groups(vault, path, 1)
    assert groups.all() == []
    await groups.learn()
    assert groups.all() == [OLD]


async def test_one_that_is_damaged_in_the_vault_stays_as_it_was_here(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("stays as it was")
    store, vault = await vault_with(OLD)
    groups = Groups(vault, tmp_path / "groups.json", 1)
    await groups.learn()
    store.put("groups/old.json", b"{", {})
    await groups.learn()
    assert of_disks(groups) == ("old", None)


async def test_a_vault_that_is_not_there_ends_no_group(tmp_path: Path) -> None:
    """Neither an empty one nor another one."""
    store, vault = await vault_with(OLD)
    groups = Groups(vault, tmp_path / "groups.json", 1)
    await groups.learn()
    there = dict(store.objects)
    store.objects.clear()
    with pytest.raises(NotFoundError, match="the vault is gone"):
        await groups.learn()
    _, other = await vault_with()
    store.objects.update(other.store.objects)  # type: ignore[attr-defined]
    with pytest.raises(WrongVaultError):
        await groups.learn()
    assert of_disks(groups) == ("old", None)
    store.objects.update(there)
    await groups.learn()
    assert groups.all() == [OLD]


async def test_of_two_groups_that_have_a_disk_the_older_counts(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """So it is where a writer was killed before it gave the disk back."""
    expect_log("is in the groups old and young; the first counts")
    store, vault = await vault_with(OLD)
    apart, _ = await vault_with(YOUNG)
    store.objects["groups/young.json"] = apart.objects["groups/young.json"]
    groups = Groups(vault, tmp_path / "groups.json", 1)
    await groups.learn()
    assert of_disks(groups) == ("old", "young")
