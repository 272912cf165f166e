"""Two sites on one vault, and a shop that goes from one to the other and comes home.

At home the guest is first a QEMU of the user's own on the disk's image, which the site stops by
its ``stop_command``; wherever the product has moved it, it is a machine of the product.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tests.e2e.guest import Disk, block_options
from tests.e2e.loopdev import run_tool
from tests.e2e.mounted import MountedSite
from tests.e2e.shop import APPEND, UP, Console, Found, Shop
from vdiskfs.machines import DirectBoot, HealthCheck, Machine, MachineDisk

DISK = "web01"
FAST = "epoch_interval_s = 0.2\nheartbeat_s = 1\n"
STOP = """#!{python}
import json, os, socket, sys
with open("{log}", "a") as log:
    print(*(os.environ["VDISKFS_" + name] for name in ("DISK", "REASON", "IMAGE")), file=log)
qmp = socket.socket(socket.AF_UNIX)
try:
    qmp.connect("{socket}")
except OSError:
    sys.exit(0)  # it does not run
qmp.sendall(b"".join(json.dumps(dict(execute=name)).encode() + b"\\n"
                     for name in ("qmp_capabilities", "system_powerdown")))
while qmp.recv(4096):
    pass  # until QEMU has ended
"""


class OwnMachine:
    """The QEMU that the user runs at home: its console and its QMP socket are files."""

    def __init__(
        self, directory: Path, image: Path, boot: Path, memory: int, options: Sequence[str] = ()
    ) -> None:
        directory.mkdir()
        self._options = options
        self.socket = directory / "qmp"
        self.console = Console(directory / "serial.log")
        self._image = image
        self._boot = boot
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it runs until `kill`, or until its guest turns it off."""
        words = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max"]
        words += ["-smp", "1", "-m", str(self._memory >> 20), "-nodefaults", "-no-user-config"]
        words += ["-no-reboot", "-display", "none", "-nic", "none", "-device", "virtio-rng-pci"]
        words += ["-serial", f"file:{self.console.path}"]
        words += ["-qmp", f"unix:{self.socket},server=on,wait=off"]
        words += ["-kernel", str(self._boot / "vmlinuz"), "-initrd", str(self._boot / "initrd")]
        words += ["-append", APPEND, *block_options("d0", Disk(self._image))]
        words += ["-device", "virtio-blk-pci,drive=d0"]
        self._process = subprocess.Popen([*words, *self._options])

    def wait_ended(self) -> None:
        """Wait until its guest has turned it off."""
        assert self._process is not None
        assert self._process.wait(60) == 0

    def kill(self) -> None:
        """End it as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def tell_qemu(directory: Path, command: str) -> None:
    """Give a command to the QEMU of a machine's directory, and wait until it has ended."""
    with socket.socket(socket.AF_UNIX) as qmp:
        opened = os.open(directory, os.O_PATH)  # a socket's path may not be long
        try:
            qmp.connect(f"/proc/self/fd/{opened}/qmp.sock")
        finally:
            os.close(opened)
        for word in ("qmp_capabilities", command):
            qmp.sendall(b'{"execute": "%s"}\n' % word.encode())
        while qmp.recv(4096):
            pass


class Watch:
    """Notes when each row was told, by any console below a directory; looks 20 times a second."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._told: dict[Path, list[tuple[float, int]]] = {}
        self._sizes: dict[Path, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journey-watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def has_seen(self, console: Console) -> bool:
        """Whether a row of this console was noted."""
        return bool(self._told.get(console.path))

    def down_s(self, before: Console, after: Console) -> float:
        """Return the seconds from the last row of one console to the first of the other."""
        return self._told[after.path][0][0] - self._told[before.path][-1][0]

    def _run(self) -> None:
        while not self._over.wait(0.05):
            paths = [self._root / "own/serial.log"]
            paths += self._root.glob("*/state/failovers/*/machine/serial.log")
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._look(path)

    def _look(self, path: Path) -> None:
        size = path.stat().st_size
        if self._sizes.get(path) == size:
            return
        self._sizes[path] = size
        told = self._told.setdefault(path, [])
        last = Console(path).last("ROW")
        if last and (not told or told[-1][1] != last):
            told.append((time.monotonic(), last))


class Journey:
    """Home with the shop's disk, and a recovery site without a source."""

    def __init__(
        self, root: Path, shop: Shop, *, vault: str | None = None, away_options: str = ""
    ) -> None:
        """Lay it out; the vault is a folder of the root's unless one is given."""
        self.root = root
        self.shop = shop
        boot, own = root / "boot", root / "own"
        shop.make_boot(boot)
        log, stop = root / "stopped", root / "stop"
        stop.write_text(STOP.format(python=sys.executable, log=log, socket=own / "qmp"))
        stop.chmod(0o755)
        log.touch()
        self.stop_log = log
        vault = vault or f"file://{root}/vault"
        machines = f'[machines]\nboot_directory = "{boot}"\nshutdown_s = {shop.limit_s}\n'
        at_home = f'{FAST}{machines}stop_command = ["{stop}"]\n'
        self.home = MountedSite(root, vault=vault, name="home", options=at_home)
        self.away = MountedSite(
            root, vault=vault, name="away", options=FAST + away_options + machines
        )
        self.own = OwnMachine(own, self.home.image(DISK), boot, shop.memory)
        self.watch = Watch(root)
        self.downtimes: dict[str, float] = {}

    @contextlib.contextmanager
    def begun(self) -> Iterator[Self]:
        """Mount both sites, and have the shop open at home."""
        self.shop.make_disk(self.home.source / f"{DISK}.img")
        definition = self.root / "shop.toml"
        definition.write_text(Machine(
            "shop", self.shop.memory, (MachineDisk(DISK),), accel="tcg",
            boot=DirectBoot("vmlinuz", "initrd", APPEND),
            health=HealthCheck("serial", self.shop.limit_s, text=UP),
        ).to_toml())  # fmt: skip
        with self.home, self.away, self.watch, contextlib.ExitStack() as ends:
            self.home.init().mount().wait_shipped(DISK)
            set_ = ("machine", "set", "shop", "--file", definition, "--vault", self.home.vault)
            self.home.json(*set_)
            self.away.mount(recovery=True)
            ends.callback(self.own.kill)
            ends.callback(self._end_machines)
            self.own.start()
            self.sell(self.own.console, 3)
            yield self

    def _end_machines(self) -> None:
        """End what the product has started, and still runs where a check has failed."""
        for path in self.root.glob("*/state/failovers/*/machine/qmp.sock"):
            with contextlib.suppress(OSError):
                tell_qemu(path.parent, "quit")

    # ---- what is waited for ------------------------------------------------------------------

    def wait(self, what: str, console: Console, is_true: Any) -> None:
        """Wait until it is true of a console, which is shown where it never is."""
        try:
            self.home.wait(what, is_true, self.shop.limit_s)
        except TimeoutError as error:
            raise AssertionError(f"{what}:\n{console.text}") from error

    def sell(self, console: Console, count: int = 3) -> int:
        """Wait until so many more rows are durable; return the last one."""
        wanted = console.last("ROW") + count
        self.wait(f"row {wanted}", console, lambda: console.last("ROW") >= wanted)
        return console.last("ROW")

    def point(self, site: MountedSite, console: Console) -> tuple[int, int, int]:
        """Make a point; return its epoch, and between which rows its last one is."""
        low = console.last("ROW")
        [row] = site.json("point", "create", DISK, "--wait")["points"]
        return int(row["epoch"]), low, console.last("BEGIN")

    def console(self, document: dict[str, Any]) -> Console:
        """Return the console of a failover's, or a failback's, machine."""
        assert document["machine"], document
        return Console(Path(document["machine"]["directory"]) / "serial.log")

    def waits(self, document: dict[str, Any]) -> int:
        """Return how often a failover's machine has had to wait for the vault."""
        [disk] = self.away.json("failover", "show", document["name"])["disks"]
        return int(disk["waits"])

    # ---- steps -------------------------------------------------------------------------------

    def check_test(self, epoch: int, low: int, high: int) -> int:
        """Start the shop from a point, on copies, and throw it away; return the point's rows."""
        document = self.away.json("failover", "test", DISK, "--point", f"#{epoch}")
        console = self.console(document)
        assert document["health"]["healthy"], console.text
        n = console.found().all_up_to(low, high)
        self.sell(console)
        assert f"] BEGIN {n + 1}\n" in console.text.replace("\r", "")
        console.check_clean()
        self.away.json("failover", "cleanup", document["name"])
        return n

    def check_point(self, site: MountedSite, console: Console) -> None:
        """Make a point at a site, and judge its image on this host, as the vault gives it."""
        self.read_point(site, *self.point(site, console))

    def read_point(self, site: MountedSite, epoch: int, low: int, high: int) -> int:
        """Judge a point's image as a site shows it; return its rows."""
        image = next(
            path for path in reversed(site.point_images(DISK))
            if json.loads((path.parent / "point.json").read_text())["epoch"] == epoch
        )  # fmt: skip
        return self.read(image).all_up_to(low, high)

    def read(self, image: Path) -> Found:
        """Judge the database of an image that nobody writes to."""
        return self.shop.read(image, self.root)

    def arrived(self, what: str, before: Console, document: dict[str, Any]) -> Console:
        """The shop goes on where it was closed: nothing is lost. Return its new console."""
        closed = before.last("CLOSED after")
        assert closed > 0, before.text
        assert closed == before.last("ROW") == before.last("BEGIN")
        before.check_clean()
        console = self.console(document)
        assert document["health"]["healthy"], document
        console.found().all_up_to(closed)
        self.sell(console)
        self.measure(what, before, console)
        return console

    def measure(self, what: str, before: Console, after: Console) -> None:
        """Note how long nothing was sold."""
        self.wait("it is noted", after, lambda: self.watch.has_seen(after))
        self.downtimes[what] = round(self.watch.down_s(before, after), 1)

    def lose_home(self) -> None:
        """The power fails at home: the machine and the daemon are gone, and nobody restarts them."""
        self.own.kill()
        self.home.kill_for_good()

    def mount_home(self) -> None:
        """Home is back, with what it had: another site has taken the disk."""
        run_tool(["umount", "-l", self.home.mountpoint])
        self.home.mount()
        self.home.wait("it is displaced", lambda: self.home.disk(DISK)["state"] == "Displaced")

    def branches(self) -> list[Found]:
        """Judge the disk's branches."""
        site = self.home
        names = [one["name"] for one in site.json("disk", "branches", DISK)["branches"]]
        return [self.read(site.point(f"{DISK}@{name}").with_name(f"{DISK}.img")) for name in names]

    def reprotect(self, name: str, console: Console) -> None:
        """Make the failover final, and replicate from away while the shop sells."""
        self.away.json("failover", "commit", name)
        assert self.away.json("reprotect", DISK)["state"] == "FailbackReady"
        self.away.wait("away is protected", lambda: self.away.disk(DISK)["state"] == "Protected")
        self.sell(console)
        self.check_point(self.away, console)

    def come_home(self, console: Console) -> Console:
        """Fail back while the shop sells, and make it final; return the console at home."""
        assert self.home.json("failback", "start", DISK)["state"] == "FailingBack"
        self.sell(console)
        done = self.home.json("failback", "complete", DISK)
        assert done["state"] == "FailbackUncommitted"
        back = self.arrived("failback", console, done)
        self.home.json("failback", "commit", DISK)
        self.check_point(self.home, back)
        return back

    def close(self, console: Console) -> None:
        """Press the power button of a machine of the product; every row is in the last point."""
        tell_qemu(console.path.parent, "system_powerdown")
        last = console.last("CLOSED after")
        console.check_clean()
        self.home.wait_shipped(DISK)
        assert last == console.last("ROW")
        self.read(self.home.image(DISK)).all_up_to(last)
        assert self.home.point(DISK).read_bytes() == self.home.image(DISK).read_bytes()


def there_and_back(directory: Path, shop: Shop) -> dict[str, float]:
    """Test a shop elsewhere, move it there as planned, and bring it home; judge each stage.

    Args:
        directory: an empty one.
        shop: the guest.

    Returns:
        Seconds from the last row to the next one, by what was done.

    Raises:
        AssertionError: rows or errors are not what is promised.
    """
    with Journey(directory, shop).begun() as journey:
        away, own = journey.away, journey.own
        point = journey.point(journey.home, own.console)
        journey.sell(own.console)
        journey.check_test(*point)
        # The test was nobody's business: the shop at home goes on.
        journey.sell(own.console)
        document = away.json("failover", "start", DISK)
        assert (document["kind"], document["state"]) == ("planned", "FailedOver")
        own.wait_ended()
        stopped = f"{DISK} handover {journey.home.image(DISK)}"
        assert journey.stop_log.read_text().split("\n")[0] == stopped
        console = journey.arrived("planned failover", own.console, document)
        journey.reprotect(document["name"], console)
        back = journey.come_home(console)
        away.json("failover", "cleanup", document["name"])
        journey.close(back)
        return journey.downtimes
