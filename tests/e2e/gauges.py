"""What tests measure and compare: objects of a folder vault, the daemon's time and memory, files.

Nothing here starts or stops anything.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vdiskfs.units import PAGE_SIZE

_SCHEDULED = 2  # of the clocks of a process: what the scheduler gave it, in nanoseconds
_WORK = ".vdiskfs"  # the folder store's place for what is no object yet


class Stored(NamedTuple):
    """One object of a folder vault."""

    size: int
    modified_ns: int


def vault_objects(vault: Path) -> dict[str, Stored]:
    """Return all objects of a folder vault by name."""
    found = {}
    for directory, folders, names in os.walk(vault):
        folders[:] = [name for name in folders if name != _WORK]
        for name in names:
            path = Path(directory) / name
            status = path.stat()
            found[str(path.relative_to(vault))] = Stored(status.st_size, status.st_mtime_ns)
    return found


def data_objects(vault: Path) -> dict[str, Stored]:
    """Return the deltas, joined deltas and segments: what replication stores."""
    return {
        name: stored
        for name, stored in vault_objects(vault).items()
        if name.startswith(("disks/", "segments/")) and not name.endswith("/disk.json")
    }


def added(before: dict[str, Stored], after: dict[str, Stored]) -> dict[str, Stored]:
    """Return the objects that are new."""
    return {name: stored for name, stored in after.items() if name not in before}


def total(objects: dict[str, Stored]) -> int:
    """Return the sum of the sizes."""
    return sum(stored.size for stored in objects.values())


def processor_s(pid: int) -> float:
    """Return the processor time of a process so far, in seconds: user and system."""
    return time.clock_gettime((~pid << 3) | _SCHEDULED)


def resident_bytes(pid: int, key: str = "VmRSS") -> int:
    """Return the resident memory of a process; ``VmHWM`` is the most that it ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} of process {pid}")


def read_bytes(pid: int) -> int:
    """Return how many bytes a process has read so far: by its calls, or from disks if that is more."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    counts = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return max(counts["rchar"], counts["read_bytes"])


def overwrite_pages(image: Path, count: int, seed: int) -> None:
    """Write distinct random pages of an image, each with bytes that do not compress."""
    choice = random.Random(seed)
    with image.open("r+b", buffering=0) as file:
        pages = os.fstat(file.fileno()).st_size // PAGE_SIZE
        for pageno in choice.sample(range(pages), count):
            os.pwrite(file.fileno(), choice.randbytes(PAGE_SIZE), pageno * PAGE_SIZE)


def write_at(image: Path, offset: int, data: bytes) -> None:
    """Write into an image that is there."""
    with image.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, offset) == len(data)


def assert_same(one: Path, other: Path) -> None:
    """Fail where two files differ, in size or at any byte."""
    done = subprocess.run(["cmp", one, other], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def digest(path: Path) -> str:
    """Return a digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def digests(points: Iterable[Path]) -> dict[str, str]:
    """Return what points hold, by the names of their directories."""
    return {image.parent.name: digest(image) for image in points}
