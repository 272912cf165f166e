"""Moving a delta of the spool into another generation: its head and digest change, no page does.

A slot of another generation, or one after a delta that was itself moved, hangs on other
digests. Frames, index and segments stay as they are.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from vdiskfs.delta.digest import epoch_digest
from vdiskfs.delta.layout import HEAD_SIZE, encode_head
from vdiskfs.delta.tail import settle
from vdiskfs.delta.writer import Spooled


def rehead(
    spooled: Spooled, generation: int, from_digest: bytes, directory: Path | None = None
) -> Spooled:
    """Put a delta into a generation, after the epoch with that digest; in a thread.

    The new file takes the old one's place, or lies in ``directory`` and the old one stays.
    Durable on return; a crash before leaves the old one. A vault in a folder may share the
    old file: it is never written to.

    Raises:
        OSError: the disk is full or broken. The old delta stays.
    """
    head = replace(spooled.head, generation=generation, from_digest=from_digest)
    head = replace(head, to_digest=epoch_digest(head))
    path = spooled.path if directory is None else directory / spooled.path.name
    temporary = path.parent / f"{uuid.uuid4().hex}.tmp"
    try:
        with spooled.path.open("rb") as source, temporary.open("xb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
            out.seek(0)
            out.write(encode_head(head))
            out.seek(-HEAD_SIZE, os.SEEK_END)
            out.write(encode_head(head))
            settle(out, temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Spooled(path, head, spooled.segments)
