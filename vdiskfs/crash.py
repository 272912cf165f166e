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
import threading
from pathlib import Path

_lock = threading.Lock()
_plan = ""
_left = 0
_log = ""


def arm(plan: str, log: str) -> None:
    """Say anew what the environment said: ``NAME:N`` or nothing, and a file or nothing."""
    global _plan, _left, _log  # noqa: PLW0603 (one plan for the process)
    _plan, _, number = plan.rpartition(":")
    _left = int(number) if _plan and number.isdigit() else 0
    _log = log


def hook(name: str) -> None:
    """Pass a hook. Names are ``noun.step``: what is durable when it is passed."""
    if _log or _left:
        _pass(name)


def _pass(name: str) -> None:
    global _left  # noqa: PLW0603 (one countdown for the process)
    with _lock:
        if _log:
            with Path(_log).open("a", encoding="ascii") as file:
                file.write(f"{name}\n")
        if _left and _plan in (name, "*"):
            _left -= 1
            if not _left:
                os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("VDISKFS_CRASH", ""), os.environ.get("VDISKFS_CRASH_LOG", ""))
