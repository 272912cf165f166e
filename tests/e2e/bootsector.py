"""The smallest guest there is: a boot sector that writes sector after sector through the BIOS.

    with SectorGuest(image, directory) as guest:
        guest.wait_answered(1000)

Its disk needs `boot_sector` in front. It tells of each write that was answered, and goes on;
after an error it stands still. There is no system beneath it that would try anything again.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

SECTOR = 512
FIRST, SLOTS = 8, 1024  # the sectors that are written, in turn
SIZE = 1 << 20

_CODE = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0"  # ax, ds, es, ss = 0
    "bc007c"  # sp = 0x7c00
    "66ff06007d 66a1007d"  # next: eax = ++number (at 0x7d00)
    "bf0080 b98000 fc 66f3ab"  # fill 512 bytes at 0x8000 with it
    "6625ff030000 6683c008 66a3187d"  # sector = 8 + (eax & 1023)
    "b80043 b280 be107d cd13"  # write it: int 13h, function 43h, packet at 0x7d10
    "b045 7202 b02e"  # al = 'E', or '.' if it was answered without an error
    "baf803 ee"  # say so on the serial console
    "3c2e 74c7"  # '.': next
    "faf4"  # stand still
)
_PACKET = struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, 0)


def boot_sector() -> bytes:
    """Return the first sector of the guest's disk."""
    sector = bytearray(_CODE.ljust(SECTOR, b"\0"))
    sector[0x110 : 0x110 + len(_PACKET)] = _PACKET
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


def newest(image: bytes) -> int:
    """Return the number of the last write that an image holds; it holds all before it, too."""
    slots = image[FIRST * SECTOR :][: SLOTS * SECTOR]
    held = [struct.unpack_from("<I", slots, at)[0] for at in range(0, len(slots), SECTOR)]
    last = int(max(held))
    for slot, number in enumerate(held):
        assert slots[slot * SECTOR :][:SECTOR] == struct.pack("<I", number) * (SECTOR // 4)
        wanted = last - (last - slot) % SLOTS
        assert number == max(0, wanted), f"slot {slot} of write {number}, not of {wanted}"
    return last


class SectorGuest:
    """QEMU with this guest, its disk as block node ``disk``; ended with the block."""

    def __init__(self, image: Path, directory: Path) -> None:
        self._serial = directory / "serial"
        self._control = directory / "qmp"
        self._command = [
            "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "16", "-smp", "1",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", f"file:{self._serial}",
            "-qmp", f"unix:{self._control},server=on,wait=off",
            "-blockdev", json.dumps(self.node("disk", image)),
            "-device", "virtio-blk-pci,id=vd0,drive=disk,werror=stop,rerror=stop",
        ]  # fmt: skip

    @staticmethod
    def node(name: str, image: Path) -> dict[str, Any]:
        """Return a block node for an image, past the page cache, as machines have it."""
        file = {"driver": "file", "filename": str(image), "cache": {"direct": True}}
        return {"driver": "raw", "node-name": name, "cache": {"direct": True}, "file": file}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def told(self) -> bytes:
        """What the guest has said."""
        return self._serial.read_bytes() if self._serial.exists() else b""

    @property
    def answered(self) -> int:
        """How many writes were answered without an error."""
        return self.told.count(b".")

    def is_stopped_by_error(self) -> bool:
        """Whether QEMU has stopped the machine because of an error of its disk."""
        return bool(self.ask("query-status")["status"] == "io-error")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Give QEMU a command, and return its answer.

        Raises:
            RuntimeError: it refuses.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self._control))
            with connection.makefile("rw") as lines:
                for name, words in (("qmp_capabilities", {}), (command, arguments)):
                    lines.write(
                        json.dumps({"execute": name, "arguments": words, "id": name}) + "\n"
                    )
                    lines.flush()
                    # The greeting and events come first, or between.
                    while (answer := json.loads(lines.readline())).get("id") != name:
                        pass
                if "error" in answer:
                    raise RuntimeError(f"{command}: {answer['error']['desc']}")
                return answer["return"]

    def wait(self, what: str, is_true: Callable[[], bool]) -> None:
        """Wait until it is true.

        Raises:
            TimeoutError: it is not, and what the guest has said.
        """
        end = time.monotonic() + 60
        while not is_true():
            if time.monotonic() > end or self._process.poll() is not None:
                raise TimeoutError(f"{what}; it said {self.told[-20:]!r}")
            time.sleep(0.02)

    def wait_answered(self, count: int) -> None:
        """Wait until so many more writes are answered."""
        wanted = self.answered + count
        self.wait(f"{count} writes", lambda: self.answered >= wanted)
