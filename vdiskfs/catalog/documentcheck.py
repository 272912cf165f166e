"""Looking at all documents of a vault for ``check``: each has a check of its own bytes."""

from __future__ import annotations

from collections.abc import Sequence

from vdiskfs.catalog.anchor import VAULT
from vdiskfs.catalog.documents import decode_document
from vdiskfs.catalog.garbage import CLOCK, CLOCK_DOCUMENT
from vdiskfs.catalog.inspection import bare
from vdiskfs.catalog.ledger import ledger_name
from vdiskfs.catalog.policy import missing_policies
from vdiskfs.catalog.proofs import proofs_prefix
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.report import CheckReport, Problem
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.store import READ_LIMIT, Store

PREFIXES = ("names/", "sites/", "leases/", "boot/", "groups/", "policies/", "machines/")
"""Where documents lie that are no disk's own."""


async def check_documents(
    store: Store, report: CheckReport, *, disk: DiskRecord | None = None,
    disks: Sequence[DiskRecord] = (),
) -> None:  # fmt: skip
    """Report documents that are damaged: those of a disk, or those that are no disk's.

    Of these also policies that are missing: ``disks`` say that there was one.
    What a document means is for whoever needs it to say; here it is read as it was written.
    """
    known = {problem.object for problem in report.problems}
    names = _of_disk(disk) if disk is not None else [VAULT]
    prefixes = (proofs_prefix(disk.id),) if disk is not None else (*PREFIXES, CLOCK)
    for prefix in prefixes:
        names += [info.name async for info in store.list(prefix)]
    for name in names:
        if name in known:
            continue
        try:
            data, _ = await store.read(name, limit=READ_LIMIT)
            if name != CLOCK:
                decode_document(data, where=name)
            elif data != CLOCK_DOCUMENT:
                report.problems.append(Problem(name, "is not what is always written", ""))
        except DamagedError as error:
            said = disk.name if disk is not None else ""
            report.problems.append(Problem(name, bare(error, name), said))
        except NotFoundError:
            continue  # it went away since it was listed
    for name, followers in (await missing_policies(store, disks)).items():
        # Nothing is thinned without it.
        message = f"is missing: {', '.join(followers)} keep all points until it is there"
        report.problems.append(Problem(name, message, ""))


def _of_disk(disk: DiskRecord) -> list[str]:
    return [
        f"disks/{disk.id}/disk.json",
        *(ledger_name(disk.id, number, ref.id) for number, ref in sorted(disk.ledgers.items())),
    ]
