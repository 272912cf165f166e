"""Indexes of the newest deltas, kept locally so that joining reads nothing back.

What was joined is put aside, a file for each block of 16 slots, for `vdiskfs.catalog.repair`:
an index that is damaged in the vault has no other copy. So are leaves and ledgers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgpack
import zstandard

from vdiskfs.delta.names import parse_slot

KEPT_LIMIT = 128 << 20
"""Bytes of what was put aside, of slots and of the rest: 500,000 slots with a page changed each."""

_PACK_MOST = 512 << 20


class IndexCache:
    """Tails of deltas as files of a directory, the oldest dropped above a limit.

    What is here is only a copy: it is checked like what the vault gives, and may be lost.
    """

    def __init__(
        self, directory: Path, limit: int = 256 << 20, kept_limit: int = KEPT_LIMIT
    ) -> None:
        """Use a directory, which is made when something is put there."""
        self._directory = directory
        self._lock = threading.Lock()
        self._tails = _Files(directory, limit)
        # Apart: slots come every second, and leaves and documents stay for years.
        self._slots = _Files(directory.with_name(f"{directory.name}.slots"), kept_limit)
        self._others = _Files(directory.with_name(f"{directory.name}.others"), kept_limit)

    def get(self, name: str) -> bytes | None:
        """Return the tail of the object of that name, or None."""
        return self._tails.get(name)

    def put(self, name: str, tail: bytes) -> None:
        """Keep a tail; what cannot be kept is left out."""
        self._tails.put(name, tail)

    def drop(self, names: Iterable[str]) -> None:
        """Forget tails that are not needed again: they were joined."""
        self._tails.drop(names)

    def put_aside(self, tails: Mapping[str, bytes]) -> None:
        """Keep what nobody needs unless the vault loses it: tails, or whole documents."""
        packs: dict[str, dict[str, bytes]] = {}
        for name, tail in tails.items():
            packs.setdefault(_pack_of(name), {})[name] = tail
        for key, pack in packs.items():
            with self._lock:
                self._files(next(iter(pack))).put(key, _packed({**self._opened(key, pack), **pack}))

    def copies(self, name: str) -> list[bytes]:
        """Return what is kept of an object: ends of it. It is to be checked."""
        found = [self.get(name), self._opened(_pack_of(name), (name,)).get(name)]
        return [one for one in found if one is not None]

    def confirm(self, name: str) -> None:
        """Note that what is put aside of an object was compared with it just now."""
        self._files(name).confirm(_pack_of(name))

    def age_s(self, name: str) -> float:
        """Return for how long what is put aside was not compared; infinite: there is nothing."""
        return self._files(name).age_s(_pack_of(name))

    def _files(self, name: str) -> _Files:
        return self._slots if parse_slot(name) is not None else self._others

    def _opened(self, key: str, names: Iterable[str]) -> dict[str, bytes]:
        packed = self._files(next(iter(names))).get(key)
        if packed is None:
            return {}
        try:
            raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=_PACK_MOST)
            found = msgpack.unpackb(raw)
        except (zstandard.ZstdError, ValueError, msgpack.exceptions.UnpackException):
            return {}
        return found if isinstance(found, dict) else {}

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


class _Files:
    """Bytes by name as files of a directory, the oldest dropped above a limit."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._size: int | None = None

    def get(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except OSError:
            return None

    def put(self, name: str, data: bytes) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._size is None:
                self._size = sum(path.stat().st_size for path in self._directory.iterdir())
            # Whoever reads it meanwhile, or after a crash, finds what was there or what is.
            path = self._path(name)
            new = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
            new.write_bytes(data)
            new.replace(path)
            self._size += len(data)
            if self._size > self._limit:
                self._shrink()
        except OSError:
            self._size = None

    def confirm(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._path(name))

    def age_s(self, name: str) -> float:
        try:
            return time.time() - self._path(name).stat().st_mtime
        except OSError:
            return math.inf

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            try:
                length = path.stat().st_size
                path.unlink()
            except OSError:
                continue
            if self._size is not None:
                self._size -= length

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


def _pack_of(name: str) -> str:
    """Return what is kept together: slots of an aligned block of 16, all else by itself."""
    return name[:-1] if parse_slot(name) is not None else name


def _packed(pack: Mapping[str, bytes]) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(msgpack.packb(dict(pack)))
