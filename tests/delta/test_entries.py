"""Extents are sets of pages; entries cut down to pages supply exactly those."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.delta.entries import (
    Entries,
    Extents,
    concat_entries,
    distinct,
    extents_of_pages,
    first_of_each,
    make_extents,
    select_pages,
    unite_extents,
)

pages = st.sets(st.integers(0, 200))


def extents(numbers: set[int]) -> Extents:
    return extents_of_pages(np.array(sorted(numbers), np.uint64))


def numbers(runs: Extents) -> set[int]:
    pairs = list(zip(runs.start.tolist(), runs.end.tolist(), strict=True))
    assert all(start < end for start, end in pairs)
    assert all(a[1] < b[0] for a, b in zip(pairs, pairs[1:], strict=False))
    return {page for start, end in pairs for page in range(start, end)}


@given(pages, pages)
def test_extents_are_sets(a: set[int], b: set[int]) -> None:
    one, two = extents(a), extents(b)
    assert numbers(one) == a
    assert one.page_count == len(a)
    assert numbers(unite_extents([one, two])) == a | b
    assert numbers(one.without(two)) == a - b
    assert numbers(one.without_pages(np.array(sorted(b), np.uint64))) == a - b
    asked = np.arange(210, dtype=np.uint64)
    assert {page for page in range(210) if one.contains(asked)[page]} == a


@given(pages, st.integers(0, 210), st.integers(0, 210))
def test_a_clip_is_an_intersection(a: set[int], low: int, high: int) -> None:
    assert numbers(extents(a).clip(low, high)) == a & set(range(low, high))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100))))
def test_any_runs_make_extents(runs: list[tuple[int, int]]) -> None:
    pairs = np.array(runs, np.uint64).reshape(-1, 2)
    wanted = {page for start, end in runs for page in range(start, end)}
    assert numbers(make_extents(pairs[:, 0], pairs[:, 1])) == wanted


def make(chunks: list[tuple[int, int]]) -> Entries:
    """Return entries of (chunk, mask) whose sums are 1000 * entry + page."""
    count = len(chunks)
    mask = np.array([mask for _, mask in chunks], np.uint16)
    made = Entries(
        np.array([chunk for chunk, _ in chunks], np.uint64), mask, mask | np.uint16(0x8001),
        np.zeros(count, np.uint32), np.arange(count, dtype=np.uint64) * np.uint64(65536),
        np.ones(count, np.uint32), np.ones(count, np.uint8), np.arange(count, dtype=np.uint32),
        np.empty(0, np.uint64),
    )  # fmt: skip
    pageno, owner = made.pages()
    made.sums = pageno + owner.astype(np.uint64) * np.uint64(1000)
    return made


chunk_lists = st.dictionaries(st.integers(0, 9), st.integers(1, 0xFFFF), min_size=1).map(
    lambda found: sorted(found.items())
)


@given(chunk_lists, chunk_lists, st.randoms(use_true_random=False))
def test_selected_pages_keep_their_sums_and_frames(
    a: list[tuple[int, int]], b: list[tuple[int, int]], rng: object
) -> None:
    """Of two indexes joined anyhow, each page chosen once: it has its own sum and place."""
    both = concat_entries([make(a), make(b)])
    both.offset = np.arange(len(both), dtype=np.uint64) * np.uint64(65536)
    both.check = np.arange(len(both), dtype=np.uint32)
    pageno, owner = both.pages()
    both.sums = pageno + owner.astype(np.uint64) * np.uint64(1000)
    _, kept = np.unique(pageno, return_index=True)
    chosen = kept[np.array([rng.random() < 0.6 for _ in kept], np.bool_)]  # type: ignore[attr-defined]
    result = select_pages(both, pageno, owner, chosen)
    got, entry = result.pages()
    assert sorted(got.tolist()) == sorted(pageno[chosen].tolist())
    source = (result.offset // np.uint64(65536)).astype(np.int64)
    assert (result.check == source).all()
    assert (result.sums == got + source[entry].astype(np.uint64) * np.uint64(1000)).all()
    order = [(int(c), int(m) & -int(m)) for c, m in zip(result.chunkno, result.mask, strict=True)]
    assert order == sorted(order)
    assert not (result.mask & ~result.frame_mask).any()


@given(chunk_lists, st.integers(0, 160), st.integers(0, 170))
def test_entries_within_pages_are_those_of_the_chunks(
    chunks: list[tuple[int, int]], first: int, end: int
) -> None:
    part = make(chunks).within(first, end)
    low, high = first // 16, -(-end // 16)
    assert part.chunkno.tolist() == [chunk for chunk, _ in chunks if low <= chunk < high]
    assert len(part.sums) == int(np.bitwise_count(part.mask).sum())


@given(chunk_lists, st.data())
def test_rows_of_entries_keep_their_sums(
    chunks: list[tuple[int, int]], data: st.DataObject
) -> None:
    entries = make(chunks)
    rows = data.draw(st.lists(st.integers(0, len(chunks) - 1), min_size=1, max_size=12))
    part = entries.rows(np.array(rows))
    starts = entries.sum_starts()
    wanted = [s for row in rows for s in entries.sums[starts[row] : starts[row + 1]].tolist()]
    assert part.sums.tolist() == wanted


@given(st.lists(st.integers(0, 20)))
def test_distinct_values_and_where_each_is_first(numbers: list[int]) -> None:
    values = np.array(numbers, np.uint64)
    assert distinct(values).tolist() == sorted(set(numbers))
    assert first_of_each(values).tolist() == [numbers.index(one) for one in sorted(set(numbers))]
