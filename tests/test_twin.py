"""A file that is a copy of a disk of the vault is known by its name and its bytes."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from tests.catalog.harness import Bench, bench
from vdiskfs.catalog import Owner
from vdiskfs.twin import find_twin

THEIRS, OURS = "a" * 32, "b" * 32
SIZE = 4 << 20


@asynccontextmanager
async def owned() -> AsyncIterator[Bench]:
    """A disk of another writer with data in places."""
    async with bench() as test:
        owner = Owner("site-a", THEIRS, "n", "t")
        await test.vault.update_disk(test.record.id, lambda one: replace(one, owner=owner))
        for offset in range(0, SIZE, 1 << 16):
            test.model.write(offset, random.Random(offset).randbytes(20000))
        test.model.truncate(SIZE)
        await test.publish()
        yield test


async def found(test: Bench, path: Path, name: str = "web01", writer: str = OURS) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        twin = await find_twin(test.vault, name, fd, writer)
    finally:
        os.close(fd)
    assert twin is None or twin.id == test.record.id
    return twin is not None


async def test_a_copy_is_the_disk_also_after_it_was_written_to(tmp_path: Path) -> None:
    async with owned() as test:
        copy = tmp_path / "web01.img"
        copy.write_bytes(test.model.data)
        assert await found(test, copy)
        with copy.open("r+b") as file:
            for offset in range(0, SIZE // 8, 1 << 16):
                file.seek(offset)
                file.write(b"changed" * 3000)
        assert await found(test, copy)


async def test_another_file_of_the_same_name_is_another_disk(tmp_path: Path) -> None:
    async with owned() as test:
        other = tmp_path / "web01.img"
        other.write_bytes(random.Random(1).randbytes(SIZE))
        assert not await found(test, other)
        other.write_bytes(bytes(SIZE))
        assert not await found(test, other)
        other.write_bytes(b"")
        assert not await found(test, other)


async def test_a_copy_under_another_name_or_of_our_own_disk_is_another_disk(
    tmp_path: Path,
) -> None:
    async with owned() as test:
        copy = tmp_path / "web01.img"
        copy.write_bytes(test.model.data)
        assert not await found(test, copy, name="web02")
        assert not await found(test, copy, writer=THEIRS)


async def test_a_retired_disk_and_one_without_points_have_no_copies(tmp_path: Path) -> None:
    async with owned() as test:
        copy = tmp_path / "web01.img"
        copy.write_bytes(test.model.data)
        await test.vault.update_disk(test.record.id, lambda one: replace(one, retired="t"))
        assert not await found(test, copy)
        made = await test.vault.create_disk("web01", file="f", size=1, site="c",
                                            owner=Owner("c", THEIRS, "", "t"))  # fmt: skip
        assert made.name == "web01-2"
        assert not await found(test, copy)
