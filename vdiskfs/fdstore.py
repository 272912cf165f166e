"""Descriptors that outlive the daemon: the client of sd_notify(3)'s FDSTORE protocol.

Whoever started the daemon keeps them: systemd, or ``vdiskfs.keeper`` where there is none.
Both speak the same: a datagram with the descriptor gives it, and a successor finds it from
descriptor 3 on, named by ``LISTEN_FDNAMES``. What was sent is kept also when the sender is
killed the moment after: the datagram waits in the keeper's socket.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from array import array
from collections.abc import MutableMapping
from typing import Self

log = logging.getLogger(__name__)

FIRST = 3  # SD_LISTEN_FDS_START

HANDED_OVER = 75
"""The exit status that asks for a successor at once (EX_TEMPFAIL: also for systemd a failure)."""

SEND_S = 5
"""Seconds that a message waits at most for room; the daemon answers for no names meanwhile."""

FAILURE = "X_VDISKFS_FAILURE"
"""The field by which a daemon says why it ends."""


class FdStore:
    """Gives descriptors to whoever keeps them. ``keeper`` is its process id, 0: not ours."""

    def __init__(self, address: str, keeper: int = 0) -> None:
        """Take ``$NOTIFY_SOCKET``: a path, or ``@`` and an abstract name."""
        self.keeper = keeper
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # The kernel queues ten datagrams (net.unix.max_dgram_qlen): a burst of more waits for
        # whoever takes them, which may be waiting for a processor.
        wait = struct.pack("ll", SEND_S, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        self._lost = False

    @classmethod
    def take(cls, environ: MutableMapping[str, str] = os.environ) -> Self | None:
        """Return the store of this process, or None; no child of ours finds it again."""
        address = environ.pop("NOTIFY_SOCKET", "")
        keeper = environ.pop("VDISKFS_KEEPER", "")
        if address[:1] not in ("@", "/"):
            return None
        return cls(address, int(keeper) if keeper.isdigit() else 0)

    def push(self, name: str, fd: int) -> bool:
        """Give a descriptor to be kept under a name; False: nobody takes it."""
        # FDPOLL=0: it is not given back because its other end is gone, and O_PATH will do.
        return self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])

    def remove(self, name: str) -> bool:
        """Have all descriptors of the name closed."""
        return self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def ready(self, status: str) -> bool:
        """Say that the daemon serves."""
        return self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def failed(self, reason: str) -> bool:
        """Say why this daemon is about to end: the keeper tells the user."""
        line = " ".join(reason.split())[:500]
        return self._send(f"STATUS=failed: {line}\n{FAILURE}={line}")

    def _send(self, text: str, fds: list[int] | None = None) -> bool:
        try:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            flags = socket.MSG_DONTWAIT if self._lost else 0  # nobody waits twice for nobody
            self._socket.sendmsg([text.encode()], control, flags, self._address)
        except OSError as error:
            if not self._lost:
                log.warning("nobody keeps the mount's descriptors any more: %s: if the daemon"
                            " died now, machines would get errors", error.strerror)  # fmt: skip
            self._lost = True
            return False
        self._lost = False
        return True


def take_descriptors(environ: MutableMapping[str, str] = os.environ) -> dict[str, int]:
    """Return the descriptors that a predecessor gave, by name; empty for the first daemon."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, int] = {}
    for number, name in enumerate(names[: int(count)]):
        os.set_inheritable(FIRST + number, False)
        found[name] = FIRST + number
    return found
