"""The body of one request, read piece by piece while it is sent. Runs in trio's threads.

The SDK reads the whole body of a single Put Blob into memory, and bytes are sent as one piece,
for which a slow line has no more time than for a connection. Its hook for requests, which it
calls before it signs, lets pieces of a file of any size, or of memory, take the body's place.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import trio
from azure.core.pipeline import PipelineRequest

from vdiskfs.errors import LocalError


def size_of(path: Path) -> int:
    """Return a file's length. Raises LocalError."""
    with _reading(path):
        return path.stat().st_size


class Body:
    """The bytes of one file, or of memory; reading stops when the task that waits has left."""

    def __init__(self, source: Path | memoryview, length: int) -> None:
        """Name the source; a file is open while this is entered."""
        self._source = source
        self._name = source if isinstance(source, Path) else "what is in memory"
        self._length = length
        self._missing = length

    def __enter__(self) -> Self:
        if isinstance(self._source, Path):
            with _reading(self._source):
                self._file: BinaryIO = self._source.open("rb", buffering=0)
        else:
            self._file = io.BytesIO(self._source)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Return the length of the body; requests asks for it."""
        return self._length

    def read(self, size: int) -> bytes:
        """Return the next piece."""
        trio.from_thread.check_cancelled()
        with _reading(self._name):
            data = self._file.read(min(size, self._missing))
        if not data and self._missing:
            raise LocalError(f"{self._name} became shorter while it was sent")
        self._missing -= len(data)
        return data

    def replace_body(self, request: PipelineRequest[Any]) -> None:
        """Be the body of a request that has none; called before it is signed."""
        request.http_request.headers["Content-Length"] = str(self._length)
        request.http_request.data = self


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
