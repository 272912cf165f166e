"""groups: consistency groups in the vault; a disk is in one at most, whoever writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.catalog.memory import MemoryStore
from tests.vaults import given
from vdiskfs.catalog import Group, Vault, group_members
from vdiskfs.catalog.groups import (
    GroupDisk,
    by_age,
    check_group_name,
    create_group,
    delete_group,
    group_named,
    list_groups,
    read_group,
    update_group,
)
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    FormatError,
    NotFoundError,
    UsageError,
)

A, B, C = (GroupDisk(letter * 32, f"disk-{letter}") for letter in "abc")


def group(name: str, *disks: GroupDisk, created: str = "2026-11-21T01:40:05Z") -> Group:
    return Group(name, name.encode().hex().ljust(32, "0")[:32], created, disks)


async def test_a_group_is_made_read_changed_and_deleted() -> None:
    store = MemoryStore()
    await create_group(store, group("shop", A, B))
    assert (await read_group(store, "shop"))[0] == group("shop", A, B)
    with pytest.raises(AlreadyExistsError, match="there is a group shop already"):
        await create_group(store, group("shop", C))
    changed = await update_group(store, "shop", lambda one: replace(one, disks=(B, C)))
    assert changed == group("shop", B, C)
    assert [one.group for one in await list_groups(store)] == [changed]
    await delete_group(store, "shop")
    assert await list_groups(store) == []
    with pytest.raises(NotFoundError, match="no group 'shop'; see `vdiskfs group list`"):
        await read_group(store, "shop")
    with pytest.raises(NotFoundError, match="no group 'shop'"):
        await delete_group(store, "shop")


async def test_a_disk_is_in_one_group_at_most() -> None:
    """The other one is named, and how to take the disk out of it."""
    store = MemoryStore()
    await create_group(store, group("shop", A, B))
    message = "disk disk-b is in group shop; vdiskfs group remove shop disk-b"
    with pytest.raises(ConflictError, match=message) as refused:
        await create_group(store, group("other", C, B))
    assert refused.value.exit_code == 4
    await create_group(store, group("other", C))
    with pytest.raises(ConflictError, match=message):
        await update_group(store, "other", lambda one: replace(one, disks=(C, B)))
    assert (await read_group(store, "other"))[0] == group("other", C)


class Racing(MemoryStore):
    """Lets somebody else write, once, just before this writer's document lands."""

    rival: Group | None = None

    async def replace(
        self, name: str, data: bytes | bytearray | memoryview, *, etag: str | None,
        metadata: Mapping[str, str] = {},
    ) -> str:  # fmt: skip
        rival, self.rival = self.rival, None
        if rival is not None:
            document = json.dumps({"format": 1, "group": rival.to_body()}).encode()
            self.put(f"groups/{rival.name}.json", document, {})
        return await super().replace(name, data, etag=etag, metadata=metadata)


async def test_of_two_who_take_a_disk_at_one_time_the_later_gives_it_back() -> None:
    store = Racing()
    store.rival = group("rival", A)
    with pytest.raises(ConflictError, match="disk disk-a is in group rival"):
        await create_group(store, group("shop", A, B))
    assert [one.name for one in await list_groups(store)] == ["rival"]
    await create_group(store, group("shop", B))
    store.rival = group("third", C)
    with pytest.raises(ConflictError, match="disk disk-c is in group third"):
        await update_group(store, "shop", lambda one: replace(one, disks=(B, C)))
    assert (await read_group(store, "shop"))[0] == group("shop", B)


async def test_a_change_that_was_outrun_is_made_again_on_what_is_there() -> None:
    store = Racing()
    await create_group(store, group("shop", A))
    store.rival = group("shop", A, B)
    seen = []

    def join(one: Group) -> Group:
        seen.append(one.disks)
        return replace(one, disks=(*one.disks, C))

    assert await update_group(store, "shop", join) == group("shop", A, B, C)
    assert seen == [(A,), (A, B)]


async def test_one_that_is_damaged_hides_none_of_the_others() -> None:
    store = MemoryStore()
    await create_group(store, group("shop", A))
    good = group("bad", B).to_body()
    for body in (
        b"no json", {"format": 1}, {"format": 3, "group": good}, {"group": {**good, "id": "x"}},
        {"group": {**good, "disks": [{"id": "zz", "name": "z"}]}},
        {"group": {**good, "disks": [*good["disks"], *good["disks"]]}},
        {"group": {**good, "name": "shop"}}, {"group": {**good, "disks": ["a"]}},
    ):  # fmt: skip
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        store.put("groups/bad.json", data, {})
        bad, shop = await list_groups(store)
        assert (bad.name, bad.group) == ("bad", None), body
        assert shop.group == group("shop", A)
        with pytest.raises(FormatError):
            await read_group(store, "bad")
        await create_group(store, group("other", C))
        await delete_group(store, "other")
    await delete_group(store, "bad")


async def test_members_have_the_names_that_the_disks_have() -> None:
    store = MemoryStore()
    vault = await Vault.init(store, given())
    made = [await vault.create_disk(name, file="f", size=0, site="s") for name in ("web", "db")]
    disks = [GroupDisk(one.id, "an old name") for one in made]
    await create_group(vault.store, group("shop", *disks))
    assert await group_members(vault, "shop") == ["db", "web"]
    with pytest.raises(NotFoundError, match="no group 'absent'"):
        await group_members(vault, "absent")


@pytest.mark.parametrize("name", ["shop", ".hidden", "..", "Größe 1", "%41", "a" * 240])
async def test_any_name_of_a_group_is_found_again(name: str) -> None:
    store = MemoryStore()
    await create_group(store, group(check_group_name(name), A))
    assert [group_named(one) for one in store.objects] == [name]


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "a\x1b", "a" * 241])
def test_what_no_group_can_be_named(name: str) -> None:
    with pytest.raises(UsageError, match="not a name for a group"):
        check_group_name(name)


def test_the_older_group_counts_first() -> None:
    young, old = group("a", A, created="2026-11-22T00:00:00Z"), group("b", A)
    assert by_age([young, old]) == [old, young]
