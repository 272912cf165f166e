"""An image on its way between the points of a disk with several lines."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.catalog.lines import Lines, Place, differing, lines
from tests.delta.model import PAGE
from vdiskfs.catalog import DiskLog
from vdiskfs.homeward import HomeMover, prepare_home, read_home


class Home:
    """A directory with an image and its note."""

    def __init__(self, test: Lines, directory: Path) -> None:
        self.test = test
        self.image = directory / "image"
        self.notes = directory / "note"

    def begin(self, at: Place | None, data: bytes) -> None:
        """Put the image there; ``at`` says which point it is, or that nobody knows."""
        self.image.write_bytes(data.rstrip(b"\0"))
        os.truncate(self.image, len(data))
        prepare_home(self.notes, self.test.bench.record.id, at)

    async def log(self, generation: int) -> DiskLog:
        """Open a generation."""
        return self.test.log(generation)

    def mover(self, **options: Any) -> HomeMover:
        """Return what the next process would have."""
        return HomeMover(self.image, self.notes, self.log, **options)

    def assert_is(self, place: Place) -> None:
        """Check every byte, and what the note says."""
        assert read_home(self.notes).at == place
        assert self.image.read_bytes() == self.test.states[place]

    def assert_note_holds(self) -> None:
        """Check what a note promises of an image on its way."""
        note = read_home(self.notes)
        if not note.path:
            return
        states = [self.test.states[place] for place in note.path]
        loose = {
            page
            for one, two in zip(states, states[1:], strict=False)
            for page in differing(one, two)
        }
        wrong = set(differing(self.image.read_bytes(), states[0])) - loose
        assert not {page for page in wrong if note.known is None or page < note.known}

    def allocated(self) -> int:
        """Return the bytes that the image takes."""
        return self.image.stat().st_blocks * 512


@asynccontextmanager
async def home(directory: Path) -> AsyncIterator[Home]:
    """Give a disk without points, and a place for an image."""
    (directory / "spools").mkdir()
    async with lines(directory / "spools") as test:
        yield Home(test, directory)


def page_of(number: int) -> bytes:
    """Return a page that no other is."""
    return number.to_bytes(8, "little") * (PAGE // 8)
