"""Test failovers of a machine: a real guest starts from a point, isolated, and is judged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.gauges import write_at
from tests.e2e.guest_files import initramfs, kernel
from tests.e2e.mounted import CommandError, MountedSite
from vdiskfs.machines import DirectBoot, HealthCheck, Machine, MachineDisk, Network

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(300)]

MIB = 1 << 20
LIMIT_S = 90.0
SCRIPT = r"""
echo "FIRST: $(dd if=/dev/vda bs=4096 skip=1 count=1 2>/dev/null | tr -d '\0')"
echo "SECOND: $(dd if=/dev/vdb bs=4096 skip=1 count=1 2>/dev/null | tr -d '\0')"
echo "the guest was here" | dd of=/dev/vda bs=4096 seek=2 conv=sync,fsync 2>/dev/null
for number in $(seq 0 15); do
    dd if=/dev/vda of=/dev/null bs=65536 count=1 skip=$((number * 4 + 1)) 2>/dev/null
done
echo "SERVICE IS UP"
number=0
while :; do
    number=$((number + 1))
    echo "beat $number" | dd of=/dev/vda bs=4096 seek=3 conv=sync,fsync 2>/dev/null || echo "FAILED"
    dd if=/dev/vda of=/dev/null bs=65536 count=1 skip=$((number % 64)) 2>/dev/null || echo "FAILED"
    echo "BEAT $number"
    sleep 0.2
done
"""


@contextmanager
def site_with_machine(tmp_path: Path, **changes: object) -> Iterator[MountedSite]:
    """Mount two disks of a machine that the vault has a definition of."""
    boot = tmp_path / "boot"
    boot.mkdir(mode=0o755)
    (boot / "vmlinuz").write_bytes(kernel().read_bytes())
    initramfs(SCRIPT, boot / "initrd")
    options = f'epoch_interval_s = 0.2\nheartbeat_s = 1\n[machines]\nboot_directory = "{boot}"\n'
    options += 'networks = {lan = "user"}\n'
    machine = Machine(
        "shop", 256 << 20, (MachineDisk("web01"), MachineDisk("db01")), accel="tcg",
        boot=DirectBoot("vmlinuz", "initrd", "console=ttyS0 panic=-1 quiet mitigations=off"),
        health=HealthCheck("serial", LIMIT_S, text="SERVICE IS UP"),
        networks=(Network("lan", address="192.0.2.10/24"),),
    )  # fmt: skip
    definition = tmp_path / "shop.toml"
    definition.write_text(replace(machine, **changes).to_toml())  # type: ignore[arg-type]
    with MountedSite(tmp_path, options=options) as site:
        for disk in ("web01", "db01"):
            text = f"{disk} one".encode().ljust(4096, b"\0")
            site.add_image(disk, 4 * MIB, os.urandom(4096) + text + os.urandom(4 * MIB - 8192))
        site.init().mount()
        for disk in ("web01", "db01"):
            site.wait_shipped(disk)
        site.json("machine", "set", "shop", "--file", str(definition), "--vault", site.vault)
        yield site


def console(document: dict[str, dict[str, str]]) -> str:
    """Return what the machine's serial console printed."""
    directory = Path(document["machine"]["directory"])
    return "".join(path.read_text(errors="replace") for path in sorted(directory.glob("serial*")))


def networks(document: dict[str, dict[str, str]]) -> list[str]:
    """Return what QEMU was told of the machine's network cards."""
    record = json.loads((Path(document["machine"]["directory"]) / "record.json").read_text())
    words = Path(f"/proc/{record['pid']}/cmdline").read_text().split("\0")
    return [after for before, after in pairwise(words) if before == "-netdev"]


def recovery_s(site: MountedSite, disk: str, label: str) -> float:
    """Return the measured recovery time of a point, or 0."""
    return next(row["recovery_s"] or 0.0 for row in site.points(disk) if row["label"] == label)


def beats(document: dict[str, dict[str, str]]) -> int:
    """Return how many rounds the guest says that it has made."""
    return console(document).count("BEAT ")


def test_a_machine_starts_from_a_point_and_outlives_the_daemon(tmp_path: Path) -> None:
    with site_with_machine(tmp_path) as site:
        site.json("point", "create", "web01", "db01", "--label", "good", "--wait")
        [*_, good] = site.points("web01")
        for disk in ("web01", "db01"):
            write_at(site.image(disk), 4096, b"bad")
        site.wait_shipped("web01")
        live = site.image("web01").read_bytes()
        document = site.json("failover", "test", "web01", "--point", f"#{good['epoch']}")
        try:
            assert document["health"]["healthy"], document
            took = document["health"]["seconds"]
            assert took > 1
            for disk in ("web01", "db01"):
                site.wait(
                    "the recovery time is with the points",
                    lambda disk=disk: abs(recovery_s(site, disk, "good") - took) < 0.001,  # type: ignore[misc]
                )
            assert document["machine"]["name"] == "shop"
            # This host allows that network; a test failover is kept from it all the same.
            [network] = networks(document)
            assert network.startswith("user,id=net0,restrict=on,")
            assert [row["disk"] for row in document["disks"]] == ["web01", "db01"]
            printed = console(document)
            assert "FIRST: web01 one" in printed
            assert "SECOND: db01 one" in printed
            # A daemon that is killed costs the machine a pause and no error.
            for _ in range(2):
                seen = beats(document)
                site.wait("the guest goes on", lambda seen=seen: beats(document) > seen)  # type: ignore[misc]
                site.kill_daemon()
            seen = beats(document)
            site.wait("the guest goes on", lambda: beats(document) > seen + 2)
            assert "FAILED" not in console(document)
            shown = site.json("failover", "show", document["name"])
            assert shown["machine"]["state"] == "running"
            assert shown["health"] == document["health"]
            copy = Path(document["disks"][0]["path"])
            assert copy.read_bytes()[8192:].startswith(b"the guest was here")
            assert site.image("web01").read_bytes() == live
        finally:
            site.json("failover", "cleanup", document["name"], "--notes", "it starts")
        assert site.json("failover", "list")["failovers"] == []
        assert not list((site.state / "failovers").iterdir())
        # What it read until it was up is fetched before it asks for it.
        again = site.json("failover", "test", "web01")
        waits = [sum(row["waits"] for row in one["disks"]) for one in (document, again)]
        print(f"requests of a start that waited for the vault: {waits}")
        assert waits[0] > 16
        assert waits[1] <= waits[0] / 2
        site.json("failover", "cleanup", again["name"], "--notes", "it starts sooner")
        # The measured time is told with the points, and so is what the test showed.
        told = {one["code"]: one["text"] for one in site.json("event", "list")["events"]
                if one["subject"] == again["name"]}  # fmt: skip
        points = ", ".join(f"{row['disk']}@#{row['epoch']}" for row in again["disks"])
        assert told["machine.health"] == f"{points}: {again['health']['detail']}"
        assert told["failover.removed"] == "removed: it starts sooner"


def test_a_machine_that_does_not_come_up_is_told_and_can_be_looked_at(tmp_path: Path) -> None:
    never = HealthCheck("serial", 3.0, text="NEVER SAID")
    with site_with_machine(tmp_path, health=never) as site:
        where = ("-m", str(site.mountpoint))
        with pytest.raises(CommandError, match="NEVER SAID") as failed:
            site.run(*where, "failover", "test", "web01", "--name", "t1")
        assert failed.value.returncode == 6
        document = site.json("failover", "show", "t1")
        assert document["health"]["healthy"] is False
        assert document["machine"]["state"] == "running"
        told = {one["code"]: one for one in site.json("event", "list")["events"]}
        assert told["machine.unhealthy"]["level"] == "error"
        assert "machine.health" not in told
        site.json("failover", "cleanup", "t1")
        # The copies alone, and what this host does not allow.
        copies = site.json("failover", "test", "web01", "--vm", "none")
        assert copies["machine"] is None
        assert [row["disk"] for row in copies["disks"]] == ["web01"]
        site.json("failover", "cleanup", copies["name"])
        (tmp_path / "boot/vmlinuz").unlink()
        site.run(*where, "failover", "test", "web01", "--name", "t2", code=3)
        assert site.json("failover", "list")["failovers"] == []


def test_a_daemon_killed_while_it_waits_for_health_has_a_successor_that_does(
    tmp_path: Path,
) -> None:
    with site_with_machine(tmp_path) as site:
        document = site.json("failover", "test", "web01", "--no-wait")
        assert document["health"] is None
        os.kill(site.pid, signal.SIGKILL)
        site.wait_successor(site.pid, {"web01", "db01"})
        name = document["name"]
        site.wait("it is judged", lambda: site.json("failover", "show", name)["health"] is not None)
        assert site.json("failover", "show", name)["health"]["healthy"]
        site.json("failover", "cleanup", name)
