"""What is shown of a disk while it is ended: it is listed still."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.onedisk import OneDisk, opened
from vdiskfs.image import LiveImage
from vdiskfs.monitor import disk_document
from vdiskfs.units import PAGE_SIZE


async def test_a_disk_is_shown_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    await OneDisk(tmp_path).init(1 << 20)
    async with opened(tmp_path) as one:
        await one.ship()
        one.image.write(0, bytes(PAGE_SIZE))
        disk, close = one.disk, LiveImage.close

        def closed(live: LiveImage) -> None:
            close(live)
            shown.append(disk_document(disk)["dirty_bytes"])

        monkeypatch.setattr(LiveImage, "close", closed)
        await one.stop()
    assert shown == [PAGE_SIZE]
