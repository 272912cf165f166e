"""Thawing what notes say that nobody cares for any more: a daemon and its holder died.

Trio thread only. A daemon that begins to serve calls `undo_all`, whichever daemon it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import trio

from vdiskfs.errors import LocalError
from vdiskfs.quiesce.note import is_held
from vdiskfs.quiesce.session import Session

log = logging.getLogger(__name__)

AGAIN_S = 1.0
LONGEST_S = 600.0

Tell = Callable[[str, str], None]
"""Is told what happened: of which disks, and a line."""


async def undo_all(notes: Path, tell: Tell) -> None:
    """Put back what all notes of a directory say; returns when that is done.

    Thawing a file system writes to its disk: the disks must be served already.
    """
    async with trio.open_nursery() as nursery:
        for path in await trio.to_thread.run_sync(lambda: sorted(notes.glob("*.json"))):
            nursery.start_soon(undo, path, tell)


async def undo(path: Path, tell: Tell) -> None:
    """Have a holder put back what a note says, until that is so."""
    pause_s = AGAIN_S
    while await trio.to_thread.run_sync(path.exists):
        names = await trio.to_thread.run_sync(names_of, path)
        if not await trio.to_thread.run_sync(is_held, path):
            log.warning("disk %s: what was left frozen is thawed", names)
        session = Session(path.parent, 0.0, log.warning)
        try:
            await session.undo(path)
            why = await session.wait_over()
        except LocalError as error:
            why = str(error)
        finally:
            with trio.CancelScope(shield=True):
                await session.aclose()
        if not why:
            tell(names, "thawed: nothing is frozen any more")
            return
        log.error("disk %s: may still be frozen: %s", names, why)
        await trio.sleep(pause_s)
        pause_s = min(LONGEST_S, 2 * pause_s)


def names_of(path: Path) -> str:
    """Return the disks of a note; in a thread."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return ",".join(one["name"] for one in body["disks"])
    except (OSError, ValueError, KeyError, TypeError):
        return "?"
