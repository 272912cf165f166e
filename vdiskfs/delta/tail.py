"""The end of a delta file: blocks, pages, root, and the head a second time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from vdiskfs.crash import hook
from vdiskfs.delta.blocks import PAGE, Rows
from vdiskfs.delta.builder import IndexBuilder, build_root, seal_root
from vdiskfs.delta.digest import epoch_digest
from vdiskfs.delta.layout import DeltaHead, Flags, Kind, encode_head, hash_bytes

_COPY = 1 << 20


def write_tail(
    out: IO[bytes],
    position: int,
    head: DeltaHead,
    builder: IndexBuilder,
    *,
    rows: Rows,
    skip: int = 0,
) -> DeltaHead:
    """Write all that follows the frames, then the head at both ends; return the head.

    ``rows`` have offsets into the builder where their object is 0; the builder's bytes
    before ``skip`` lie in segments already. ``stored_bytes`` of ``head`` counts those.
    """
    rows = rows.copy()
    own = rows["object"] == 0
    rows["offset"][own] = rows["offset"][own] - np.uint64(skip) + np.uint64(position)
    out.seek(position)
    for start in range(skip, builder.size, _COPY):
        out.write(builder.read(start, min(_COPY, builder.size - start)))
    pages_at = position + builder.size - skip
    pages, root = build_root(rows)
    is_page = (root["kind"] & np.uint8(PAGE)) != 0
    root["offset"][is_page] += np.uint64(pages_at)
    out.writelines(page.data for page in pages)
    stored, raw = seal_root(root)
    root_at = pages_at + sum(len(page.data) for page in pages)
    out.write(stored)
    head = replace(
        head, tail_offset=position, root_offset=root_at, root_length=len(stored), root_raw=raw,
        root_hash=hash_bytes(stored),
    )  # fmt: skip
    size = root_at + len(stored) + len(encode_head(head))
    head = replace(head, object_size=size, stored_bytes=head.stored_bytes + size)
    if head.kind is Kind.SLOT and not head.flags & Flags.MERGED:
        head = replace(head, to_digest=epoch_digest(head))
    out.write(encode_head(head))
    out.seek(0)
    out.write(encode_head(head))
    return head


def settle(out: IO[bytes], temporary: Path, path: Path) -> None:
    """Make a written file durable under its name; the directory too."""
    out.flush()
    os.fdatasync(out.fileno())
    out.close()
    hook("spool.synced")
    temporary.rename(path)
    sync_directory(path.parent)
    hook("spool.named")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
