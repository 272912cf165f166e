"""What the benches share: a vdiskfs mount by its command line, processor time, tables."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vdiskfs.registry import MountEntry, mount_entries
from vdiskfs.state import unseal_mountpoint
from vdiskfs_tools.client import Client

VDISKFS = str(Path(sys.executable).with_name("vdiskfs"))
_TICKS = os.sysconf("SC_CLK_TCK")


def call(*words: str | Path, environ: dict[str, str] | None = None) -> str:
    """Run a command to its end and return its output; its messages are shown."""
    done = subprocess.run(
        words, stdout=subprocess.PIPE, check=True, env={**os.environ, **(environ or {})}
    )
    return done.stdout.decode()


@dataclass(frozen=True)
class Mount:
    """A mounted vdiskfs: where, and how to ask it. Asking costs this process, no command's."""

    mountpoint: Path
    vault: Path
    entry: MountEntry

    def ask(self, *path: str) -> dict[str, Any]:
        """Return a document of the control socket."""
        with Client(self.entry) as client:
            return client.get(*path)

    def disk(self, name: str) -> dict[str, Any]:
        """Return one disk of ``status``."""
        disks: list[dict[str, Any]] = self.ask("status")["disks"]
        return next(disk for disk in disks if disk["name"] == name)

    def wait_first_point(self, name: str, timeout_s: float = 600) -> None:
        """Return once the disk has a stored recovery point.

        Raises:
            TimeoutError: it had none in time.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.disk(name)["usable_point_age_s"] is not None:
                return
            # Each question costs the daemon some milliseconds of what is measured.
            time.sleep(0.5)
        raise TimeoutError(f"no recovery point of {name} within {timeout_s} s")


def make_vault(root: Path) -> None:
    """Make the folder vault that ``vdiskfs`` mounts with."""
    root.mkdir(exist_ok=True)
    call(VDISKFS, "--quiet", "vault", "init", "--encryption", "none", f"file://{root / 'vault'}")


@contextmanager
def vdiskfs(
    root: Path, source: Path, settings: str = "", *, drain: bool = False, url: str | None = None,
    environ: dict[str, str] | None = None,
) -> Iterator[Mount]:  # fmt: skip
    """Mount a source with a vault; unmounted at the end.

    The vault is that of the URL, which is there, else a folder under ``root``, made if absent.
    """
    vault, mountpoint = root / "vault", root / "mnt"
    mountpoint.mkdir(parents=True)
    config = root / "vdiskfs.conf"
    config.write_text(settings, encoding="utf-8")
    if url is None and not vault.exists():
        make_vault(root)
    options: list[str | Path] = ["--state", root / "state", "--config", config, "--site", "bench"]
    options += ["--vault", url or f"file://{vault}"]
    call(VDISKFS, "--quiet", "mount", source, mountpoint, *options, environ=environ)
    try:
        entry = next(e for e in mount_entries() if e.mountpoint == str(mountpoint))
        yield Mount(mountpoint, vault, entry)
    finally:
        words = ["--drain"] if drain else []
        call(VDISKFS, "--quiet", "umount", mountpoint, *words)
        # The mount made it immutable, so that no image is ever created beneath it.
        unseal_mountpoint(str(mountpoint))


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its ended children so far."""
    # proc(5): the name may hold spaces; after its closing parenthesis come fields 3 and on.
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(int(word) for word in words[11:15]) / _TICKS


def stored_bytes(directory: Path) -> int:
    """Return the lengths of all files below a directory."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers are lined up at the right."""
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    Console(width=110).print(shown)


def show_host() -> None:
    """Print what was measured on: figures mean nothing without."""
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((x.split(":")[1].strip() for x in words.split("\n") if "model name" in x), "?")
    print(f"{model}, {os.cpu_count()} processors, Linux {platform.release()}")
