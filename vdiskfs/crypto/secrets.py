"""What a user gives to open a vault: a passphrase, a key file, or both.

A key file is one line, ``vdiskfs-key-1`` and 64 hexadecimal digits: 256 random bits that we
made, so that nothing has to be slowed down to guess them.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from vdiskfs.errors import AlreadyExistsError, LocalError, RefusedError, UsageError

_LINE = re.compile(rb"vdiskfs-key-1 ([0-9a-f]{64})\n?")
PASSPHRASE_MAX = 1024


@dataclass(frozen=True, repr=False)
class Secrets:
    """What was given. ``file_key`` is what a key file holds: 32 bytes."""

    passphrase: str | None = None
    file_key: bytes | None = None

    def __bool__(self) -> bool:
        return self.passphrase is not None or self.file_key is not None

    def check(self) -> None:
        """Refuse a passphrase that protects nothing, or is no text that can be typed.

        Raises:
            UsageError: it is empty, or too long.
        """
        if self.passphrase is not None and not 0 < len(self.passphrase) <= PASSPHRASE_MAX:
            raise UsageError(f"a passphrase has 1 to {PASSPHRASE_MAX} characters")


def read_key_file(path: Path) -> bytes:
    """Return the 32 bytes of a key file.

    Raises:
        RefusedError: it is absent, open to other users, or no key file.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise RefusedError(f"{path}: other users may read this key", hint="chmod 600 it")
            line = file.read(256)
    except OSError as error:
        raise RefusedError(f"{path}: the key file cannot be read: {error.strerror}") from None
    found = _LINE.fullmatch(line)
    if found is None:
        raise RefusedError(f"{path}: this is not a key file of vdiskfs")
    return bytes.fromhex(found[1].decode())


def make_key_file(path: Path) -> bytes:
    """Make a new key file, for its owner alone, and return its 32 bytes. Durable on return.

    Raises:
        AlreadyExistsError: there is a file of that name.
        LocalError: it cannot be written.
    """
    key = secrets.token_bytes(32)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(b"vdiskfs-key-1 " + key.hex().encode() + b"\n")
            file.flush()
            os.fsync(fd)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except FileExistsError:
        raise AlreadyExistsError(f"{path} exists already") from None
    except OSError as error:
        raise LocalError(f"{path}: the key file cannot be written: {error.strerror}") from None
    return key
