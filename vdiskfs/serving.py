"""A mount while it is served: how it is announced, handed over and ended.

The same whatever stands behind its names: the daemon, or the plain one that a keeper starts
when daemons keep dying (`vdiskfs.plain`). Trio thread only, but for `unmount`.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import logging
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NoReturn, Protocol

import pyfuse3
import trio

from vdiskfs import native
from vdiskfs.api import Control, serve_socket
from vdiskfs.config import MountSettings
from vdiskfs.daemonlog import log_handler
from vdiskfs.errors import BusyError, StateError
from vdiskfs.fdstore import HANDED_OVER, FdStore
from vdiskfs.fs import MAX_TASKS, OPTIONS, Operations
from vdiskfs.ready import Ready
from vdiskfs.registry import MountEntry, address_of, write_entry
from vdiskfs.running import VERSION
from vdiskfs.state import StateDirectory, users_of
from vdiskfs.tree import Namespace

log = logging.getLogger(__name__)

ANSWER_S = 3.0
"""How long the end waits for the control socket to give its last answers."""

HAND_OVER_MS = 5000
"""How long a daemon that hands over waits for names to be answered; the rest is asked again."""

FAIL_S = 2.0
"""How long the other tasks have to end after one has failed."""

REST_S = 20.0
"""How long what uses the mount from inside has to let go of it."""

RESTART_S = 5.0
"""Seconds before a task that failed is started again."""


class Inside(Protocol):
    """What uses the mount from inside, and would hold up its end."""

    async def rest(self) -> None:
        """Let go of it, soon, until `go_on`."""

    def go_on(self) -> None:
        """Go on: the mount has not ended."""


class Serving:
    """One mount from the first request to the last answer."""

    def __init__(self, settings: MountSettings, store: FdStore | None) -> None:
        """Prepare; ``store`` keeps what a successor needs, None: there will be none."""
        self._settings = settings
        self._store = store
        self.is_over = False
        """The source directory shows the mount (``--over``)."""
        self.is_kept = False
        """A successor could resume."""
        self.ended = trio.Event()
        """Nothing is mounted any more, and every request is answered."""
        self.inside: Inside | None = None
        self._finished = trio.Event()
        self._answered = trio.Event()
        self._leaving = trio.Event()

    # ---- tasks -------------------------------------------------------------------------

    def begin(self, core: native.Core, namespace: Namespace, nursery: trio.Nursery) -> None:
        """Answer for the names, and read requests from now on."""
        pyfuse3.init(Operations(namespace), f"/dev/fd/{core.names_fd}", set(OPTIONS))
        nursery.start_soon(self._names)
        core.start()
        faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
        nursery.start_soon(self._end_on_signal)
        nursery.start_soon(self._leave_when_told, core)
        nursery.start_soon(self._end_for_sure)

    async def serve_control(self, path: Path, control: Control) -> None:
        """Listen for the command line until `wait_answered`."""

        async def serve() -> None:
            await serve_socket(path, control, self._finished.wait)
            self._answered.set()

        await keep_running("the control socket", serve)

    async def _names(self) -> None:
        await pyfuse3.main(max_tasks=MAX_TASKS)
        self.ended.set()

    async def _end_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            lazy = False
            async for _ in received:
                try:
                    await self.let_go(lazy)
                except BusyError as error:
                    # The guests go before the disks do. Asked again, it is forced.
                    log.warning("%s; a second signal detaches it all the same", error)
                    lazy = True
                else:
                    if lazy:
                        pyfuse3.terminate()

    # ---- the next daemon -----------------------------------------------------------------

    async def announce(self, state: StateDirectory) -> None:
        """Tell the command line where the mount is, once it can ask."""
        settings = self._settings
        while not _listens(state.control):  # noqa: ASYNC110 (the server tells nobody)
            await trio.sleep(0.01)
        write_entry(MountEntry(
            mountpoint=settings.mountpoint, pid=os.getpid(), socket=str(state.control),
            state=settings.state, vault=settings.vault, site=settings.site,
            source=settings.source, keeper=0 if self._store is None else self._store.keeper,
        ))  # fmt: skip

    async def hand_over(self) -> Mapping[str, object]:
        """Let a successor take the mount over: `upgrade`.

        Raises:
            StateError: nobody keeps it meanwhile.
        """
        if self._store is None or not self.is_kept:
            raise StateError(
                f"{self._settings.mountpoint}: nobody keeps the mount while the daemon is replaced",
                hint="unmount and mount again when no machine runs",
            )
        await self._rest()
        self._leaving.set()
        return {"pid": os.getpid(), "version": VERSION}

    async def _leave_when_told(self, core: native.Core) -> None:
        await self._leaving.wait()
        left = await trio.to_thread.run_sync(core.pause, HAND_OVER_MS)
        log.info("the mount is handed over; %d requests for names go with it", left)
        leave(HANDED_OVER)

    async def _end_for_sure(self) -> None:
        """Once a task has failed names are not answered: let nothing hold the end up.

        A thread in a system call cannot be cancelled, and a process may wait for our answer.
        """
        try:
            await trio.sleep_forever()
        finally:
            if not self.ended.is_set():
                # Takes no thread and no memory: the lack of these may be what failed. The
                # signal writes where each thread is, and ends the process.
                signal.setitimer(signal.ITIMER_REAL, FAIL_S)
                log.critical("a task failed: the others have %g s to end", FAIL_S)

    # ---- the end -------------------------------------------------------------------------

    async def let_go(self, lazy: bool) -> None:
        """Take the mount away, as `unmount`; what uses it from inside goes first."""
        await self._rest()
        try:
            await trio.to_thread.run_sync(self.unmount, lazy)
        except BaseException:
            if self.inside is not None:
                self.inside.go_on()
            raise

    async def _rest(self) -> None:
        if self.inside is not None:
            with trio.move_on_after(REST_S):
                await self.inside.rest()

    def unmount(self, lazy: bool) -> None:
        """Take the mount away, and the one over the source. Blocks.

        Raises:
            BusyError: it is in use; names who uses it.
        """
        settings = self._settings
        places = [settings.mountpoint]
        if self.is_over and settings.source is not None:
            places.insert(0, settings.source)
        for place in places:
            try:
                native.unmount(place, lazy=lazy)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue  # somebody else has unmounted it
                raise _busy(settings.mountpoint, places) from error
            if place == settings.source:
                self.is_over = False

    async def wait_answered(self) -> None:
        """Let the control socket give its last answers, for a while."""
        self._finished.set()
        with trio.move_on_after(ANSWER_S):
            await self._answered.wait()


async def wait_mounted(mountpoint: str) -> None:
    """Wait until a new mount answers.

    Invariant: this process never asks its own mount for anything. It cannot be reaped while a
    thread of it waits for an answer, not even after kill -9, and its successor, which would
    give the answer, is started when it is reaped. So another process asks.
    """
    await trio.run_process(["stat", "--", mountpoint], stdout=subprocess.DEVNULL, check=False)


def _listens(path: Path) -> bool:
    with (
        address_of(path) as address,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as trial,
    ):
        return trial.connect_ex(address) == 0


async def keep_running(what: str, task: Callable[[], Awaitable[None]]) -> None:
    """Run a task that the mount can live without: what it raises ends neither of them."""
    while True:
        try:
            await task()
        except Exception:
            log.exception("%s failed; it is started again", what)
            await trio.sleep(RESTART_S)
        else:
            return


def begin_process(program: str) -> tuple[MountSettings, Ready]:
    """Read the arguments and the settings of this process, begin its log, set its limits."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--settings-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--foreground", action="store_true")
    arguments = parser.parse_args()
    with os.fdopen(arguments.settings_fd, encoding="utf-8") as file:
        settings = MountSettings.from_json(file.read())
    logging.basicConfig(
        level=settings.options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[log_handler(Path(settings.state))],
    )
    logging.getLogger("azure").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    threading.excepthook = _end_with_thread
    os.umask(0o077)
    # Room for descriptors, none for core dumps: guests' data and keys are in memory.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return settings, Ready(arguments.ready_fd)


def _end_with_thread(failure: threading.ExceptHookArgs) -> None:
    """End: what a thread was to do is lost, and who waits for it would for ever."""
    threading.__excepthook__(failure)
    leave(1)


def leave(status: int) -> NoReturn:
    """End now: whatever is not answered is the successor's."""
    logging.shutdown()
    os._exit(status)


def _busy(mountpoint: str, places: list[str]) -> BusyError:
    users = users_of(*places)
    who = ", ".join(str(user) for user in users[:5]) or "somebody that cannot be seen"
    more = f" and {len(users) - 5} more" if len(users) > 5 else ""
    return BusyError(f"{mountpoint}: in use by {who}{more}", hint="stop them first, or use --lazy")
