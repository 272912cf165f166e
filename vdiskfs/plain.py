"""A mount served plainly: guests' reads, writes and names, and nothing else.

    python -m vdiskfs.plain --settings-fd N

The keeper starts it where daemons die again and again, so that what kills them costs no guest
its disk. It takes the connection over as a daemon does. It asks no vault, opens no bitmaps and
seals nothing: before it answers anything it notes durably that nothing is known of any page
of any disk, so that the next daemon compares all of them. Recovery points wait, or are refused.

It hands over to a daemon when it is told to (``vdiskfs upgrade``), and after a time by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from vdiskfs import native
from vdiskfs.config import MountSettings
from vdiskfs.errors import StateError
from vdiskfs.failoverapi import Failovers
from vdiskfs.fdstore import FdStore, take_descriptors
from vdiskfs.jobapi import Jobs
from vdiskfs.keeper import PLAIN
from vdiskfs.monitor import plain_document
from vdiskfs.native import CoreFlags, EventKind
from vdiskfs.plaintree import NoFailovers, NoPoints, PlainDisks
from vdiskfs.quiesce.undoing import undo_all
from vdiskfs.ready import Ready, describe_failure, report_failure
from vdiskfs.registry import remove_entry
from vdiskfs.repairapi import Repairs
from vdiskfs.serving import Serving, begin_process, keep_running, leave
from vdiskfs.state import DiskRecord, StateDirectory
from vdiskfs.takeover import Kept, serve_node, take_over
from vdiskfs.tree import Handover, Namespace, Nodes
from vdiskfs.untracked import UntrackedImages

if TYPE_CHECKING:
    from vdiskfs.watching import Watching

log = logging.getLogger(__name__)

Document = Mapping[str, object]


class PlainMount:
    """One mount, from a predecessor to a successor or to its end."""

    def __init__(self, settings: MountSettings, reason: str, again_s: float) -> None:
        """Prepare; ``again_s`` is after how many seconds a daemon is tried again."""
        self._settings = settings
        self._reason = reason
        self._again_at = time.monotonic() + again_s
        self._store = FdStore.take()
        self._fds = take_descriptors()
        self._serving = Serving(settings, self._store)

    async def run(self, ready: Ready) -> None:
        """Serve until the mount is ended, or handed over.

        Raises:
            VdiskfsError: this host cannot; nothing is answered, and a successor may try.
        """
        kept = take_over(self._fds, self._store)
        if kept is None:
            remove_entry(self._settings.mountpoint)  # ended meanwhile
            return
        self._serving.is_kept = True
        self._serving.is_over = self._settings.over
        try:
            await self._serve(kept, ready)
        except BaseException as failure:
            if not self._serving.ended.is_set():
                log.critical("the plain daemon failed", exc_info=failure)
                self.tell_failure(failure)
                leave(1)
            raise
        remove_entry(self._settings.mountpoint)

    def tell_failure(self, failure: BaseException) -> None:
        """Tell who keeps the mount why this daemon ends."""
        if self._store is not None:
            self._store.failed(describe_failure(failure))

    async def _serve(self, kept: Kept, ready: Ready) -> None:
        settings, options = self._settings, self._settings.options
        state = await trio.to_thread.run_sync(StateDirectory.open, Path(settings.state))
        await trio.to_thread.run_sync(state.distrust_all)  # before anything is answered
        log.error("%s: served plainly: disks are neither tracked nor replicated, and will be "
                  "compared; %s", settings.mountpoint, self._reason)  # fmt: skip
        flags = CoreFlags.ALLOW_MMAP if options.allow_mmap else CoreFlags.NONE
        watching = _watching(settings)
        core = native.Core(kept.connection, options.workers, flags)
        core.resume(kept.init)
        images = UntrackedImages(core, itertools.count(1).__next__)
        disks = PlainDisks(state, images, options)
        async with trio.open_nursery() as nursery:
            namespace = Namespace(
                core, kept.source, disks, NoPoints(), failovers=NoFailovers(),
                handover=Handover(self._store, self._fds),
            )  # fmt: skip
            if namespace.disks is not None:
                await trio.to_thread.run_sync(disks.load, namespace.disks)
            nursery.start_soon(_watch_core, core, namespace.nodes, nursery)
            self._serving.begin(core, namespace, nursery)
            nursery.start_soon(
                self._serving.serve_control, state.control,
                PlainControl(self, disks, core, watching),
            )  # fmt: skip
            await self._serving.announce(state)
            if self._store is not None:
                self._store.ready(f"{settings.mountpoint} is served plainly")
            ready.tell({"ok": True, "pid": os.getpid()})
            nursery.start_soon(self._try_again)
            thaw = partial(undo_all, state.path / "quiesce", partial(log.warning, "disk %s: %s"))
            nursery.start_soon(keep_running, "thawing", thaw)
            if watching is not None:
                tell = partial(self._tell, watching, disks.records)
                nursery.start_soon(keep_running, "telling of events", tell)
            await self._serving.ended.wait()
            await self._serving.wait_answered()
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            pyfuse3.close(unmount=False)
            await namespace.close()
            with contextlib.suppress(OSError):  # the guest's own syncs have told the guest
                await trio.to_thread.run_sync(images.sync)
            disks.close()
            core.stop()
            images.close()
            core.close()
        # No clean end is noted: the next start compares all anyhow.
        state.close()

    async def _tell(self, watching: Watching, records: Sequence[DiskRecord]) -> None:
        again = f"a daemon is tried again in {math.ceil(self.again_s)} s"
        names = ",".join(sorted(one.name for one in records))
        await watching.tell_plain(f"{self._reason}; {again}", names)

    async def _try_again(self) -> None:
        """Hand over to a daemon after a time."""
        await trio.sleep(self.again_s)
        with contextlib.suppress(StateError):
            await self._serving.hand_over()

    @property
    def again_s(self) -> float:
        """Seconds until a daemon is tried again."""
        return max(0.0, self._again_at - time.monotonic())

    def status(self, records: Sequence[DiskRecord]) -> Document:
        """Return the document of ``vdiskfs status --json``."""
        return plain_document(self._settings, records, self._reason, self.again_s)

    async def unmount(self, *, lazy: bool) -> Document:
        """End the mount."""
        await trio.to_thread.run_sync(self._serving.unmount, lazy)
        return {"unmounted": True, "spooled_bytes": None}

    async def hand_over(self) -> Document:
        """Let a daemon take the mount over."""
        return await self._serving.hand_over()


class PlainControl:
    """What the control socket offers meanwhile: `api.Control`."""

    def __init__(
        self, mount: PlainMount, disks: PlainDisks, core: native.Core, watching: Watching | None
    ) -> None:
        self._mount = mount
        self._watching = watching
        self._disks = disks
        self._core = core

    async def status(self) -> Document:
        """Return the document of ``vdiskfs status --json``."""
        document = self._mount.status(self._disks.records)
        return {**document, "requests": asdict(self._core.counts())}

    async def disks(self) -> Document:
        """Return the disks of this mount; those of others are not known."""
        return {"disks": (await self.status())["disks"], "vault_error": None}

    async def unmount(self, *, drain: bool, lazy: bool) -> Document:
        """End the mount; nothing can be shipped first."""
        if drain:
            raise _refused()
        return await self._mount.unmount(lazy=lazy)

    async def upgrade(self) -> Document:
        """Let a daemon take the mount over."""
        return await self._mount.hand_over()

    async def disk(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def protect(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def unprotect(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def retry(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def pause(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def resume(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def resync(self, name: str, *, now: bool, cancel: bool) -> Document:
        """Refuse."""
        raise _refused()

    async def points(self, name: str, since: str, until: str, limit: int | None) -> Document:
        """Refuse."""
        raise _refused()

    async def point(self, name: str, point: str) -> Document:
        """Refuse."""
        raise _refused()

    async def create_points(
        self, names: list[str], label: str, *, application: bool, wait: bool
    ) -> Document:
        """Refuse."""
        raise _refused()

    @property
    def failovers(self) -> Failovers:
        """Cannot be asked now."""
        raise _refused()

    @property
    def jobs(self) -> Jobs:
        """Cannot be asked now."""
        raise _refused()

    @property
    def repairs(self) -> Repairs:
        """See `api.Control`."""
        raise _refused()

    @property
    def watching(self) -> Watching:
        """What has happened; there are no metrics."""
        if self._watching is None:
            raise _refused()
        return self._watching

    async def groups(self) -> Document:
        """Refuse."""
        raise _refused()

    async def group(self, name: str) -> Document:
        """Refuse."""
        raise _refused()

    async def change_group(
        self, name: str, change: str, disks: list[str], *, dry_run: bool
    ) -> Document:
        """Refuse."""
        raise _refused()


def _watching(settings: MountSettings) -> Watching | None:
    """Return who is told of it; None: that cannot be had, as what daemons die of may be there."""
    try:
        from vdiskfs.watching import Watching  # noqa: PLC0415 (what is imported may be the fault)

        watching = Watching(settings)
        watching.check(strict=False)
    except Exception:
        log.exception("nobody is told that the mount is served plainly")
        return None
    return watching


def _refused() -> StateError:
    return StateError(
        "the mount is served plainly: nothing is tracked or replicated",
        hint="see vdiskfs status, then vdiskfs upgrade",
    )


async def _watch_core(core: native.Core, nodes: Nodes, nursery: trio.Nursery) -> None:
    while True:
        await trio.lowlevel.wait_readable(core.event_fd)
        with contextlib.suppress(BlockingIOError):
            os.read(core.event_fd, 8)
        while (event := core.next_event()) is not None:
            if event.kind is EventKind.ENDED:
                pyfuse3.terminate()
            elif event.kind is EventKind.NODE:
                nursery.start_soon(serve_node, core, nodes, event.offset)
            elif event.kind is EventKind.SYNC_FAILED:
                log.error("syncing an image failed: %s", os.strerror(event.error))


def main() -> int:
    """Run it; the exit status is that of vdiskfs(1)."""
    again, _, reason = os.environ.pop(PLAIN, "").partition(" ")
    settings, ready = begin_process("vdiskfs.plain")
    mount = PlainMount(settings, reason, float(again))
    try:
        trio.run(mount.run, ready)
    except BaseException as failure:  # noqa: BLE001 (whoever keeps the mount must hear of it)
        mount.tell_failure(failure)
        return report_failure(failure, ready)
    return 0


if __name__ == "__main__":
    sys.exit(main())
