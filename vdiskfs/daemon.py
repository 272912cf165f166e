"""The daemon of one mount: builds the objects, opens one nursery, shuts down in order.

    python -m vdiskfs.daemon --settings-fd N [--ready-fd M] [--foreground]

A successor (of a daemon that died, or handed the mount over) finds descriptors that its
predecessor gave away (vdiskfs.fdstore): it serves the same connection, and what it needs for
that is on this host; the vault is asked afterwards. Whatever goes wrong from the moment the
descriptors are kept ends the process and nothing else: the next one resumes.

Order of the first start: state directory, vault, mount, disks (tracked before anybody can write
through the mount), names, control socket. Order of the end: the mount is gone, so nobody
writes; what changed is sealed and captured; what can be shipped soon is shipped; the images
are synced; the clean end is noted last. What was not shipped is in the spool.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import pyfuse3
import trio

from vdiskfs import native
from vdiskfs.applicationpoints import ApplicationPoints
from vdiskfs.browse import Browser
from vdiskfs.catalog import Vault
from vdiskfs.config import MountSettings, vault_environ
from vdiskfs.control import MountControl
from vdiskfs.crash import hook
from vdiskfs.disk import Site
from vdiskfs.diskjobs import DiskJobs
from vdiskfs.errors import LocalError, RefusedError, VdiskfsError
from vdiskfs.failover import Drills, Failovers, Homecomings, OwnMachines, Relocations
from vdiskfs.failover.proofcopies import ProofCopies
from vdiskfs.failovercontrol import FailoverControl
from vdiskfs.fdstore import FdStore, take_descriptors
from vdiskfs.groups import Groups
from vdiskfs.handovers import Handovers
from vdiskfs.health import State
from vdiskfs.heartbeat import Heartbeat
from vdiskfs.hydration import PointImages
from vdiskfs.imageevents import tell_disk
from vdiskfs.jobcontrol import JobControl
from vdiskfs.jobs import Jobs
from vdiskfs.liveness import Liveness
from vdiskfs.maintenance import Maintenance
from vdiskfs.native import CoreFlags, EventKind, MountFlags
from vdiskfs.protection import Protection
from vdiskfs.prover import Prover
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.ready import Ready, describe_failure, report_failure
from vdiskfs.registry import remove_entry
from vdiskfs.repairing import Repairs
from vdiskfs.replicator import Replicator
from vdiskfs.room import RoomMaker
from vdiskfs.serving import Serving, begin_process, keep_running, leave, wait_mounted
from vdiskfs.state import StateDirectory, open_mountpoint, seal_mountpoint
from vdiskfs.stopping import MachineStopper
from vdiskfs.store import open_store
from vdiskfs.storing import store_all
from vdiskfs.stride import Pace
from vdiskfs.takeover import Kept, Session, give_away, serve_node, take_over
from vdiskfs.tree import Disks, Handover, Namespace, Nodes, open_source
from vdiskfs.unlocking import check_known, close_seen, open_seen, unlock_vault
from vdiskfs.watching import Watching
from vdiskfs.window import Window

log = logging.getLogger(__name__)


class Unmounter(Protocol):
    """Ends the mount."""

    async def __call__(self, *, drain: bool, lazy: bool) -> Mapping[str, object]:
        """Unmount; BusyError names who uses it."""


FINAL_SHIP_S = 5.0
"""How long the end of a mount waits for the vault unless it was asked to drain."""


class Daemon:
    """One mount from start to end."""

    def __init__(self, settings: MountSettings) -> None:
        """Prepare; `run` does it all."""
        self._settings = settings
        self._drain = False
        self._cookies = itertools.count(1)
        self._store = FdStore.take()
        self._kept = take_descriptors()
        self._serving = Serving(settings, self._store)
        self._prover: Prover | None = None
        self._watching = Watching(settings)
        self._events = self._watching.events
        self._jobs = Jobs(Path(settings.state))

    async def run(self, ready: Ready) -> None:
        """Mount, tell that it is ready, serve until unmounted.

        Raises:
            VdiskfsError: it could not be started; nothing is mounted then.
        """
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            has_predecessor = bool(self._kept)
            kept = take_over(self._kept, self._store)
            if has_predecessor and kept is None:
                log.info("%s: was unmounted meanwhile", settings.mountpoint)
                remove_entry(settings.mountpoint)
                return
            source = _source(settings, kept)
            mountpoint = None if kept is not None else open_mountpoint(settings.mountpoint)
            if mountpoint is not None:
                stack.callback(os.close, mountpoint)
            state = await trio.to_thread.run_sync(StateDirectory.open, Path(settings.state))
            stack.callback(state.close)
            self._watching.check(strict=kept is None)
            await self._jobs.load()
            vault = await stack.enter_async_context(_open_vault(settings, state, kept))
            if kept is not None:
                fuse_fd = kept.connection
                self._serving.is_kept = True
                self._serving.is_over = settings.over
            else:
                fuse_fd = await trio.to_thread.run_sync(_mount, settings)
            stack.callback(self._unmount_left)
            if mountpoint is not None:
                seal_mountpoint(mountpoint)
            allowed = CoreFlags.ALLOW_MMAP if settings.options.allow_mmap else CoreFlags.NONE
            core = native.Core(fuse_fd, settings.options.workers, allowed | CoreFlags.ASK_ROOM)
            stack.callback(core.close)
            if kept is not None:
                core.resume(kept.init)
            try:
                await self._serve(core, source, state, vault, ready)
            except BaseException as failure:
                if not self._is_over:
                    # Nothing is answered and nothing unmounted: a successor goes on.
                    log.critical("the daemon failed", exc_info=failure)
                    self.tell_failure(failure)
                    leave(1)
                raise
            state.end_clean()

    def tell_failure(self, failure: BaseException) -> None:
        """Tell who keeps the mount why this daemon ends."""
        if self._store is not None:
            self._store.failed(describe_failure(failure))

    async def _serve(
        self, core: native.Core, source: int | None, state: StateDirectory, vault: Vault,
        ready: Ready,
    ) -> None:  # fmt: skip
        options = self._settings.options
        images = PointImages(core, state.cache, options.cache_limit, self._next_cookie)
        groups = Groups(vault, state.groups, options.epoch_interval_s)
        site = self._site(core, vault, state, groups)
        async with trio.open_nursery() as nursery:
            protection = Protection(site, options.patterns, nursery)
            groups.begin(protection.disks, nursery)
            browser = Browser(vault, images, protection.logs, protection.access)
            failovers = Failovers(
                core, state, vault, browser.newest_log, self._next_cookie,
                shown_in=Path(self._settings.mountpoint) / "failovers", host=options.machines,
                nursery=nursery, events=self._events, jobs=self._jobs,
            )  # fmt: skip
            failover_control, homecomings = await self._take_up(
                failovers, site, protection, nursery, browser
            )
            namespace = Namespace(
                core, source, protection, browser, failovers=failovers,
                handover=Handover(self._store, self._kept),
            )  # fmt: skip
            resumed = self._serving.is_kept
            nursery.start_soon(
                self._watch_core, core,
                partial(tell_disk, protection, self._events, RoomMaker(
                    core, images, protection.replicators, nursery, (source, state.path))),
                (images, failovers), namespace.nodes, nursery,
            )  # fmt: skip
            if namespace.disks is not None:
                await self._start(protection, namespace.disks, resumed=resumed)
            heartbeat = self._live(site, protection, groups, (images, failovers), nursery)
            application = ApplicationPoints(
                options, Path(self._settings.mountpoint), state.path, events=self._events,
                groups=groups, disks=protection.disks, nursery=nursery,
            )  # fmt: skip
            control = MountControl(
                self._settings, protection, browser, failover_control,
                self._unmount_for(protection, groups), groups=groups,
                vault_error=lambda: heartbeat.vault_error, hand_over=self._serving.hand_over,
                counts=core.counts, application=application, watching=self._watching,
                jobs=JobControl(self._jobs, failovers), repairs=Repairs(protection, self._events),
            )  # fmt: skip
            self._serving.begin(core, namespace, nursery)
            nursery.start_soon(self._serving.serve_control, state.control, control)
            self._watch(nursery, heartbeat, protection, core, vault)
            nursery.start_soon(keep_running, "application-consistent points", application.run)
            if resumed and namespace.disks is not None:
                nursery.start_soon(
                    self._start_later, protection, namespace.disks, homecomings, failovers
                )
            else:
                self._are_started(protection, homecomings, failovers)
            await self._announce(state, resumed=resumed)
            self._settle(core, source, vault)
            ready.tell({"ok": True, "pid": os.getpid()})  # last: from here on a kill costs nothing
            await self._serving.ended.wait()
            await self._finish(protection, groups)
            await self._serving.wait_answered()
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            pyfuse3.close(unmount=False)
            await namespace.close()
            await protection.stop(clean=True)
            core.stop()
            await images.aclose()
            await failovers.aclose()

    def _live(
        self, site: Site, protection: Protection, groups: Groups,
        pools: tuple[PointImages, Failovers], nursery: trio.Nursery,
    ) -> Heartbeat:  # fmt: skip
        """Let the disks follow their policies; return what gives signs of life."""
        images, failovers = pools
        maintenance = Maintenance(site, protection.disks, failovers.events, self._jobs)
        heartbeat = Heartbeat(
            self._settings, site, protection.disks, groups.learn,
            uses=lambda: [*images.in_use(), *failovers.in_use(), *self._proofs_in_use()],
            touched=maintenance.wake,
        )  # fmt: skip
        nursery.start_soon(keep_running, "maintenance", maintenance.run)
        return heartbeat

    def _proofs_in_use(self) -> Sequence[tuple[str, int, int]]:
        return () if self._prover is None else self._prover.in_use()

    async def _take_up(
        self, failovers: Failovers, site: Site, protection: Protection, nursery: trio.Nursery,
        browser: Browser,
    ) -> tuple[FailoverControl, Homecomings]:  # fmt: skip
        """Go on with the failovers that an earlier run left."""
        await failovers.load()
        drills = Drills(failovers)
        host, mountpoint = self._settings.options.machines, Path(self._settings.mountpoint)
        limiter = RateLimiter(self._settings.options.hydration_limit)
        relocations = Relocations(failovers, site, protection, nursery, host=host, limiter=limiter)
        relocations.resume()
        drills.resume()
        stopper = MachineStopper(host, site.state.path)
        own = OwnMachines(failovers, host)
        copies = ProofCopies(failovers, drills, mountpoint / "failovers")
        options, events = self._settings.options, failovers.events
        jobs = self._jobs
        prover = Prover(site, protection.disks, copies, options=options, events=events, jobs=jobs)
        self._serving.inside = self._prover = prover
        nursery.start_soon(keep_running, "proofs", prover.run)
        handovers = Handovers(
            site, protection, own, stopper=stopper, mountpoint=mountpoint, events=events, jobs=jobs
        )
        protection.stop_machine = handovers.stop_machine
        nursery.start_soon(keep_running, "handing disks over", handovers.run)
        homecomings = Homecomings(failovers, site, protection, nursery, host=host, limiter=limiter)
        control = FailoverControl(
            failovers, drills, relocations, homecomings, shown_in=mountpoint / "failovers",
            changed=browser.forget_records,
        )  # fmt: skip
        return control, homecomings

    async def _start(self, protection: Protection, files: Disks, *, resumed: bool) -> None:
        """Start the disks; of those that guests go on with only what can be done at once."""
        if resumed:
            await protection.resume(files)
        else:
            await protection.start(files, protect=self._settings.protect)

    async def _start_later(
        self, protection: Protection, files: Disks, homecomings: Homecomings, failovers: Failovers
    ) -> None:
        """Start the disks of which guests go on already; then bring others home."""
        await protection.start(files, protect=self._settings.protect, patient=True)
        self._are_started(protection, homecomings, failovers)

    def _are_started(
        self, protection: Protection, homecomings: Homecomings, failovers: Failovers
    ) -> None:
        """Bring disks home, and interrupt the jobs of those that an earlier run had alone."""
        homecomings.resume()
        taken = {disk_id for one in failovers.all() for disk_id in one.taken}
        self._jobs.disks_are(protection.known_ids() | taken)

    def _site(self, core: native.Core, vault: Vault, state: StateDirectory, groups: Groups) -> Site:
        options = self._settings.options
        pace = Pace(
            options.epoch_interval_s, options.spool_limit, options.compression_level,
            options.resync_threshold / 100, Window.parse(options.resync_window),
        )  # fmt: skip
        jobs = DiskJobs(self._jobs, self._events)
        return Site(
            self._settings.site, core, vault, state, pace, self._next_cookie, Liveness(vault),
            options.when_displaced, self._settings.force, self._settings.accept_rollback,
            RateLimiter(options.bandwidth_limit), groups.joint_of,
            jobs.follow, jobs.refused,
        )  # fmt: skip

    @property
    def _is_over(self) -> bool:
        """No successor has anything to serve: never begun to be kept, or ended in order."""
        return self._serving.ended.is_set() or not self._serving.is_kept

    def _unmount_left(self) -> None:
        """Take away what a start that failed has mounted; an ended mount is gone already."""
        if self._is_over:
            remove_entry(self._settings.mountpoint)
            with contextlib.suppress(OSError):
                native.unmount(self._settings.mountpoint, lazy=True)

    def _next_cookie(self) -> int:
        return next(self._cookies)

    def _settle(self, core: native.Core, source: int | None, vault: Vault) -> None:
        """Give a successor what it needs, and say that the mount serves."""
        if self._store is None:
            return
        if not self._serving.is_kept:
            give_away(
                self._store,
                core.fuse_fd,
                source,
                Session.of(core.init_request, vault),
                can_resend=core.can_resend,
            )
            hook("connection.kept")
            self._serving.is_kept = True
        self._store.ready(f"{self._settings.mountpoint} is served")

    async def _announce(self, state: StateDirectory, *, resumed: bool) -> None:
        """Wait until the mount answers, then tell everybody."""
        settings = self._settings
        if not resumed:
            await wait_mounted(settings.mountpoint)
        if settings.over and not resumed:
            await trio.to_thread.run_sync(_bind_over, settings)
            self._serving.is_over = True
        await self._serving.announce(state)
        how = "taken over" if resumed else "mounted"
        log.info("%s: %s, vault %s", settings.mountpoint, how, settings.vault)
        self._events.tell("mount.started", settings.mountpoint, how)

    def _watch(
        self, nursery: trio.Nursery, heartbeat: Heartbeat, protection: Protection,
        core: native.Core, vault: Vault,
    ) -> None:  # fmt: skip
        nursery.start_soon(keep_running, "the heartbeat", heartbeat.run)
        nursery.start_soon(keep_running, "keeping jobs", self._jobs.run)
        self._watching.begin(
            nursery, protection, vault.store, core.counts, lambda: heartbeat.vault_error
        )

    # ---- tasks -------------------------------------------------------------------------

    async def _watch_core(
        self, core: native.Core, tell: Callable[[native.Event], None],
        pools: tuple[PointImages, Failovers], nodes: Nodes, nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        while True:
            await trio.lowlevel.wait_readable(core.event_fd)
            with contextlib.suppress(BlockingIOError):
                os.read(core.event_fd, 8)
            while (event := core.next_event()) is not None:
                if event.kind is EventKind.ENDED:
                    pyfuse3.terminate()
                elif event.kind in (EventKind.WANT, EventKind.SEEK):
                    for pool in pools:
                        asked = pool.by_cookie(event.cookie)
                        if asked is not None:
                            nursery.start_soon(asked.answer, event)
                elif event.kind is EventKind.NODE:
                    nursery.start_soon(serve_node, core, nodes, event.offset)
                else:
                    tell(event)

    # ---- the end -------------------------------------------------------------------------

    def _unmount_for(self, protection: Protection, groups: Groups) -> Unmounter:
        async def unmount(*, drain: bool, lazy: bool) -> Mapping[str, object]:
            if drain:
                await protection.wait_started()
                disks = [one.replicator for one in protection.disks()
                         if one.health.shown_as is not State.FAILED_OVER]  # fmt: skip
                for disk in disks:
                    disk.check_not_paused()
                await groups.seal_last()
                for disk in disks:
                    await store_all(disk)
            self._drain = drain
            await self._serving.let_go(lazy)
            waiting = sum(one.spooled_bytes for one in protection.replicators())
            return {"unmounted": True, "spooled_bytes": waiting}

        return unmount

    async def _finish(self, protection: Protection, groups: Groups) -> None:
        """Nobody writes any more: seal, capture, ship what can be shipped soon."""
        protection.closing = True
        self._events.tell("mount.ended", self._settings.mountpoint, "unmounted")
        with trio.move_on_after(math.inf if self._drain else FINAL_SHIP_S):
            await groups.seal_last()
            async with trio.open_nursery() as nursery:
                for replicator in protection.replicators():
                    nursery.start_soon(_finish_disk, replicator)


async def _finish_disk(replicator: Replicator) -> None:
    try:
        if not replicator.suspects.needed:
            await replicator.seal_if_changed()
        if not replicator.paused:
            await replicator.wait_shipped()
    except (VdiskfsError, OSError) as error:
        log.warning("disk %s: what changed last is not captured yet: %s", replicator.name, error)
    except Exception:
        # The other disks end in order all the same.
        log.exception("disk %s: what changed last is not captured yet", replicator.name)


def _source(settings: MountSettings, kept: Kept | None) -> int | None:
    """Return the descriptor of the source directory; None: a recovery site."""
    if settings.source is None:
        return None
    return open_source(settings.source) if kept is None else kept.source


def _mount(settings: MountSettings) -> int:
    flags = MountFlags.ALLOW_OTHER if settings.allow_other else MountFlags.NONE
    try:
        return native.mount(settings.mountpoint, "vdiskfs", flags)
    except FileNotFoundError:
        raise LocalError("/dev/fuse is missing", hint="modprobe fuse; see vdiskfs doctor") from None
    except PermissionError as error:
        hint = "install fuse3; with --allow-other set user_allow_other in /etc/fuse.conf"
        raise RefusedError(f"{settings.mountpoint}: mounting was refused", hint=hint) from error
    except OSError as error:
        raise LocalError(f"{settings.mountpoint}: cannot be mounted: {error.strerror}") from error


def _bind_over(settings: MountSettings) -> None:
    source = str(settings.source)
    command = ["mount", "--bind", "--", f"{settings.mountpoint}/disks", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LocalError(f"{source}: --over failed: {result.stderr.strip()}")


@contextlib.asynccontextmanager
async def _open_vault(
    settings: MountSettings, state: StateDirectory, kept: Kept | None
) -> AsyncIterator[Vault]:
    store = open_store(settings.vault, environ=vault_environ(settings.options))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.aclose)
        if kept is not None:
            # It was opened by the predecessor, and may be away now: guests do not wait for it.
            session = kept.session
            seen = await trio.to_thread.run_sync(open_seen, state.path, session.vault_id)
            vault = Vault.reopened(
                store, session.vault_id, session.vault_created, session.data_key, seen
            )
        else:
            vault = await unlock_vault(store, settings, state.path)
            check_known(vault, settings, state)
        stack.push_async_callback(close_seen, vault)
        yield vault


def main() -> int:
    """Run the daemon; the exit status is that of vdiskfs(1)."""
    settings, ready = begin_process("vdiskfs.daemon")
    daemon = Daemon(settings)
    try:
        trio.run(daemon.run, ready)
    except BaseException as failure:  # noqa: BLE001 (whoever waits must hear of it)
        daemon.tell_failure(failure)
        return report_failure(failure, ready)
    return 0


if __name__ == "__main__":
    sys.exit(main())
