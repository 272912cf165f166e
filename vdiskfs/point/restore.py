"""Restoring a point: its bytes as a file, sparse, or on standard output."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import trio

from vdiskfs.delta.entries import Bools, extents_of_pages
from vdiskfs.errors import AlreadyExistsError, LocalError, UsageError
from vdiskfs.point.fetch import first_error
from vdiskfs.point.reader import PointReader
from vdiskfs.units import PAGE_SIZE

# One step: 8 MiB of the disk; this many steps are under way at once.
STEP = 2048
STEPS_AT_ONCE = 3
FORMATS = ("raw", "qcow2")
STDOUT = "-"

# progress(done, total): bytes of the disk dealt with; never falls.
Progress = Callable[[int, int], None]


async def restore(
    reader: PointReader,
    target: str | Path,
    *,
    force: bool = False,
    format: str = "raw",  # noqa: A002  the word of the command line
    progress: Progress | None = None,
) -> int:
    """Write the disk at a point to a file, or to standard output; return the bytes of data.

    The file gets its name when it is complete and synced; zeros are never written to it.

    Raises:
        AlreadyExistsError: the file exists and ``force`` is not given.
        DamagedError: a page cannot be read; no file is left.
        LocalError: the file cannot be written; none is left.
        UsageError: the format is unknown, or cannot go where it is to go.
    """
    if format not in FORMATS:
        raise UsageError(f"not a format: {format!r}", hint="use raw or qcow2")
    if str(target) == STDOUT:
        if format != "raw":
            raise UsageError("only raw can go to standard output")
        return await _restore_stream(reader, 1, progress)
    path = Path(target)
    await trio.to_thread.run_sync(_check_target, path, force)
    async with _temporary(path) as temporary:
        written = await _restore_file(reader, temporary, progress)
        if format == "qcow2":
            await trio.to_thread.run_sync(_convert, temporary)
        await trio.to_thread.run_sync(_give_name, temporary, path, force)
    return written


def _check_target(path: Path, force: bool) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.absolute().parent.is_dir():
            raise LocalError(f"{path}: there is no such directory") from None
        return
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: not a file")
    if not force:
        raise AlreadyExistsError(f"{path}: exists", hint="use --force to replace it")


@asynccontextmanager
async def _temporary(path: Path) -> AsyncIterator[Path]:
    """Give a name beside the target; nothing of that name is left behind."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


async def _restore_file(reader: PointReader, path: Path, progress: Progress | None) -> int:
    with _local_errors(path):
        # 0600: a disk's content is nobody else's.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with _local_errors(path):
            os.ftruncate(descriptor, reader.size)
        written = await _copy(reader, path, descriptor, progress)
        with _local_errors(path):
            await trio.to_thread.run_sync(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    return written


async def _copy(reader: PointReader, path: Path, descriptor: int, progress: Progress | None) -> int:
    """Copy all data, several steps at once."""
    free = trio.Semaphore(STEPS_AT_ONCE)
    total = done = 0

    async def step(page: int, count: int) -> None:
        nonlocal total, done
        data, mask = await reader.read_mapped(page, count)
        with _local_errors(path):
            written = await trio.to_thread.run_sync(
                _write_data, descriptor, page, data, mask, reader.size
            )
        total += written  # not in one: others have added to it meanwhile
        free.release()
        done += count * PAGE_SIZE
        if progress is not None:
            progress(min(done, reader.size), reader.size)

    page = 0
    try:
        async with trio.open_nursery() as nursery:
            while page < reader.pages:
                found = await reader.next_candidate(page)
                if found is None:
                    break
                done += (found - page) * PAGE_SIZE
                count = min(STEP - found % STEP, reader.pages - found)
                await free.acquire()
                nursery.start_soon(step, found, count)
                page = found + count
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    if progress is not None:
        progress(reader.size, reader.size)
    return total


def _write_data(descriptor: int, page: int, data: bytearray, mask: Bools, size: int) -> int:
    runs = extents_of_pages(np.flatnonzero(mask).astype(np.uint64))
    view, written = memoryview(data), 0
    for start, end in zip(runs.start.tolist(), runs.end.tolist(), strict=True):
        offset = (page + start) * PAGE_SIZE
        part = view[start * PAGE_SIZE : end * PAGE_SIZE]
        # The last page is padded; the file is not.
        _write_all(descriptor, part[: size - offset], offset)
        written += min(len(part), size - offset)
    return written


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


async def _restore_stream(reader: PointReader, descriptor: int, progress: Progress | None) -> int:
    """Write everything, in order, to a pipe or a terminal."""
    written = 0
    for page in range(0, reader.pages, STEP):
        count = min(STEP, reader.pages - page)
        data, mask = await reader.read_mapped(page, count)
        part = memoryview(data)[: reader.size - page * PAGE_SIZE]
        with _local_errors(Path("standard output")):
            await trio.to_thread.run_sync(_write_stream, descriptor, part)
        written += int(mask.sum()) * PAGE_SIZE
        if progress is not None:
            progress(min((page + count) * PAGE_SIZE, reader.size), reader.size)
    return written


def _write_stream(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _convert(raw: Path) -> None:
    """Turn the raw file into qcow2 under the same name."""
    tool = shutil.which("qemu-img")
    if tool is None:
        raise LocalError("qemu-img is not installed", hint="install it (qemu-utils), or use raw")
    out = raw.with_name(f"{raw.name}.qcow2")
    try:
        result = subprocess.run(
            [tool, "convert", "-f", "raw", "-O", "qcow2", os.fspath(raw), os.fspath(out)],
            check=False,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise LocalError(f"qemu-img convert: {result.stderr.strip()[:300]}")
        with out.open("rb") as file:
            os.fsync(file.fileno())
        out.replace(raw)
    finally:
        out.unlink(missing_ok=True)


def _give_name(temporary: Path, path: Path, force: bool) -> None:
    with _local_errors(path):
        if force:
            temporary.replace(path)
        else:
            # link() refuses where rename() would replace what came in the meantime.
            os.link(temporary, path)
        descriptor = os.open(path.absolute().parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise AlreadyExistsError(f"{path}: exists", hint="use --force to replace it") from None
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror or error}") from error
