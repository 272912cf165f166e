"""Bytes that say which write put them where they are.

The 8-byte word number ``w`` of the disk, written by the operation ``op`` of a run, is
``mix(base + op + w * STEP)``. ``mix`` is the finalizer of SplitMix64 (Steele, Lea, Flood:
"Fast Splittable Pseudorandom Number Generators", 2014), which is a bijection: from one word
and its place the operation is read back, and a word that was moved does not say its own.
Pure functions over numpy arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

SECTOR = 512
WORDS = SECTOR // 8
_MASK = 2**64 - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_C1, _C2 = np.uint64(_M1), np.uint64(_M2)
_I1, _I2 = np.uint64(pow(_M1, -1, 2**64)), np.uint64(pow(_M2, -1, 2**64))


def mix(x: Words) -> Words:
    """Spread each word over all 64 bits; no two words become one."""
    x = (x ^ (x >> np.uint64(30))) * _C1
    x = (x ^ (x >> np.uint64(27))) * _C2
    return x ^ (x >> np.uint64(31))


def unmix(x: Words) -> Words:
    """Undo ``mix``."""
    x = _unshift(x, 31) * _I2
    x = _unshift(x, 27) * _I1
    return _unshift(x, 30)


def _unshift(x: Words, bits: int) -> Words:
    """Undo ``x ^ (x >> bits)`` for bits > 21: two steps reach the lowest bits."""
    step = x ^ (x >> np.uint64(bits))
    return x ^ (step >> np.uint64(bits))


def base_of(seed: int) -> np.uint64:
    """Return the number that sets the stamps of one run apart from those of another."""
    return np.uint64((seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _MASK)


def words(base: np.uint64, op: int, first: int, count: int) -> Words:
    """Return ``count`` stamped words of one operation, from the word number ``first`` on."""
    start = np.uint64((int(base) + op + first * int(_STEP)) & _MASK)
    return mix(np.arange(count, dtype=np.uint64) * _STEP + start)


def content(base: np.uint64, op: int, offset: int, length: int) -> bytes:
    """Return the bytes that the operation puts at ``[offset, offset + length)``."""
    first, last = offset // 8, -(-(offset + length) // 8)
    skip = offset - first * 8
    return words(base, op, first, last - first).tobytes()[skip : skip + length]


def sectors(base: np.uint64, ops: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> Words:
    """Return whole sectors, one row for each pair of an operation and a sector number."""
    first = numbers.astype(np.uint64) * np.uint64(WORDS)
    start = first * _STEP + ops.astype(np.uint64) + base
    return mix(start[:, None] + (np.arange(WORDS, dtype=np.uint64) * _STEP)[None, :])


def operations(base: np.uint64, data: Words, numbers: npt.NDArray[np.int64]) -> Words:
    """Return the operation that each word names, nonsense where none wrote it.

    Args:
        base: of the run.
        data: words as read, shape (n, m): m words from the beginning of each sector.
        numbers: the n sector numbers.
    """
    place = numbers.astype(np.uint64)[:, None] * np.uint64(WORDS)
    place = place + np.arange(data.shape[1], dtype=np.uint64)[None, :]
    return unmix(data) - place * _STEP - base
