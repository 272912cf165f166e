"""Where a key comes from: an option, the environment, the configuration. Never an argument."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vdiskfs.config import Config, MountSettings
from vdiskfs.crypto.secrets import PASSPHRASE_MAX, Secrets, read_key_file
from vdiskfs.errors import RefusedError

PASSPHRASE = "VDISKFS_PASSPHRASE"  # noqa: S105 - the name of a variable
PASSPHRASE_FILE = "VDISKFS_PASSPHRASE_FILE"  # noqa: S105
KEY_FILE = "VDISKFS_KEY_FILE"


def given_secrets(
    options: Config, key_file: str | None, environ: Mapping[str, str] = os.environ
) -> Secrets:
    """Return what the user gives to open a vault; nothing is asked for.

    Args:
        options: their ``key_file`` counts where no other is named.
        key_file: the option's.
        environ: has the passphrase or the name of a file with it, and of a key file.

    Raises:
        RefusedError: a file that was named cannot be read, is open to others, or is no key.
        UsageError: the passphrase is empty or too long.
    """
    path = key_file or environ.get(KEY_FILE) or options.key_file
    secrets = Secrets(given_passphrase(environ), read_key_file(Path(path)) if path else None)
    secrets.check()
    return secrets


def given_passphrase(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the passphrase that the environment has or names; errors as `given_secrets`."""
    if PASSPHRASE in environ:
        return environ[PASSPHRASE]
    path = environ.get(PASSPHRASE_FILE)
    return read_passphrase_file(Path(path)) if path else None


def read_passphrase_file(path: Path) -> str:
    """Return the first line of a file that only its owner may read; RefusedError."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise RefusedError(
                    f"{path}: other users may read this passphrase", hint="chmod 600 it"
                )
            return file.readline(PASSPHRASE_MAX + 2).removesuffix("\n")
    except OSError as error:
        raise RefusedError(f"{path}: the passphrase cannot be read: {error.strerror}") from None


def secrets_of(settings: MountSettings) -> Secrets:
    """Return what the settings of a mount hold."""
    key = settings.file_key
    return Secrets(settings.passphrase, bytes.fromhex(key) if key else None)
