"""A real mount for a test: source, vault, state and mountpoint, through the command line.

    with MountedSite(tmp_path) as site:
        site.add_image("web01", 64 << 20)
        site.mount()
        ...

Everything is ended and removed at the end, whatever happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.e2e.asking import ask, can_ask
from tests.vaults import init_options, key_file
from vdiskfs.registry import mount_entries
from vdiskfs.state import unseal_mountpoint

PROGRAM = Path(sys.executable).parent / "vdiskfs"


class CommandError(AssertionError):
    """A command ended with another status than expected."""

    def __init__(self, command: list[str], result: subprocess.CompletedProcess[str]) -> None:
        super().__init__(
            f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}"
        )
        self.returncode = result.returncode


class NotListedError(AssertionError):
    """A disk is not in the status, or waits to be started."""


class MountedSite:
    """One site: mounted by `mount`, ended by `umount` or at the end of the block."""

    asks_here = True
    """Whether a process like ours can ask the mount."""

    def __init__(
        self, root: Path, *, vault: str | None = None, name: str = "site",
        environ: Mapping[str, str] | None = None, options: str = "",
    ) -> None:  # fmt: skip
        """Lay the directories out; ``options`` is the text of vdiskfs.conf."""
        self.root = root / name
        self.source = self.root / "source"
        self.mountpoint = self.root / "mnt"
        self.state = self.root / "state"
        for directory in (self.source, self.mountpoint):
            directory.mkdir(parents=True)
        self.vault = vault or f"file://{root}/vault"
        self.name = name
        # Tests kill more often than any fault does: see keeper.DEATHS.
        self.environ = {"VDISKFS_DEATHS": "1000", **os.environ, **(environ or {})}
        if (key := key_file(root)) is not None:
            self.environ["VDISKFS_KEY_FILE"] = str(key)
        self.config = self.root / "vdiskfs.conf"
        self.config.write_text(options)
        self.pid = 0
        self.keeper = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.pid:
                self.umount(check=kind is None)
        finally:
            if kind is not None:
                self._show_log()
            self._kill()
            unseal_mountpoint(str(self.mountpoint))

    def _show_log(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write((self.state / "daemon.log").read_text()[-6000:])
        with contextlib.suppress(Exception):  # what went wrong before is what is to be seen
            errors = {row["name"]: row["last_error"] for row in self.json("status")["disks"]}
            sys.stderr.write(f"last errors: {errors}\n")

    def _kill(self) -> None:
        if self.pid:
            for pid in (self.keeper, self.pid):  # else it would start another one
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            subprocess.run(["umount", "-l", self.mountpoint], check=False, capture_output=True)
            self.pid = 0

    # ---- commands ------------------------------------------------------------------------

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the program, and check its exit status."""
        command = [str(PROGRAM), *map(str, arguments)]
        result = subprocess.run(
            command, capture_output=True, text=True, env=self.environ, check=False, timeout=300
        )
        if result.returncode != code:
            raise CommandError(command, result)
        return result

    def begin(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start the program, and do not wait for it; it says nothing."""
        quiet = subprocess.DEVNULL
        command = [str(PROGRAM), *map(str, arguments)]
        return subprocess.Popen(command, stdout=quiet, stderr=quiet, env=self.environ)

    def run_any(self, *arguments: str | Path) -> int:
        """Run the program, and return its exit status, whatever it is."""
        return self.begin(*arguments).wait(300)

    def json(self, *arguments: str | Path) -> Any:
        """Run the program with --json against this mount, and return the document."""
        words = list(map(str, arguments))
        line = ["--json", "-m", str(self.mountpoint), *words]
        if not self.asks_here or not can_ask(words, self.environ):
            return json.loads(self.run(*line).stdout)
        result = ask(line, self.environ)
        if result.returncode:
            raise CommandError(line, result)
        return json.loads(result.stdout)

    def init(self) -> Self:
        """Make the vault."""
        self.run("vault", "init", *init_options(self.root.parent), self.vault)
        return self

    def mount(self, *extra: str, recovery: bool = False) -> Self:
        """Mount the source; or none, as a recovery site."""
        source = () if recovery else (self.source,)
        self.run(
            "mount", *source, self.mountpoint, "--vault", self.vault, "--site", self.name,
            "--state", self.state, "--config", self.config, *extra,
        )  # fmt: skip
        # It may be dead by now, where a test has it die early.
        [entry] = [one for one in mount_entries() if one.mountpoint == str(self.mountpoint)]
        self.pid, self.keeper = entry.pid, entry.keeper
        return self

    def umount(self, *extra: str, check: bool = True) -> None:
        """End the mount."""
        try:
            self.run("umount", self.mountpoint, *extra)
            self.pid = 0
        except CommandError:
            if check:
                raise

    # ---- the daemon is replaced ----------------------------------------------------------

    def kill_daemon(self, number: int = signal.SIGKILL, *, wait_s: float = 60) -> float:
        """Kill the daemon, and wait until its successor answers; return the pause in seconds.

        The pause is what a program in the mount sees: from the signal until a name that
        nobody has cached is answered again. `status` lists all disks again on return.
        """
        disks = {row["name"] for row in self.json("status")["disks"]}
        began = time.monotonic()
        os.kill(self.pid, number)
        with contextlib.suppress(FileNotFoundError):
            (self.mountpoint / "disks" / f"absent-{time.monotonic_ns()}").stat()
        pause = time.monotonic() - began
        self.wait_successor(self.pid, disks, wait_s)
        return pause

    def kill_for_good(self) -> None:
        """Kill the daemon, and its keeper first: the mount is dead. Waits until both are gone."""
        handles = [os.pidfd_open(pid) for pid in (self.keeper, self.pid)]
        try:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            for handle in handles:
                assert select.select([handle], [], [], 60)[0]
        finally:
            for handle in handles:
                os.close(handle)

    def wait_successor(self, before: int, disks: set[str], wait_s: float = 60) -> None:
        """Wait until another daemon than ``before`` answers, and lists these disks."""

        def answers() -> bool:
            try:
                status = self.json("status")
            except CommandError:
                return False
            self.pid = int(status["pid"])
            started = {row["name"] for row in status["disks"] if row["state"] != "Enabling"}
            return self.pid != before and disks <= started

        self.wait("a successor of the daemon", answers, wait_s)

    # ---- disks and points ----------------------------------------------------------------

    def image(self, disk: str) -> Path:
        """The live image in the mount."""
        return self.mountpoint / "disks" / f"{disk}.img"

    def add_image(self, disk: str, size: int, content: bytes = b"") -> Path:
        """Make an image in the source; before mounting."""
        path = self.source / f"{disk}.img"
        path.write_bytes(content)
        os.truncate(path, size)
        return path

    def disk(self, disk: str) -> dict[str, Any]:
        """Return the disk's row of ``status``, once it is started."""
        rows = [
            row for row in self.json("status")["disks"]
            if row["name"] == disk and row["state"] != "Enabling"
        ]  # fmt: skip
        if not rows:
            raise NotListedError(f"no disk {disk} in status")
        return dict(rows[0])

    def points(self, disk: str) -> list[dict[str, Any]]:
        """Return the points, newest last."""
        return list(self.json("point", "list", disk)["points"])

    def wait(self, what: str, is_true: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait until it is true, looking at it again and again."""
        end = time.monotonic() + timeout_s

        def holds() -> bool:
            with contextlib.suppress(NotListedError):  # a daemon that has just begun
                return is_true()
            return False

        while not holds():
            if time.monotonic() > end:
                self._show_log()
                raise TimeoutError(what)
            time.sleep(0.05)

    def wait_shipped(self, disk: str) -> None:
        """Wait until everything that was written is in the vault."""

        def shipped() -> bool:
            row = self.disk(disk)
            done: bool = row["state"] == "Protected" and row["epoch"] > 0
            return done and row["dirty_bytes"] == 0 and row["spooled_bytes"] == 0

        self.wait(f"disk {disk} is shipped", shipped)

    def point(self, disk: str, name: str = "latest") -> Path:
        """The image of a point, by the name of its directory."""
        return self.mountpoint / "recovery-points" / disk / name / f"{disk}.img"

    def point_images(self, disk: str) -> list[Path]:
        """The images of all points, oldest first, by walking the directories."""
        top = self.mountpoint / "recovery-points" / disk
        days = sorted(path for path in top.iterdir() if path.name[0].isdigit())
        return [time / f"{disk}.img" for day in days for time in sorted(day.iterdir())]
