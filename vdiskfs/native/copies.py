"""Writable copies: lazy images that are written to, and what is known of their pages.

Part of ``vdiskfs.native``; native/src/lazy.c and presence.c say how it works. Of an image made
with ``ImageFlags.LAZY`` and without ``READONLY`` what is written, filled or made zero is
present from then on. With presence open that survives the process, and what was committed
(`Image.sync`, `commit_presence`) the host; the rest falls back to what the base has.

A change that covers pages in part needs those first. Asked for by the kernel it waits, and
posts WANT for exactly them; `Image.write`, `Image.allocate` and `Image.truncate` raise
``BlockingIOError`` then, and nothing is changed: map and fill the pages at both ends (of
``truncate`` the page of the new size), then call again.

Everything here but the questions may wait for the local disk: call it from a thread. So may
`Image.answer` of such an image, which runs writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdiskfs._native import ffi, lib
from vdiskfs.native.host import check
from vdiskfs.native.records import PresenceCounts

if TYPE_CHECKING:
    from vdiskfs.native import Image


def _open_directory(directory: str | os.PathLike[str]) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def create_presence(
    directory: str | os.PathLike[str],
    size: int,
    *,
    absent: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Make the presence of a copy, in a directory of its own. Durable on return.

    Args:
        directory: takes the files ``presence`` (32 MiB for each TiB), ``presence.head``
            and ``presence.log``.
        size: bytes of the base: the image's at first.
        absent: None: nothing is here. Otherwise all is but these runs, each a first page and
            a number of pages; no region has to be mapped then.

    Raises:
        OSError: EEXIST, there is one; ENOSPC, no room for the bitmap.
    """
    runs = [number for run in absent or () for number in run]
    whole = 0 if absent is None else lib.VDF_PRESENCE_WHOLE
    fd = _open_directory(directory)
    try:
        numbers = ffi.new("uint64_t[]", runs)
        check(
            lib.vdf_presence_create(fd, size, whole, numbers, len(runs) // 2), os.fspath(directory)
        )
    finally:
        os.close(fd)


def open_presence(image: Image, directory: str | os.PathLike[str], *, host_lived: bool) -> None:
    """Let a copy know its pages, before its first use.

    Args:
        image: LAZY and not READONLY.
        directory: as given to `create_presence`.
        host_lived: since it was made or opened last. Otherwise the log alone is believed.

    Raises:
        OSError: ENOENT, there is none; EBADMSG, damaged: it is not known what the image holds.
            The image is of no use then.
    """
    fd = _open_directory(directory)
    try:
        flags = lib.VDF_PRESENCE_TRUST if host_lived else 0
        check(lib.vdf_image_presence_open(image.handle, fd, flags), os.fspath(directory))
    finally:
        os.close(fd)


def commit_presence(image: Image) -> None:
    """Sync the image; what is present by now outlives the host. For use in the background.

    May write the log anew; the guest's syncs wait meanwhile.
    """
    check(lib.vdf_image_presence_commit(image.handle), "presence")


def complete_presence(image: Image) -> bool:
    """Note that all is here, durably; False: something is not, or not known to be."""
    result = lib.vdf_image_presence_complete(image.handle)
    return result != -errno.EAGAIN and check(result, "presence") == 0


def presence_counts(image: Image) -> PresenceCounts:
    """Return what is known of a copy's pages.

    Raises:
        OSError: EINVAL, not a writable lazy image.
    """
    out = ffi.new("vdf_presence_counts *")
    check(lib.vdf_presence_counts_get(image.handle, out), "presence")
    return PresenceCounts(
        out.base_size, out.low, out.present_pages, out.uncommitted_pages, out.absent_pages,
        out.log_bytes, bool(out.complete), bool(out.rebuilt), bool(out.lost),
    )  # fmt: skip


def next_absent(image: Image, offset: int) -> tuple[int, int] | None:
    """Return offset and bytes of the first absent run from ``offset`` on, in mapped regions."""
    length = ffi.new("uint64_t *")
    at = lib.vdf_image_next_absent(image.handle, offset, length)
    return None if at == -errno.ENXIO else (check(at, "absent"), int(length[0]))


def next_unmapped(image: Image, region: int) -> int | None:
    """Return the first region from ``region`` on that has to be mapped to know it."""
    found = lib.vdf_image_next_unmapped(image.handle, region)
    return None if found == -errno.ENXIO else check(found, "unmapped")
