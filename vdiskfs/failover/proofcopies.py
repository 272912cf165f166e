"""Writable copies of points for `vdiskfs.prover`: test failovers without a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from vdiskfs.errors import BusyError, NotFoundError
from vdiskfs.failover.drills import Drills
from vdiskfs.failover.failovers import Failovers
from vdiskfs.failover.states import Kind

_AGAIN_S, _TRIES = 0.2, 50
"""A loop device lets go of its file a moment after it was detached."""


class ProofCopies:
    """What `prover.Copies` says. Trio thread only."""

    def __init__(self, failovers: Failovers, drills: Drills, shown_in: Path) -> None:
        """Take the mount's; ``shown_in`` is the directory in it that shows copies."""
        self._failovers = failovers
        self._drills = drills
        self._shown_in = shown_in

    async def make(self, disk: str, epoch: int, name: str) -> Path:
        """Make one; return its image in the mount.

        Raises:
            VdiskfsError: as `Drills.test`.
        """
        failover = await self._drills.test(disk, epoch, name, vm=False)
        return self._shown_in / name / failover.record.members[0].file

    async def remove(self, name: str) -> None:
        """Throw it away; nothing where it is gone.

        Raises:
            BusyError: a program uses it.
        """
        for rest in range(_TRIES - 1, -1, -1):
            try:
                await self._drills.cleanup(name, "proof")
            except NotFoundError:
                return
            except BusyError:
                if not rest:
                    raise
                await trio.sleep(_AGAIN_S)
            else:
                return

    def left(self) -> Mapping[str, Sequence[Path]]:
        """Return the names of all test failovers that there are, with their images."""
        tests = (one.record for one in self._failovers.all() if one.record.kind is Kind.TEST)
        return {
            record.name: [self._shown_in / record.name / one.file for one in record.members]
            for record in tests
        }
