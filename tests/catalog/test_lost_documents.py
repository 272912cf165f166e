"""Policies, groups and machines are put back where a copy is proven; else a command is named."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.catalog.harness import Bench, bench
from tests.vaults import PLAIN, is_encrypted
from vdiskfs.catalog import Group, Policy, check, repair
from vdiskfs.catalog.documents import decode_document
from vdiskfs.catalog.garbage import CLOCK, CLOCK_DOCUMENT
from vdiskfs.catalog.groups import GroupDisk, create_group
from vdiskfs.catalog.keptdocuments import KeptDocuments
from vdiskfs.catalog.lostdocuments import restore_document
from vdiskfs.catalog.policy import changed_policy, read_policy, set_policy
from vdiskfs.catalog.report import Healed, Left, Problem
from vdiskfs.errors import FormatError

pytestmark = pytest.mark.usefixtures("each_vault")

GOLD = "policies/gold.json"
SETTINGS = {"retention": "1m for 1h", "rpo_error": "5m"}


async def with_policy(test: Bench, directory: Path) -> KeptDocuments:
    """Give a policy that the disk follows, and this host's copy of it."""
    store = test.vault.store
    await set_policy(store, "gold", lambda one: changed_policy(one, SETTINGS))
    disk = await test.vault.disk(test.record.id)
    await test.vault.update_disk(disk.id, lambda one: type(one)(**{
        **{key: getattr(one, key) for key in one.__slots__}, "policy": "gold"}))  # fmt: skip
    kept = KeptDocuments(store, directory / "documents")
    await kept.look()
    return kept


def flip(test: Bench, name: str, at: int) -> None:
    data, metadata, _ = test.store.objects[name]
    changed = bytearray(data)
    changed[at] ^= 1
    test.store.put(name, bytes(changed), metadata)


async def settled(test: Bench, kept: KeptDocuments | None, name: str = GOLD) -> Healed | Left:
    [problem] = [one for one in (await check(test.vault, read_data=True)).problems
                 if one.object == name]  # fmt: skip
    found = await restore_document(test.vault.store, problem, kept, dry_run=False)
    assert found is not None
    return found


@PLAIN
@pytest.mark.parametrize("at", [3, 40, -4])
async def test_a_document_is_put_back_whose_check_or_bytes_are_those_of_the_copy(
    tmp_path: Path, at: int
) -> None:
    async with bench() as test:
        kept = await with_policy(test, tmp_path)
        whole = test.store.objects[GOLD][0]
        flip(test, GOLD, at)
        assert isinstance(await settled(test, kept), Healed)
        assert test.store.objects[GOLD][0] == whole
        assert (await check(test.vault, read_data=True)).ok


@PLAIN
async def test_an_older_copy_is_not_put_back(tmp_path: Path) -> None:
    """Somebody has made the policy keep more since: the copy would thin points away."""
    async with bench() as test:
        kept = await with_policy(test, tmp_path)
        await set_policy(test.vault.store, "gold",
                         lambda one: changed_policy(one, {"retention": "1m for 9h"}))  # fmt: skip
        flip(test, GOLD, 40)
        damaged = test.store.objects[GOLD][0]
        left = await settled(test, kept)
        assert isinstance(left, Left)
        assert test.store.objects[GOLD][0] == damaged
        assert "older" in left.why


@PLAIN
async def test_of_a_policy_that_is_missing_the_command_is_said_that_makes_it_anew(
    tmp_path: Path,
) -> None:
    async with bench() as test:
        kept = await with_policy(test, tmp_path)
        before = await read_policy(test.vault.store, "gold")
        del test.store.objects[GOLD]
        [left] = (await repair(test.vault)).left
        assert left.problem.message == "is missing: web01 keep all points until it is there"
        assert left.why == (
            "no copy of it is known here; make it anew: vdiskfs policy set gold retention=..."
        )
        told = await settled(test, kept)
        assert isinstance(told, Left)
        vdiskfs, *command = shlex.split(told.why.rpartition(": ")[2])
        assert (vdiskfs, command[:3]) == ("vdiskfs", ["policy", "set", "gold"])
        values = dict(one.split("=", 1) for one in command[3:])
        await set_policy(test.vault.store, "gold", lambda one: changed_policy(one, values))
        assert await read_policy(test.vault.store, "gold") == before
        assert (await check(test.vault, read_data=True)).ok


@PLAIN
async def test_a_damaged_policy_is_made_anew_only_where_its_retention_is_given(
    tmp_path: Path,
) -> None:
    async with bench() as test:
        await with_policy(test, tmp_path)
        flip(test, GOLD, 40)
        store = test.vault.store
        with pytest.raises(FormatError, match="damaged"):
            await set_policy(store, "gold", lambda one: changed_policy(one, {"rpo_error": "9m"}))
        made = await set_policy(
            store, "gold", lambda one: changed_policy(one, {"retention": "1m for 2h"}), anew=True
        )
        assert made == await read_policy(store, "gold") == Policy("gold", "1m for 2h")


@PLAIN
async def test_a_preset_that_was_written_is_proven_without_a_copy(tmp_path: Path) -> None:
    async with bench() as test:
        await set_policy(test.vault.store, "asr-premium", lambda one: one)
        flip(test, "policies/asr-premium.json", 60)
        assert [one.problem.object for one in (await repair(test.vault)).healed] == [
            "policies/asr-premium.json"
        ]
        # Another one of that name is not.
        await set_policy(test.vault.store, "default", lambda one: changed_policy(one, SETTINGS))
        flip(test, "policies/default.json", 60)
        [left] = (await repair(test.vault)).left
        assert "vdiskfs policy set default retention=..." in left.why


@PLAIN
async def test_of_a_group_the_members_are_said(tmp_path: Path) -> None:
    async with bench() as test:
        kept = KeptDocuments(test.vault.store, tmp_path / "documents")
        disks = (GroupDisk(test.record.id, "web01"), GroupDisk("ab" * 16, "my db"))
        await create_group(test.vault.store, Group("shop", "cd" * 16, "2026-11-22", disks))
        await kept.look()
        data, metadata, _ = test.store.objects["groups/shop.json"]
        test.store.put("groups/shop.json", data[:60], metadata)
        left = await settled(test, kept, "groups/shop.json")
        assert isinstance(left, Left)
        assert left.why.endswith(
            ": vdiskfs group delete shop && vdiskfs group create shop web01 'my db'"
        )
        with_nothing = await settled(test, None, "groups/shop.json")
        assert isinstance(with_nothing, Left)
        assert with_nothing.why.endswith("vdiskfs group create shop DISK...")


@PLAIN
async def test_what_always_is_the_same_is_written_again(tmp_path: Path) -> None:
    async with bench() as test:
        await test.vault.store.create(CLOCK, b"{x\n")
        assert [one.problem.object for one in (await repair(test.vault)).healed] == [CLOCK]
        assert (await test.vault.store.read(CLOCK))[0] == CLOCK_DOCUMENT


async def test_the_etag_proves_a_copy_where_nothing_can_be_read(tmp_path: Path) -> None:
    """A service keeps the etag of an object whose bytes decay."""
    async with bench() as test:
        kept = await with_policy(test, tmp_path)
        whole = (await test.vault.store.read(GOLD))[0]
        [name] = [name for name in test.store.objects if name.startswith("policies/")]
        data, metadata, etag = test.store.objects[name]
        test.store.objects[name] = (data[:40] + bytes(20) + data[60:-20], metadata, etag)
        problem = Problem(GOLD, "damaged", "")
        planned = await restore_document(test.vault.store, problem, kept, dry_run=True)
        assert isinstance(planned, Healed)
        assert test.store.objects[name][2] == etag
        done = await restore_document(test.vault.store, problem, kept, dry_run=False)
        assert isinstance(done, Healed)
        assert (await test.vault.store.read(GOLD))[0] == whole
        decode_document(whole, where=GOLD)
        assert is_encrypted() == (b"gold" not in test.store.objects[name][0])
