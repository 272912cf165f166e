"""A Debian with its guest agent, and application-consistent points while its shop sells on.

In some of the points the daemon is killed, at a random moment: the guest is thawed all the same.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.journey import OwnMachine
from tests.e2e.loopdev import run_tool
from tests.e2e.mounted import MountedSite
from tests.e2e.resting import unclean
from tests.e2e.shop import NOISE, UP
from tests.e2e.shop_debian import DebianShop

LIMIT_S = 60.0  # software emulation, on a machine with much else to do
COMMAND = ("point", "create", "web01", "--consistency", "application", "--wait")


def resting_round(directory: Path, seed: int) -> Mapping[str, int | list[float]]:
    """Make 20 points of a running Debian, and check that each is clean; counts for the soak."""
    with tempfile.TemporaryDirectory(prefix="agent-") as short:
        return _round(directory, random.Random(seed), Path(short, "ga.sock"))


def _round(directory: Path, rng: random.Random, socket: Path) -> Mapping[str, int | list[float]]:
    shop = DebianShop()
    shop.make_boot(directory / "boot")
    conf = (
        f"epoch_interval_s = 0.5\nheartbeat_s = 1\nfreeze_limit_s = {LIMIT_S}\n"
        f'[quiesce.web01]\nagent = "{socket}"\n'
    )
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(MountedSite(directory, options=conf))
        shop.make_disk(site.source / "web01.img")
        site.init().mount()
        site.wait_shipped("web01")
        options = ["-device", "virtio-serial-pci"]
        options += ["-chardev", f"socket,id=agent,path={socket},server=on,wait=off"]
        options += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        machine = OwnMachine(
            directory / "own", site.image("web01"), directory / "boot", shop.memory, options
        )
        stack.callback(machine.kill)
        machine.start()
        console = machine.console
        site.wait("the shop is up", lambda: UP in console.text, shop.limit_s)
        site.wait("the agent answers", lambda: site.run_any(
            "-m", site.mountpoint, *COMMAND) == 0, shop.limit_s)  # fmt: skip

        def sells(more: int) -> None:
            """Wait until so many more sales are durable in the guest."""
            goal = console.last("ROW") + more
            site.wait("the shop sells on", lambda: console.last("ROW") >= goal, 180)

        took: list[float] = []
        known: dict[str, int] = {}
        kills = 0
        for number in range(20):
            sells(2)
            label, before = f"a{number}", console.last("ROW")
            began = time.monotonic()
            asking = site.begin("-m", site.mountpoint, *COMMAND, "--label", label)
            if number % 4 == 3:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    asking.wait(rng.uniform(0.3, 3.0))
                dying = site.pid
                os.kill(dying, signal.SIGKILL)
                site.wait_successor(dying, {"web01"}, 180)
                kills += 1
            if asking.wait(300) == 0:
                took.append(time.monotonic() - began)
                known[label] = before
            # Frozen, no sale would become durable.
            sells(2)
            site.wait("nothing is noted", lambda: not any((site.state / "quiesce").iterdir()), 120)
        console.check_clean()
        site.wait_shipped("web01")
        points = [one for one in site.points("web01") if one["consistency"] == "application"]
        labels = {one["label"] for one in points}
        assert set(known) <= labels, (known, labels)
        assert len(known) >= 15, known
        for number, one in enumerate(points):
            image, sold = site.point("web01", "@" + one["time"]), known.get(one["label"])
            _check(shop, image, directory, sold, deep=number % 4 == 0)
        return {
            "application_points": len(points), "kills": kills,
            "not_made": 20 - len(known), "sales": console.last("ROW"),
            "violations": 0, "points_s": took,
        }  # fmt: skip


def _check(
    shop: DebianShop, image: Path, directory: Path, before: int | None, *, deep: bool
) -> None:
    part = directory / "part.img"
    try:
        run_tool(["dd", f"if={image}", f"of={part}", f"bs={NOISE}", "skip=1", "conv=sparse"])
        said = unclean("ext4", part, directory, trusted=False)
        assert said == "", (image, said)
    finally:
        part.unlink(missing_ok=True)
    if not deep:
        return
    found = shop.read(image, directory)
    assert found.check == "ok"
    assert found.wrong == 0
    assert before is None or found.last >= before, (found, before)
