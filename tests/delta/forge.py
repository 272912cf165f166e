"""Making deltas that lie: any columns, any rows, any head, all hashes right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.delta.model import DISK, T0, VAULT, WRITER
from vdiskfs.delta.blocks import CHECKS, DATA, ROW, ZEROS, Rows, Sealed, planes, seal_block
from vdiskfs.delta.digest import epoch_digest, genesis_digest
from vdiskfs.delta.layout import HEAD_SIZE, DeltaHead, Kind, encode_head, hash_bytes

COLUMNS = (
    ("chunkno", "<u8"), ("mask", "<u2"), ("frame_mask", "<u2"), ("object", "<u4"),
    ("offset", "<u8"), ("length", "<u4"), ("flags", "u1"),
)  # fmt: skip


def data_block(entries: Sequence[dict[str, int]], sums: int | None = None) -> Sealed:
    """Seal entries whose columns are given as they are stored (differences and all)."""
    raw = len(entries).to_bytes(4, "little")
    count = sum(entry["mask"].bit_count() for entry in entries) if sums is None else sums
    raw += count.to_bytes(4, "little")
    before_chunk = before_end = 0
    columns: dict[str, list[int]] = {name: [] for name, _ in COLUMNS}
    for entry in entries:
        columns["chunkno"].append((entry["chunkno"] - before_chunk) % 2**64)
        columns["mask"].append(entry["mask"])
        columns["frame_mask"].append(entry["mask"] ^ entry["frame_mask"])
        columns["object"].append(entry["object"])
        columns["offset"].append((entry["offset"] - before_end) % 2**64)
        columns["length"].append(entry["length"])
        columns["flags"].append(entry["flags"])
        before_chunk = entry["chunkno"]
        before_end = entry["offset"] + entry["length"]
    for name, kind in COLUMNS:
        raw += planes(np.array(columns[name], kind))
    raw += np.array([entry["check"] for entry in entries], "<u4").tobytes()
    raw += bytes(8 * count)
    chunks = [entry["chunkno"] for entry in entries] or [0]
    last = chunks[-1] * 16 + 15
    return seal_block(DATA, chunks[0] * 16, last % 2**63, len(entries), raw, flags=CHECKS)


def entry(**changes: int) -> dict[str, int]:
    return {
        "chunkno": 0, "mask": 1, "frame_mask": 1, "object": 0, "offset": 512, "length": 4096,
        "flags": 0, "check": 0, **changes,
    }  # fmt: skip


def zeros_block(gaps: Sequence[tuple[int, int]]) -> Sealed:
    raw = len(gaps).to_bytes(4, "little") + bytes(4)
    raw += planes(np.array([gap for gap, _ in gaps], "<u8"))
    raw += planes(np.array([length for _, length in gaps], "<u8"))
    end = sum(gap + length for gap, length in gaps)
    return seal_block(ZEROS, gaps[0][0] % 2**63, (end - 1) % 2**63, len(gaps), raw)


def head_of(**changes: object) -> DeltaHead:
    head = DeltaHead(
        kind=Kind.SLOT, vault_id=VAULT, disk_id=DISK, writer_id=WRITER, generation=1,
        from_epoch=0, to_epoch=1, time_ns=T0, first_time_ns=T0, size=1 << 20, cut=0, from_size=0,
        from_digest=genesis_digest(VAULT, DISK), to_digest=bytes(32), content_digest=bytes(32),
    )  # fmt: skip
    return replace(head, **changes)  # type: ignore[arg-type]


def delta(
    blocks: Sequence[Sealed] = (),
    *,
    head: DeltaHead | None = None,
    frames: bytes = bytes(4096),
    rows: Rows | None = None,
    root: bytes | None = None,
    root_raw: int | None = None,
) -> bytes:
    """Return a delta object: frames, blocks, root, heads, with all hashes as they must be."""
    body = bytes(HEAD_SIZE) + frames
    tail_offset = len(body)
    placed = []
    for block in blocks:
        row = block.row.copy()
        row["offset"] = len(body)
        placed.append(row)
        body += block.data
    if rows is None:
        rows = np.concatenate(placed) if placed else np.zeros(0, ROW)
    stored = rows.tobytes() if root is None else root
    head = replace(
        head or head_of(),
        tail_offset=tail_offset, root_offset=len(body), root_length=len(stored),
        root_raw=len(stored) if root_raw is None else root_raw, root_hash=hash_bytes(stored),
        object_size=len(body) + len(stored) + HEAD_SIZE,
    )  # fmt: skip
    head = replace(head, to_digest=epoch_digest(head))
    encoded = encode_head(head)
    return encoded + body[HEAD_SIZE:] + stored + encoded
