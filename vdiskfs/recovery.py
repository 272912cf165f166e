"""One disk after the death of its host: what of its bitmaps is believed.

The order, each step durable before the next: the image as the file system gave it back; the
track, with the regions of the intent log suspect (``native.recover_track``); what parts of a
pass hold of those regions counts as changed; stretches that no region names are noted as
distrusted. Then the disk starts as any other, and only when all is marked does the core keep
its intent log again. Everything can be done again from the beginning.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from vdiskfs import crash, native
from vdiskfs.image import ChainEnd
from vdiskfs.state import Stretch, sync_directory
from vdiskfs.units import format_size

log = logging.getLogger(__name__)


def recover_track(
    name: str, image: native.Image, change_ns: int, directory: Path, last: ChainEnd
) -> native.Recovery | None:
    """Make the track in ``directory`` right; in a thread.

    Args:
        name: the disk's, for messages.
        image: the disk's, not tracked yet.
        change_ns: when its file was changed last.
        directory: the track's.
        last: the newest epoch that the vault or the spool holds.

    Returns what is suspect, or None: nothing is known of any page.
    """
    image.sync_internal()
    try:
        found = native.recover_track(
            directory, size=image.size(), change_ns=change_ns,
            epoch=last.epoch + 1, base_size=last.size,
        )  # fmt: skip
    except OSError as error:
        log.warning("disk %s: the host died; all of it is compared: %s", name, _reason(error))
        return None
    crash.hook("recovery.track-right")
    log.info(
        "disk %s: the host died; %s in %d regions that were active are compared",
        name, format_size(len(found.regions) * native.INTENT_REGION), len(found.regions),
    )  # fmt: skip
    for start, end in found.spans:
        log.info("disk %s: so is what lies in [%d, %d), distrusted", name, start, end)
    return found


def _reason(error: OSError) -> str:
    known = {
        errno.ENOENT: "there is no intent log",
        errno.EBADMSG: "the intent log is void or damaged, or not this disk's",
        errno.ESTALE: "the image was changed after the intent log ended",
    }
    return known.get(error.errno or 0, error.strerror or str(error))


def doubted(found: native.Recovery) -> list[Stretch]:
    """Return every stretch of which nothing is believed."""
    regions = [(start, start + native.INTENT_REGION) for start in found.regions]
    return [*regions, *found.spans]


def clear_track(directory: Path) -> None:
    """Forget a track. The intent log first, durably: the rest says nothing without it."""
    if not directory.exists():
        return
    (directory / "intent").unlink(missing_ok=True)
    sync_directory(directory)
    for path in directory.iterdir():
        path.unlink()
