"""A file system on a protected disk: every recovery point is it as after a power cut.

The disk carries a loop device with a mounted file system. A thread writes to it: files that
are fsync'd and noted in a ledger, files that are not, renames, deletes. What the ledger held
when a point was asked for must be in the point, after its log was replayed.
"""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.e2e.loopdev import (
    KINDS,
    attached,
    check_point,
    file_system,
    make_fs,
    make_image,
    mounted,
)
from tests.e2e.mounted import MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root]
FAST = "epoch_interval_s = 0.3\n"
SIZE = 384 << 20  # xfs takes no less than 300 MiB
ASKED = 2  # points that are asked for, besides those of the interval
SHOWN = "hello from the live disk\n"


def content(name: str) -> bytes:
    """Return what a file of this name holds: it depends on nothing else."""
    rng = random.Random(name)
    return rng.randbytes(rng.randrange(1, 60_000))


class Scribbler:
    """Works in a mounted file system until the block ends; ``synced`` names what is durable.

    ``version`` is the newest durable one of ``config``, which is always replaced whole.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stopped = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scribbler")
        self.synced: list[str] = []
        self.version = 0

    def __enter__(self) -> Self:
        for name in ("kept", "loose"):
            (self._root / name).mkdir()
        (self._root / "hello").write_text(SHOWN)
        os.sync()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def wait_synced(self, more: int, timeout_s: float = 60) -> None:
        """Return once this many more files are durable."""
        with self._changed:
            goal = len(self.synced) + more
            done = self._changed.wait_for(
                lambda: self._error or len(self.synced) >= goal, timeout_s
            )
        assert done, f"{goal - len(self.synced)} files are still missing after {timeout_s} s"

    def _run(self) -> None:
        try:
            number = 0
            while not self._stopped:
                number += 1
                self._round(number)
        except BaseException as error:  # noqa: BLE001 - raised at the end of the block
            self._error = error
        with self._changed:
            self._changed.notify_all()

    def _round(self, number: int) -> None:
        loose = self._root / "loose"
        for part in range(3):
            (loose / f"{number:05}.{part}").write_bytes(content(f"loose{number}"))
        if number > 2:
            (loose / f"{number - 1:05}.0").rename(loose / f"renamed{number - 1}")
            (loose / f"{number - 1:05}.1").unlink()
            (loose / f"{number - 2:05}.2").unlink()
        self._durable(f"kept/{number:05}", content(f"kept/{number:05}"))
        if number % 4 == 0:
            self._durable("config.new", b"%d" % number)
            (self._root / "config.new").rename(self._root / "config")
            _sync(self._root)
            self.version = number
        with self._changed:
            self.synced.append(f"kept/{number:05}")
            self._changed.notify_all()

    def _durable(self, name: str, data: bytes) -> None:
        path = self._root / name
        path.write_bytes(data)
        _sync(path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Ledger:
    """What must be in each point: of all that was durable when it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[list[str], int]] = {}

    def ask(self, site: MountedSite, load: Scribbler) -> None:
        """Make a point in the middle of the writing."""
        known = (list(load.synced), load.version)
        point = site.json("point", "create", "web01", "--wait")["points"][0]
        assert point["stored"]
        self.asked[point["epoch"]] = known

    def before(self, epoch: int) -> tuple[list[str], int]:
        """Return what a point of this epoch holds at least."""
        earlier = [number for number in self.asked if number <= epoch]
        return self.asked[max(earlier)] if earlier else ([], 0)


def epoch_of(image: Path) -> int:
    """Return the epoch that the point's own description gives."""
    return int(json.loads((image.parent / "point.json").read_text())["epoch"])


@contextmanager
def written(site: MountedSite, kind: str, root: Path) -> Iterator[Ledger]:
    """Write to a file system on the live disk while points are made; it is still mounted then."""
    ledger = Ledger()
    site.add_image("web01", SIZE)
    site.init().mount()
    site.wait_shipped("web01")
    with file_system(kind, site.image("web01"), root) as top:
        with Scribbler(top) as load:
            for _ in range(ASKED):
                load.wait_synced(10)
                ledger.ask(site, load)
            load.wait_synced(20)
        site.wait_shipped("web01")
        yield ledger


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_mounts_checks_clean_and_has_what_was_synced(tmp_path: Path, kind: str) -> None:
    with (
        MountedSite(tmp_path, options=FAST) as site,
        written(site, kind, tmp_path / "fs") as ledger,
    ):
        images = {epoch_of(image): image for image in site.point_images("web01")}
        assert set(ledger.asked) <= set(images)
        first = min(ledger.asked)
        by_interval = [epoch for epoch in images if epoch > first and epoch not in ledger.asked]
        assert by_interval, "the interval made no point while the disk was written"
        middle = by_interval[len(by_interval) // 2]
        chosen = sorted({*ledger.asked, middle, by_interval[-1]})
        assert len(chosen) >= 3
        for epoch in chosen:
            names, version = ledger.before(epoch)

            def look(root: Path, names: list[str] = names, version: int = version) -> None:
                for name in names:
                    assert (root / name).read_bytes() == content(name), name
                if version:
                    assert int((root / "config").read_bytes()) >= version

            found = check_point(kind, images[epoch], tmp_path / "check", look)
            assert "hello" in found
        print(f"{kind}: points {chosen} of {len(images)}; {len(names)} files in the last")


def test_a_point_is_mounted_where_it_lies_and_nobody_writes_to_it(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        live = make_image(site.source / "web01.img", 64 << 20)
        make_fs("ext4", live)
        site.init().mount()
        site.wait_shipped("web01")
        with (
            attached(site.image("web01")) as device,
            mounted(device, tmp_path / "fs", kind="ext4") as root,
        ):
            (root / "hello").write_text(SHOWN)
            os.sync()
            site.json("point", "create", "web01", "--wait")
            point = site.point_images("web01")[-1]
            options = ["ro", "noload"]
            with (
                attached(point, read_only=True, direct=False) as frozen,
                mounted(frozen, tmp_path / "at", kind="ext4", options=options) as at,
            ):
                (root / "hello").write_text("something newer\n")
                os.sync()
                assert (at / "hello").read_text() == SHOWN
            check_read_only(point)


def check_read_only(point: Path) -> None:
    """Prove that neither the point nor its directory can be changed, by root either."""
    refused = [
        lambda: os.close(os.open(point, os.O_RDWR)),
        lambda: os.close(os.open(point, os.O_WRONLY | os.O_TRUNC)),
        lambda: os.truncate(point, 0),
        lambda: point.chmod(0o600),
        point.unlink,
        lambda: point.rename(point.with_name("other.img")),
        lambda: (point.parent / "new").write_bytes(b"x"),
        point.parent.rmdir,
    ]
    for number, act in enumerate(refused):
        with pytest.raises(OSError, match="Read-only") as caught:
            act()
        assert caught.value.errno == errno.EROFS, number
