"""Named crash hooks: the process kills itself at a durable step, for tests.

``VDISKFS_CRASH=NAME:N`` in the environment ends the process by SIGKILL when the hook of that
name is passed for the Nth time; ``NAME`` may be ``*``, then the Nth hook of any name. With
``VDISKFS_CRASH_LOG=FILE`` every hook that is passed adds a line with its name to that file,
so that a walk knows how many there are. Without either nothing happens. The C core has the
same hooks of its own (native/src/crash.c) and counts apart.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_plan, _, _number = os.environ.get("VDISKFS_CRASH", "").rpartition(":")
_left = int(_number) if _plan and _number.isdigit() else 0
_log = os.environ.get("VDISKFS_CRASH_LOG", "")


def hook(name: str) -> None:
    """Pass a hook. Names are ``noun.step``: what is durable when it is passed."""
    global _left  # noqa: PLW0603 (one countdown for the process)
    if _log:
        with Path(_log).open("a", encoding="ascii") as file:
            file.write(f"{name}\n")
    if _left and _plan in (name, "*"):
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGKILL)
