"""A disk's life for crash tests: run as a program, killed at a hook, run again.

    python -m tests.replicate.crashing ROOT work|recover

The vault is a folder, which is away (its writes fail) while the file ROOT/away is there.
What the disk was after each write is noted in ROOT/snapshots before the write is made, so
that whoever looks later knows which contents of points are right.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from tests.replicate.rig import Rig, digest_of, page_of
from vdiskfs import passes
from vdiskfs.errors import VaultUnreachableError
from vdiskfs.health import State
from vdiskfs.store.local import LocalStore
from vdiskfs.stride import Pace
from vdiskfs.units import PAGE_SIZE

SIZE = 256 << 10
PAGES = SIZE // PAGE_SIZE
PACE = Pace(0.02, 64 << 20, 1)


class AwayStore(LocalStore):
    """A folder that can be away."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "vault")
        self._away = root / "away"

    async def create(
        self, name: str, data: bytes | bytearray | memoryview, *, metadata: Mapping[str, str] = {}
    ) -> str:
        self._ask()
        return await super().create(name, data, metadata=metadata)

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        self._ask()
        return await super().create_from_file(name, path, metadata=metadata)

    def _ask(self) -> None:
        if self._away.exists():
            raise VaultUnreachableError("the folder is away")


class Life:
    """The disk, its notes, and what is done with it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes = root / "snapshots"
        self.rig = Rig(root, SIZE, store=AwayStore(root), pace=PACE)

    def write(self, pageno: int, seed: int) -> None:
        """Note what the disk will be, and write one page."""
        data = bytearray(self.rig.file.read_bytes())
        data[pageno * PAGE_SIZE : (pageno + 1) * PAGE_SIZE] = page_of(seed)
        with self.notes.open("a", encoding="ascii") as file:
            file.write(digest_of(bytes(data)).hex() + "\n")
        self.rig.write(pageno * PAGE_SIZE, page_of(seed))

    async def settled(self) -> None:
        while not self.rig.is_settled:
            self.rig.health.retry_now()
            await trio.sleep(0.01)

    async def work(self) -> None:
        """Ship, be cut off until the spool is given back, resynchronize, ship."""
        for number in range(3):
            self.write(number, number)
            await self.settled()
        away = self.root / "away"
        away.touch()
        for number in range(PAGES * 3 // 4):
            self.write(number, 100 + number)
            if number % 8 == 0:
                await trio.sleep(0.03)
        await self.rig.wait(lambda: self.rig.health.state is State.RESYNC_REQUIRED, 0.01)
        away.unlink()
        await self.settled()
        self.write(5, 999)
        await self.settled()

    async def check(self) -> int:
        """Check that every point is a moment of the disk, in order, the newest what it is."""
        known = [bytes.fromhex(line) for line in self.notes.read_text().split()]
        self.rig.snapshots.clear()
        # A page may be written again as it was: the last moment that it looked so counts.
        for number, digest in enumerate(known):
            self.rig.snapshots[digest] = number
        return await self.rig.check()


async def live(root: Path, what: str) -> None:
    passes.PART_SIZE, passes.READ_PAGES = 16 * PAGE_SIZE, 16
    life = Life(root)
    if not life.notes.exists():
        life.notes.write_text(digest_of(life.rig.file.read_bytes()).hex() + "\n")
    async with life.rig:
        async with life.rig.running():
            if what == "work":
                await life.work()
            else:
                (root / "away").unlink(missing_ok=True)
                life.write(7, 12345)
                await life.settled()
        points = await life.check()
    sys.stdout.write(f"{points} points right\n")


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.ERROR)
    kinds: dict[str, Any] = {"root": Path(arguments[0]), "what": arguments[1]}
    trio.run(lambda: live(**kinds))


if __name__ == "__main__":
    main(sys.argv[1:])
