"""A writer that goes from disk to disk, and what that says of points of one instant.

Step k writes k to the first disk and flushes, then to the second, and so on. Where a disk
holds k, every disk before it holds k, too, and none is further than one step: so it is at
each instant, and in no mixture of two. k goes to page k modulo PAGES: a disk says of all its
last steps whether they are there.

    with Chain(images) as chain:
        ...
    check_instants(vault_url, names)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from tests.vaults import given
from vdiskfs.catalog import DiskLog, Point, Vault, shared_points
from vdiskfs.store import open_store
from vdiskfs.units import PAGE_SIZE

PAGES = 8


class Chain:
    """Writes in a thread while the block runs; a write that fails ends the block with it."""

    def __init__(self, images: Sequence[Path]) -> None:
        self._images = images
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: BaseException | None = None
        self.steps = max(value_of(image.read_bytes()[: PAGES * PAGE_SIZE]) for image in images)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stop.set()
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        files: list[int] = []
        try:
            files += [os.open(image, os.O_RDWR) for image in self._images]
            while not self._stop.is_set():
                step = self.steps + 1
                for file in files:
                    os.pwrite(file, step.to_bytes(8, "little"), step % PAGES * PAGE_SIZE)
                    os.fdatasync(file)
                self.steps = step
        except BaseException as error:  # noqa: BLE001 (it ends the block, in its thread)
            self._failure = error
        finally:
            for file in files:
                os.close(file)


def value_of(data: bytes) -> int:
    """Return the last step that a disk holds; all before it must be there.

    Raises:
        AssertionError: one is missing: the bytes are those of no instant of this disk.
    """
    values = [
        int.from_bytes(data[page * PAGE_SIZE : page * PAGE_SIZE + 8], "little")
        for page in range(PAGES)
    ]
    last = max(values)
    for page, value in enumerate(values):
        wanted = last - (last - page) % PAGES
        assert value == max(wanted, 0), f"page {page} holds step {value}, the last one is {last}"
    return last


@dataclass
class Instants:
    """What was found of the group points of some disks: the last steps, in order of disks."""

    steps: list[tuple[int, ...]]
    points: list[tuple[Point, ...]]

    @property
    def cut_inside(self) -> int:
        """How many fell between two writes of one step."""
        return sum(len(set(one)) > 1 for one in self.steps)


def check_instants(url: str, names: Sequence[str], *, strict: bool = True) -> Instants:
    """Read every group point of disks, in the order of the chain, and check each.

    Args:
        url: of the vault.
        names: of the disks; with the chain's order.
        strict: the chain has no other disks, so that none is further than one step.

    Raises:
        AssertionError: a disk is ahead of one before it, or a point is none of its disk.
    """

    async def work() -> Instants:
        store = open_store(url)
        try:
            vault = await Vault.open(store, given())
            logs = {name: await vault.find_log(name) for name in names}

            async def find(name: str) -> DiskLog:
                return logs[name]

            found = Instants([], await shared_points(find, names))
            for points in found.points:
                steps = [
                    await _step_at(logs[name], point)
                    for name, point in zip(names, points, strict=True)
                ]
                assert steps == sorted(steps, reverse=True), f"{points[0].time}: {steps}"
                assert not strict or steps[0] - steps[-1] <= 1, f"{points[0].time}: {steps}"
                found.steps.append(tuple(steps))
            return found
        finally:
            await store.aclose()

    return trio.run(work)


async def _step_at(log: DiskLog, point: Point) -> int:
    async with await log.open(point) as reader:
        return value_of(bytes(await reader.read_pages(0, PAGES)))


def count_shared(url: str, names: Sequence[str]) -> Callable[[], int]:
    """Return what counts the group points that disks have in the vault, each looked at once."""
    made, newest_ns = 0, 0

    async def work() -> None:
        nonlocal made, newest_ns
        store = open_store(url)
        try:
            # Deltas are shipped in order: an older instant is whole before a newer one.
            found = await shared_points(
                (await Vault.open(store, given())).find_log, names, since_ns=newest_ns + 1
            )
        finally:
            await store.aclose()
        made += len(found)
        newest_ns = found[-1][0].time_ns if found else newest_ns

    def count() -> int:
        trio.run(work)
        return made

    return count
