"""A delta that lies is refused with one clear error, in bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import zstandard

from tests.delta.forge import data_block, delta, entry, head_of, zeros_block
from vdiskfs.delta.blocks import (
    CHECKS,
    DATA,
    OBJECTS,
    PAGE,
    POINTS,
    ROW,
    ZEROS,
    Sealed,
    planes,
    seal_block,
)
from vdiskfs.delta.frames import FrameError, decode_frames
from vdiskfs.delta.layout import (
    HEAD_SIZE,
    Kind,
    decode_head,
    encode_head,
    hash_bytes,
    head_from_metadata,
)
from vdiskfs.delta.local import LocalDelta, open_tail
from vdiskfs.delta.names import parse_joined, parse_slot
from vdiskfs.delta.segments import decode_segment_head
from vdiskfs.errors import FormatError

# What a reader may take for any delta object, however it lies: 24 MiB.
CAP = 24 << 20


@contextmanager
def bounded() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < CAP
    finally:
        tracemalloc.stop()


def read_all(data: bytes) -> None:
    found = open_tail(data, where="x")
    found.zeros(), found.objects(), found.points()
    list(found.entries())


def test_an_honest_forgery_is_read() -> None:
    """The forge makes whole deltas where nothing lies."""
    read_all(delta([data_block([entry()]), zeros_block([(20, 5)])]))


BAD_ENTRIES: dict[str, list[dict[str, int]]] = {
    "no pages": [entry(mask=0)],
    "mask outside the frame": [entry(mask=3, frame_mask=1)],
    "unknown flags": [entry(flags=4)],
    "length of a raw frame": [entry(length=4095)],
    "length of a packed frame": [entry(flags=1, length=4096)],
    "no length": [entry(flags=1, length=0)],
    "offset before the frames": [entry(offset=511)],
    "offset beyond the frames": [entry(offset=513)],
    "offset near 2**63": [entry(offset=2**63 - 1)],
    "offset near 2**64": [entry(offset=2**64 - 4096)],
    "an object that is not there": [entry(object=1)],
    "object 2**32-1": [entry(object=2**32 - 1)],
    "chunk beyond the disk": [entry(chunkno=16)],
    "page beyond the disk": [entry(chunkno=15, mask=1, frame_mask=1), entry(chunkno=2**40)],
    "chunk near 2**60": [entry(chunkno=2**60 - 1)],
    "chunks that go back": [entry(chunkno=3), entry(chunkno=2)],
    "a page twice": [entry(mask=1, frame_mask=1), entry(mask=1, frame_mask=1)],
    "entries of a chunk out of order": [entry(mask=2, frame_mask=2), entry(mask=1, frame_mask=1)],
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_entries_that_lie_are_refused(name: str) -> None:
    with bounded(), pytest.raises(FormatError, match="^x: "):
        read_all(delta([data_block(BAD_ENTRIES[name])]))


BAD_ZEROS: dict[str, list[tuple[int, int]]] = {
    "empty run": [(0, 0)],
    "touching runs": [(0, 1), (0, 1)],
    "beyond the disk": [(250, 7)],
    "2**62 pages": [(0, 2**62)],
    "a sum beyond 2**64": [(1, 2**63), (1, 2**63)],
    "a gap near 2**64": [(2**64 - 1, 1)],
    "too many": [(1, 1)] * 4097,
}


@pytest.mark.parametrize("name", BAD_ZEROS)
def test_zeros_that_lie_are_refused(name: str) -> None:
    with bounded(), pytest.raises(FormatError, match="^x: "):
        read_all(delta([zeros_block(BAD_ZEROS[name])]))


def row(**changes: object) -> np.ndarray:
    made = np.zeros(1, ROW)
    for key, value in {"kind": DATA, "first": 0, "last": 15, "offset": 4608, "length": 10,
                       "raw": 10, "count": 1, **changes}.items():  # fmt: skip
        made[key] = value
    return made


BAD_ROWS: dict[str, list[np.ndarray]] = {
    "kind 0": [row(kind=0)],
    "kind 99": [row(kind=99)],
    "flags": [row(flags=2)],
    "reserved": [row(reserved=1)],
    "reserved2": [row(reserved2=1)],
    "a bomb": [row(flags=1, raw=2**32 - 1)],
    "longer than raw": [row(length=11)],
    "backwards": [row(first=9, last=8)],
    "last near 2**64": [row(last=2**64 - 1)],
    "overlapping": [row(), row(first=15, last=31)],
    "out of order": [row(first=16, last=31), row()],
    "kinds out of order": [row(kind=ZEROS), row()],
    "outside the object": [row(offset=4609)],
    "in the frames": [row(offset=512)],
    "offset near 2**63": [row(offset=2**63)],
    "points in a segment": [row(kind=POINTS, object=1)],
    "a page in a segment": [row(kind=DATA | PAGE, object=1)],
    "data beyond the disk": [row(first=256, last=271)],
    "zeros beyond the disk": [row(kind=ZEROS, first=256, last=256)],
    "half a row": [],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_lie_are_refused(name: str) -> None:
    rows = BAD_ROWS[name]
    filler = Sealed(bytes(10), row())
    with bounded(), pytest.raises(FormatError, match="^x: "):
        if rows:
            read_all(delta([filler], rows=np.concatenate(rows)))
        else:
            read_all(delta([filler], root=bytes(79)))


def test_a_million_rows_are_refused_before_they_are_unpacked() -> None:
    """A root of 80 MB packed into a few KiB: the head says so, and nothing is allocated."""
    packed = zstandard.ZstdCompressor().compress(bytes(80_000_000))
    data = delta(root=packed, root_raw=80_000_000)
    with bounded(), pytest.raises(FormatError, match="larger than the format allows"):
        read_all(data)


def test_a_million_entries_are_refused() -> None:
    count = 1_000_000
    raw = struct.pack("<II", count, count) + bytes(count * 41)
    block = seal_block(DATA, 0, 15, count, raw, flags=CHECKS)
    with bounded(), pytest.raises(FormatError, match="larger than the format allows"):
        read_all(delta([block]))


@pytest.mark.parametrize("said", [10, 1 << 20, 200_000])
def test_a_bomb_that_lies_of_its_size_is_refused(said: int) -> None:
    """The size that a frame says of itself is checked before the library allocates it."""
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    made = np.zeros(1, ROW)
    made["kind"], made["flags"], made["last"], made["count"] = DATA, 1, 15, 1
    made["length"], made["raw"] = len(bomb), max(said, len(bomb))
    made["hash"] = np.void(hash_bytes(bomb))
    with bounded(), pytest.raises(FormatError):
        read_all(delta([Sealed(bomb, made)]))


def stream(data: bytes) -> bytes:
    """Compress without saying the size."""
    made = zstandard.ZstdCompressor().compressobj()
    return made.compress(data) + made.flush()


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 28))
HUGE = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**63) + b"\x01\x00\x00"


@pytest.mark.parametrize(
    "frame",
    [BOMB, HUGE, stream(bytes(4096)), stream(bytes(1 << 28)), b"", b"\x28\xb5\x2f\xfd", bytes(40),
     zstandard.ZstdCompressor().compress(bytes(4095)),
     zstandard.ZstdCompressor().compress(bytes(4096))[:-1]],
)  # fmt: skip
def test_a_frame_that_lies_is_refused(frame: bytes) -> None:
    out = bytearray(4096)
    with bounded(), pytest.raises(FrameError):
        decode_frames([frame], [4096], [True], [None], memoryview(out))


def test_a_raw_frame_of_another_length_is_refused() -> None:
    with pytest.raises(FrameError):
        decode_frames([bytes(4095)], [4096], [False], [None], memoryview(bytearray(4096)))


def test_a_frame_of_another_check_is_refused() -> None:
    """Also where a flipped bit changes nothing of what comes out of it."""
    frame = zstandard.ZstdCompressor().compress(bytes(range(256)) * 16)
    idle, out = 0, bytearray(4096)
    for bit in range(8 * len(frame)):
        wrong = bytearray(frame)
        wrong[bit // 8] ^= 1 << bit % 8
        with bounded(), pytest.raises(FrameError):
            decode_frames([wrong], [4096], [True], [zlib.crc32(frame)], memoryview(out))
        with suppress(FrameError):
            decode_frames([wrong], [4096], [True], [None], memoryview(out))
            idle += out == bytes(range(256)) * 16
    assert idle > 0


@pytest.mark.parametrize(("version", "flags"), [(1, CHECKS), (2, 0)])
def test_entries_have_checks_since_version_2_and_none_before(version: int, flags: int) -> None:
    block = data_block([entry()])
    assert int(block.row["flags"][0]) & CHECKS
    block.row["flags"] &= ~np.uint8(CHECKS)
    block.row["flags"] |= np.uint8(flags)
    with pytest.raises(FormatError, match="a row of the index has unknown values"):
        read_all(delta([block], head=head_of(version=version)))


def points_raw(**changes: object) -> bytes:
    columns: dict[str, object] = {
        "epoch": [1, 1], "time": [5, 5], "size": [1, 1], "changed": [1, 1], "stored": [1, 1],
        "flags": b"\0\0", "lengths": b"\0\0", "blob": b"", **changes,
    }  # fmt: skip
    raw = struct.pack("<II", 2, len(columns["blob"]))  # type: ignore[arg-type]
    for name in ("epoch", "time", "size", "changed", "stored"):
        raw += planes(np.array(columns[name], "<u8"))
    return raw + b"".join(columns[name] for name in ("flags", "lengths", "blob"))  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [{"epoch": [1, 0]}, {"epoch": [1, 2**63]}, {"epoch": [2**63, 2**63]}, {"time": [5, 2**64 - 1]},
     {"size": [2**63, 1]}, {"changed": [1, 2**64 - 1]}, {"flags": b"\0\xff"}, {"lengths": b"\0\x05"},
     {"lengths": b"\xff\0", "blob": bytes(255)}, {"lengths": b"\x02\0", "blob": b"\xff\xfe"},
     {"blob": b"more"}],
)  # fmt: skip
def test_points_that_lie_are_refused(changes: dict[str, object]) -> None:
    block = seal_block(POINTS, 1, 2, 2, points_raw(**changes))
    with bounded(), pytest.raises(FormatError, match="^x: "):
        read_all(delta([block]))
    read_all(delta([seal_block(POINTS, 1, 2, 2, points_raw())]))


@pytest.mark.parametrize(
    ("kind", "extra"), [(b"\x02", b""), (b"\x01", b""), (b"\0", b"x" * 16), (b"\x01", b"short")]
)
def test_objects_that_lie_are_refused(kind: bytes, extra: bytes) -> None:
    raw = struct.pack("<II", 1, len(extra) // 16) + kind + bytes(20) + extra
    with bounded(), pytest.raises(FormatError, match="^x: "):
        read_all(delta([seal_block(OBJECTS, 1, 1, 1, raw)]))


def test_a_reference_cannot_be_a_path() -> None:
    """An object is a number or 16 bytes: whatever they are, the name is hex of this disk."""
    raw = struct.pack("<II", 1, 1) + b"\x01" + bytes(20) + b"../../etc/passwd"
    found = open_tail(delta([seal_block(OBJECTS, 1, 1, 1, raw)]), where="x")
    name = found.objects().ref(0).name(found.head.disk_id)
    assert name == f"segments/{found.head.disk_id}/" + b"../../etc/passwd".hex()


HEADS: dict[str, dict[str, object]] = {
    "size": {"size": 2**63}, "time": {"time_ns": 2**64 - 1}, "epoch": {"to_epoch": 2**63},
    "cut": {"cut": 1}, "cut beyond the size": {"cut": 1 << 21, "from_size": 1 << 22},
    "epochs": {"from_epoch": 3}, "level": {"level": 1}, "kind": {"kind": Kind.JOINED},
    "label": {"label": "x"}, "time first": {"first_time_ns": 2**62},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_lie_are_refused(name: str) -> None:
    with bounded(), pytest.raises(FormatError, match="^x: "):
        read_all(delta(head=head_of(**HEADS[name])))


@pytest.mark.parametrize(
    ("offset", "value"),
    [(8, 3), (8, 0), (10, 0), (10, 9), (12, 0x80), (84, 121), (85, 1), (86, 1), (320, 1), (472, 1),
     (352, 65), (168, 255), (176, 255), (184, 255), (160, 255)],
)  # fmt: skip
def test_heads_with_unknown_values_are_refused(offset: int, value: int) -> None:
    """Each field that has to be something, with a right hash over what it is not."""
    data = bytearray(delta())
    for start in (0, len(data) - HEAD_SIZE):
        data[start + offset] = value
        body = bytes(data[start : start + HEAD_SIZE - 32])
        data[start + HEAD_SIZE - 32 : start + HEAD_SIZE] = hash_bytes(body)
    with bounded(), pytest.raises(FormatError, match="^x: "):
        read_all(bytes(data))


def test_a_newer_version_is_named() -> None:
    data = bytearray(encode_head(head_of()))
    data[8] = 3
    data[-32:] = hash_bytes(bytes(data[:-32]))
    with pytest.raises(FormatError, match="format version 3.*use a newer vdiskfs"):
        decode_head(bytes(data))


@pytest.mark.parametrize("length", [0, 100, 511, 513])
def test_a_head_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        decode_head(bytes(length))


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: d[600:]])
def test_a_tail_that_is_not_whole_is_refused(change: Callable[[bytes], bytes]) -> None:
    data = delta([data_block([entry()])])
    tail = data[-(len(data) - HEAD_SIZE - 4096) :]
    assert isinstance(open_tail(tail, where="x"), LocalDelta)
    with pytest.raises(FormatError):
        open_tail(change(tail), where="x")


@pytest.mark.parametrize(
    "name",
    ["", "disks/x/g00000001/0", f"disks/{'a' * 32}/g00000001/{'0' * 15}", "../vault.json",
     f"disks/{'A' * 32}/g00000001/{'0' * 16}", f"disks/{'a' * 32}/g00000001/{'0' * 16}\n",
     f"disks/{'a' * 32}/g00000001.0/{'0' * 16}-{'1' * 16}.0"],
)  # fmt: skip
def test_names_that_are_not_ours_are_not_parsed(name: str) -> None:
    assert parse_slot(name) is None
    assert parse_joined(name) is None


@pytest.mark.parametrize("data", [b"", bytes(128), b"VDFSEGMT" + bytes(120)])
def test_segments_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_segment_head(data, where="x")


@pytest.mark.parametrize("label", ["%ff%fe", "%00", "x" * 5000])
def test_a_label_in_a_listing_is_bounded(label: str) -> None:
    metadata = {"to": "1", "time": "1", "first": "1", "size": "1", "flags": "0", "changed": "1",
                "stored": "1", "tail": "1", "digest": "00" * 32, "label": label}  # fmt: skip
    listed = head_from_metadata(metadata)
    assert listed is None or len(listed.label) <= 120


def test_random_bytes_are_refused() -> None:
    """Whole deltas with random bytes in them, and random bytes alone."""
    rng = np.random.default_rng(1)
    data = delta([data_block([entry()]), zeros_block([(20, 5)])])
    for _ in range(300):
        broken = bytearray(data)
        at = int(rng.integers(HEAD_SIZE + 4096, len(data)))
        broken[at : at + 8] = rng.bytes(8)
        broken = broken[: len(data)]
        if bytes(broken) != data:
            with pytest.raises(FormatError):
                read_all(bytes(broken))
        with pytest.raises(FormatError):
            read_all(rng.bytes(2000))
