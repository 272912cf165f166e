"""A mount whose `copy.img` is a writable copy of a point, completed in the background.

    python tests/hydration/hydratemount.py SOURCE MOUNTPOINT COPY VAULT DISK EPOCH SIZE LIMIT

SOURCE/copy.img is a link to COPY/image. A line on its standard input cuts the vault off, or
brings it back, and is answered by `cut` or `back`; `complete` is printed when all is here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyfuse3
import trio

from tests.fs.harness import PlainHooks, PlainPoints
from tests.vaults import given
from vdiskfs import native
from vdiskfs.catalog import Vault
from vdiskfs.errors import VaultUnreachableError
from vdiskfs.failover.background import BackgroundHydration
from vdiskfs.failover.copy import WritableCopy
from vdiskfs.failover.record import Member
from vdiskfs.fs import MAX_TASKS, OPTIONS, Operations
from vdiskfs.point import PointReader
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.store.local import LocalStore
from vdiskfs.tree import Namespace, SourceFile, open_source


class CutStore(LocalStore):
    """A folder that can be cut off."""

    cut = False

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        if self.cut:
            raise VaultUnreachableError("cut off")
        return await super().read_range(name, offset, length)


class CopyHooks(PlainHooks):
    """`copy.img` is the copy."""

    def __init__(self, core: native.Core) -> None:
        super().__init__(core)
        self.copy: WritableCopy | None = None

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        assert self.copy is not None
        return self.copy.image

    async def closed_last(self, file: SourceFile) -> None:
        """It stays open."""


async def answer_events(core: native.Core, copy: WritableCopy, nursery: trio.Nursery) -> None:
    while True:
        await trio.lowlevel.wait_readable(core.event_fd)
        os.eventfd_read(core.event_fd)
        while (event := core.next_event()) is not None:
            if event.kind is native.EventKind.ENDED:
                nursery.cancel_scope.cancel()
                return
            nursery.start_soon(copy.answer, event)


async def listen(store: CutStore) -> None:
    while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
        store.cut = not store.cut
        print("cut" if store.cut else "back", flush=True)


async def complete(copy: WritableCopy, limit: int) -> None:
    task = BackgroundHydration(copy, RateLimiter(limit))
    await task.run()
    assert task.progress().done
    print("complete", flush=True)


async def serve(source: int, connection: int, arguments: list[str]) -> None:
    place, folder, disk, epoch, size, limit = arguments
    store = CutStore(Path(folder))
    core = native.Core(connection, 2, native.CoreFlags.NONE)
    hooks = CopyHooks(core)

    async def read() -> PointReader:
        vault = await Vault.open(store, given())
        return await vault.log(await vault.disk(disk)).open(int(epoch))

    async def is_away() -> bool:
        return store.cut

    member = Member("web01", disk, "web01.img", 1, int(epoch), 0, int(size))
    hooks.copy = WritableCopy(core, Path(place), member, 7, read, is_away=is_away, boot_id="boot")
    namespace = Namespace(core, source, hooks, PlainPoints(core))
    assert namespace.disks is not None
    namespace.disks.scan(lambda path: False)
    pyfuse3.init(Operations(namespace), f"/dev/fd/{core.names_fd}", set(OPTIONS))
    core.start()
    print("ready", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_events, core, hooks.copy, nursery)
        nursery.start_soon(listen, store)
        nursery.start_soon(complete, hooks.copy, int(limit))
        await pyfuse3.main(max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()


def main() -> None:
    source, mountpoint, *arguments = sys.argv[1:]
    os.umask(0o077)
    connection = native.mount(mountpoint, "vdiskfs")
    trio.run(serve, open_source(source), connection, arguments)


if __name__ == "__main__":
    main()
