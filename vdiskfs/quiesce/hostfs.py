"""File systems that are mounted on this host from a disk's image: found, frozen, thawed.

The image is attached to a loop device; what is mounted from that, from its partitions, or from
what is made of them (device mapper), is frozen. In the holder only: it asks the mount for
the image, and may wait for a daemon that is just being replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vdiskfs.quiesce.agentline import QuiesceError

_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_BLOCK = Path("/sys/block")


class HostFileSystem:
    """One mounted file system, held by a descriptor of its root."""

    def __init__(self, mountpoint: str) -> None:
        """Open it.

        Raises:
            QuiesceError: that cannot be.
        """
        self.name = f"file system at {mountpoint}"
        try:
            self._fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise QuiesceError(f"{self.name}: {error.strerror}") from None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._begun = self._frozen = self._unwanted = False

    def prepare(self) -> None:
        """Nothing is left to be found out."""

    def freeze(self, deadline: float) -> None:
        """Freeze it: what is dirty is written first, its log is emptied.

        Raises:
            QuiesceError: it cannot be frozen, or was not in time; then `insist`.
        """
        self._begun = True
        failed: list[OSError] = []
        # The call cannot be interrupted: it waits for the disk, which is ours to serve.
        thread = threading.Thread(target=self._freeze, args=(failed,), daemon=True)
        thread.start()
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            raise QuiesceError(f"{self.name}: not frozen in time")
        if failed:
            said = failed[0]
            why = "somebody else froze it" if said.errno == errno.EBUSY else said.strerror
            raise QuiesceError(f"{self.name}: {why}")

    def _freeze(self, failed: list[OSError]) -> None:
        try:
            fcntl.ioctl(self._fd, _FIFREEZE, 0)
        except OSError as error:
            failed.append(error)
        else:
            with self._lock:
                self._frozen = True
                unwanted = self._unwanted
            if unwanted:
                self._thaw()
        self._done.set()

    def thaw(self, deadline: float) -> bool:
        """Thaw it; False: somebody else had.

        Raises:
            QuiesceError: the disk did not take what thawing writes, or not in time.
        """
        done: list[bool | OSError] = []

        def run() -> None:
            try:
                done.append(self._thaw())
            except OSError as error:
                done.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        if not done:
            raise QuiesceError(f"{self.name}: not thawed in time")
        if isinstance(done[0], OSError):
            raise QuiesceError(f"{self.name}: cannot be thawed: {done[0].strerror}")
        return done[0]

    def insist(self, until: float) -> None:
        """Have it thawed, also when it is still being frozen.

        Raises:
            QuiesceError: it is not done by then.
        """
        with self._lock:
            self._unwanted = True
            frozen = self._frozen
        if not self._begun:
            return
        if frozen:
            self.thaw(until)
        elif not self._done.wait(max(0.0, until - time.monotonic())):
            raise QuiesceError(f"{self.name}: it is still being frozen")

    def _thaw(self) -> bool:
        try:
            fcntl.ioctl(self._fd, _FITHAW, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is not frozen
                raise
            return False
        return True

    def close(self) -> None:
        """Let go of it; not while a thread is in a call."""
        if self._done.is_set() or not self._begun:
            os.close(self._fd)


def mounted_from(images: Sequence[str]) -> list[str]:
    """Return where file systems of an image are mounted on this host, each once.

    Args:
        images: the paths that the image may have; of those that are not there nothing is said.
    """
    wanted = []
    for image in images:
        with contextlib.suppress(OSError):
            wanted.append(os.stat(image))  # noqa: PTH116 (compared with os.path.samestat)
    devices = {
        device
        for loop in sorted(_BLOCK.glob("loop[0-9]*"))
        if _is_over(loop, wanted)
        for device in _devices(loop)
    }
    if not devices:
        return []
    places: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, more = line.partition(" - ")
        number, place = fields.split()[2], _unescaped(fields.split()[4])
        source = _unescaped(more.split()[1])
        if number in devices or _number_of(source) in devices:
            places.setdefault(number, place)
    return list(places.values())


def _is_over(loop: Path, wanted: Sequence[os.stat_result]) -> bool:
    try:
        backing = os.fsdecode((loop / "loop/backing_file").read_bytes().removesuffix(b"\n"))
        found = os.stat(backing)  # noqa: PTH116
    except OSError:
        return False  # it is detached, or its file has another name now
    return any(os.path.samestat(found, one) for one in wanted)


def _devices(block: Path) -> Iterator[str]:
    """Yield MAJOR:MINOR of a block device, its partitions, and all that is made of them."""
    with contextlib.suppress(OSError):
        yield (block / "dev").read_text().strip()
        for part in block.glob(f"{block.name}p[0-9]*"):
            yield from _devices(part)
        for holder in (block / "holders").iterdir():
            yield from _devices(holder.resolve())


def _number_of(source: str) -> str:
    """Return MAJOR:MINOR of what was mounted: btrfs has a number of its own in the list."""
    if not source.startswith("/dev/"):
        return ""
    try:
        device = os.stat(source).st_rdev  # noqa: PTH116
    except OSError:
        return ""
    return f"{os.major(device)}:{os.minor(device)}"


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda hit: chr(int(hit[1], 8)), text)
