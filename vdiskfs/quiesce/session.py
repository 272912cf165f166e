"""The daemon's side of one holder: it is started, told to freeze and to thaw, and listened to.

Nothing here freezes anything. Whatever happens to this side, the holder thaws: its socket
ends. Trio thread only; no wait here is longer than the limits say.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from vdiskfs.crash import hook
from vdiskfs.errors import LocalError
from vdiskfs.machines.directory import passed_environ
from vdiskfs.machines.spawn import Child, spawn
from vdiskfs.quiesce.note import FORMAT
from vdiskfs.quiesceconfig import QuiesceConfig
from vdiskfs.state import remove_file, write_file

SLACK_S = 5.0
"""Beyond its own limit a holder may take this long to say something, on a busy host."""
START_S = 60.0
_PASSED = ("LIBVIRT_DEFAULT_URI", "PYTHONPATH")


@dataclass(frozen=True)
class Resting:
    """One disk that is to rest: its name, the paths its image may have, and how it is done."""

    name: str
    images: Sequence[str]
    how: QuiesceConfig


class Session:
    """One holder, from `prepare` to `aclose`. ``why`` says why it failed, empty: it has not."""

    def __init__(self, directory: Path, limit_s: float, tell: Callable[[str], None]) -> None:
        """Prepare nothing yet.

        Args:
            directory: of the notes, in the state directory; it exists.
            limit_s: of the freeze.
            tell: is told what is to be known besides, one line each.
        """
        self.note = directory / f"{uuid.uuid4().hex}.json"
        self.why = ""
        self._limit_s = limit_s
        self._tell = tell
        self._stream: trio.SocketStream | None = None
        self._rest = b""
        self._child: Child | None = None

    async def prepare(self, disks: Sequence[Resting], label: str) -> bool:
        """Start the holder; have the hooks run, and everybody asked whether he is there.

        False: see ``why``.

        Raises:
            LocalError: the state directory takes no note, or no process can be started.
        """
        body = {
            "format": FORMAT, "limit_s": self._limit_s, "label": label,
            "targets": _targets(disks),
            "disks": [
                {"name": one.name, "before": one.how.before, "after": one.how.after,
                 "hook_limit_s": one.how.hook_limit_s}
                for one in disks
            ],
        }  # fmt: skip
        await trio.to_thread.run_sync(write_file, self.note, json.dumps(body).encode())
        hook("quiesce.noted")
        try:
            await self._start()
        except LocalError:
            await trio.to_thread.run_sync(remove_file, self.note)
            raise
        hooks_s = sum(one.how.hook_limit_s for one in disks if one.how.before)
        return await self._heard("ready", START_S + hooks_s) is not None

    async def undo(self, note: Path) -> None:
        """Start a holder that puts back what a note says; `wait_over` says how it went."""
        self.note = note
        await self._start("--undo")

    async def freeze(self) -> None:
        """Freeze, if nothing has failed so far."""
        if self.why:
            return
        await self._send({"do": "freeze"})
        if await self._heard("frozen", self._limit_s + SLACK_S) is not None:
            hook("quiesce.frozen")

    async def thaw(self, points: Mapping[str, str]) -> bool:
        """Thaw; True: all was frozen from before this call, and is thawed within the limit.

        Args:
            points: what was sealed, by disk, for the hooks.
        """
        if self.why:
            return False
        hook("quiesce.sealed")
        await self._send({"do": "thaw", "points": dict(points)})
        verdict = await self._heard("verdict", self._limit_s + SLACK_S)
        hook("quiesce.thawed")
        return verdict is not None and verdict.get("held") is True

    async def wait_over(self) -> str:
        """Wait until the holder has ended; return why something may still be frozen."""
        if self._stream is None:
            return ""  # it was never started
        why = "the process that thaws died"
        while (message := await self._next()) is not None:
            if message.get("step") == "over":
                why = str(message.get("why", ""))
        if self._child is not None and await self._child.wait() == 0:
            return ""
        return why

    def let_go(self) -> None:
        """Say no more: a holder that has not thawed does so now. `wait_over` may follow."""
        if self._stream is not None:
            self._stream.socket.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        """Close the socket."""
        if self._stream is not None:
            await self._stream.aclose()

    # ---- messages --------------------------------------------------------------------------

    async def _start(self, *more: str) -> None:
        ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stream = trio.SocketStream(ours)
        command = [sys.executable, "-m", "vdiskfs.quiesce.holder", str(self.note), *more]
        try:
            self._child = await spawn(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd="/",
                env=_environ(undo=bool(more)),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    async def _send(self, message: Mapping[str, object]) -> None:
        assert self._stream is not None
        try:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.why = self.why or "the process that freezes died"

    async def _heard(self, wanted: str, limit_s: float) -> dict[str, Any] | None:
        """Return the message that is waited for; None: another one came, or none; see ``why``."""
        with trio.move_on_after(limit_s):
            while (message := await self._next()) is not None:
                step = message.get("step")
                if step == "verdict" and not message.get("held"):
                    self.why = str(message.get("why")) or "it failed"
                    return None
                if step == wanted:
                    return message
            self.why = self.why or "the process that freezes died"
            return None
        self.why = f"the process that freezes said nothing for {limit_s:g} s"
        return None

    async def _next(self) -> dict[str, Any] | None:
        """Return the next message; what is only to be told is told. None: there are no more."""
        assert self._stream is not None
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if not found:
                try:
                    data = await self._stream.receive_some(65536)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return None
                if not data:
                    return None
                self._rest += data
                continue
            self._rest = rest
            message = json.loads(line)
            if message.get("step") != "note":
                return dict(message)
            self._tell(str(message.get("text")))


def _targets(disks: Sequence[Resting]) -> list[dict[str, Any]]:
    """Return what is frozen: a guest with several of the disks is frozen once."""
    found: list[dict[str, Any]] = []
    for disk in disks:
        how = disk.how
        if how.agent is not None:
            found.append({"kind": "agent", "path": os.path.realpath(how.agent)})
        if how.libvirt is not None:
            found.append({"kind": "libvirt", "domain": how.libvirt})
        if how.filesystem:
            found.append({"kind": "filesystem", "disk": disk.name, "images": list(disk.images)})
    return [one for number, one in enumerate(found) if one not in found[:number]]


def _environ(*, undo: bool) -> dict[str, str]:
    """Return what a holder and its hooks see of our environment: no credentials."""
    kept = {key: os.environ[key] for key in _PASSED if key in os.environ}
    kept |= {key: value for key, value in os.environ.items() if key.startswith("VDISKFS_TEST")}
    if not undo and os.environ.get("VDISKFS_CRASH", "").startswith("holder."):
        # One holder dies of it: the next one counts anew.
        kept["VDISKFS_CRASH"] = os.environ.pop("VDISKFS_CRASH")
    return passed_environ(None) | kept
