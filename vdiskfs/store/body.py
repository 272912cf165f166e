"""A file as the body of one request, read while it is sent. Runs in trio's threads.

The SDK reads the whole body of a single Put Blob into memory; its hook for requests, which
it calls before it signs, lets a file of any size take the body's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import trio
from azure.core.pipeline import PipelineRequest

from vdiskfs.errors import LocalError


def size_of(path: Path) -> int:
    """Return a file's length. Raises LocalError."""
    with _reading(path):
        return path.stat().st_size


class Body:
    """The bytes of one file; reading stops when the task that waits has left."""

    def __init__(self, path: Path, length: int) -> None:
        """Name the file; it is open while this is entered."""
        self._path = path
        self._length = length
        self._missing = length

    def __enter__(self) -> Self:
        with _reading(self._path):
            self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Return the length of the body; requests asks for it."""
        return self._length

    def read(self, size: int) -> bytes:
        """Return the next piece."""
        trio.from_thread.check_cancelled()
        with _reading(self._path):
            data = self._file.read(min(size, self._missing))
        if not data and self._missing:
            raise LocalError(f"{self._path} became shorter while it was sent")
        self._missing -= len(data)
        return data

    def replace_body(self, request: PipelineRequest[Any]) -> None:
        """Be the body of a request that has none; called before it is signed."""
        request.http_request.headers["Content-Length"] = str(self._length)
        request.http_request.data = self


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
