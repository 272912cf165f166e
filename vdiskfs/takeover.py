"""A connection goes from one daemon to the next: what is given away, and how it is taken up.

Kept by name (vdiskfs.fdstore): ``connection``, the /dev/fuse descriptor; ``source``, the
source directory, which ``--over`` hides; ``session``, a file in memory with the kernel's
FUSE_INIT, what the vault said of itself and its key; and the names (vdiskfs.tree.handover).

Before Linux 6.9 a request that a dead daemon had read is never seen again. There the
connection is kept as a second handle of it (FUSE_DEV_IOC_CLONE): the kernel fails what was
under way on the daemon's own when that closes, instead of leaving its callers for ever.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import struct
from dataclasses import asdict, dataclass, field, replace

import trio

from vdiskfs import native
from vdiskfs.catalog import Vault
from vdiskfs.crypto import DataKey
from vdiskfs.errors import VaultUnreachableError, VdiskfsError
from vdiskfs.fdstore import FdStore
from vdiskfs.tree import Nodes

log = logging.getLogger(__name__)

RETRY_S = 2.0
"""Seconds between tries to open a recovery point again while the vault is away."""

_CONNECTION, _SOURCE, _SESSION = "connection", "source", "session"
_CLONE = 0x8004E500  # FUSE_DEV_IOC_CLONE: _IOR(229, 0, uint32_t)


@dataclass(frozen=True, slots=True)
class Session:
    """What the first daemon learned and its successors need."""

    init: bytes
    vault_id: str
    vault_created: str
    can_resend: bool = True
    # The vault's data key, hexadecimal; empty: it is not encrypted. In memory alone.
    vault_key: str = field(default="", repr=False)

    @staticmethod
    def of(init: bytes, vault: Vault) -> Session:
        """Return what is to be known of a vault that is open."""
        key = "" if vault.key is None else vault.key.secret.hex()
        return Session(init, vault.vault_id, vault.created, vault_key=key)

    @property
    def data_key(self) -> DataKey | None:
        """Return the vault's key; None: it is not encrypted."""
        return DataKey(bytes.fromhex(self.vault_key), self.vault_id) if self.vault_key else None

    def to_json(self) -> bytes:
        """Write it."""
        return json.dumps(asdict(self) | {"init": self.init.hex()}).encode()

    @staticmethod
    def from_json(text: bytes) -> Session:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return Session(**values | {"init": bytes.fromhex(values["init"])})


@dataclass(frozen=True, slots=True)
class Kept:
    """What a predecessor left. The descriptors are the caller's."""

    connection: int
    source: int | None
    session: Session

    @property
    def init(self) -> bytes:
        """The kernel's FUSE_INIT request."""
        return self.session.init


def give_away(
    store: FdStore, connection: int, source: int | None, session: Session, *, can_resend: bool
) -> None:
    """Have everything kept that a successor starts from; the connection last.

    Without the connection the rest is not looked at: all of it is there, or it does not count.
    """
    session = replace(session, can_resend=can_resend)
    fd = os.memfd_create("vdiskfs-session", os.MFD_CLOEXEC)
    try:
        os.write(fd, session.to_json())
        store.push(_SESSION, fd)
    finally:
        os.close(fd)
    if source is not None:
        store.push(_SOURCE, source)
    if can_resend:
        store.push(_CONNECTION, connection)
        return
    clone = clone_connection(connection)
    try:
        store.push(_CONNECTION, clone)
    finally:
        os.close(clone)


def take_over(fds: dict[str, int], store: FdStore | None) -> Kept | None:
    """Take what a predecessor left out of ``fds``; None: there is no connection to serve."""
    taken = {name: fds.pop(name) for name in (_CONNECTION, _SOURCE, _SESSION) if name in fds}
    if taken.keys() >= {_CONNECTION, _SESSION} and not _has_ended(taken[_CONNECTION]):
        size = os.fstat(taken[_SESSION]).st_size
        session = Session.from_json(os.pread(taken[_SESSION], size, 0))
        os.close(taken[_SESSION])
        connection = taken[_CONNECTION]
        if not session.can_resend:
            connection = clone_connection(connection)
            os.close(taken[_CONNECTION])
        return Kept(connection, taken.get(_SOURCE), session)
    for name, fd in {**taken, **fds}.items():
        os.close(fd)
        if store is not None:
            store.remove(name)
    fds.clear()
    return None


def clone_connection(connection: int) -> int:
    """Return another handle of a FUSE connection, with requests of its own."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _CLONE, struct.pack("I", connection))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _has_ended(connection: int) -> bool:
    """Say whether the mount is gone."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


async def serve_node(core: native.Core, nodes: Nodes, number: int) -> None:
    """Let the data plane answer for a node that the kernel has open from a predecessor.

    The requests that wait run afterwards. Of a recovery point they wait for the vault.
    """
    error = 0
    while True:
        try:
            await nodes.get(number).serve()
            break
        except VaultUnreachableError as failure:
            log.info("node %d waits to be opened again: %s", number, failure)
            await trio.sleep(max(RETRY_S, failure.retry_after_s or 0.0))
        except OSError as failure:
            log.error("node %d cannot be opened again: %s", number, failure)
            error = failure.errno or errno.EIO
            break
        except VdiskfsError as failure:
            log.error("node %d cannot be opened again: %s", number, failure)
            error = errno.EIO
            break
        except Exception:
            log.exception("node %d cannot be opened again", number)
            error = errno.EIO
            break
    await trio.to_thread.run_sync(core.retry, number, error)
