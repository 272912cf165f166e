"""A guest's kernel and its initramfs: Debian's cloud kernel and busybox, nothing installed.

``python -m tests.e2e.guest_files`` fetches the kernel into .venv/guest (``./run setup`` does).
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

CACHE = Path(__file__).resolve().parents[2] / ".venv" / "guest"
# Packages that name the newest kernel for virtual machines: Debian's, Ubuntu's.
_NAMES = ("linux-image-cloud-amd64", "linux-image-virtual")
_MODULES = ("virtio_pci", "virtio_blk", "virtio_rng", "ext4", "xfs", "btrfs", "crc32c-intel")
_APPLETS = ("sh", "mount", "insmod")  # the init script makes the others


class GuestFilesError(RuntimeError):
    """There is no kernel to boot; the message says what to do."""


def kernel() -> Path:
    """Return the kernel image.

    Raises:
        GuestFilesError: it was not fetched.
    """
    found = sorted(CACHE.glob("boot/vmlinuz-*"))
    if not found:
        raise GuestFilesError(f"no kernel under {CACHE}: ./run setup fetches it")
    return found[-1]


def fetch() -> Path:
    """Download and unpack the kernel's packages, unless that was done; return the image."""
    if CACHE.exists():
        return kernel()
    partial = CACHE.with_name("guest.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=partial) as name:
        # apt's own user could not write here.
        command = ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", *_packages()]
        subprocess.run(command, cwd=name, check=True)
        for package in Path(name).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, partial], check=True)
    for directory in ("usr/share", "boot/System.map"):
        shutil.rmtree(partial / directory, ignore_errors=True)
    partial.rename(CACHE)
    return kernel()


def _packages() -> list[str]:
    for name in _NAMES:
        wanted = [p for p in _depends(name) if re.match(r"linux-image-\d", p)]
        if wanted:
            modules = [p for p in _depends(wanted[0]) if re.match(r"linux-modules-\d", p)]
            return [wanted[0], *modules]
    raise GuestFilesError(f"apt knows none of {', '.join(_NAMES)}: run apt-get update")


def _depends(package: str) -> list[str]:
    done = subprocess.run(["apt-cache", "depends", package], capture_output=True, check=False)
    return re.findall(r"Depends: (\S+)", done.stdout.decode())


def initramfs(
    script: str, target: Path, programs: Sequence[Path] = (), drivers: Sequence[str] = (),
    libraries: Sequence[Path] = (), *, switch_root: bool = False,
) -> None:  # fmt: skip
    """Write an initramfs whose init loads the drivers, runs the script and turns off.

    The script is busybox sh; its exit code is printed as ``GUEST EXIT <code>``. The programs lie
    in /bin under their own names, the libraries of those that are not linked statically where
    they lie here; ``drivers`` are loaded beyond the usual. With ``switch_root`` the script mounts
    another root at /mnt, whose init goes on.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise GuestFilesError("no busybox on this host: apt-get install busybox-static")
    modules = list(_modules((*_MODULES, *drivers)))
    load = "".join(f"insmod /modules/{name}\n" for name, _ in modules)
    init = _INIT.replace("@LOAD@", load).replace("@END@", _SWITCH if switch_root else _END)
    with gzip.open(target, "wb", compresslevel=1) as file:
        archive = _Archive(file)
        for directory in ("bin", "dev", "proc", "sys", "mnt", "tmp", "modules"):
            archive.add(directory, b"", stat.S_IFDIR | 0o755)
        archive.add("dev/console", b"", stat.S_IFCHR | 0o600, device=(5, 1))
        archive.add("bin/busybox", Path(busybox).read_bytes(), stat.S_IFREG | 0o755)
        for program in programs:
            archive.add(f"bin/{program.name}", program.read_bytes(), stat.S_IFREG | 0o755)
        above = {parent for path in libraries for parent in path.parents}
        for parent in sorted(above - {Path("/"), Path("/bin")}):
            archive.add(str(parent)[1:], b"", stat.S_IFDIR | 0o755)
        for path in libraries:
            archive.add(str(path)[1:], path.read_bytes(), stat.S_IFREG | 0o755)
        for applet in _APPLETS:
            archive.add(f"bin/{applet}", b"busybox", stat.S_IFLNK | 0o777)
        for name, data in modules:
            archive.add(f"modules/{name}", data, stat.S_IFREG | 0o644)
        archive.add("init", init.encode(), stat.S_IFREG | 0o755)
        archive.add("script", script.encode(), stat.S_IFREG | 0o755)
        archive.close()


_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
/bin/busybox --install -s /bin
@LOAD@
echo "GUEST READY"
sh /script
@END@"""
_END = """echo "GUEST EXIT $?"
poweroff -f
"""
_SWITCH = """umount /proc /sys
exec switch_root /mnt /sbin/init
"""


def _modules(wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted modules that are not built in, each behind those that it needs."""
    files = {}
    for path in CACHE.glob("**/lib/modules/*/kernel/**/*.ko*"):
        files[path.name.split(".ko")[0].replace("-", "_")] = path
    done: dict[str, bytes] = {}
    for name in wanted:
        yield from _with_needs(name.replace("-", "_"), files, done)


def _with_needs(
    name: str, files: dict[str, Path], done: dict[str, bytes]
) -> Iterator[tuple[str, bytes]]:
    if name in done or name not in files:
        return
    done[name] = data = _unpacked(files[name])
    found = re.search(rb"\0depends=([^\0]*)\0", data)
    for need in found[1].decode().split(",") if found else []:
        yield from _with_needs(need.replace("-", "_"), files, done)
    yield f"{name}.ko", data


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


class _Archive:
    """Writes the kernel's initramfs format: cpio "newc" (Documentation: buffer-format)."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._inode = 0

    def add(self, name: str, data: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> None:
        """Append one entry; a link's data is its target."""
        self._inode += 1
        words = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        self._put(b"070701" + b"".join(b"%08X" % word for word in words) + name.encode() + b"\0")
        self._put(data)

    def _put(self, data: bytes) -> None:
        self._file.write(data.ljust(-(-len(data) // 4) * 4, b"\0"))

    def close(self) -> None:
        """Write the end mark."""
        self.add("TRAILER!!!", b"", 0)


if __name__ == "__main__":
    sys.stdout.write(f"{fetch()}\n")
