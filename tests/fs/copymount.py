"""A mount whose `copy.img` is a writable copy, and a vault that answers when it is told to.

    python tests/fs/copymount.py SOURCE MOUNTPOINT PRESENCE

Prints `ready`, and `want OFFSET LENGTH` for each event; a line on its standard input answers
all that came until then and what they lead to, another one makes the vault go away again.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pyfuse3
import trio

from tests.fs.harness import PlainHooks, PlainPoints
from vdiskfs import native
from vdiskfs.fs import MAX_TASKS, OPTIONS, Operations
from vdiskfs.tree import Namespace, SourceFile, open_source
from vdiskfs.units import PAGE_SIZE, PAGES_PER_REGION

PAGES = 64
COOKIE = 4711


def base_page(number: int) -> bytes:
    """What the base holds; every fourth page is zero."""
    return bytes(PAGE_SIZE) if number % 4 == 0 else bytes([number]) * PAGE_SIZE


class CopyHooks(PlainHooks):
    """`copy.img` is a copy, opened once."""

    def __init__(self, core: native.Core, presence: str) -> None:
        super().__init__(core)
        self._presence = presence
        self.copy: native.Image | None = None

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        if self.copy is None:
            fd, _ = file.open_file(writable=True)
            flags = native.ImageFlags.DIRECT | native.ImageFlags.LAZY
            self.copy = native.Image(self._core, fd, flags, COOKIE)
            os.close(fd)
            native.open_presence(self.copy, self._presence, host_lived=True)
        return self.copy

    async def closed_last(self, file: SourceFile) -> None:
        """It stays open."""


class Vault:
    """Answers events while it is there."""

    def __init__(self, core: native.Core, hooks: CopyHooks) -> None:
        self._core = core
        self._hooks = hooks
        self._waiting: list[native.Event] = []
        self._away = True

    async def serve(self, scope: trio.CancelScope) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._core.event_fd)
            os.eventfd_read(self._core.event_fd)
            while (event := self._core.next_event()) is not None:
                if event.kind is native.EventKind.ENDED:
                    scope.cancel()
                    return
                print("want", event.offset, event.length, flush=True)
                self._waiting.append(event)
            await self._answer()

    async def listen(self) -> None:
        async with trio.open_nursery() as nursery:
            while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                self._away = not self._away
                nursery.start_soon(self._answer)

    async def _answer(self) -> None:
        image = self._hooks.copy
        while self._waiting and not self._away:
            event = self._waiting.pop(0)
            assert image is not None
            image.map(0, 1, np.arange(PAGES_PER_REGION) % 4 != 0)
            if event.kind is native.EventKind.WANT:
                first = event.offset // PAGE_SIZE
                end = -(-(event.offset + event.length) // PAGE_SIZE)
                data = b"".join(base_page(number) for number in range(first, end))
                image.fill(first * PAGE_SIZE, data)
            await trio.to_thread.run_sync(image.answer, event.offset, event.length)


async def serve(source: int, connection: int, presence: str) -> None:
    core = native.Core(connection, 2, native.CoreFlags.NONE)
    hooks = CopyHooks(core, presence)
    namespace = Namespace(core, source, hooks, PlainPoints(core))
    assert namespace.disks is not None
    namespace.disks.scan(lambda path: False)
    pyfuse3.init(Operations(namespace), f"/dev/fd/{core.names_fd}", set(OPTIONS))
    core.start()
    print("ready", flush=True)
    vault = Vault(core, hooks)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vault.serve, nursery.cancel_scope)
        nursery.start_soon(vault.listen)
        await pyfuse3.main(max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()


def main() -> None:
    source, mountpoint, presence = sys.argv[1:]
    os.umask(0o077)
    connection = native.mount(mountpoint, "vdiskfs")
    trio.run(serve, open_source(source), connection, presence)


if __name__ == "__main__":
    main()
