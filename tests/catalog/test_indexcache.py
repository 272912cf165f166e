"""The place where joins are made is empty for each, whatever a dead daemon left there."""

from __future__ import annotations

from pathlib import Path

from vdiskfs.catalog.indexcache import IndexCache


def test_a_join_begins_in_an_empty_place_and_leaves_nothing(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "indexes")
    left = tmp_path / "indexes.join"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    with cache.workplace() as place:
        assert not list(place.iterdir())
        (place / "joined").write_bytes(b"y")
    assert not list(tmp_path.iterdir())
