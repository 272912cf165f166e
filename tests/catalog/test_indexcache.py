"""The place where joins are made is empty for each, whatever a dead daemon left there."""

from __future__ import annotations

import math
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.delta.names import joined_name, slot_name


def test_a_join_begins_in_an_empty_place_and_leaves_nothing(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes")
    left = tmp_path / "indexes.join"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    with cache.workplace() as place:
        assert not list(place.iterdir())
        (place / "joined").write_bytes(b"y")
    assert not list(tmp_path.iterdir())


def test_what_is_put_aside_is_there_by_name_and_slots_go_before_the_rest(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes", kept_limit=40_000)
    disk = "ab" * 16
    leaf = joined_name(disk, 1, 9, (0, 512), 3)
    cache.put_aside({leaf: b"leaf"})
    tails = {slot_name(disk, 1, epoch): random.Random(epoch).randbytes(500) for epoch in range(256)}
    for name, tail in tails.items():
        cache.put_aside({name: tail})
    again = IndexCache(tmp_path / "indexes")
    assert again.copies(leaf) == [b"leaf"]
    kept = [name for name, tail in tails.items() if again.copies(name) == [tail]]
    assert kept == list(tails)[-len(kept) :], "the newest"
    assert 20 < len(kept) < 256
    assert again.copies(slot_name(disk, 2, 255)) == []


def test_a_file_that_is_damaged_is_as_good_as_none(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes")
    name = slot_name("ab" * 16, 1, 5)
    cache.put_aside({name: b"tail"})
    [path] = (tmp_path / "indexes.slots").iterdir()
    path.write_bytes(b"\x28\xb5\x2f\xfd junk")
    assert cache.copies(name) == []
    cache.put_aside({name: b"tail"})
    assert cache.copies(name) == [b"tail"]


def test_the_age_of_a_copy_is_that_of_the_last_comparison(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes")
    assert cache.age_s("disks/a/disk.json") == math.inf
    cache.confirm("disks/a/disk.json")
    cache.put_aside({"disks/a/disk.json": b"{}"})
    [path] = (tmp_path / "indexes.others").iterdir()
    os.utime(path, (0, 0))
    assert cache.age_s("disks/a/disk.json") > 1e9
    cache.confirm("disks/a/disk.json")
    assert cache.age_s("disks/a/disk.json") < 1e9


def test_what_several_threads_put_aside_at_once_is_all_there(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes")
    names = [slot_name("ab" * 16, 1, epoch) for epoch in range(16)]
    with ThreadPoolExecutor(16) as threads:
        for _ in range(8):
            list(threads.map(lambda name: cache.put_aside({name: name.encode()}), names))
            assert [cache.copies(name) for name in names] == [[name.encode()] for name in names]
            shutil.rmtree(tmp_path / "indexes.slots")


def test_what_was_put_aside_outlives_a_write_that_fails(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes")
    cache.put_aside({"a": b"first"})
    write = Path.write_bytes

    def torn(path: Path, data: bytes) -> None:
        write(path, data[:3])
        raise OSError(28, "No space left on device")

    with mock.patch.object(Path, "write_bytes", torn):
        cache.put_aside({"a": b"second"})
    assert cache.copies("a") == [b"first"]
