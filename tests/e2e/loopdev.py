"""Loop devices and file systems on image files, always cleaned up. Needs root.

Only file systems that the tests made themselves are mounted: what a guest wrote is untrusted
input to the host's kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
# Nothing is repaired: each says with its exit code whether it would have to.
_CHECK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}
KINDS = tuple(_MAKE)


class ToolError(AssertionError):
    """A tool of the host said no; the message has its whole answer."""


def run_tool(command: Sequence[str | Path], timeout_s: float = 120) -> str:
    """Run a tool and return what it printed.

    Raises:
        ToolError: it failed.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise ToolError(f"{words}: exit {done.returncode}\n{output}")
    return output


def make_image(path: Path, size: int) -> Path:
    """Create a sparse file of this size."""
    with path.open("xb") as file:
        file.truncate(size)
    return path


def make_fs(kind: str, target: Path) -> None:
    """Make a file system on a device or in an image file.

    Discarding first would leave nothing to see on a tracked disk that is empty anyway: it is
    left on, as users have it.
    """
    run_tool([*_MAKE[kind], target])


@contextmanager
def attached(
    image: Path, *, read_only: bool = False, direct: bool = True, partitions: bool = False
) -> Iterator[Path]:
    """Attach a loop device and give its path; detached at the end, also when that was lazy.

    With ``direct`` the device writes past the page cache of the file below, as QEMU does with
    cache.direct=on: what the device has completed, the file has got.
    """
    options = ["--read-only"] * read_only + ["--partscan"] * partitions
    if direct:
        options.append("--direct-io=on")
    device = Path(run_tool(["losetup", "--find", "--show", *options, image]).strip())
    try:
        yield device
    finally:
        detach(device)


def detach(device: Path) -> None:
    """Detach; while something still has it open the kernel does so at its last close."""
    run_tool(["losetup", "--detach", device])


@contextmanager
def mounted(
    source: Path, directory: Path, *, kind: str, options: Sequence[str] = ()
) -> Iterator[Path]:
    """Mount a device on a directory, made for it, and take the mount away at the end."""
    directory.mkdir(exist_ok=True)
    # Never lazily: an unmount that does not work is a finding.
    words = ",".join(["nosuid", "nodev", *options])
    run_tool(["mount", "-t", kind, "-o", words, source, directory])
    try:
        yield directory
    finally:
        run_tool(["umount", directory])
        directory.rmdir()


@contextmanager
def file_system(kind: str, image: Path, directory: Path) -> Iterator[Path]:
    """Make a file system in an image, attach and mount it; give the mounted directory."""
    with attached(image) as device:
        make_fs(kind, device)
        with mounted(device, directory, kind=kind) as root:
            yield root


def check_fs(kind: str, target: Path) -> str:
    """Check a file system that is not mounted, without writing; return what the tool said.

    Raises:
        ToolError: it found something.
    """
    return run_tool([*_CHECK[kind], target])


def check_point(
    kind: str, point: Path, directory: Path, look: Callable[[Path], None] | None = None
) -> list[str]:
    """Prove that a copy of a point is a file system as after a power cut; return its files.

    The point is copied, sparse; the copy is mounted, which replays the log, read through,
    given to ``look``, unmounted and checked.

    Raises:
        ToolError: it cannot be mounted, or the check found something.
    """
    directory.mkdir()
    copy = directory / "copy.img"
    try:
        run_tool(["cp", "--sparse=always", point, copy])
        copy.chmod(0o600)
        # Two file systems with one UUID are not mounted at once by xfs, mixed up by btrfs.
        options = ["nouuid"] if kind == "xfs" else []
        with (
            attached(copy) as device,
            mounted(device, directory / "root", kind=kind, options=options) as root,
        ):
            names = [str(path.relative_to(root)) for path in _read_all(root)]
            if look is not None:
                look(root)
        check_fs(kind, copy)
        return names
    finally:
        shutil.rmtree(directory, ignore_errors=False)


def _read_all(root: Path) -> Iterator[Path]:
    """Read every regular file to its end, in the order of names, and yield its path."""
    for directory, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    while file.read(1 << 20):
                        pass
            yield path
