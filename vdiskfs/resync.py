"""Whether a disk is to be resynchronized, why, and whether that may run now.

What is decided here survives the daemon and the host: a record in the disk's directory is
durable before anything is given up in its name, and goes when the pass is settled. It also
names the regions of 4 MiB whose only other copy was given up, for a host that dies before
the bitmaps are on its disk.

The pass itself is `vdiskfs.passes`; this module reads and writes nothing else.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vdiskfs.crash import hook
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.state import read_record, write_record
from vdiskfs.state.files import keep_room, remove_file
from vdiskfs.window import Window

REGION_SIZE = 4 << 20
"""Bytes of one region of the record: 64 TiB are 2 MiB of bits at most."""

LOOK_S = 60.0
"""How often a closed window is looked at: clocks may be set."""

Bools = npt.NDArray[np.bool_]


def local_now() -> datetime:
    """Return the time of day here."""
    return datetime.now().astimezone()


class Resync:
    """One disk's resynchronization: wanted, held back, or neither."""

    def __init__(
        self, path: Path, window: Window | None, now: Callable[[], datetime] = local_now
    ) -> None:
        """``path`` is the record's; without a window it may always run."""
        self.window = window
        self.reason: str | None = None
        self.cancelled = False
        self.forced = False
        self._path = path
        self._room = 4096
        self.now = now
        self._regions: Bools = np.zeros(0, np.bool_)

    # ---- the record: these wait for the local disk -----------------------------------------

    def keep_room(self, size: int) -> None:
        """Have room for the record of a disk of this size, in bytes, should this one be full."""
        # Bits of the regions, as text and at their worst.
        self._room = 4096 + size // REGION_SIZE // 8 * 3 // 2
        keep_room(self._path, self._room)

    def load(self) -> list[int] | None:
        """Take up the record; return the regions to suspect, or None: it is damaged."""
        try:
            body = read_record(self._path)
            self.reason = str(body["reason"])
            self.cancelled = bool(body["cancelled"])
            self.forced = bool(body.get("forced", False))
            packed = zlib.decompress(base64.b64decode(body["regions"]))
        except NotFoundError:
            return []
        except (DamagedError, KeyError, TypeError, ValueError, zlib.error):
            self.reason, self.cancelled, self.forced = "its record is damaged", False, False
            return None
        self._regions = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(np.bool_)
        return [int(region) for region in np.flatnonzero(self._regions)]

    def require(self, reason: str, regions: Iterable[int] = (), *, forced: bool = False) -> None:
        """Note that the disk is to be resynchronized; durable on return.

        Args:
            reason: for people.
            regions: those whose only other copy is given up.
            forced: outside its window, too, until it is done, whoever dies: the user asks.

        Raises:
            LocalError: the disk refused; then nothing may be given up.
        """
        wanted = np.array(sorted(regions), np.int64)
        size = max(len(self._regions), int(wanted[-1]) + 1 if len(wanted) else 0)
        merged = np.zeros(size, np.bool_)
        merged[: len(self._regions)] = self._regions
        merged[wanted] = True
        before, self._regions = self._regions, merged
        try:
            self._write(reason, cancelled=False, forced=forced or self.forced)
        except BaseException:
            self._regions = before
            raise
        hook("resync.marked")

    def cancel(self, reason: str) -> None:
        """Hold it back until the user asks for it; durable on return.

        Raises:
            LocalError: the disk refused; it is not held back then.
        """
        try:
            self._write(reason, cancelled=True, forced=False)
        except BaseException:
            self.cancelled = False
            raise
        hook("resync.cancelled")

    def settle(self) -> None:
        """The disk is known again. Call it when what was found is durable in the spool."""
        if self.reason is None:
            return
        remove_file(self._path)
        hook("resync.settled")
        keep_room(self._path, self._room)
        self.reason, self.cancelled, self.forced = None, False, False
        self._regions = np.zeros(0, np.bool_)

    def _write(self, reason: str, *, cancelled: bool, forced: bool) -> None:
        packed = zlib.compress(np.packbits(self._regions).tobytes())
        regions = base64.b64encode(packed).decode("ascii")
        body = {"reason": reason, "cancelled": cancelled, "forced": forced, "regions": regions}
        write_record(self._path, body)
        self.reason, self.cancelled, self.forced = reason, cancelled, forced

    # ---- when ----------------------------------------------------------------------------

    def wait_s(self) -> float | None:
        """Return for how long it has to wait at least; None: it may run now."""
        if self.cancelled:
            return LOOK_S
        if self.forced or self.window is None:
            return None
        opens_s = self.window.opens_in_s(self.now())
        return min(opens_s, LOOK_S) if opens_s else None

    def left_s(self) -> float:
        """Return for how long it may run by itself from now on."""
        if self.cancelled:
            return 0.0
        if self.forced or self.window is None:
            return float("inf")
        return self.window.closes_in_s(self.now())
