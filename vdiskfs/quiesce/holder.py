"""Freezes, and thaws whatever becomes of the daemon: a process for one point.

    python -m vdiskfs.quiesce.holder NOTE [--undo]

Its standard input is a socket to the daemon; a line of JSON is a message. It says ``ready``
(the hooks have run, everybody answers), is told ``freeze``, says ``frozen``, is told ``thaw``,
says ``verdict`` and, when all is as it was, ``over``. Instead of any of these it may say
``verdict`` at once: what it was to freeze is not frozen, or not any more. The limit counts from
``freeze``. When it is over, when the socket ends, or on SIGTERM, it thaws without being told;
what does not answer then is asked for an hour. With ``--undo`` it only does that.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vdiskfs.crash import hook
from vdiskfs.quiesce.agentline import QuiesceError, line_to
from vdiskfs.quiesce.guest import Guest
from vdiskfs.quiesce.hookcommand import run_hook
from vdiskfs.quiesce.hostfs import HostFileSystem, mounted_from
from vdiskfs.quiesce.note import Note

INSIST_S = 3600.0
"""How long a guest that does not answer is asked to thaw; then the daemon tries anew."""
PREPARED_S = 600.0
"""How long it stays prepared: the daemon waits for captures that are under way."""


class Target(Protocol):
    """Something that is frozen as a whole."""

    name: str

    def prepare(self) -> None:
        """Find out that it can be frozen."""

    def freeze(self, deadline: float) -> None:
        """Freeze it."""

    def thaw(self, deadline: float) -> bool:
        """Thaw it; False: it was not frozen any more."""

    def insist(self, until: float) -> None:
        """Thaw it whatever was done before."""

    def close(self) -> None:
        """Let go of it."""


class ToldToEndError(QuiesceError):
    """The daemon, or somebody else, wants no more of it."""


class Holder:
    """One holder, from its start to its end."""

    def __init__(self, note: Note, channel: socket.socket) -> None:
        """Take a note and the daemon's socket."""
        self._note = note
        self._body = note.body
        self._channel = channel
        self._rest = b""
        self._gone = False
        self._targets: list[Target] = []
        self._asked = False  # something was asked to freeze
        self._ran: list[dict[str, Any]] = []  # disks whose hooks before have run
        self._point: dict[str, str] = {}
        self._wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(woken)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def hold(self) -> bool:
        """Do what the daemon says, then put all back; False: something may still be frozen."""
        held, why = False, ""
        try:
            self._prepare()
            self._say("ready")
            self._wait_for("freeze", time.monotonic() + PREPARED_S)
            deadline = time.monotonic() + self._body["limit_s"]
            self._freeze(deadline)
            hook("holder.frozen")
            self._say("frozen")
            self._point = self._wait_for("thaw", deadline).get("points", {})
            held, why = self._thaw(deadline)
        except QuiesceError as error:
            why = str(error)
        hook("holder.thawed")
        return self._end(held=held, why=why)

    def undo(self) -> bool:
        """Put all back that the note says; False: something may still be frozen."""
        self._asked = True
        self._ran = list(self._body["disks"])
        failed: list[str] = []
        try:
            self._targets = self._find(forced=True)
        except QuiesceError as error:
            failed.append(str(error))
        return self._end(held=False, why="what froze it died", failed=failed)

    # ---- the steps -----------------------------------------------------------------------

    def _prepare(self) -> None:
        for disk in self._body["disks"]:
            if disk["before"]:
                self._ran.append(disk)
                self._run_hook(disk, "before", {})
        self._targets = self._find(forced=False)
        self._each(lambda target: target.prepare())

    def _find(self, *, forced: bool) -> list[Target]:
        found: list[Target] = []
        for one in self._body["targets"]:
            if one["kind"] != "filesystem":
                found.append(Guest(line_to(one)))
                continue
            places = mounted_from(one["images"])
            if not places and not forced:
                raise QuiesceError(f"disk {one['disk']}: no file system of it is mounted here")
            found += [_Left(place) if forced else HostFileSystem(place) for place in places]
        return found

    def _freeze(self, deadline: float) -> None:
        self._asked = True
        # What is prepared is frozen at once: who is first does not wait for the last.
        self._each(lambda target: target.freeze(deadline))

    def _thaw(self, deadline: float) -> tuple[bool, str]:
        """Thaw everything; say whether it had stayed frozen, or why not."""
        held: dict[str, bool] = {}

        def thaw(target: Target) -> None:
            held[target.name] = target.thaw(deadline)

        self._each(thaw)
        lost = [name for name, one in held.items() if not one]
        if lost:
            return False, f"{lost[0]}: somebody else thawed it before the seal"
        self._asked = False
        return True, ""

    def _end(self, *, held: bool, why: str, failed: Sequence[str] = ()) -> bool:
        """Have everything thawed, run the hooks after, and remove the note if nothing failed."""
        late: list[threading.Thread] = []
        failed = list(failed)
        if self._asked:
            late = [
                threading.Thread(target=self._insist, args=(one, failed), daemon=True)
                for one in self._targets
            ]
            for thread in late:
                thread.start()
        else:
            for target in self._targets:
                target.close()
        self._say("verdict", held=held, why=why)
        for disk in reversed(self._ran):
            if disk["after"]:
                consistency = "application" if held else "crash"
                try:
                    self._run_hook(disk, "after", {"VDISKFS_CONSISTENCY": consistency})
                except QuiesceError as error:
                    self._say("note", text=str(error))
        for thread in late:
            thread.join()
        if failed:
            self._say("over", why=failed[0])
            return False
        self._note.remove()
        hook("holder.over")
        self._say("over", why="")
        return True

    def _insist(self, target: Target, failed: list[str]) -> None:
        try:
            target.insist(time.monotonic() + INSIST_S)
            target.close()  # a file system that is open cannot be unmounted
        except Exception as error:  # noqa: BLE001 (whatever it is, the note must stay)
            failed.append(str(error))

    def _run_hook(self, disk: dict[str, Any], which: str, more: dict[str, str]) -> None:
        name = disk["name"]
        environ = {
            "VDISKFS_DISK": name, "VDISKFS_HOOK": which, "VDISKFS_LABEL": self._body["label"],
            "VDISKFS_POINT": self._point.get(name, ""), **more,
        }  # fmt: skip
        run_hook(
            disk[which], what=f"disk {name}: hook {which}", environ=environ,
            limit_s=disk["hook_limit_s"],
        )  # fmt: skip

    def _each(self, act: Callable[[Target], None]) -> None:
        """Do something with all targets at once.

        Raises:
            QuiesceError: that of the first that failed, when all are done.
        """
        failed: list[str] = []

        def run(target: Target) -> None:
            try:
                act(target)
            except QuiesceError as error:
                failed.append(str(error))
            except Exception as error:  # noqa: BLE001 (all must be thawed, whatever it is)
                failed.append(f"{target.name}: {error!r}")

        threads = [threading.Thread(target=run, args=(one,)) for one in self._targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise QuiesceError(failed[0])

    # ---- the daemon ------------------------------------------------------------------------

    def _say(self, step: str, **more: object) -> None:
        if self._gone:
            return
        try:
            self._channel.sendall(json.dumps({"step": step, **more}).encode() + b"\n")
        except OSError:
            self._gone = True

    def _wait_for(self, wanted: str, deadline: float) -> dict[str, Any]:
        """Return the message that tells to do something.

        Raises:
            QuiesceError: the time is over, or nobody will tell.
        """
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                message = json.loads(line)
                if message.get("do") == wanted:
                    return dict(message)
                raise ToldToEndError("it was called off")
            left = deadline - time.monotonic()
            fds = [self._channel.fileno(), self._wake]
            ready, _, _ = select.select(fds, [], [], max(0.0, left))
            if self._wake in ready:
                raise ToldToEndError("it was told to end")
            if not ready:
                limit = f"{self._body['limit_s']:g}"
                raise QuiesceError(
                    f"thawed after {limit} s: it was not sealed by then"
                    if wanted == "thaw"
                    else "the disks could not be sealed"
                )
            data = self._receive()
            if not data:
                self._gone = True
                raise ToldToEndError("the daemon is gone")
            self._rest += data

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(65536)
        except OSError:
            return b""


class _Left(HostFileSystem):
    """A file system that a holder which died may have left frozen."""

    def insist(self, until: float) -> None:
        """Thaw it whoever froze it."""
        self.thaw(until)


def main(arguments: Sequence[str]) -> int:
    """Run a holder; exit 0: nothing is frozen."""
    note = Note.take(Path(arguments[0]))
    if note is None:
        return 0
    hook("holder.taken")
    with socket.socket(fileno=os.dup(0)) as channel:
        holder = Holder(note, channel)
        done = holder.undo() if "--undo" in arguments[1:] else holder.hold()
    return 0 if done else 1


if __name__ == "__main__":
    # Threads may wait for a disk for ever; the note stays then.
    sys.stdout.flush()
    os._exit(main(sys.argv[1:]))
