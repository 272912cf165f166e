"""Small files that survive a crash: whole or not at all, and damage is seen.

A record is one JSON document ``{"check": ..., "body": {...}}``; the check is BLAKE2b-128
over the canonical text of the body. Everything here blocks on the local disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.errors import DamagedError, LocalError, NotFoundError

log = logging.getLogger(__name__)

_LIMIT = 16 << 20
_EXCHANGE = 2


def write_file(path: Path, data: bytes) -> None:
    """Put a file at the path, private to its owner.

    Durable on return; a crash before leaves the file that was there.

    Raises:
        LocalError: the disk refused (full, broken, read-only).
    """
    partial = path.with_name(f".{path.name}.new")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        hook("record.synced")
        partial.rename(path)
        hook("record.renamed")
        sync_directory(path.parent)
        hook("record.durable")
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def remove_file(path: Path) -> None:
    """Remove a file if it is there; durable on return."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)
    hook("record.removed")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _spare(path: Path) -> Path:
    return path.with_name(f".{path.name}.spare")


def keep_room(path: Path, size: int) -> None:
    """Have room for a record that may have to be written first on a full disk, if there is any."""
    spare = _spare(path)
    try:
        if spare.exists() and spare.stat().st_blocks * 512 >= size:
            return  # since an earlier start
        fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("%s: no room is kept for it: %s", path, error.strerror)


def write_record(path: Path, body: dict[str, Any]) -> None:
    """Write a record with its check. Durable on return.

    Its last version stays beside it as room for the next one, so that a record that was
    written twice, or has its room by `keep_room`, can be written on a full disk, too (not
    where data is never overwritten).

    Raises:
        LocalError: the disk refused; the record that was there is whole.
    """
    document = {"check": _check(body), "body": body}
    data = json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
    spare, is_first = _spare(path), not path.exists()
    try:
        if is_first and not spare.exists():
            write_file(path, data)
            return
        fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _write_all(fd, data)
            os.ftruncate(fd, len(data))
            os.fsync(fd)
        finally:
            os.close(fd)
        hook("record.synced")
        if is_first:
            spare.rename(path)
        else:
            exchange(spare, path)
        hook("record.renamed")
        sync_directory(path.parent)
        hook("record.durable")
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error


def exchange(new: Path, path: Path) -> None:
    """Put ``new`` at the path; what was there gets its name, where the file system can."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        native.rename(parent, new.name, parent, path.name, _EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        new.rename(path)
    finally:
        os.close(parent)


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises:
        NotFoundError: there is none.
        DamagedError: it is not what was written.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such record") from None
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
    try:
        document = json.loads(text)
        body, check = document["body"], document["check"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{path}: not a record") from None
    if not isinstance(body, dict) or check != _check(body):
        raise DamagedError(f"{path}: the record does not match its check")
    return body


def _check(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()
