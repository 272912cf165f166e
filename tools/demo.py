"""``./run demo``: a disk, its past, an accident, and the way back. Each command is printed.

A script, not a part of the package: it uses the command line and the mount as anybody does. As
root it puts a real file system on a loop device on the live disk; without a loop device it uses
e2fsprogs' own tools on the image. Everything lies in one temporary directory, removed at the
end, also after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

VDISKFS = str(Path(sys.executable).with_name("vdiskfs"))
SIZE_MIB = 256
COLOUR = sys.stdout.isatty()


def tell(text: str) -> None:
    """Print a piece of the story."""
    print(f"\n\033[1;36m{text}\033[0m" if COLOUR else f"\n# {text}", flush=True)


def run(*words: str | Path, quiet: bool = False, show: int = 14, worst: int = 0) -> str:
    """Print a command, run it, print the first lines of its output, and return all of it.

    An exit status above ``worst`` ends the demo.
    """
    line = shlex.join("vdiskfs" if word == VDISKFS else str(word) for word in words)
    print(f"\033[1m$ {line}\033[0m" if COLOUR else f"$ {line}", flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = done.stdout.decode(errors="replace")
    lines = output.rstrip().split("\n") if output.strip() and not quiet else []
    for text in lines[:show]:
        print(f"  {text}")
    if len(lines) > show:
        print(f"  ... {len(lines) - show} lines more")
    if not 0 <= done.returncode <= worst:
        if quiet:
            print(output)
        raise SystemExit(f"demo: that failed with exit code {done.returncode}")
    return output


class LoopHand:
    """A loop device with a mounted ext4, as a virtual machine would have it. Needs root."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._root = Path("guest")
        self._point = Path("old")
        self._device = ""

    def make(self, files: Path) -> None:
        """Make the file system and copy the first files in."""
        self._device = run("losetup", "--find", "--show", "--direct-io=on", self._image).strip()
        run("mkfs.ext4", "-q", self._device)
        self._root.mkdir()
        run("mount", self._device, self._root)
        run("cp", "-r", *sorted(files.iterdir()), self._root)
        run("ls", self._root)
        self.flush()

    def write(self, path: Path, name: str) -> None:
        """Copy a file in."""
        run("cp", path, self._root / name)
        self.flush()

    def remove(self, name: str) -> None:
        """The accident."""
        run("rm", "-rf", self._root / name)
        self.flush()
        run("ls", self._root)

    def flush(self) -> None:
        """What the guest has not written to its disk yet, no point can hold."""
        run("sync", "--file-system", self._root)

    def look(self, point: Path, name: str, target: Path) -> None:
        """Mount a point, read-only, and copy a file out of it."""
        device = run("losetup", "--find", "--show", "--read-only", point).strip()
        try:
            self._point.mkdir(exist_ok=True)
            # noload: the journal is left as it was at that instant; a point is never written.
            run("mount", "-o", "ro,noload,nosuid,nodev,noexec", device, self._point)
            try:
                run("ls", "-l", self._point)
                run("cp", self._point / name, target)
            finally:
                run("umount", self._point)
        finally:
            run("losetup", "--detach", device)

    def close(self) -> None:
        """Unmount and detach, what there is of it."""
        if self._root.is_mount():
            run("umount", self._root)
        if self._device:
            run("losetup", "--detach", self._device)
            self._device = ""


class ToolsHand:
    """mkfs.ext4 -d and debugfs on the image itself: for ordinary users."""

    def __init__(self, image: Path) -> None:
        self._image = image

    def make(self, files: Path) -> None:
        """Make a file system that holds the first files."""
        run("mkfs.ext4", "-q", "-F", "-d", files, self._image)
        self._debugfs("ls -l /")

    def write(self, path: Path, name: str) -> None:
        """Copy a file in."""
        self._debugfs(f"write {path} {name}", writes=True)

    def remove(self, name: str) -> None:
        """The accident."""
        self._debugfs(f"rm {name}", writes=True)
        self._debugfs("ls -l /")

    def flush(self) -> None:
        """Nothing to do: each debugfs has written all when it ends."""

    def look(self, point: Path, name: str, target: Path) -> None:
        """Read a point with debugfs and copy a file out of it."""
        run("debugfs", "-R", "ls -l /", point)
        run("debugfs", "-R", f"dump {name} {target}", point)

    def close(self) -> None:
        """Nothing is open."""

    def _debugfs(self, request: str, *, writes: bool = False) -> None:
        run("debugfs", *["-w"] * writes, "-R", request, self._image)


def can_loop() -> bool:
    """Tell whether this user can attach loop devices."""
    return os.geteuid() == 0 and Path("/dev/loop-control").exists()


def next_second() -> str:
    """Wait for the next second to begin and return the one that ended, in ISO 8601."""
    ended = datetime.now(UTC)
    time.sleep(1 - ended.microsecond / 1e6)
    return f"{ended:%Y-%m-%dT%H:%M:%SZ}"


def wait_first_point() -> None:
    """Wait until the disk has its first recovery point, and show the disk."""
    words = [VDISKFS, "--json", "status"]
    for _ in range(240):
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        disks = json.loads(done.stdout)["disks"]
        if disks and disks[0]["usable_point_age_s"] is not None:
            run(VDISKFS, "status")
            return
        time.sleep(0.25)
    run(VDISKFS, "status")
    raise SystemExit("demo: the disk had no recovery point after a minute")


def first_files() -> Path:
    """Collect real files of this host for the machine's disk."""
    files = Path("files")
    (files / "etc").mkdir(parents=True)
    for name in ("os-release", "hostname", "services", "protocols"):
        with suppress(OSError):
            shutil.copyfile(Path("/etc", name), files / "etc" / name)
    licences = Path("/usr/share/common-licenses")
    if licences.is_dir():
        shutil.copytree(licences, files / "licenses")
    return files


def story(work: Path, stack: ExitStack, *, loop: bool) -> None:
    """Tell it, from the empty vault to the restored disk."""
    source, mountpoint = Path("images"), Path("mnt")
    vault = f"file://{work / 'vault'}"
    source.mkdir()
    mountpoint.mkdir()
    os.environ["VDISKFS_MOUNT"] = str(work / "mnt")

    tell(
        "A vault: the place where all of the past is kept, encrypted. Here a folder; or Azure Blob."
    )
    run(VDISKFS, "vault", "init", vault, "--key-file", "vault.key")
    os.environ["VDISKFS_KEY_FILE"] = str(work / "vault.key")

    tell("The mount. images/ is a directory with the disks of virtual machines (none yet).")
    stack.callback(unmount, mountpoint)
    state: list[str | Path] = ["--state", "state", "--site", "demo"]
    run(VDISKFS, "mount", source, mountpoint, "--vault", vault, *state)
    run("ls", mountpoint)

    tell(f"A machine's disk of {SIZE_MIB} MiB. It is a plain file, and protected from the start.")
    image = mountpoint / "disks" / "web01.img"
    run("truncate", "-s", f"{SIZE_MIB}M", image)
    hand = LoopHand(image) if loop else ToolsHand(image)
    stack.callback(hand.close)
    hand.make(first_files())

    tell("First the disk is copied to the vault as it is, while the machine writes on.")
    wait_first_point()

    tell("Points are made about every second while the disk changes. This one gets a label.")
    run(VDISKFS, "point", "create", "web01", "--label", "installed", "--wait")

    tell("The machine does its work: somebody writes a report.")
    report = Path("report.txt")
    report.write_text(f"Figures of {datetime.now(UTC):%d %B %Y}: all good.\n", encoding="utf-8")
    hand.write(report, "report.txt")
    run(VDISKFS, "point", "create", "web01", "--wait", "--label", "report-written")
    good = next_second()

    tell("Then the accident: the report is deleted.")
    hand.remove("report.txt")
    run(VDISKFS, "point", "create", "web01", "--wait")

    tell("How is the disk, and what points are there?")
    run(VDISKFS, "status")
    run(VDISKFS, "point", "list", "web01")

    tell("The same as directories: every point is one, with the whole disk in it.")
    points = mountpoint / "recovery-points" / "web01"
    run("ls", points)
    day = next(path for path in sorted(points.iterdir()) if path.name[:2] == "20")
    run("ls", day)
    run("ls", "-l", f"{points}/latest/")
    run("cat", points / "latest" / "point.json")

    tell(f"Any instant can be named. At {good} the report was still there:")
    past = points / f"@{good}" / "web01.img"
    found = Path("found.txt")
    hand.look(past, "report.txt", found)
    run("cat", found)
    if found.read_bytes() != report.read_bytes():
        raise SystemExit("demo: the file that came back is not the one that was written")

    tell("It is copied back into the running machine.")
    hand.write(found, "report.txt")

    tell("The whole disk comes back as well: the newest point, restored and compared.")
    hand.close()
    run(VDISKFS, "point", "create", "web01", "--wait")
    restored = Path("restored.img")
    run(VDISKFS, "point", "restore", "web01@latest", restored)
    run("cmp", restored, image)
    run("ls", "-ls", restored)
    print("  the same, byte for byte")

    tell("A drill: a writable copy of the good instant, there at once whatever the disk's size.")
    run(VDISKFS, "failover", "test", "web01", "--point", good, "--name", "drill")
    run("e2fsck", "-f", "-y", mountpoint / "failovers" / "drill" / "web01.img", worst=1)
    run(VDISKFS, "failover", "list")
    run("cmp", restored, image)
    print("  the live disk knows nothing of it")
    run(VDISKFS, "failover", "cleanup", "drill", "--notes", "clean")

    tell("Is everything in the vault as it was written? Every byte is read and verified.")
    run(VDISKFS, "vault", "check", "--read-data", "--vault", vault)
    sizes()

    tell("The mount ends; first everything is shipped. The image stays a plain file.")
    run(VDISKFS, "umount", mountpoint, "--drain")
    run("ls", "-l", source)
    run("cmp", source / "web01.img", restored)


def sizes() -> None:
    """Say what the vault holds, in numbers that were just measured."""
    answer = subprocess.run(
        [VDISKFS, "--json", "point", "list", "web01"], stdout=subprocess.PIPE, check=True
    )
    points = json.loads(answer.stdout)["points"]
    stored = sum(p.lstat().st_size for p in Path("vault").rglob("*") if p.is_file())
    changed = sum(point["changed_bytes"] for point in points)
    print(
        f"  {len(points)} points of a {SIZE_MIB} MiB disk: {changed / 2**20:.1f} MiB changed, "
        f"{stored / 2**20:.1f} MiB stored"
    )


def unmount(mountpoint: Path) -> None:
    """Unmount what a demo that was interrupted has left mounted."""
    if mountpoint.is_mount():
        words = [VDISKFS, "--quiet", "umount", str(mountpoint)]
        if subprocess.run(words, check=False).returncode != 0:
            subprocess.run(["fusermount3", "-uz", mountpoint], check=False)


def remove(work: Path) -> None:
    """Remove the demo's directory, but never what is still mounted in it."""
    with Path("/proc/self/mountinfo").open(encoding="utf-8") as mounts:
        left = [line.split()[4] for line in mounts if line.split()[4].startswith(str(work))]
    if left:
        raise SystemExit(f"demo: still mounted, so {work} is left: {', '.join(left)}")
    # The mount made it immutable, so that no image is ever created beneath it.
    subprocess.run(["chattr", "-i", work / "mnt"], stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(work)


def interrupted(*_: object) -> NoReturn:
    """Let the clean-up run when the demo is asked to end."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo in a directory of its own; return the exit code."""
    signal.signal(signal.SIGTERM, interrupted)
    begin = time.monotonic()
    # /tmp is often memory: too small for disks, and without direct I/O.
    place = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 - mkdtemp makes it ours alone
    work = Path(tempfile.mkdtemp(prefix="vdiskfs-demo-", dir=place))
    loop = can_loop() and "--no-loop" not in sys.argv[1:]
    print(f"Everything happens in {work}, which is removed at the end.")
    if not loop:
        print("No loop devices for this user: e2fsprogs' debugfs stands in for the machine.")
    try:
        with ExitStack() as stack:
            stack.callback(remove, work)
            stack.callback(os.chdir, Path.cwd())
            os.chdir(work)
            # A second Ctrl-C would leave mounts behind: the clean-up is not interrupted.
            stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
            story(work, stack, loop=loop)
    except KeyboardInterrupt:
        print("\ninterrupted; everything is cleaned up")
        return 130
    tell(f"Done in {time.monotonic() - begin:.0f} seconds; nothing is left behind.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
