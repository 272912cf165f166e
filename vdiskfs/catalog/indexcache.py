"""Indexes of the newest deltas, kept locally so that joining reads nothing back."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


class IndexCache:
    """Tails of deltas as files of a directory, the oldest dropped above a limit.

    What is here is only a copy: it is checked like what the vault gives, and may be lost.
    """

    def __init__(self, directory: Path, limit: int = 256 << 20) -> None:
        """Use a directory, which is made when something is put there."""
        self._directory = directory
        self._limit = limit
        self._size: int | None = None

    def get(self, name: str) -> bytes | None:
        """Return the tail of the object of that name, or None."""
        try:
            return self._path(name).read_bytes()
        except OSError:
            return None

    def put(self, name: str, tail: bytes) -> None:
        """Keep a tail; what cannot be kept is left out."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._size is None:
                self._size = sum(path.stat().st_size for path in self._directory.iterdir())
            self._path(name).write_bytes(tail)
            self._size += len(tail)
            if self._size > self._limit:
                self._shrink()
        except OSError:
            self._size = None

    def drop(self, names: Iterable[str]) -> None:
        """Forget tails that are not needed again: they were joined."""
        for name in names:
            path = self._path(name)
            try:
                length = path.stat().st_size
                path.unlink()
            except OSError:
                continue
            if self._size is not None:
                self._size -= length

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give an empty directory for one join at a time, and remove it.

        It lies beside the indexes, and not among the host's temporary files, so that the next
        join removes what a daemon left that died in this one.
        """
        path = self._directory.with_name(f"{self._directory.name}.join")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._directory / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _shrink(self) -> None:
        """Drop the oldest until a quarter of the limit is free."""
        files = [(path, path.stat()) for path in self._directory.iterdir()]
        self._size = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda item: item[1].st_mtime_ns):
            if self._size <= self._limit * 3 // 4:
                break
            path.unlink(missing_ok=True)
            self._size -= status.st_size
