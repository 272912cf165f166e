"""The lock bytes that QEMU puts on an image it writes.

While they are held, QEMU, qemu-img and qemu-io refuse to open the source file for writing
(and for reading without ``force-share``) behind the mount, as if a machine ran on it. The
scheme is that of QEMU's block/file-posix.c: a permission that is used is a shared lock on
byte 100 + n, one that others must not use a shared lock on byte 200 + n, and whoever comes
asks whether an exclusive lock could be had on the bytes that stand against him.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vdiskfs.errors import BusyError, LocalError, RefusedError

PERM_BASE = 100
SHARED_BASE = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_USED = (_CONSISTENT_READ, _WRITE, _RESIZE)
_REFUSED = (_WRITE, _RESIZE)
# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")


class ImageLock:
    """Holds the lock bytes of one file until `close`.

    Args:
        fd: the file; opened again, so that these locks are its own (O_PATH will do).
        name: the file's, for messages.

    Raises:
        BusyError: somebody holds bytes that stand against us: QEMU uses the file directly.
        LocalError: the file cannot be read, or its file system keeps no locks.
    """

    def __init__(self, fd: int, name: str) -> None:
        try:
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise RefusedError(
                f"{name}: this user may not read the image", hint="check its owner and mode"
            ) from error
        except OSError as error:
            raise LocalError(f"{name}: {error.strerror}") from error
        try:
            self._take(name)
        except OSError as error:
            self.close()
            raise LocalError(f"{name}: cannot be locked: {error.strerror}") from error
        except BusyError:
            self.close()
            raise

    def _take(self, name: str) -> None:
        # Ours first, then the question: of two who come at once at least one sees the other.
        try:
            for offset in _bytes_held():
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, offset))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _busy(name) from None
            raise
        if _is_against(self._fd):
            raise _busy(name)

    def close(self) -> None:
        """Give the bytes back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_in_use(path: str) -> bool:
    """Tell whether somebody uses an image directly, without keeping anybody from doing so.

    Raises:
        OSError: the file cannot be read, or its file system keeps no locks.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _is_against(fd)
    finally:
        os.close(fd)


def _is_against(fd: int) -> bool:
    against = [SHARED_BASE + n for n in _USED] + [PERM_BASE + n for n in _REFUSED]
    return any(_is_held(fd, offset) for offset in against)


def _is_held(fd: int, offset: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, offset))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _bytes_held() -> list[int]:
    return [PERM_BASE + n for n in _USED] + [SHARED_BASE + n for n in _REFUSED]


def _lock(kind: int, offset: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)


def _busy(name: str) -> BusyError:
    return BusyError(
        f"{name}: QEMU uses the file directly",
        hint="stop that machine, and let it open the file in the mount",
    )
