"""What a guest does to its disk, to be done to an image and to plain bytes alike."""

from __future__ import annotations

import dataclasses
import random

from vdiskfs.native import Image
from vdiskfs.units import PAGE_SIZE

MAX_SIZE = 96 * PAGE_SIZE
PUNCH = 0x02 | 0x01
ZERO_RANGE = 0x10
KEEP_SIZE = 0x01
KINDS = ("write", "write", "write", "punch", "zero", "allocate", "resize")


@dataclasses.dataclass(frozen=True)
class Change:
    """One change that a guest makes; ``kind`` is write, punch, zero, allocate or resize."""

    kind: str
    offset: int
    length: int
    seed: int

    def apply(self, image: Image, data: bytearray) -> None:
        """Do it to the image, then to the bytes."""
        self.apply_image(image)
        self.apply_bytes(data)

    @property
    def _length(self) -> int:
        return min(self.length, MAX_SIZE - self.offset)

    @property
    def _keeps_size(self) -> bool:
        return self.kind == "punch" or bool(self.seed % 2)

    def _data(self) -> bytes:
        return random.Random(self.seed).randbytes(self._length)

    def apply_image(self, image: Image) -> None:
        """Do it to the image."""
        if self.kind == "resize":
            image.truncate(self.offset)
        elif self.kind == "write":
            image.write(self.offset, self._data())
        elif self.kind == "allocate":
            image.allocate(0, self.offset, self._length)
        elif self.kind == "punch":
            image.allocate(PUNCH, self.offset, self._length)
        else:
            mode = ZERO_RANGE | (KEEP_SIZE if self._keeps_size else 0)
            image.allocate(mode, self.offset, self._length)

    def apply_bytes(self, data: bytearray) -> None:
        """Do it to the bytes."""
        offset, end = self.offset, self.offset + self._length
        if self.kind == "resize":
            del data[offset:]
            data.extend(bytes(offset - len(data)))
        elif self.kind == "write":
            data.extend(bytes(max(0, offset - len(data))))
            data[offset:end] = self._data()
        else:
            if self.kind == "allocate" or not self._keeps_size:
                data.extend(bytes(max(0, end - len(data))))
            inside = min(end, len(data))
            if self.kind != "allocate" and offset < inside:
                data[offset:inside] = bytes(inside - offset)


def random_changes(seed: int, count: int) -> list[Change]:
    """Return changes by chance, the same for the same seed."""
    rng = random.Random(seed)
    return [
        Change(
            rng.choice(KINDS),
            rng.choice([rng.randrange(MAX_SIZE), rng.randrange(96) * PAGE_SIZE]),
            rng.choice([rng.randint(1, 40_000), 1, 512, PAGE_SIZE, 16 * PAGE_SIZE]),
            rng.randrange(1 << 16),
        )
        for _ in range(count)
    ]
