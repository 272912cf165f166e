"""Sums and zero tests of pages, and how arrays are handed to C. Part of ``vdiskfs.native``."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vdiskfs._native import ffi, lib
from vdiskfs.native.records import BoolArray, U64Array
from vdiskfs.units import PAGE_SIZE

Buffer: TypeAlias = bytes | bytearray | memoryview


def pages_sum(data: Buffer) -> U64Array:
    """Return the XXH3-64 of each page of 4 KiB; the length must be whole pages."""
    source = ffi.from_buffer(data)
    count = _whole_pages(len(source))
    sums = np.empty(count, np.uint64)
    lib.vdf_pages_sum(ffi.cast("uint8_t *", source), count, as_u64(sums))
    return sums


def pages_zero(data: Buffer) -> BoolArray:
    """Return for each page of 4 KiB whether it holds only zeros."""
    source = ffi.from_buffer(data)
    count = _whole_pages(len(source))
    zero = np.empty(count, np.bool_)
    lib.vdf_pages_zero(ffi.cast("uint8_t *", source), count, as_u8(zero))
    return zero


def pages_verify(data: Buffer, sums: U64Array) -> int:
    """Return the number of the first page whose sum is not the given one, or -1."""
    source = ffi.from_buffer(data)
    count = _whole_pages(len(source))
    if count != len(sums):
        raise ValueError(f"{count} pages, {len(sums)} sums")
    wanted = np.ascontiguousarray(sums, np.uint64)
    return int(lib.vdf_pages_verify(ffi.cast("uint8_t *", source), count, as_u64(wanted)))


def _whole_pages(length: int) -> int:
    if length % PAGE_SIZE:
        raise ValueError(f"{length} bytes are not whole pages")
    return length // PAGE_SIZE


def as_u64(array: U64Array) -> Any:
    """Return the array as C takes it; it must outlive the call."""
    return ffi.cast("uint64_t *", array.ctypes.data)


def as_u8(array: npt.NDArray[Any]) -> Any:
    """Return the array as C takes bytes; it must outlive the call."""
    return ffi.cast("uint8_t *", array.ctypes.data)
