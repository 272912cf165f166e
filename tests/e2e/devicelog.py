"""A block device whose power can be cut: every write and flush that it was given is in a log.

qemu-storage-daemon exports an image through its blklogwrites driver; a loop device over the
export carries the file system. When the power is cut the server is stopped at once; what the
disk then holds is made from the image of the beginning and the log. See `rebuild`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.e2e.loopdev import run_tool

SECTOR = 512
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_PUNCH = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Entry(NamedTuple):
    """One request of the log. Offsets and lengths are bytes; ``data`` is where in the log."""

    offset: int
    length: int
    flags: int
    data: int


@dataclass
class Device:
    """A running one. ``path`` is the block device; ``log`` is complete up to any instant."""

    image: Path
    log: Path
    path: Path
    pid: int
    _export: Path
    _gone: bool = False

    def cut(self) -> None:
        """Stop at once: nothing that is not in the log now has reached the disk."""
        os.kill(self.pid, signal.SIGSTOP)

    def fail(self) -> None:
        """End the server: who waits for the device gets an error."""
        if not self._gone:
            self._gone = True
            handle = os.pidfd_open(self.pid)
            try:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                os.waitid(os.P_PIDFD, handle, os.WEXITED)
            finally:
                os.close(handle)


@contextmanager
def logged_device(image: Path, directory: Path) -> Iterator[Device]:
    """Attach a copy of the image with a log; the image itself stays as it is."""
    directory.mkdir()
    working, log, export = directory / "working", directory / "log", directory / "export"
    run_tool(["cp", "--sparse=always", image, working])
    log.touch()
    export.touch()
    socket = directory / "ready"
    # In the foreground: our child, so that its end can be waited for.
    with subprocess.Popen(
        [
            "qemu-storage-daemon", "--pidfile", socket,
            "--blockdev", f"driver=file,node-name=f,filename={working}",
            "--blockdev", "driver=raw,node-name=r,file=f",
            "--blockdev", f"driver=file,node-name=l,filename={log}",
            "--blockdev", "driver=blklogwrites,node-name=w,file=r,log=l,log-append=off,"
            f"log-sector-size={SECTOR},log-super-update-interval=1",
            "--export", f"type=fuse,id=e,node-name=w,mountpoint={export},writable=on,growable=off",
        ],
    ) as server:  # fmt: skip
        device: Device | None = None
        try:
            _wait_exported(server, export, image.stat().st_size)
            found = run_tool(["losetup", "--find", "--show", "--direct-io=on", export]).strip()
            device = Device(image, log, Path(found), server.pid, export)
            yield device
        finally:
            if device is not None:
                device.fail()
                run_tool(["losetup", "--detach", device.path])
            else:
                server.kill()
            subprocess.run(["umount", "-l", export], check=False, capture_output=True)
            server.returncode = server.returncode or 0
    shutil.rmtree(directory)


def _wait_exported(server: subprocess.Popen[bytes], export: Path, size: int) -> None:
    """The file has the image's size as soon as it is the export."""
    pid_file = export.with_name("ready")
    while not pid_file.exists() or export.stat().st_size != size:
        assert server.poll() is None, "qemu-storage-daemon has ended"
        os.sched_yield()


def entries(log: Path) -> Iterator[Entry]:
    """Yield what the device was given, in the order of completion."""
    with log.open("rb") as file:
        magic, version, count, size = struct.unpack("<QQQI", file.read(28))
        assert (magic, version, size) == (0x6A736677736872, 1, SECTOR), "not such a log"
        at = SECTOR
        for _ in range(count):
            file.seek(at)
            sector, sectors, flags, _ = struct.unpack("<QQQQ", file.read(32))
            at += SECTOR
            yield Entry(sector * SECTOR, sectors * SECTOR, flags, at)
            if not flags & _DISCARD:
                at += sectors * SECTOR


class Loss(NamedTuple):
    """What became of the writes that no flush had made safe."""

    safe: int
    kept: int
    lost: int
    torn: int


def rebuild(image: Path, log: Path, target: Path, choice: random.Random) -> Loss:
    """Write what the disk holds after the power was cut.

    All up to the last completed flush is there. Of the writes after it, which a disk keeps in
    a volatile cache, any subset is, whatever their order was: all, none, or a random half;
    those that were to be written through (FUA) are always, and one is torn between sectors.
    """
    run_tool(["cp", "--sparse=always", image, target])
    every = list(entries(log))
    flushes = [number for number, entry in enumerate(every) if entry.flags & _FLUSH]
    safe = flushes[-1] + 1 if flushes else 0
    share = choice.choice([0.0, 0.5, 0.5, 1.0])
    tail = [entry for entry in every[safe:] if entry.length]
    kept = [entry for entry in tail if entry.flags & _FUA or choice.random() < share]
    torn = None
    if share == 0.5 and kept and kept[-1].length > SECTOR and not kept[-1].flags & _DISCARD:
        torn = kept.pop()
    with log.open("rb") as source, target.open("r+b", buffering=0) as out:
        for entry in [*every[:safe], *kept]:
            _apply(entry, source.fileno(), out.fileno(), entry.length)
        if torn is not None:
            length = choice.randrange(1, torn.length // SECTOR) * SECTOR
            _apply(torn, source.fileno(), out.fileno(), length)
    return Loss(safe, len(kept), len(tail) - len(kept) - (torn is not None), int(torn is not None))


def _apply(entry: Entry, log: int, out: int, length: int) -> None:
    if not length:
        return
    if entry.flags & _DISCARD:
        os.pwrite(out, bytes(length), entry.offset)
        return
    done = 0
    while done < length:
        data = os.pread(log, min(1 << 20, length - done), entry.data + done)
        assert data, "the log is cut short"
        done += os.pwrite(out, data, entry.offset + done)
