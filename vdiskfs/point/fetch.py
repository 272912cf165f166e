"""Fetching frames: neighbours in one request, requests side by side, every page verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import trio

from vdiskfs import native
from vdiskfs.delta.entries import I64, U64, Bools, Entries, distinct
from vdiskfs.delta.frames import FrameError, decode_frames
from vdiskfs.delta.layout import OBJECT_MAX
from vdiskfs.errors import DamagedError, FormatError, NotFoundError
from vdiskfs.point.piece import Piece
from vdiskfs.store import Store
from vdiskfs.units import PAGE_SIZE

View = npt.NDArray[np.uint8]
# Where pages go in a buffer: from a first page on, or each to its place in a sorted list.
Places = int | U64

# Frames this near to each other are read in one request, up to this many bytes.
GAP = 64 * 1024
REQUEST = 4 << 20
# Decoded at once: 32 frames of 64 KiB.
DECODE_FRAMES = 128


@dataclass(slots=True)
class Found:
    """Entries of one piece that supply pages wanted, masks cut down to those pages."""

    piece: Piece
    entries: Entries
    objects: Mapping[int, str]


async def locate(piece: Piece, entries: Entries) -> Found:
    """Return entries with the names of their objects.

    Raises:
        FormatError: an object is not in the delta's table, or a frame lies outside it.
    """
    names = {0: piece.name}
    for number in distinct(entries.object).tolist():
        if number:
            ref = await piece.object_ref(number)
            names[number] = ref.name(piece.head.disk_id)
            mine = entries.object == number
            end = entries.offset[mine] + entries.length[mine]
            if int(end.max()) > min(ref.size, OBJECT_MAX):
                raise FormatError("a frame lies outside its object", where=piece.name)
    return Found(piece, entries, names)


@dataclass(slots=True)
class _Run:
    """Frames of one object that are read in one request."""

    name: str
    start: int
    end: int
    entries: Entries
    rows: I64
    held: bytes | None = None


async def fetch_pages(
    store: Store,
    found: Sequence[Found],
    places: Places,
    out: bytearray,
    limiter: trio.CapacityLimiter,
) -> None:
    """Put the pages of all entries into ``out``.

    Args:
        store: what they are read from.
        found: which entries.
        places: the page that ``out`` begins with, or the pages that it holds, in order.
        out: takes them.
        limiter: of requests.

    Raises:
        DamagedError: bytes are not what was stored; names object and page.
    """
    runs: list[_Run] = []
    for item in found:
        runs += _runs(item)
    view = np.frombuffer(out, np.uint8).reshape(-1, PAGE_SIZE)

    async def one(run: _Run) -> None:
        async with limiter:
            stored = run.held
            if stored is None:
                stored = await store.read_range(run.name, run.start, run.end - run.start)
            await trio.to_thread.run_sync(_decode_run, run, stored, places, view)

    if len(runs) == 1:
        await one(runs[0])
        return
    try:
        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(one, run)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def stored_bytes(found: Sequence[Found]) -> int:
    """Return how many bytes `fetch_pages` reads from the store for these entries."""
    runs = [run for item in found for run in _runs(item)]
    return sum(run.end - run.start for run in runs if run.held is None)


async def find_bad_pages(
    store: Store, found: Found, limiter: trio.CapacityLimiter
) -> tuple[Bools, int]:
    """Read all frames of the entries; return which pages (by their sums) cannot be read.

    The second number is the bytes that were read.
    """
    entries = found.entries
    bad = np.zeros(len(entries.sums), np.bool_)
    starts = entries.sum_starts()
    read = 0
    for run in _runs(found):
        async with limiter:
            try:
                await _verify(store, run)
            except (DamagedError, NotFoundError):
                # Which pages of the request are bad is seen frame by frame.
                for row in run.rows.tolist():
                    bad[starts[row] : starts[row + 1]] = await _bad_in_frame(store, found, row)
        read += run.end - run.start
    return bad, read


async def _verify(store: Store, run: _Run) -> None:
    stored = run.held
    if stored is None:
        stored = await store.read_range(run.name, run.start, run.end - run.start)
    await trio.to_thread.run_sync(_decode_run, run, stored, 0, None)


async def _bad_in_frame(store: Store, found: Found, row: int) -> list[bool]:
    """Return for each page that an entry supplies whether it is bad."""
    entry = found.entries.slice(row, row + 1)
    bad: list[bool] = []
    for page in range(16):
        bit = np.uint16(1 << page)
        if not entry.mask[0] & bit:
            continue
        part = replace(
            entry, mask=np.array([bit], np.uint16), sums=entry.sums[len(bad) : len(bad) + 1]
        )
        try:
            await _verify(store, _runs(Found(found.piece, part, found.objects))[0])
        except (DamagedError, NotFoundError):
            bad.append(True)
        else:
            bad.append(False)
    return bad


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what ended a nursery: the first error that is not a cancellation."""
    _, rest = group.split(trio.Cancelled)
    error: BaseException = rest if rest is not None else group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _runs(found: Found) -> list[_Run]:
    """Group entries by object and nearness."""
    entries, piece = found.entries, found.piece
    runs = []
    for number in distinct(entries.object).tolist():
        rows = np.flatnonzero(entries.object == number)
        rows = rows[np.argsort(entries.offset[rows], kind="stable")]
        start, end = entries.offset[rows], entries.offset[rows] + entries.length[rows]
        name = found.objects[number]
        for low, high in _groups(start, end):
            part = rows[low:high]
            run = _Run(name, int(start[low]), int(end[low:high].max()), entries.rows(part), part)
            run.held = piece.held(number, run.start, run.end - run.start)
            runs.append(run)
    return runs


def _groups(start: U64, end: U64) -> list[tuple[int, int]]:
    """Cut sorted places into requests: near to each other, and not too long."""
    far = np.flatnonzero(start[1:] > end[:-1] + np.uint64(GAP)) + 1
    groups = []
    for low, high in zip([0, *far.tolist()], [*far.tolist(), len(start)], strict=True):
        at = low
        while at < high:
            stop = int(np.searchsorted(start[at:high], start[at] + np.uint64(REQUEST), "right"))
            groups.append((at, at + stop))
            at += stop
    return groups


def _decode_run(run: _Run, stored: bytes, places: Places, view: View | None) -> None:
    """Decode, verify and (with a view) place the frames of one request. Runs in a thread."""
    starts = run.entries.sum_starts()
    for low in range(0, len(run.entries), DECODE_FRAMES):
        high = min(low + DECODE_FRAMES, len(run.entries))
        _decode_some(run, run.entries.slice(low, high, starts), stored, places, view)


def _decode_some(
    run: _Run, entries: Entries, stored: bytes, places: Places, view: View | None
) -> None:
    whole = memoryview(stored)
    offset = (entries.offset - np.uint64(run.start)).tolist()
    length = entries.length.tolist()
    raw = entries.raw_length.astype(np.int64)
    frames = [whole[at : at + size] for at, size in zip(offset, length, strict=True)]
    buffer = bytearray(int(raw.sum()))
    pageno, owner = entries.pages()
    try:
        decode_frames(
            frames, raw.tolist(), entries.packed.tolist(), _checks(entries), memoryview(buffer)
        )
    except FrameError as error:
        page = int(pageno[np.flatnonzero(owner == error.number)[0]])
        raise _damage(run, page) from None
    # The place of a page in its frame is the number of pages of the frame before it.
    bit = (pageno & np.uint64(15)).astype(np.uint16)
    below = np.left_shift(np.uint16(1), bit) - np.uint16(1)
    place = np.bitwise_count(entries.frame_mask[owner] & below).astype(np.int64)
    place += ((np.cumsum(raw) - raw) // PAGE_SIZE)[owner]
    pages = np.frombuffer(buffer, np.uint8).reshape(-1, PAGE_SIZE)
    if len(place) != len(pages) or (place != np.arange(len(place))).any():
        pages = pages[place]
    wrong = native.pages_verify(pages.data, entries.sums)
    if wrong >= 0:
        raise _damage(run, int(pageno[wrong]))
    if view is not None:
        if isinstance(places, int):
            view[(pageno - np.uint64(places)).astype(np.int64)] = pages
        else:
            view[np.searchsorted(places, pageno)] = pages


def _checks(entries: Entries) -> list[int | None]:
    pairs = zip(entries.check.tolist(), entries.checked.tolist(), strict=True)
    return [check if known else None for check, known in pairs]


def _damage(run: _Run, pageno: int) -> DamagedError:
    return DamagedError(f"{run.name}: page {pageno} is damaged")
