"""The directory under the mount: nothing may be written there while nothing is mounted.

A machine that is started before its mount would otherwise get a new, empty image beneath
it. The seal is the immutable flag where we are root and the file system knows it, else mode
0000 (which holds everybody but root).

The seal stays after an unmount, orderly or not: the host that boots and starts its machines
before the mount is the case it is for. It is therefore never restored by the daemon, and a
crash leaves nothing to put right. `unseal_mountpoint` takes it away (so does ``chattr -i``
or ``chmod``), which removing the directory needs.

Order: `open_mountpoint`, mount, then `seal_mountpoint` with the descriptor, which still
leads to the directory beneath. (An ordinary user cannot mount on a directory of mode 0000;
opening it makes it 0700 again.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

from vdiskfs.errors import BusyError, LocalError, NotFoundError, RefusedError, UsageError
from vdiskfs.state.users import mounted_paths

_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS, 64-bit
_SET_FLAGS = 0x40086602  # FS_IOC_SETFLAGS
_IMMUTABLE = 0x10


def open_mountpoint(path: str) -> int:
    """Open the directory to mount on; it must be empty and not be one already.

    Raises:
        NotFoundError: there is none.
        UsageError: it is not a directory, or not empty.
        BusyError: something is mounted there.
        RefusedError: it may not be used.
    """
    try:
        if _is_mounted(path):
            raise BusyError(f"{path}: something is mounted there already")
        fd = _open_directory(path)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such mountpoint") from None
    except NotADirectoryError:
        raise UsageError(f"{path}: the mountpoint is not a directory") from None
    except PermissionError as error:
        raise RefusedError(f"{path}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise BusyError(
                f"{path}: a mount whose daemon is gone", hint=f"fusermount3 -uz {path}"
            ) from None
        raise LocalError(f"{path}: {error.strerror}") from error
    with os.scandir(fd) as entries:
        if next(entries, None) is not None:
            os.close(fd)
            raise UsageError(f"{path}: the mountpoint is not empty")
    return fd


def _is_mounted(path: str) -> bool:
    real = Path(path).resolve()
    here, above = real.lstat(), real.parent.stat()
    return here.st_dev != above.st_dev or str(real) in mounted_paths()


def _open_directory(path: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:
        status = Path(path).stat()
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0:
            raise
    Path(path).chmod(0o700)  # our own seal
    return os.open(path, flags)


def seal_mountpoint(fd: int) -> bool:
    """Make the directory unusable. Return False if it is not ours to seal."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # not every file system knows the flag
            _set_immutable(fd, on=True)
            return True
    try:
        os.fchmod(fd, 0)
    except PermissionError:
        return False
    return True


def unseal_mountpoint(path: str) -> None:
    """Make the directory usable again; does nothing to one that is not sealed.

    Raises:
        LocalError: the host refused.
    """
    try:
        fd = _open_directory(path)
        try:
            if os.geteuid() == 0:
                with contextlib.suppress(OSError):
                    _set_immutable(fd, on=False)
            if stat.S_IMODE(os.fstat(fd).st_mode) == 0:
                os.fchmod(fd, 0o700)
        finally:
            os.close(fd)
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error


def _set_immutable(fd: int, *, on: bool) -> None:
    [flags] = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, struct.pack("l", 0)))
    wanted = flags | _IMMUTABLE if on else flags & ~_IMMUTABLE
    if wanted != flags:
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", wanted))
