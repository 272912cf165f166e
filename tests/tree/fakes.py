"""A data plane and hooks that write down what they are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import trio

from vdiskfs import native
from vdiskfs.tree import Disks, Nodes, SourceFile, open_source


class FakeCore:
    """Which image is attached to which node."""

    def __init__(self) -> None:
        self.attached: dict[int, object] = {}

    def attach(self, nodeid: int, image: object) -> None:
        self.attached[nodeid] = image

    def detach(self, nodeid: int) -> None:
        self.attached.pop(nodeid, None)


class FakeImage:
    """An image that can only be truncated, by path."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def truncate(self, size: int) -> None:
        os.truncate(self._file.proc_path, size)


class FakeHooks:
    """Writes down each call; fails where it is told to."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.fails: dict[str, Exception] = {}

    async def _tell(self, name: str, *words: str) -> None:
        await trio.lowlevel.checkpoint()
        if name in self.fails:
            raise self.fails[name]
        self.told.append(" ".join([name, *words]))

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        await self._tell("image", file.path, "rw" if writable else "ro")
        return cast("native.Image", FakeImage(file))

    async def closed_last(self, file: SourceFile) -> None:
        await self._tell("closed", file.path)

    async def created(self, file: SourceFile) -> None:
        await self._tell("created", file.path)

    async def linked(self, file: SourceFile, path: str) -> None:
        await self._tell("linked", path)

    async def unlinked(self, file: SourceFile, path: str, *, last: bool) -> None:
        await self._tell("unlinked", path, str(last))

    async def replaced(self, file: SourceFile, path: str, *, last: bool) -> None:
        await self._tell("replaced", path, str(last))

    async def renamed(self, file: SourceFile, old_path: str, new_path: str) -> None:
        await self._tell("renamed", old_path, new_path)

    async def directory_renamed(self, old_path: str, new_path: str) -> None:
        await self._tell("directory", old_path, new_path)


class FakeMount:
    """A source directory with its tree, and no kernel."""

    def __init__(self, path: Path, *, descriptors: int = 100) -> None:
        self.path = path
        self.core = FakeCore()
        self.hooks = FakeHooks()
        self.nodes = Nodes()
        core = cast("native.Core", self.core)
        fd = open_source(str(path))
        self.disks = Disks(self.nodes, core, self.hooks, fd, descriptors=descriptors)
        self.root = self.disks.root
        self.root.pins += 1

    async def close(self) -> None:
        """Drop everything, and see that nothing is left open."""
        await self.nodes.forget_all()
        self.disks.close()
        assert self.disks.open_descriptors == 0
        assert not self.core.attached
