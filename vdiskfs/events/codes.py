"""The codes of events: scripts rely on them, and vdiskfs-monitoring(7) has the same table.

A *condition* begins and ends: its end has the same code with ``.over`` behind it. The other
codes are things that happen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

OVER = ".over"
"""Behind a condition's code: it is over."""


class EventLevel(StrEnum):
    """How bad it is: nothing to do; look at it soon; look at it now."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """Return 0 to 2: a higher one is worse."""
        return tuple(EventLevel).index(self)


@dataclass(frozen=True, slots=True)
class Code:
    """One row of the table.

    ``told_as`` is the level that decides who is told: the end of a condition goes to everybody
    who was told of its beginning.
    """

    name: str
    level: EventLevel
    meaning: str
    todo: str = ""
    is_condition: bool = False
    told_as: EventLevel = EventLevel.INFO

    @property
    def kind(self) -> str:
        """Return the first word of the code."""
        return self.name.partition(".")[0]


_I, _W, _E = EventLevel.INFO, EventLevel.WARNING, EventLevel.ERROR
_RETRY = "it is tried again by itself; vdiskfs disk retry tries at once"
_MEND = "mend it, then: vdiskfs disk retry"

_CONDITIONS = (
    ("rpo.warning", _W, "a disk's shipped lag is above rpo_warning",
     "see vdiskfs status: the vault, the network and bandwidth_limit"),
    ("rpo.error", _E, "a disk's shipped lag is above rpo_error",
     "see vdiskfs status: the vault, the network and bandwidth_limit"),
    ("vault.away", _W, "the vault does not answer, throttles, or answers that it cannot now",
     _RETRY),
    ("vault.refused", _E, "the vault refuses the credential, or what it may do",
     f"check the key or token and its permissions; {_MEND}"),
    ("vault.gone", _E, "there is no vault, no container or no object where one must be",
     f"bring it back; {_MEND}"),
    ("vault.wrong", _E, "what answers is another vault, or an older state of it",
     f"bring back the vault that was mounted; {_MEND}"),
    ("chain.damaged", _E, "a delta that others follow is damaged or does not fit",
     "vdiskfs vault repair --disk DISK; then vdiskfs disk retry"),
    ("host.trouble", _W, "this host cannot keep what replication needs: space, memory, its disk",
     f"free room where the state directory lies; {_RETRY}"),
    ("image.unreadable", _E, "the disk of an image does not give a page back: there is no new "
     "point",
     "see the host's kernel log; restore the image, or have the machine write to that place"),
    ("replication.stuck", _E, "replication of a disk stands still, and time does not mend it",
     f"see vdiskfs disk show; {_MEND}"),
    ("disk.resync", _W, "a disk is to be resynchronized", "vdiskfs disk resync --now, or wait"),
    ("finalize.failed", _E, "a disk's first replication has ended, but what came of it is not "
     "proven to be of use", f"see the text; {_RETRY}"),
    ("mount.plain", _E, "daemons died again and again: the mount is served, and nothing is tracked "
     "or replicated", "see daemon.log for what they died of; then vdiskfs upgrade"),
    ("disk.displaced", _E, "another site has taken a disk over",
     "vdiskfs disk branches; see vdiskfs-internals(7)"),
)  # fmt: skip

_HAPPENINGS = (
    ("mount.started", _I, "a daemon serves the mount", ""),
    ("mount.ended", _I, "a mount was ended in order", ""),
    ("thinning.clocks", _W, "clocks disagree: nothing is thinned and nothing deleted",
     "set the clock that is wrong"),
    ("thinning.failed", _W, "a disk cannot follow its policy", "see the text"),
    ("thinning.kept", _I, "what was thinned away cannot be deleted yet: the container keeps it, or "
     "the credential may not delete", "nothing: it is tried again; see vdiskfs doctor"),
    ("epoch.given-up", _W, "an epoch could not be kept: one point less, nothing is lost",
     "see the room of the state directory"),
    ("intent.void", _W, "the intent log cannot be kept: should the host die, all is compared",
     "free room where the state directory lies"),
    ("image.sync-failed", _E, "the file system of an image failed to sync it",
     "see the host's kernel log: its disk may be failing"),
    ("disk.finalized", _I, "a disk's first replication has ended, and was read back",
     "try it: vdiskfs failover test DISK"),
    ("disk.asked", _I, "another site asks for a disk", ""),
    ("disk.handed", _I, "a disk was handed over to another site", ""),
    ("disk.kept", _W, "a disk cannot be handed over", "see the text, and try again over there"),
    ("failover.state", _I, "a failover is in another state", ""),
    ("failover.removed", _I, "a failover was removed", ""),
    ("failover.damaged", _E, "what lies here of a failover cannot be opened",
     "see the text; put it back and mount again, or: vdiskfs failover rollback, or cleanup"),
    ("failover.overdue", _E, "a failover that was not committed in time is not rolled back yet",
     "see the text; it is tried again by itself; or: vdiskfs failover commit, or rollback"),
    ("hydration.ended", _E, "a failover's copy is not completed in the background any more",
     "see the text; what is read is fetched all the same; vdiskfs vault check"),
    ("job.step", _I, "a job has come to its next step", ""),
    ("job.stands", _E, "a job stands still", "vdiskfs job show says why; run the command again"),
    ("machine.health", _I, "a failover's machine has passed its health check", ""),
    ("machine.unhealthy", _E, "a failover's machine has not passed its health check",
     "see its console, in the directory that vdiskfs failover show names"),
    ("machine.started", _I, "a machine that was stopped for a handover runs again", ""),
    ("machine.stopped", _W, "a machine that was stopped for a handover does not run",
     "start it"),
    ("point.crash-consistent", _W,
     "a point that was to be application-consistent is crash-consistent",
     "the text says why: the guest's agent, its file systems, hooks, freeze_limit_s"),
    ("point.not-made", _W, "an application-consistent point was not made",
     "the text says why; the next is tried on schedule"),
    ("proof.failed", _E, "a point in the vault is not what was sealed, or a file system in it is "
     "damaged", "vdiskfs vault check; then vdiskfs disk resync DISK --now makes a whole one"),
    ("proof.inconclusive", _W, "it cannot be told whether the file systems of a point are whole",
     "the text says why"),
    ("quiesce.trouble", _W, "something about a freeze or a thaw is not as it should be",
     "see the text"),
    ("quiesce.frozen", _E, "a guest or a file system may still be frozen",
     "thaw it: virsh domfsthaw, or fsfreeze -u"),
    ("quiesce.thawed", _I, "what was left frozen is thawed", ""),
    ("quiesce.incomplete", _W, "a group makes no application-consistent points",
     "say in [quiesce.DISK] how each of its disks rests"),
    ("repair.healed", _W, "damage was found in the vault, and healed",
     "see what the vault's disks and logs say of themselves"),
    ("repair.left", _E, "damage in the vault could not be healed: points are hurt",
     "vdiskfs vault check names them; vdiskfs disk resync DISK --now makes a whole one"),
    ("watch.sink", _W, "a mail, a webhook or the journal does not take events",
     "vdiskfs event test"),
    ("watch.lost", _W, "events were lost: the state directory took none for too long",
     "free room where the state directory lies"),
    ("watch.test", _I, "somebody tried vdiskfs event test", ""),
    ("event.other", _W, "something that has no code of its own", ""),
)  # fmt: skip


def _table() -> dict[str, Code]:
    rows = [Code(*row, is_condition=True, told_as=row[1]) for row in _CONDITIONS]
    rows += [Code(*row, told_as=row[1]) for row in _HAPPENINGS]
    return {row.name: row for row in rows}


CODES = _table()
"""All codes but the ends of conditions, by name."""


def code_of(name: str) -> Code:
    """Return the row of a code, or of the end of a condition; ``event.other`` if it has none."""
    if name.endswith(OVER) and (base := CODES.get(name.removesuffix(OVER))) is not None:
        return replace(base, name=name, level=EventLevel.INFO, todo="", is_condition=False)
    return CODES.get(name, CODES["event.other"])
