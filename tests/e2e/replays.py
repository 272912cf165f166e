"""Losses of power at every moment of one run, replayed: ``replay_round``.

As a program: ``python -m tests.e2e.replays [--states N] [--seed N]``.

The file system with state directory and image lies on a device that logs what it is given
(devicelog.py). One disk without a mount lives there: it is written to, flushed, sealed, captured
and shipped, also while it is captured. Then the disk of many moments is made from the log, once
as it was given everything, once with what no flush had made safe lost in part and out of order,
and one write torn. Each is attached, its journal replayed, and the disk started after a reboot.

The vault of that moment is made, too: each change of an object is known to lie between two
lengths of the log, so a state has all that were made before it, and none that were begun later.

The intent log has room for fewer regions than are written to (SLOTS), so that they leave it again
and again, with all that this syncs.

Checked, by the letters of the fault model: L sector by sector; P and I, as every point is the
bytes of a seal, in order; T, as the next point is the image; pages that were never written to are
not suspect, nor those of more regions than the log has room for, and no generation is started.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import trio

from tests.e2e.devicelog import Entry, logged_device, read_entries
from tests.e2e.loopdev import attached, make_image, mounted, run_tool
from tests.e2e.stamps import SECTOR
from tests.model.onedisk import OneDisk, opened
from vdiskfs import native
from vdiskfs.store.local import LocalStore
from vdiskfs.units import PAGE_SIZE

MIB = 1 << 20
DEVICE = 32 * MIB
SLOTS = 2
REGIONS = SLOTS + 1  # that are written to
HOT = 96  # pages of each
QUIET = 1 * MIB  # written before the run, never in it; a region of the intent log of its own
FIRST = native.INTENT_REGION // PAGE_SIZE
PAGES = REGIONS * FIRST + HOT
SIZE = PAGES * PAGE_SIZE
STEPS = 150
SHM = Path("/dev/shm")
_ZEROS = bytes(1 << 16)
CHANGES = ("create", "create_from_file", "replace", "delete")
_PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@dataclass(frozen=True)
class VaultChange:
    """An object as a change left it, and the lengths of the log before and after the change."""

    name: str
    copy: Path | None
    before: int
    after: int


@dataclass
class History:
    """What was done in the run, by number from 1 on; lengths of the log say when."""

    rng: random.Random
    disk: bytearray
    versions: dict[int, list[tuple[int, bool]]] = field(default_factory=dict)
    count: int = 0
    flushes: list[tuple[int, int]] = field(default_factory=list)  # last change before, log after
    sealed: dict[bytes, int] = field(default_factory=dict)
    left: int = 0  # regions, the intent log

    def change(self, image: native.Image) -> None:
        """Write some pages, or discard them."""
        self.count += 1
        first = FIRST * self.rng.randrange(1, REGIONS + 1) + self.rng.randrange(-4, HOT)
        pages = range(max(FIRST, first), min(PAGES, first + self.rng.randrange(5, 12)))
        zero = self.rng.random() < 0.1
        data = b"".join(bytes(PAGE_SIZE) if zero else page_of(self.count, page) for page in pages)
        for page in pages:
            self.versions.setdefault(page, []).append((self.count, zero))
        offset = pages.start * PAGE_SIZE
        self.disk[offset : offset + len(data)] = data
        if zero:
            image.allocate(_PUNCH, offset, len(data))
        else:
            image.write(offset, data)

    def seal(self) -> None:
        """A point of this moment is right."""
        self.sealed.setdefault(digest_of(self.disk), len(self.sealed))

    def check_flushed(self, data: bytes, length: int) -> None:
        """Check what was flushed when the log had this length."""
        last = max((count for count, after in self.flushes if after <= length), default=0)
        for page, versions in self.versions.items():
            old = max((one for one in [(0, True), *versions] if one[0] <= last), default=(0, True))
            right = [old, *(one for one in versions if one[0] > last)]
            may_be_zero = any(zero for _, zero in right)
            numbers = {number for number, zero in right if not zero}
            for index in range(PAGE_SIZE // SECTOR):
                at = page * PAGE_SIZE + index * SECTOR
                sector = data[at : at + SECTOR]
                number = struct.unpack_from("<Q", sector)[0]
                if not any(sector):
                    assert may_be_zero, f"page {page}: zeros, not one of {numbers}"
                else:
                    assert number in numbers, f"page {page}: {number}, not one of {numbers}"
                    assert sector == sector_of(number, page, index), f"page {page}: torn"


def sector_of(number: int, page: int, index: int) -> bytes:
    """Return a sector that says who wrote it and where."""
    return struct.pack("<QII", number, page, index) * (SECTOR // 16)


def page_of(number: int, page: int) -> bytes:
    """Return a page of such sectors."""
    return b"".join(sector_of(number, page, index) for index in range(PAGE_SIZE // SECTOR))


def digest_of(data: bytes | bytearray) -> bytes:
    """Return what tells one state of the disk from another."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Recording:
    """One run on a logged device, and all that is needed to go back to any moment of it."""

    def __init__(self, directory: Path, seed: int, *, lies: bool = False) -> None:
        self.directory = directory
        self.lies = lies
        self.root = directory / "fs"
        self.vault = directory / "vault"
        self.device = directory / "device.raw"
        self.rng = random.Random(f"replay/{seed}")
        self.changes: list[VaultChange] = []
        self.entries: list[Entry] = []
        self._log = directory / "log"

    def run(self) -> None:
        """Make the disk and its vault, then write under the log."""
        run_tool(["mkfs.ext4", "-q", "-F", "-b", "4096", make_image(self.device, DEVICE)])
        content = self.rng.randbytes(QUIET)
        with attached(self.device) as device, mounted(device, self.root, kind="ext4"):
            self.vault.mkdir()
            (self.root / "vault").symlink_to(self.vault)
            trio.run(self._begin, content)
        self.history = History(self.rng, bytearray(content.ljust(SIZE, b"\0")))
        self.history.seal()
        shutil.copytree(self.vault, self.directory / "vault-before")
        run_tool(["cp", "--sparse=always", self.device, self.directory / "before.raw"])
        with (
            logged_device(self.device, self._log) as device,
            mounted(device, self.root, kind="ext4"),
            self._observed(),
        ):
            trio.run(self._work)
        self.entries = read_entries(self._log)

    async def _begin(self, content: bytes) -> None:
        await OneDisk(self.root).init(SIZE, content)
        async with opened(self.root) as one:
            await one.ship()
            await one.stop()

    async def _work(self) -> None:
        history, rng = self.history, self.rng
        async with opened(self.root) as one:
            one.sealed = history.seal
            one.between = lambda: history.change(one.image) if rng.random() < 0.3 else None
            for _ in range(STEPS):
                dice = rng.random()
                if dice < 0.12:
                    count = history.count
                    await trio.to_thread.run_sync(one.image.sync)
                    history.flushes.append((count, self._length()))
                elif dice < 0.2:
                    await one.seal()
                elif dice < 0.25:
                    await one.ship()
                else:
                    await trio.to_thread.run_sync(history.change, one.image)
            counts = native.intent_counts(one.image)
            assert counts.slots == SLOTS
            assert not counts.voids
            history.left = counts.left

    def _length(self) -> int:
        return self._log.stat().st_size

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        """Note each change of an object of the vault."""
        (self.directory / "objects").mkdir()
        with contextlib.ExitStack() as stack:
            for name in CHANGES:
                observed = self._observe(getattr(LocalStore, name))
                stack.enter_context(mock.patch.object(LocalStore, name, observed))
            yield

    def _observe(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def call(store: LocalStore, name: str, *words: Any, **options: Any) -> Any:
            before = self._length()
            result = await method(store, name, *words, **options)
            after, copy = self._length(), None
            if method.__name__ != "delete":
                copy = self.directory / "objects" / str(len(self.changes))
                shutil.copy2(self.vault / name, copy)
            self.changes.append(VaultChange(name, copy, before, after))
            return result

        return call

    # ---- back to a moment ----------------------------------------------------------------

    def states(self, count: int) -> Iterator[tuple[int, bool]]:
        """Yield how many entries the disk was given, in order, and whether all are to be there.

        A count of 0 stands for all that there are.
        """
        every = range(len(self.entries) + 1)
        some = every if not count else sorted(self.rng.sample(every, min(count, len(every))))
        for turn, number in enumerate(some):
            yield number, turn % 2 == 0

    def rebuild(self, disk: Disk, number: int, *, whole: bool) -> None:
        """Make device and vault as they were when the device had been given so many entries."""
        self._rebuild_vault(number)
        flushes = [n + 1 for n in range(number) if self.entries[n].is_flush]
        safe = max(flushes[: -5 if self.lies else None], default=0)
        disk.advance(self.entries[disk.given : safe])
        tail = self.entries[safe:number]
        if not whole:
            share = self.rng.choice([0.0, 0.5, 0.9])
            tail = [one for one in tail if self.rng.random() < share]
            self.rng.shuffle(tail)
            tail = tail[:-1] + [self._torn(one) for one in tail[-1:]]
        disk.write(self.device, tail)

    def _torn(self, entry: Entry) -> Entry:
        kept = self.rng.randrange(len(entry.data) // SECTOR + 1)
        return entry._replace(data=entry.data[: kept * SECTOR])

    def length(self, number: int) -> int:
        """Return the length of the log with so many entries."""
        return self.entries[number - 1].end if number else 0

    def _rebuild_vault(self, number: int) -> None:
        shutil.rmtree(self.vault)
        shutil.copytree(self.directory / "vault-before", self.vault)
        here = self.length(number)
        later = self.length(number + 1) if number < len(self.entries) else here + 1
        sure = sum(change.after < here for change in self.changes)
        possible = sum(change.before < later for change in self.changes)
        for change in self.changes[: self.rng.randint(sure, max(sure, possible))]:
            path = self.vault / change.name
            if change.copy is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(change.copy, path)


class Disk:
    """A device's bytes after so many entries (`given`)."""

    def __init__(self, path: Path) -> None:
        self._data = bytearray(path.read_bytes())
        self.given = 0

    def advance(self, entries: list[Entry]) -> None:
        """Carry out more of them, for good."""
        _apply(self._data, entries)
        self.given += len(entries)

    def write(self, path: Path, more: list[Entry]) -> None:
        """Write the disk to a file, with these entries carried out, too."""
        data = bytearray(self._data)
        _apply(data, more)
        path.unlink()
        with path.open("xb") as file:
            file.truncate(len(data))
            view = memoryview(data)
            for at in range(0, len(data), 1 << 16):
                chunk = view[at : at + (1 << 16)]
                if bytes(chunk) != _ZEROS:
                    os.pwrite(file.fileno(), chunk, at)


def _apply(data: bytearray, entries: list[Entry]) -> None:
    for entry in entries:
        data[entry.offset : entry.offset + len(entry.data)] = entry.data


async def recover(root: Path, history: History, length: int) -> int:
    """Start the disk after a reboot, check everything, and return how many points there are."""
    history.check_flushed((root / "web01.img").read_bytes(), length)
    async with opened(root, boot_id="boot-1") as one:
        suspect = one.suspect_pages()
        assert all(page >= FIRST for page in suspect), "nobody wrote to them"
        assert len({page // FIRST for page in suspect}) <= SLOTS, "more than the log names"
        await one.ship()
        points = await one.points()
        live = (root / "web01.img").read_bytes()
    assert {generation for generation, _ in points} == {1}, "another generation was started"
    found = [digest_of(data) for _, data in sorted(points.items())]
    assert found[-1] == digest_of(live), "the newest point is not the image"
    # The newest one may be the recovery's: what was shipped and not flushed is gone here.
    sealed = [history.sealed.get(one, -1) for one in found[:-1]]
    assert -1 not in sealed, f"of {len(found)} points these are seals: {sealed}"
    assert sealed == sorted(sealed), f"points are not in the order of the seals: {sealed}"
    return len(found)


def replay_round(seed: int, states: int = 40, *, lies: bool = False) -> dict[str, int]:
    """Record one run and recover from so many of its moments; 0: from each. Returns counts.

    All of it lies in memory where that can be: what is synced is told by the log.

    A disk that ``lies`` loses what its last five flushes were to make safe.

    Raises:
        AssertionError: something was wrong; its notes say at which moment.
    """
    few = {"VDISKFS_INTENT_SLOTS": str(SLOTS)}
    with (
        mock.patch.dict(os.environ, few),
        tempfile.TemporaryDirectory(dir=SHM if os.access(SHM, os.W_OK) else None) as directory,
    ):
        recording = Recording(Path(directory), seed, lies=lies)
        recording.run()
        return _recover_all(recording, seed, states)


def _recover_all(recording: Recording, seed: int, states: int) -> dict[str, int]:
    counts: Counter[str] = Counter(
        entries=len(recording.entries),
        flushes=sum(one.is_flush for one in recording.entries),
        changes=recording.history.count,
        seals=len(recording.history.sealed),
        left=recording.history.left,
        vault_changes=len(recording.changes),
    )
    disk = Disk(recording.directory / "before.raw")
    for number, whole in recording.states(states):
        recording.rebuild(disk, number, whole=whole)
        try:
            with (
                attached(recording.device, direct=False) as device,
                mounted(device, recording.root, kind="ext4"),
            ):
                length = recording.length(number)
                counts["points"] += trio.run(recover, recording.root, recording.history, length)
        except BaseException as error:
            error.add_note(f"seed {seed}: {number} of {len(recording.entries)} entries, {whole=}")
            raise
        counts["states"] += 1
    return dict(counts)


def main() -> None:
    """Replay one run, and print what it came to."""
    parser = argparse.ArgumentParser(prog="tests.e2e.replays")
    parser.add_argument("--states", type=int, default=100, help="0: each moment of the run")
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    begin_s = time.monotonic()
    counts = replay_round(words.seed, words.states)
    print(f"seed {words.seed}: {counts}, {time.monotonic() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
