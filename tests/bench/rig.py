"""What the benches share: a vdiskfs mount by its command line, processor time, tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
    """A mounted vdiskfs: where, and the process that serves it."""

    mountpoint: Path
    source: Path
    vault: Path
    pid: int

    def document(self, *words: str) -> dict[str, Any]:
        """Run a command of vdiskfs on this mount and return its JSON document."""
        answer = call(VDISKFS, "--mount", self.mountpoint, "--json", *words)
        document: dict[str, Any] = json.loads(answer)
        return document

    def disk(self, name: str) -> dict[str, Any]:
        """Return one disk of ``status``."""
        disks = self.document("status")["disks"]
        return next(disk for disk in disks if disk["name"] == name)


@contextmanager
def vdiskfs(
    root: Path, source: Path, settings: str = "", *, drain: bool = False
) -> Iterator[Mount]:
    """Mount a source with a new folder vault under ``root``; unmounted at the end."""
    root.mkdir()
    vault, mountpoint = root / "vault", root / "mnt"
    mountpoint.mkdir()
    config = root / "vdiskfs.conf"
    config.write_text(settings, encoding="utf-8")
    call(VDISKFS, "--quiet", "vault", "init", f"file://{vault}")
    options: list[str | Path] = ["--state", root / "state", "--config", config, "--site", "bench"]
    call(VDISKFS, "--quiet", "mount", source, mountpoint, "--vault", f"file://{vault}", *options)
    try:
        pid = json.loads(call(VDISKFS, "--mount", mountpoint, "--json", "status"))["pid"]
        yield Mount(mountpoint, source, vault, pid)
    finally:
        words = ["--drain"] if drain else []
        call(VDISKFS, "--quiet", "umount", mountpoint, *words)


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
