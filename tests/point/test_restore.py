"""A restored file is the disk at the point, sparse, whole or not there."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from tests.catalog.harness import bench, is_slot
from tests.delta.model import PAGE
from vdiskfs.delta.entries import Bools
from vdiskfs.errors import AlreadyExistsError, DamagedError, LocalError, UsageError
from vdiskfs.point import PointReader, diff, restore
from vdiskfs.proving import read_back

pytestmark = pytest.mark.usefixtures("each_vault")


async def test_a_restored_file_equals_the_point(tmp_path: Path) -> None:
    async with bench() as test:
        await test.churn(25, pages=3000)
        for epoch in (1, 16, 25):
            target = tmp_path / f"{epoch}.img"
            steps: list[tuple[int, int]] = []
            async with await test.log.open(epoch) as reader:
                written = await restore(reader, target, progress=lambda *step: steps.append(step))
            wanted = test.model.states[epoch]
            assert target.read_bytes() == wanted
            assert 0 <= written <= len(wanted)
            assert steps == sorted(steps)
            assert steps[-1] == (len(wanted), len(wanted))
            assert target.stat().st_mode & 0o777 == 0o600
        assert sorted(os.listdir(tmp_path)) == ["1.img", "16.img", "25.img"]


async def test_a_restored_file_is_sparse(tmp_path: Path) -> None:
    """Zeros are never written: what was discarded takes no room."""
    async with bench() as test:
        test.model.truncate(200 << 20)
        test.model.write(100 << 20, random.Random(1).randbytes(3 * PAGE))
        test.model.write(50 << 20, b"gone" * PAGE)
        await test.publish()
        test.model.discard(50 << 20, 1 << 20)
        await test.publish()
        async with await test.log.open(2) as reader:
            assert await restore(reader, tmp_path / "disk.img") == 3 * PAGE
        status = (tmp_path / "disk.img").stat()
        assert status.st_size == 200 << 20
        assert status.st_blocks * 512 <= 64 * 1024


async def test_what_a_restore_and_a_proof_cost_follows_the_data_and_not_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pages far from each other are three reads, not one for every 8 MiB between them."""
    reads: list[int] = []
    read = PointReader.read_mapped

    async def counted(self: PointReader, first: int, count: int) -> tuple[bytearray, Bools]:
        reads.append(first)
        return await read(self, first, count)

    monkeypatch.setattr(PointReader, "read_mapped", counted)
    async with bench() as test:
        test.model.truncate(256 << 20)
        for place in (0, 128 << 20, (256 << 20) - PAGE):
            test.model.write(place, random.Random(place).randbytes(PAGE))
        await test.publish()
        async with await test.log.open(1) as reader:
            assert await restore(reader, tmp_path / "disk.img") == 3 * PAGE
            assert len(reads) == 3
            assert await read_back(reader) == 3 * PAGE
            assert len(reads) == 6
        assert (tmp_path / "disk.img").read_bytes() == test.model.states[1]


async def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "disk.img"
    target.write_bytes(b"precious")
    async with bench() as test:
        await test.churn(2)
        async with await test.log.open(2) as reader:
            with pytest.raises(AlreadyExistsError, match="--force"):
                await restore(reader, target)
            assert target.read_bytes() == b"precious"
            await restore(reader, target, force=True)
        assert target.read_bytes() == test.model.states[2]


@pytest.mark.parametrize("target", ["no/such/place.img", "."])
async def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path, target: str) -> None:
    async with bench() as test:
        await test.churn(1)
        async with await test.log.open(1) as reader:
            with pytest.raises((LocalError, UsageError), match="no such directory|not a file"):
                await restore(reader, tmp_path / target)


async def test_a_damaged_point_leaves_no_file(tmp_path: Path) -> None:
    async with bench() as test:
        test.model.write(0, random.Random(1).randbytes(60 * PAGE))
        await test.publish()
        name = next(name for name in test.store.objects if is_slot(name))
        data, metadata, _ = test.store.objects[name]
        test.store.put(name, data[:90_000] + bytes([data[90_000] ^ 1]) + data[90_001:], metadata)
        async with await test.fresh_log().open(1) as reader:
            with pytest.raises(
                DamagedError, match=rf"web01@1: {name}: (page \d+ is damaged|does not auth)"
            ):
                await restore(reader, tmp_path / "disk.img")
        assert os.listdir(tmp_path) == []


async def test_a_restore_that_is_cancelled_leaves_no_file(tmp_path: Path) -> None:
    async with bench() as test:
        await test.churn(3, pages=3000)
        async with await test.log.open(3) as reader:
            with trio.CancelScope() as scope:
                await restore(reader, tmp_path / "disk.img", progress=lambda *_: scope.cancel())
            assert scope.cancelled_caught
        assert os.listdir(tmp_path) == []


async def test_standard_output_gets_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench() as test:
        await test.churn(9)
        out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
        try:
            real = os.write
            monkeypatch.setattr(os, "write", lambda fd, data: real(out if fd == 1 else fd, data))
            async with await test.log.open(9) as reader:
                await restore(reader, "-")
                with pytest.raises(UsageError, match="only raw"):
                    await restore(reader, "-", format="qcow2")
        finally:
            os.close(out)
        assert (tmp_path / "out").read_bytes() == test.model.states[9]


async def test_qcow2_is_made_by_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as test:
        test.model.truncate(8 << 20)
        test.model.write(1 << 20, b"data" * PAGE)
        await test.publish()
        async with await test.log.open(1) as reader:
            with pytest.raises(UsageError, match="not a format"):
                await restore(reader, tmp_path / "x", format="vmdk")
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "which", lambda _: None)
                with pytest.raises(LocalError, match="qemu-img is not installed"):
                    await restore(reader, tmp_path / "x", format="qcow2")
            assert os.listdir(tmp_path) == []
            await restore(reader, tmp_path / "disk.qcow2", format="qcow2")
        raw = tmp_path / "back.img"
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", tmp_path / "disk.qcow2", raw],
            check=True,
        )
        assert raw.read_bytes() == test.model.states[1]


async def test_the_difference_of_two_points_is_exact() -> None:
    """Every page that differs is in the extents, and no other."""
    async with bench() as test:
        await test.churn(30, pages=100)
        for first, second in ((1, 30), (15, 16), (29, 30), (7, 7), (30, 2)):
            async with await test.log.open(first) as a, await test.log.open(second) as b:
                extents = await diff(a, b)
            one, two = test.model.states[first], test.model.states[second]
            size = max(len(one), len(two))
            one, two = one.ljust(size, b"\0"), two.ljust(size, b"\0")
            wanted = {
                at for at in range(0, size, PAGE) if one[at : at + PAGE] != two[at : at + PAGE]
            }
            found = {at for start, length in extents for at in range(start, start + length, PAGE)}
            assert found == wanted
            assert extents == sorted(extents)
            assert all(start + length <= size for start, length in extents)
            assert all(sum(a) < b[0] for a, b in zip(extents, extents[1:], strict=False))


async def test_the_difference_reads_no_data() -> None:
    async with bench() as test:
        test.model.write(0, random.Random(1).randbytes(1 << 20))
        await test.publish()
        test.model.write(5 * PAGE, b"new")
        await test.publish()
        async with await test.log.open(1) as a, await test.log.open(2) as b:
            before = test.store.bytes_received
            assert await diff(a, b) == [(5 * PAGE, PAGE)]
            assert test.store.bytes_received - before < 64 * 1024
