"""An image model for Hypothesis: guests' changes, seals, crashes and reads against bytes.

The machine drives one real disk (`OneDisk`) and a bytearray with the same steps. What is
compared after each step, by FAULTS.md section 2: the live image is the bytes (L); every page
in which it differs from the newest captured point is marked (T); every point holds the bytes
of the instant of its seal (P) and keeps them (I).
"""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.model.changes import KINDS, MAX_SIZE, Change
from tests.model.onedisk import OneDisk, hooked
from vdiskfs import native
from vdiskfs.delta import DeltaWriter
from vdiskfs.hydration import OpenedPoint, PointImages
from vdiskfs.image import EpochGivenUpError
from vdiskfs.native import EventKind
from vdiskfs.units import PAGE_SIZE, pages_of

offsets = st.one_of(
    st.integers(0, MAX_SIZE - 1),
    st.integers(0, MAX_SIZE // PAGE_SIZE - 1).map(lambda page: page * PAGE_SIZE),
)
lengths = st.one_of(
    st.integers(1, 40_000), st.sampled_from([1, 512, PAGE_SIZE, 16 * PAGE_SIZE, MAX_SIZE])
)
sizes = st.one_of(st.integers(0, MAX_SIZE), st.integers(0, 96).map(lambda page: page * PAGE_SIZE))


changes = st.builds(
    Change,
    kind=st.sampled_from(KINDS),
    offset=offsets,
    length=lengths,
    seed=st.integers(0, 1 << 16),
)
bursts = st.lists(changes, max_size=4)


class ImageModel(RuleBasedStateMachine):
    """One disk from its first replication on, through any order of steps."""

    steps = 0
    """Steps taken by all machines of this process, for the report."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.one = OneDisk(self.root)
        self.stack.enter_context(hooked(self.one))
        # Nobody cuts the power of this host: syncs cost time and prove nothing here.
        for name in ("fsync", "fdatasync"):
            self.stack.enter_context(mock.patch.object(os, name, return_value=None))
        self.one.sealed = self._note_seal
        self.live = bytearray()
        self.durable = bytearray()  # as of the last sync that a guest asked for
        self.sealed_at: dict[tuple[int, int], bytes] = {}
        self.proven: set[tuple[int, int]] = set()
        # The smallest size since the newest captured point, and since the newest seal.
        self.low = self.low_since_seal = 0
        self.captured = (1, 0)
        self.boots = 0

    def teardown(self) -> None:
        try:
            if self.one.is_open:
                trio.run(self._check_all)
                trio.run(self.one.kill)
        finally:
            self.stack.close()

    # ---- the bytes -----------------------------------------------------------------------

    def _apply(self, change: Change) -> None:
        change.apply(self.one.image, self.live)
        self.changed()

    def changed(self) -> None:
        """The live bytes have changed, in size perhaps."""
        self.low = min(self.low, len(self.live))
        self.low_since_seal = min(self.low_since_seal, len(self.live))

    def _note_seal(self) -> None:
        # What is sealed is what is there now; the number of the epoch is the running one.
        key = (self.one.replicator.end.generation, self.one.disk.replicator.live.track.epoch)
        assert key not in self.sealed_at or key not in self.proven
        self.sealed_at[key] = bytes(self.live)
        self.low_since_seal = len(self.live)

    def _note_captured(self) -> None:
        end = self.one.replicator.end
        if (end.generation, end.epoch) != self.captured:
            self.captured = (end.generation, end.epoch)
            self.low = self.low_since_seal

    def _during(self, burst: list[Change]) -> Callable[[], None]:
        """Make one change of the burst each time it is called."""
        waiting = iter(burst)

        def act() -> None:
            change = next(waiting, None)
            if change is not None:
                self._apply(change)

        return act

    def _run(self, action: Callable[[], Awaitable[None]], burst: list[Change]) -> None:
        """Do it with the burst's changes in between; those left over come right after."""
        ImageModel.steps += 1
        waiting = list(burst)
        act = self._during(waiting)
        self.one.between = act
        try:
            trio.run(action)
        finally:
            self.one.between = lambda: None
        self._note_captured()
        for _ in waiting:
            act()

    # ---- steps ---------------------------------------------------------------------------

    @initialize(size=sizes, seed=st.integers(0, 1 << 16), burst=bursts)
    def begin(self, size: int, seed: int, burst: list[Change]) -> None:
        content = random.Random(seed).randbytes(size // 2)
        self.live = bytearray(content) + bytes(size - len(content))
        self.durable = bytearray(self.live)
        trio.run(self.one.init, size, content)
        trio.run(self.one.open)
        self._run(self.one.ship, burst)

    @rule(change=changes)
    def change(self, change: Change) -> None:
        ImageModel.steps += 1
        self._apply(change)

    @rule()
    def sync(self) -> None:
        self.one.image.sync()
        self.durable = bytearray(self.live)

    @rule(burst=bursts)
    def capture(self, burst: list[Change]) -> None:
        self._run(self.one.seal, burst)

    @rule(burst=bursts)
    def ship(self, burst: list[Change]) -> None:
        self._run(self.one.ship, burst)

    @rule(change=changes, burst=bursts)
    def capture_without_room(self, change: Change, burst: list[Change]) -> None:
        """The spool cannot be written: the epoch is given up, the guest writes on."""
        self._apply(change)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before = self.one.replicator.end

        async def seal() -> None:
            with mock.patch.object(DeltaWriter, "finish", side_effect=full):
                try:
                    await self.one.seal()
                except (EpochGivenUpError, OSError):
                    assert self.one.replicator.end == before

        self._run(seal, burst)

    @rule(offset=offsets, length=lengths, burst=bursts)
    def suspect(self, offset: int, length: int, burst: list[Change]) -> None:
        """Some pages are not known; a pass compares them, and nothing else is sent."""
        self.one.image.suspect_mark(offset, length)
        self._run(self.one.ship, burst)

    @rule(frozen=st.booleans(), burst=bursts)
    def crash_of_the_daemon(self, frozen: bool, burst: list[Change]) -> None:
        """Killed, perhaps with an epoch frozen; the next daemon goes on."""
        if frozen:
            native.seal([self.one.image])
            for change in burst:
                self._apply(change)
        trio.run(self.one.kill)
        self._run(self.one.open, [])

    @rule(lost=st.sampled_from(["nothing", "some pages", "everything"]), seed=st.integers(0, 999))
    def crash_of_the_host(self, lost: str, seed: int) -> None:
        """Power loss: of what was not synced each page may be there or not, and the size too."""
        trio.run(self.one.kill)
        if lost == "everything":
            self.live = bytearray(self.durable)
        elif lost == "some pages":
            self.live = lose_pages(self.durable, self.live, random.Random(seed))
        self.one.path.write_bytes(self.live)
        self.durable = bytearray(self.live)
        self.changed()
        self.boots += 1
        self.one.boot_id = f"boot-{self.boots}"
        self._run(self.one.open, [])

    @rule(change=st.one_of(st.none(), changes))
    def orderly_end(self, change: Change | None) -> None:
        """Unmounted and mounted again; perhaps changed behind the mount meanwhile."""
        trio.run(self.one.stop)
        if change is not None and change.offset < len(self.live):
            self.live[change.offset] ^= 0xFF
            with self.one.path.open("r+b") as file:
                file.seek(change.offset)
                file.write(self.live[change.offset : change.offset + 1])
        self.durable = bytearray(self.live)
        self._run(self.one.open, [])

    @precondition(lambda self: self.one.is_open and self.proven)
    @rule(number=st.integers(0, 99), offset=offsets, length=lengths, again=offsets)
    def read_a_point(self, number: int, offset: int, length: int, again: int) -> None:
        """A lazy image hydrates by what is read of it, and never gives other bytes."""
        keys = sorted(self.proven)
        key = keys[number % len(keys)]

        async def read() -> None:
            await self._read_lazily(key, [(offset, length), (again, length), (offset, length)])

        self._run(read, [])

    async def _read_lazily(self, key: tuple[int, int], reads: list[tuple[int, int]]) -> None:
        one, cookie = self.one, iter(range(1000, 2000))
        images = PointImages(one.core, one.state.cache, PAGE_SIZE, lambda: next(cookie))
        log = one.vault.log(await one.vault.disk(one.disk.disk_id))
        point = next(p for p in await log.points() if (p.generation, p.epoch) == key)
        opened = await images.open((one.disk.disk_id, *key), lambda: log.open(point))
        try:
            expected = self.sealed_at[key]
            for offset, length in reads:
                got = await hydrate(images, opened, offset, length)
                assert got == expected[offset : offset + length]
        finally:
            await images.close(opened)
            await images.aclose()

    # ---- what must be true -----------------------------------------------------------------

    @invariant()
    def the_image_is_the_bytes(self) -> None:
        if self.one.is_open:
            assert self.one.image.size() == len(self.live)
            assert (self.one.image.read(0, MAX_SIZE + 1) or b"") == bytes(self.live)

    @invariant()
    def every_difference_is_marked(self) -> None:
        if not self.one.is_open or self.one.replicator.suspects._distrusted:
            return
        if self.one.replicator.pass_.parts:
            return  # pages of a pass that waits for its seal are known to the parts
        end = self.one.replicator.end
        base = self.sealed_at[end.generation, end.epoch] if end.epoch else b""
        if len(base) != len(self.live):
            assert self.one.replicator.live.counts().changed or self._is_suspect()
        differing = differing_pages(base[: self.low], bytes(self.live))
        missed = np.nonzero(differing & ~self.one.marked(len(differing)))[0]
        assert missed.size == 0, f"not marked: pages {missed.tolist()}"

    def _is_suspect(self) -> bool:
        return self.one.replicator.live.counts().suspect_pages > 0

    @invariant()
    def new_points_are_what_was_sealed(self) -> None:
        if self.one.is_open:
            trio.run(self._check_new)

    async def _check_new(self) -> None:
        stored = self.one.replicator.stored
        key = (stored.generation, stored.epoch)
        if stored.epoch and key not in self.proven:
            await self._check_all()
            assert key in self.proven

    async def _check_all(self) -> None:
        found = await self.one.points()
        for key, data in found.items():
            assert data == self.sealed_at[key], f"point {key} is not what was sealed"
        assert self.proven <= set(found)
        self.proven = set(found)


def lose_pages(old: bytearray, new: bytearray, rng: random.Random) -> bytearray:
    """Return bytes of which each page is the old or the new one, in the old or new size."""
    size = len(rng.choice([old, new]))
    wide = max(len(old), len(new), size)
    mixed = bytearray(wide)
    padded = [bytes(one) + bytes(wide - len(one)) for one in (old, new)]
    for at in range(0, wide, PAGE_SIZE):
        mixed[at : at + PAGE_SIZE] = rng.choice(padded)[at : at + PAGE_SIZE]
    return mixed[:size]


def differing_pages(base: bytes, live: bytes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Say of each page of ``live`` whether it differs from the base, zeros beyond its end."""
    size = pages_of(len(live)) * PAGE_SIZE
    pair = [
        np.frombuffer((one + bytes(size))[:size], np.uint8).reshape(-1, PAGE_SIZE)
        for one in (base, live)
    ]
    found: np.ndarray[Any, np.dtype[np.bool_]] = (pair[0] != pair[1]).any(axis=1)
    return found


async def hydrate(images: PointImages, opened: OpenedPoint, offset: int, length: int) -> bytes:
    """Read as a parked request does: again after each answer."""
    if offset >= opened.image.size():
        return b""
    for _ in range(8):
        data = opened.image.read(offset, length)
        if data is not None:
            return data
        await opened.answer(native.Event(EventKind.WANT, 0, opened.image.cookie, offset, length))
    raise AssertionError("the read never got its pages")
