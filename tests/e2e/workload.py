"""Writers that log what they do to one file, for the oracle to judge its points by.

N threads write (``pwrite``, ``pwritev``; O_DIRECT and buffered; aligned and not), discard
(punch hole, zero range) and set the size, each step logged with the monotonic time before and
after it. Two steps never touch one sector at a time, and those that change the size are alone
beyond the end of the file: so every sector has one line of versions. A step that failed keeps
its range for ever, as nobody knows what it did.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

from tests.e2e.stamps import SECTOR, base_of, content
from vdiskfs.units import PAGE_SIZE

FOREVER = 2**62
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Kind(IntEnum):
    """What an operation does to its range."""

    WRITE = 0  # puts its stamps there; may extend the file
    ZERO = 1  # punch hole or zero range, within the file
    TRUNCATE = 2  # the range is what it cut off; may extend the file


class Operation(NamedTuple):
    """One step of one writer. Times are CLOCK_MONOTONIC; a log has the order of the locks."""

    kind: Kind
    offset: int
    length: int
    start_ns: int
    end_ns: int  # FOREVER: it failed, or was under way at the end
    size_before: int
    size_after: int


@dataclass
class WriteLog:
    """All operations of one run on one file; operation n is ``operations[n - 1]``."""

    seed: int
    initial_size: int
    operations: list[Operation] = field(default_factory=list)
    flushes: list[tuple[int, int]] = field(default_factory=list)  # acknowledged: begin, end

    def content(self, number: int) -> bytes:
        """Return the bytes that operation ``number``, a write, put into its range."""
        op = self.operations[number - 1]
        return content(base_of(self.seed), number, op.offset, op.length)


class RangeLocks:
    """Exclusive byte ranges of one file, rounded out to sectors, and the file's size."""

    def __init__(self, size: int) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, tuple[int, int]] = {}
        self._next = 0
        self.size = size
        self.stopped = False

    def acquire(
        self, offset: int, end: int, *, log: WriteLog, size_after: int | None = None
    ) -> int:
        """Wait for the range, give the operation its number; 0: the run was stopped.

        ``size_after`` is the size that a truncation sets, None for everything else. What changes
        the size owns everything from its offset, or the smaller size, on.
        """
        with self._changed:
            while not self.stopped:
                first, last = self._range(offset, end, size_after)
                if all(last <= a or b <= first for a, b in self._held.values()):
                    log.operations.append(_UNDER_WAY)
                    number = len(log.operations)
                    self._held[number] = (first, last)
                    return number
                self._changed.wait()
            return 0

    def _range(self, offset: int, end: int, size_after: int | None) -> tuple[int, int]:
        if size_after is not None:
            offset, end = min(size_after, self.size), FOREVER
        elif end > self.size:
            end = FOREVER
        return offset // SECTOR * SECTOR, -(-end // SECTOR) * SECTOR

    def release(self, number: int, size: int | None) -> None:
        """Give the range back; None: the file's size was left alone."""
        with self._changed:
            del self._held[number]
            self.size = self.size if size is None else size
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


_UNDER_WAY = Operation(Kind.ZERO, 0, 0, FOREVER, FOREVER, 0, 0)


@dataclass(frozen=True)
class Mix:
    """What the writers do. Shares are probabilities; the rest are writes inside the file."""

    min_length: int = 512
    max_length: int = 1 << 20
    direct: float = 0.5
    aligned: float = 0.6
    vectored: float = 0.3
    zero: float = 0.06
    truncate: float = 0.01
    extend: float = 0.03
    max_size: int = 96 << 20
    min_size: int = 8 << 20


class Workload:
    """N writers on one file, from ``start`` until ``stop`` or until ``operations`` are done.

        with Workload(path, seed=1, writers=8) as load:
            load.wait_operations(1000)
            ...take points...
        Oracle(load.log).check(point)

    ``log`` is complete after ``stop``, which raises the first error of a writer; with
    ``tolerant`` an OSError only ends its writer, for tests that pull the mount away.
    """

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        writers: int = 8,
        operations: int | None = None,
        mix: Mix | None = None,
        tolerant: bool = False,
    ) -> None:
        self.path = path
        self.mix = mix or Mix()
        self.log = WriteLog(seed, path.stat().st_size)
        self.errors: list[BaseException] = []
        self._base = base_of(seed)
        self._locks = RangeLocks(self.log.initial_size)
        self._limit = operations
        self._tolerant = tolerant
        self._progress = threading.Condition()
        self._claimed = self._done = 0
        self._running = writers
        self._switch_interval_s = sys.getswitchinterval()
        self._threads = [
            threading.Thread(target=self._write, args=(random.Random(f"{seed}/{i}"),), name=f"w{i}")
            for i in range(writers)
        ]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.stop()
        else:
            self._end()

    def start(self) -> None:
        """Start the writers."""
        # A thread that waits for Python's lock looks at the clock too late: a blunter oracle.
        sys.setswitchinterval(1e-4)
        for thread in self._threads:
            thread.start()

    def stop(self) -> WriteLog:
        """End the writers and return the log."""
        self._end()
        if self.errors and not (
            self._tolerant and all(isinstance(e, OSError) for e in self.errors)
        ):
            raise self.errors[0]
        return self.log

    def join(self) -> WriteLog:
        """Wait until the limit of operations is reached, and stop."""
        for thread in self._threads:
            thread.join()
        return self.stop()

    def wait_operations(self, more: int, timeout_s: float = 60) -> None:
        """Return once ``more`` operations have been completed from now on, or none will be."""
        with self._progress:
            goal = self._done + more
            self._progress.wait_for(lambda: self._done >= goal or not self._alive(), timeout_s)
            if self._done < goal and self._alive():
                raise TimeoutError(f"{self._done - goal + more} of {more} operations")

    def _alive(self) -> bool:
        return self._running > 0 and not self._locks.stopped

    def _end(self) -> None:
        self._locks.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        sys.setswitchinterval(self._switch_interval_s)

    def _write(self, rng: random.Random) -> None:
        try:
            with _Writer(self.path, self.mix.max_length) as writer:
                while not self._locks.stopped and self._claim():
                    self._step(rng, writer)
        except BaseException as error:  # noqa: BLE001 - handed to stop(), which raises it
            self.errors.append(error)
            self._locks.stop()
        finally:
            with self._progress:
                self._running -= 1
                self._progress.notify_all()

    def _claim(self) -> bool:
        with self._progress:
            self._claimed += 1
            return self._limit is None or self._claimed <= self._limit

    def _step(self, rng: random.Random, writer: _Writer) -> None:
        dice = rng.random()
        if dice < self.mix.truncate:
            self._truncate(rng.randrange(self.mix.min_size, self.mix.max_size), writer)
        elif dice < self.mix.truncate + self.mix.zero:
            self._zero(rng, writer)
        else:
            self._data(rng, writer)

    def _truncate(self, size: int, writer: _Writer) -> None:
        if not (number := self._locks.acquire(0, 0, size_after=size, log=self.log)):
            return
        before = self._locks.size
        op = Operation(Kind.TRUNCATE, size, max(0, before - size), 0, FOREVER, before, size)
        self._perform(number, op, lambda: os.ftruncate(writer.buffered, size))

    def _zero(self, rng: random.Random, writer: _Writer) -> None:
        offset, length = self._pick(rng, aligned=rng.random() < 0.5, extend=False)
        mode = _KEEP_SIZE | (_PUNCH_HOLE if rng.random() < 0.7 else _ZERO_RANGE)
        if not (number := self._locks.acquire(offset, offset + length, log=self.log)):
            return
        op = Operation(Kind.ZERO, offset, length, 0, FOREVER, 0, 0)
        self._perform(number, op, lambda: writer.fallocate(mode, offset, length))

    def _data(self, rng: random.Random, writer: _Writer) -> None:
        direct = rng.random() < self.mix.direct
        aligned = direct or rng.random() < self.mix.aligned
        offset, length = self._pick(rng, aligned=aligned, extend=rng.random() < self.mix.extend)
        cuts = rng.randrange(1, 4) if rng.random() < self.mix.vectored else 0
        if cuts and not direct:
            # A request of the kernel has 256 pages of the program's memory; where the next one
            # begins would be inside a sector, and a point may lie between the two.
            length = min(length, (256 - 1 - cuts) * PAGE_SIZE)
        points = sorted(rng.randrange(0, length, SECTOR if direct else 1) for _ in range(cuts))
        if not (number := self._locks.acquire(offset, offset + length, log=self.log)):
            return
        # Extending writes are alone beyond the end; for the others the size is not theirs to say.
        before = self._locks.size
        after = max(before, offset + length)
        op = Operation(Kind.WRITE, offset, length, 0, FOREVER, before, after)
        writer.load(content(self._base, number, offset, length))
        self._perform(number, op, lambda: writer.write(offset, [0, *points, length], direct=direct))

    def _perform(self, number: int, op: Operation, act: Callable[[], None]) -> None:
        """Do it between two looks at the clock, log it, give the range back."""
        op = op._replace(start_ns=time.monotonic_ns())
        self.log.operations[number - 1] = op
        act()
        self.log.operations[number - 1] = op._replace(end_ns=time.monotonic_ns())
        self._locks.release(number, op.size_after if op.size_after != op.size_before else None)
        with self._progress:
            self._done += 1
            self._progress.notify_all()

    def _pick(self, rng: random.Random, *, aligned: bool, extend: bool) -> tuple[int, int]:
        """Choose a range: lengths spread evenly over their orders of magnitude."""
        ratio = self.mix.max_length / self.mix.min_length
        length = int(self.mix.min_length * ratio ** rng.random())
        size = self._locks.size
        offset = size - length // 2 if extend else rng.randrange(max(1, size - length))
        offset = max(0, min(offset, self.mix.max_size - length))
        if aligned:
            offset, length = offset // SECTOR * SECTOR, max(SECTOR, length // SECTOR * SECTOR)
        return offset, length


class _Writer:
    """One thread's descriptors of the file and its aligned buffer."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        self._memory = mmap.mmap(-1, capacity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing fails too where the mount was pulled away.
        with contextlib.closing(self._memory):
            try:
                os.close(self.buffered)
            finally:
                os.close(self._direct)

    def load(self, data: bytes) -> None:
        """Put the bytes of the next write into the buffer."""
        self._memory[: len(data)] = data

    def write(self, offset: int, points: list[int], *, direct: bool) -> None:
        """Write the buffer up to the last of ``points``, in one call, cut at them."""
        fd = self._direct if direct else self.buffered
        with memoryview(self._memory) as view:
            parts = [view[a:b] for a, b in pairwise(points) if b > a]
            try:
                done = (
                    os.pwritev(fd, parts, offset) if parts[1:] else os.pwrite(fd, parts[0], offset)
                )
            finally:
                for part in parts:
                    part.release()
        if done != points[-1]:
            raise OSError(errno.EIO, f"short write: {done} of {points[-1]} bytes at {offset}")

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Discard or zero a range, with a mode that Python does not offer."""
        if _libc.fallocate(self.buffered, mode, offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"fallocate({mode}, {offset}, {length}): {os.strerror(code)}")
