"""Boots a small guest under QEMU's software emulation, on given disks, without a network.

    with Guest([Disk(image)], "dd if=/dev/vda of=/dev/null", tmp_path) as guest:
        guest.wait_exit()

The script is busybox sh in an initramfs; the first disk is /dev/vda. What it prints is in
``guest.console``. ``guest.send`` gives it a line to ``read``.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.e2e.guest_files import initramfs, kernel

BOOT_TIMEOUT_S = 90  # software emulation on a busy machine; some 10 s on an idle one


@dataclass(frozen=True)
class Disk:
    """One virtio disk of the guest."""

    path: Path
    format: str = "raw"
    direct: bool = True  # cache.direct=on: no page cache of QEMU's host in between
    read_only: bool = False
    write_log: Path | None = None  # an empty file: QEMU's blklogwrites notes all writes in it


class GuestError(AssertionError):
    """The guest did not do what was waited for; the message ends with its console."""


class Guest:
    """One running guest. QEMU is ended by its process id when the block ends."""

    def __init__(
        self,
        disks: Sequence[Disk],
        script: str,
        directory: Path,
        *,
        memory_mib: int = 256,
        options: Sequence[str] = (),
        programs: Sequence[Path] = (),
        libraries: Sequence[Path] = (),
        drivers: Sequence[str] = (),
    ) -> None:
        self._disks = disks
        self._options = [*options, "-m", str(memory_mib)]
        self._initramfs = directory / "initramfs.gz"
        initramfs(script, self._initramfs, programs, drivers, libraries)
        self._process: subprocess.Popen[bytes] | None = None
        self._text = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="guest-console")

    @property
    def console(self) -> str:
        """All that the guest has printed so far."""
        with self._changed:
            return self._text.decode(errors="replace").replace("\r\n", "\n")

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End QEMU as a power cut does; nothing to do when it has ended."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        self._reader.join()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._initramfs.unlink(missing_ok=True)

    def send(self, line: str) -> None:
        """Type a line on the guest's console."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def wait_line(self, pattern: str, timeout_s: float = BOOT_TIMEOUT_S) -> re.Match[str]:
        """Return the first match of a pattern in the console, once it is there.

        Raises:
            GuestError: the guest ended, or the time did, without.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                ended, length = self._ended, len(self._text)
            if found := re.search(pattern, self.console, re.MULTILINE):
                return found
            left = deadline - time.monotonic()
            if ended or left <= 0:
                why = "the guest ended" if ended else f"{timeout_s} s passed"
                raise GuestError(f"{why} without {pattern!r}:\n{self.console}")
            with self._changed:
                if not self._ended and len(self._text) == length:
                    self._changed.wait(left)

    def wait_exit(self, timeout_s: float = BOOT_TIMEOUT_S, *, code: int = 0) -> str:
        """Wait until the script has ended with this code and QEMU is gone; return the console.

        Raises:
            GuestError: another code, or no end.
        """
        match = self.wait_line(r"^GUEST EXIT (\d+)$", timeout_s)
        if int(match[1]) != code:
            raise GuestError(f"the guest's script ended with {match[1]}:\n{self.console}")
        assert self._process is not None
        self._process.wait(timeout_s)
        return self.console

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while data := self._process.stdout.read1(65536):  # type: ignore[attr-defined]
            with self._changed:
                self._text += data
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _command(self) -> list[str]:
        words = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max"]
        words += ["-smp", "1", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
        words += ["-serial", "stdio", "-nic", "none", "-device", "virtio-rng-pci"]
        words += ["-kernel", str(kernel()), "-initrd", str(self._initramfs)]
        words += ["-append", "console=ttyS0 panic=-1 quiet mitigations=off"]
        for number, disk in enumerate(self._disks):
            words += block_options(f"d{number}", disk)
            # A logged request is one of the guest's, not several in one.
            merging = ",request-merging=off" * (disk.write_log is not None)
            words += ["-device", f"virtio-blk-pci,drive=d{number}{merging}"]
        return [*words, *self._options]


def block_options(name: str, disk: Disk) -> list[str]:
    """Return QEMU's options for a disk as the block node of this name."""
    common = f"cache.direct={_switch(disk.direct)},read-only={_switch(disk.read_only)}"
    # A comma within a value is written twice.
    path = str(disk.path).replace(",", ",,")
    file = f"driver=file,node-name={name}-file,filename={path},discard=unmap,{common}"
    inner = name if disk.write_log is None else f"{name}-inner"
    node = f"driver={disk.format},node-name={inner},file={name}-file,discard=unmap,{common}"
    words = ["--blockdev", file, "--blockdev", node]
    if disk.write_log is not None:
        path = str(disk.write_log).replace(",", ",,")
        words += ["--blockdev", f"driver=file,node-name={name}-log,filename={path}"]
        log = f"log={name}-log,log-append=off,log-sector-size=512,discard=unmap"
        words += ["--blockdev", f"driver=blklogwrites,node-name={name},file={inner},{log}"]
    return words


def _switch(on: bool) -> str:
    return "on" if on else "off"
