"""What leaves a handler: FUSEError, with the errno that says it best.

Invariant: nothing but FUSEError leaves a handler. Anything else would end pyfuse3's main
loop, and with it every machine on the mount. `ENOSYS` does not leave either: the kernel
would never ask again.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from pyfuse3 import FUSEError

from vdiskfs.errors import (
    AlreadyExistsError,
    BusyError,
    NotFoundError,
    RefusedError,
    StateError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_ERRNO: tuple[tuple[type[VdiskfsError], int], ...] = (
    (NotFoundError, errno.ENOENT),
    (AlreadyExistsError, errno.EEXIST),
    (BusyError, errno.EBUSY),
    (StateError, errno.EPERM),
    (UsageError, errno.EINVAL),
    (RefusedError, errno.EACCES),
    (VaultUnreachableError, errno.EREMOTEIO),
)


def errno_of(error: Exception, what: str) -> int:
    """Return the errno that answers for an error, and log what a user of the mount cannot see.

    What the host refuses is passed on; an error of ours is logged with its own words; and
    anything unexpected is EIO with its traceback.
    """
    if isinstance(error, OSError) and error.errno:
        log.debug("%s: %s", what, error)
        return errno.EOPNOTSUPP if error.errno == errno.ENOSYS else error.errno
    if isinstance(error, VdiskfsError):
        number = next((number for kind, number in _ERRNO if isinstance(error, kind)), errno.EIO)
        log.log(logging.DEBUG if number == errno.ENOENT else logging.WARNING, "%s: %s", what, error)
        return number
    log.error("%s: unexpected error", what, exc_info=error)
    return errno.EIO


def handler(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError out of a handler; cancellation passes."""

    @functools.wraps(method)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - see the invariant
            raise FUSEError(errno_of(error, method.__name__)) from None

    return guarded
