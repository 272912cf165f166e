"""The tree of errors.

    VdiskfsError                 exit 1
    ├── UsageError               exit 2   wrong use of the program or the configuration
    ├── NotFoundError            exit 3   no such vault, disk, point, job
    ├── StateError               exit 4   not allowed in this state
    │   ├── AlreadyExistsError            the name is taken
    │   ├── ConflictError                 a compare-and-swap lost, or a slot is taken
    │   ├── BusyError                     in use
    │   ├── WrongVaultError               another vault, or an older state of it
    │   └── PassStoppedError              a pass was stopped; what it did stays
    ├── VaultUnreachableError    exit 5   the network, throttling, the vault's own errors
    ├── DamagedError             exit 6   data damaged or proof failed
    │   └── FormatError                   bytes that are not what the format says
    ├── RefusedError             exit 7   credentials, permission
    │   └── KeyNeededError                the vault is encrypted, and no key for it was given
    └── LocalError               exit 1   this host: its disk, kernel, limits
        └── ImageReadError                its disk does not give back what an image holds

Every error prints as one line: what, where, and (``hint``) what to do next.
Raise where the fact is known; catch to add a field, or at an edge: ``fs`` turns
it into an errno, ``api`` into a status, ``tools`` into an exit code.
"""

from __future__ import annotations

import errno


class VdiskfsError(Exception):
    """The root. ``hint`` says what the user can do next; empty where nothing can be done."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """One line: the message, then the hint."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(VdiskfsError):
    """The program was called, or configured, in a way that cannot work."""

    exit_code = 2


class NotFoundError(VdiskfsError):
    """There is no such vault, disk, point, job or object."""

    exit_code = 3


class StateError(VdiskfsError):
    """The request is understood and not allowed in this state."""

    exit_code = 4


class AlreadyExistsError(StateError):
    """The name is taken."""


class ConflictError(StateError):
    """Somebody else was faster: a compare-and-swap lost, or a slot is taken."""


class BusyError(StateError):
    """The thing is in use."""


class WrongVaultError(StateError):
    """What answers is another vault, or an older state of it: nothing is sent there."""


class PassStoppedError(StateError):
    """A pass was stopped: by the user, or because its window closed."""


class VaultUnreachableError(VdiskfsError):
    """The vault did not answer, or answered that it cannot now. Worth trying again.

    ``retry_after_s`` is what the vault asked for, or None.
    """

    exit_code = 5

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class DamagedError(VdiskfsError):
    """Data is damaged, or a proof failed. Never worth trying again by itself."""

    exit_code = 6


class SegmentsGoneError(DamagedError):
    """What a delta that waits here refers to was collected: its writer was away for too long."""


class FormatError(DamagedError):
    """Bytes that are not what vdiskfs-format(5) says. ``where`` names the object."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where


class RefusedError(VdiskfsError):
    """Credentials or permission: trying again does not help."""

    exit_code = 7


class KeyNeededError(RefusedError):
    """The vault is encrypted, and nothing that could open it was given."""


class LocalError(VdiskfsError):
    """Something of this host: its disk, its kernel, its limits."""


class ImageReadError(LocalError):
    """The disk that an image lies on does not give back what it holds."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What a file system says that is full, or at a quota."""


def is_disk_error(error: VdiskfsError) -> bool:
    """Say whether a disk of this host failed: the kernel said EIO."""
    cause = error.__cause__
    return isinstance(error, LocalError) and getattr(cause, "errno", None) == errno.EIO
