"""Real guests: checks on a booted system, no way out of an isolated network, a power button."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.e2e.guest_files import initramfs, kernel
from tests.e2e.mounted import MountedSite
from tests.machines.harness import end, make_disk, runner
from vdiskfs.config import MachinesConfig
from vdiskfs.machines import (
    Attach,
    DirectBoot,
    HealthCheck,
    Isolated,
    Machine,
    MachineDisk,
    Mapped,
    Network,
    wait_healthy,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]
DRIVERS = ("virtio_net", "virtio_console", "button", "evdev")
LIMIT_S = 60.0

# A service on port 8080, an agent that speaks qemu-ga's protocol, and init's power button.
SCRIPT = r"""
cat > /tmp/dhcp <<'END'
[ "$1" = bound ] && ip addr add $ip/24 dev $interface
END
chmod 755 /tmp/dhcp
ip link set eth0 up
udhcpc -i eth0 -n -q -s /tmp/dhcp >/dev/null 2>&1
ip -4 -o addr show dev eth0 | sed 's/.*inet \([0-9./]*\).*/ADDRESS \1/'
ip route add default via 192.0.2.2
if echo anybody | nc -w 5 192.0.2.2 @PORT@ | grep -q somebody
then echo "WAY OUT: open"; else echo "WAY OUT: closed"; fi
agent() {
    while read -r line; do
        case $line in
        *guest-sync-delimited*)
            id=$(echo "$line" | sed 's/.*"id": *\([0-9]*\).*/\1/')
            printf '\377{"return": %s}\n' "$id" ;;
        *guest-ping*) printf '{"return": {}}\n' ;;
        esac
    done
}
exec 3<>/dev/vport1p1
while :; do agent <&3 >&3; sleep 0.2; done &  # nobody connected reads as an end
mkdir -p /tmp/www
echo hello >/tmp/www/index.html
httpd -p 8080 -h /tmp/www
echo "written by the guest" | dd of=/dev/vda bs=512 seek=3 conv=sync,fsync 2>/dev/null
echo "SERVICE IS UP"
event=$(grep -A5 "Power Button" /proc/bus/input/devices | sed -n 's/.*\(event[0-9]*\).*/\1/p')
echo "BUTTON IS ${event:-absent}"
dd if=/dev/input/$event of=/dev/null bs=24 count=1 2>/dev/null
echo "POWER BUTTON"
"""


@contextmanager
def answering() -> Iterator[tuple[int, list[str]]]:
    """Answer on a port of this host's loopback; what is asked is noted."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                asked.append(client.recv(1000).decode(errors="replace"))
                client.sendall(b"somebody\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def guest(directory: Path, port: int) -> tuple[Machine, MachinesConfig]:
    """Return a machine that boots the script, and a host that has its kernel."""
    boot = directory / "boot"
    boot.mkdir(mode=0o755)
    (boot / "vmlinuz").write_bytes(kernel().read_bytes())
    initramfs(SCRIPT.replace("@PORT@", str(port)), boot / "initrd", drivers=DRIVERS)
    append = "console=ttyS0 panic=-1 quiet mitigations=off"
    machine = Machine(
        "web01", 256 << 20, (MachineDisk("web01"),), accel="tcg",
        networks=(Network("lan", address="192.0.2.10/24"),),
        boot=DirectBoot("vmlinuz", "initrd", append),
        health=HealthCheck("tcp", LIMIT_S, port=8080),
    )  # fmt: skip
    return machine, MachinesConfig(boot_directory=str(boot))


@pytest.mark.e2e
@pytest.mark.root
async def test_a_guest_boots_on_a_live_disk_is_checked_found_and_turned_off(
    tmp_path: Path,
) -> None:
    """Isolated: console, TCP and agent answer, nothing comes out, the power button is heard."""
    with answering() as (port, asked), MountedSite(tmp_path) as site:
        machine, host = guest(tmp_path, port)
        image = site.add_image("web01", 1 << 20)
        await trio.to_thread.run_sync(lambda: site.init().mount())
        disks = {"web01": site.image("web01")}
        directory = tmp_path / "machine"
        try:
            await runner(host).start(machine, disks, directory, Isolated())
            # Another daemon, later: it knows the directory alone.
            running = await runner(host).find(directory)
            assert running is not None
            health = await wait_healthy(running, machine, host)
            assert health.healthy, (health, running.console())
            assert 1 < health.seconds <= running.age_s()
            for check in (
                HealthCheck("serial", LIMIT_S, text="SERVICE IS UP"), HealthCheck("agent", LIMIT_S),
            ):  # fmt: skip
                health = await wait_healthy(running, replace(machine, health=check), host)
                assert health.healthy, (health, running.console())
            console = running.console()
            assert b"ADDRESS 192.0.2.10/24" in console
            assert b"WAY OUT: closed" in console
            assert asked == []
            assert await running.shut_down(LIMIT_S), running.console()
            assert b"POWER BUTTON" in running.console()
            assert await running.wait_status() == "it turned itself off"
            assert await runner(host).find(directory) is None
        finally:
            await end(directory)
        assert image.read_bytes()[1536:].startswith(b"written by the guest")


async def test_a_mapped_network_has_a_way_out(tmp_path: Path) -> None:
    """The same guest, on a network that this host has named, reaches what the host does."""
    with answering() as (port, asked):
        machine, host = guest(tmp_path, port)
        network: Attach = Mapped({"lan": "user"})
        directory = tmp_path / "machine"
        try:
            disks = {"web01": make_disk(tmp_path)}
            running = await runner(host).start(machine, disks, directory, network)
            health = await wait_healthy(running, machine, host)
            assert health.healthy, (health, running.console())
            assert b"WAY OUT: open" in running.console()
            assert len(asked) == 1
            await running.kill()
            assert not await running.is_up()
        finally:
            await end(directory)
