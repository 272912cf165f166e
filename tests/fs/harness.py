"""A mount in a process of its own: the source passed through, images untracked.

As a module, the plain parts (hooks that give untracked images, a point source from a
list). As a program, the daemon of a test mount:

    python tests/fs/harness.py SOURCE MOUNTPOINT [--allow-other] [--events FILE]

It prints `ready` when it serves, and ends when its standard input ends or the mount is gone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pyfuse3
import trio

from vdiskfs import native
from vdiskfs.fs import MAX_TASKS, OPTIONS, Operations
from vdiskfs.tree import (
    Access,
    DiskName,
    Namespace,
    OpenPoint,
    PointFacts,
    PointKind,
    PointRef,
    SourceFile,
    open_source,
)
from vdiskfs.units import NS, format_time, parse_time

FIRST_NS = 1_795_225_205_000_000_000  # 2026-11-21T01:40:05Z


class PlainHooks:
    """Untracked images, closed with the last handle. Writes what it is told, a line each."""

    def __init__(self, core: native.Core, events: TextIO | None = None) -> None:
        self._core = core
        self._events = events
        self._images: dict[SourceFile, native.Image] = {}

    def _tell(self, *words: object) -> None:
        if self._events is not None:
            print(*words, file=self._events, flush=True)

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        fd, is_writable = file.open_file(writable=writable)
        flags = native.ImageFlags.DIRECT
        if not is_writable:
            flags |= native.ImageFlags.READONLY
        try:
            image = native.Image(self._core, fd, flags, file.id)
        finally:
            os.close(fd)
        before = self._images.pop(file, None)
        if before is not None:
            before.close()
        self._images[file] = image
        return image

    async def closed_last(self, file: SourceFile) -> None:
        self._images.pop(file).close()
        self._tell("closed", file.path)

    async def created(self, file: SourceFile) -> None:
        if file.path.endswith("trap"):
            raise RuntimeError("a bug of ours")
        self._tell("created", file.path)

    async def linked(self, file: SourceFile, path: str) -> None:
        self._tell("linked", path)

    async def unlinked(self, file: SourceFile, path: str, *, last: bool) -> None:
        self._tell("unlinked", path, "last" if last else "linked")

    async def replaced(self, file: SourceFile, path: str, *, last: bool) -> None:
        self._tell("replaced", path, "last" if last else "linked")

    async def renamed(self, file: SourceFile, old_path: str, new_path: str) -> None:
        self._tell("renamed", old_path, new_path)

    async def directory_renamed(self, old_path: str, new_path: str) -> None:
        self._tell("directory", old_path, new_path)


class PlainPoint:
    """A point whose bytes are all here."""

    def __init__(self, image: native.Image) -> None:
        self._image = image

    @property
    def image(self) -> native.Image:
        return self._image


class PlainPoints:
    """Points of one disk, `web01`: one each `step_ns`, holding their own number as text."""

    def __init__(self, core: native.Core, count: int = 0, step_ns: int = NS) -> None:
        self.core = core
        self.all = [PointRef(FIRST_NS + i * step_ns, i + 1, 1) for i in range(count)]
        self.live: SourceFile | None = None
        self.asked: list[str] = []
        self.text = b'{"epoch": 1}\n'
        self.file = "images/web01.img"

    async def disks(self) -> Sequence[DiskName]:
        self.asked.append("disks")
        return [DiskName("web01", self.file)]

    async def days(self, disk: str) -> Sequence[str]:
        self.asked.append("days")
        return sorted({f"{_iso(point)[:10]}" for point in self.all})

    async def points(self, disk: str, since_ns: int, until_ns: int) -> Sequence[PointRef]:
        self.asked.append("points")
        return [point for point in self.all if since_ns <= point.time_ns < until_ns]

    async def latest(self, disk: str, kind: PointKind) -> PointRef | None:
        self.asked.append("latest")
        return self.all[-1] if self.all and kind != "proven" else None

    async def find(self, disk: str, text: str) -> PointRef | None:
        self.asked.append("find")
        until_ns = parse_time(text, FIRST_NS + 3600 * NS)
        found = [point for point in self.all if point.time_ns <= until_ns]
        return found[-1] if found else None

    async def describe(self, disk: str, point: PointRef) -> PointFacts:
        self.asked.append("describe")
        return PointFacts(1 << 20, self.text)

    async def open_point(self, disk: str, point: PointRef) -> OpenPoint:
        self.asked.append("open")
        fd = os.memfd_create("point")
        os.write(fd, str(point.epoch).encode())
        os.ftruncate(fd, 1 << 20)
        flags = native.ImageFlags.READONLY | native.ImageFlags.KEEP_CACHE
        image = native.Image(self.core, fd, flags, 1)
        os.close(fd)
        return PlainPoint(image)

    async def close_point(self, opened: OpenPoint) -> None:
        self.asked.append("close")
        opened.image.close()

    def access(self, disk: str) -> Access | None:
        return None if self.live is None else self.live.access()


def _iso(point: PointRef) -> str:
    return format_time(point.time_ns)


class Mount:
    """A test mount: this file as a program, its source and its mountpoint."""

    def __init__(
        self, directory: Path, *, options: Sequence[str] = (), before: Sequence[str] = ()
    ) -> None:
        """Mount below an existing directory; ``before`` is put before the command (setpriv)."""
        self.source = directory / "source"
        self.path = directory / "mnt"
        self.events = directory / "events"
        self.log = directory / "log"
        for made in (self.source, self.path):
            made.mkdir(exist_ok=True)
        command = [
            *before, sys.executable, __file__, str(self.source), str(self.path),
            "--events", str(self.events), *options,
        ]  # fmt: skip
        root = Path(__file__).parents[2]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": str(root)}, cwd="/",
            )  # fmt: skip
        self.disks = self.path / "disks"
        self.points = self.path / "recovery-points"

    def wait_ready(self) -> Mount:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", self.log.read_text()
        return self

    def heard(self) -> list[str]:
        """What the hooks were told so far."""
        return self.events.read_text().splitlines()

    def close(self, *, by: Sequence[str] = ("umount",)) -> str:
        """Unmount; return what the daemon said at its end and what it logged."""
        subprocess.run([*by, str(self.path)], check=True, timeout=20)
        said, _ = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, self.log.read_text()
        return said + self.log.read_text()

    def abort(self) -> None:
        """End it whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        if os.path.ismount(self.path):
            subprocess.run(["umount", "-l", str(self.path)], check=False)


async def _serve(source: int, connection: int, points: int, events: TextIO | None) -> None:
    core = native.Core(connection, 4, native.CoreFlags.ALLOW_MMAP)
    given = PlainPoints(core, points)
    namespace = Namespace(core, source, PlainHooks(core, events), given)
    assert namespace.disks is not None
    live = namespace.disks.scan(lambda path: path == "web01.img")
    given.live = live[0] if live else None
    pyfuse3.init(Operations(namespace), f"/dev/fd/{core.names_fd}", set(OPTIONS))
    core.start()
    print("ready", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_ended, core, nursery.cancel_scope)
        nursery.start_soon(_until_told, nursery.cancel_scope)
        await pyfuse3.main(max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=False)
    for file in live:
        file.drop()
    descriptors = namespace.disks.open_descriptors
    await namespace.close()
    print("descriptors", namespace.disks.open_descriptors, "of", descriptors, flush=True)
    core.close()


async def _until_told(scope: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(sys.stdin)
    scope.cancel()


async def _until_ended(core: native.Core, scope: trio.CancelScope) -> None:
    while True:
        await trio.lowlevel.wait_readable(core.event_fd)
        os.eventfd_read(core.event_fd)
        while (event := core.next_event()) is not None:
            if event.kind == native.EventKind.ENDED:
                scope.cancel()
                return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("mountpoint")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--events")
    parser.add_argument("--points", type=int, default=0)
    options = parser.parse_args()
    os.umask(0o077)
    source = open_source(options.source)
    flags = native.MountFlags.ALLOW_OTHER if options.allow_other else native.MountFlags.NONE
    connection = native.mount(options.mountpoint, "vdiskfs", flags)
    where = Path(options.events or os.devnull)
    with where.open("w", errors="surrogateescape") as events:
        trio.run(_serve, source, connection, options.points, events)


if __name__ == "__main__":
    main()
