"""permission: a definition from the vault gets of this host what the host itself has named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vdiskfs.config import MachinesConfig
from vdiskfs.errors import NotFoundError, RefusedError
from vdiskfs.machines import (
    DirectBoot,
    HealthCheck,
    Isolated,
    Machine,
    MachineDisk,
    Mapped,
    Network,
    qemuline,
)
from vdiskfs.machines.permission import (
    attachments,
    boot_file,
    hook_command,
    reached_addresses,
)
from vdiskfs.machines.qemuline import accelerators, command_line, disk_format

MACHINE = Machine("web01", 64 << 20, (MachineDisk("web01"),), accel="tcg")
NOTHING = MachinesConfig()


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory as the administrator makes it."""
    directory = tmp_path / "hooks"
    directory.mkdir(mode=0o755)
    program = directory / "start-vm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (directory / "vmlinuz").write_bytes(b"kernel")
    return directory


def test_a_host_that_names_nothing_runs_nothing() -> None:
    """Without a directory of its own there are no hooks and no kernels, and it says which key."""
    with pytest.raises(RefusedError, match="set hooks_directory"):
        hook_command(NOTHING, ["start-vm"], what="hook")
    with pytest.raises(RefusedError, match="set boot_directory"):
        boot_file(NOTHING, "vmlinuz", what="boot")


def test_a_program_of_the_directory_runs_with_its_arguments(programs: Path) -> None:
    host = MachinesConfig(hooks_directory=str(programs), boot_directory=str(programs))
    words = ["start-vm", "--name", "; rm -rf /"]
    assert hook_command(host, words, what="hook") == [f"{programs}/start-vm", *words[1:]]
    assert boot_file(host, "vmlinuz", what="boot") == programs / "vmlinuz"
    with pytest.raises(NotFoundError, match="put it there"):
        hook_command(host, ["absent"], what="hook")
    with pytest.raises(RefusedError, match="not executable"):
        hook_command(host, ["vmlinuz"], what="hook")


@pytest.mark.parametrize("mode", ["program", "directory"])
def test_what_others_can_write_to_is_not_run(programs: Path, mode: str) -> None:
    """Another user of the host must not be able to put a program there."""
    host = MachinesConfig(hooks_directory=str(programs))
    hook_command(host, ["start-vm"], what="hook")
    (programs / "start-vm" if mode == "program" else programs).chmod(0o777)
    with pytest.raises(RefusedError, match="others can write"):
        hook_command(host, ["start-vm"], what="hook")


def test_networks_are_what_the_host_says() -> None:
    """Its map wins; else only what it has for another network; a test needs no permission."""
    cards = (Network("lan", "bridge:br0"), Network("dmz", "bridge:br9"), Network("off"))
    machine = replace(MACHINE, networks=cards)
    assert attachments(machine, Isolated()) == ("isolated",) * 3
    host = Mapped({"dmz": "bridge:br0", "x": "user"})
    assert attachments(machine, host) == ("bridge:br0", "bridge:br0", "none")
    with pytest.raises(RefusedError, match='network dmz: .* set dmz = "bridge:br9"'):
        attachments(machine, Mapped({"lan": "bridge:br0"}))
    with pytest.raises(RefusedError, match="network lan"):
        attachments(replace(machine, networks=(Network("lan", "user"),)), Mapped())


def test_the_original_is_never_taken_for_its_isolated_copy() -> None:
    """At the address that both have, only a copy on a network of this host is asked."""
    cards = (Network("lan", address="192.0.2.10/24"), Network("dmz"),
             Network("wan", address="192.0.2.99"))  # fmt: skip
    machine = replace(MACHINE, networks=cards)
    assert reached_addresses(machine, attachments(machine, Isolated())) == ()
    host = Mapped({"lan": "user", "dmz": "bridge:br0", "wan": "tap:tap0"})
    assert reached_addresses(machine, attachments(machine, host)) == ("192.0.2.99",)


def line_of(machine: Machine, path: Path, attached: tuple[str, ...] = ()) -> list[str]:
    host = MachinesConfig(qemu_arguments=("-global", "a=b"))
    disks = {"web01": path}
    return list(
        command_line(machine, disks, attached, program="qemu", accel="tcg", host=host).command
    )


def test_the_format_follows_from_names_and_never_from_bytes(tmp_path: Path) -> None:
    """A raw disk into which its guest wrote the head of a qcow2 file is raw."""
    path = tmp_path / "web01.img"
    path.write_bytes(b"QFI\xfb" + bytes(500))
    assert disk_format(MACHINE.disks[0], path) == "raw"
    assert disk_format(MACHINE.disks[0], tmp_path / "web01.qcow2") == "qcow2"
    assert disk_format(MachineDisk("d", format="raw"), tmp_path / "web01.qcow2") == "raw"
    words = line_of(MACHINE, path)
    node = json.loads(words[words.index("-blockdev") + 1])
    assert node["driver"] == "raw"
    assert node["file"]["filename"] == str(path)
    words = line_of(MACHINE, tmp_path / "web01.qcow2")
    assert json.loads(words[words.index("-blockdev") + 1])["backing"] is None


def test_no_text_of_a_definition_becomes_an_option(tmp_path: Path) -> None:
    """Names with commas, equal signs and dashes stay inside the one value they are for."""
    evil = ",id=x,path=/etc/passwd -monitor stdio"
    machine = Machine(
        evil, 64 << 20, (MachineDisk("web01"),), accel="tcg",
        networks=(Network(evil, address="192.0.2.9/24"),),
    )  # fmt: skip
    words = line_of(machine, tmp_path / evil.replace("/", ""), ("isolated",))
    assert words[words.index("-name") + 1] == "guest=" + evil.replace(",", ",,")
    assert "-monitor" not in words
    netdev = words[words.index("-netdev") + 1]
    assert "restrict=on" in netdev
    assert "passwd" not in netdev
    assert words[-2:] == ["-global", "a=b"]  # the host's own come last
    assert "spawn=deny" in words[words.index("-sandbox") + 1]


def test_a_network_around_the_machine_s_address_has_room_for_its_gateway(tmp_path: Path) -> None:
    """The address is given by DHCP first, and is not QEMU's own."""
    for address, expected in [
        ("192.0.2.9/24", "net=192.0.2.0/24,host=192.0.2.2,dns=192.0.2.3,dhcpstart=192.0.2.9"),
        ("192.0.2.2", "net=192.0.2.0/24,host=192.0.2.3,dns=192.0.2.4,dhcpstart=192.0.2.2"),
    ]:
        machine = replace(MACHINE, networks=(Network("lan", address=address),),
                          health=HealthCheck("tcp", port=80))  # fmt: skip
        words = line_of(machine, tmp_path / "d.img", ("isolated",))
        netdev = words[words.index("-netdev") + 1]
        assert netdev == f"user,id=net0,restrict=on,{expected},hostfwd=tcp:127.0.0.1:0-:80"


def test_a_kernel_is_passed_by_its_checked_path(programs: Path) -> None:
    host = MachinesConfig(boot_directory=str(programs))
    machine = replace(MACHINE, boot=DirectBoot("vmlinuz", append="console=ttyS0"))
    line = command_line(
        machine, {"web01": Path("/d.img")}, (), program="qemu", accel="tcg", host=host
    )
    words = list(line.command)
    assert words[words.index("-kernel") + 1] == f"{programs}/vmlinuz"
    with pytest.raises(NotFoundError, match="no file is given for its disk web01"):
        command_line(machine, {}, (), program="qemu", accel="tcg", host=host)


def test_what_this_host_lacks_is_said_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firmware that is not installed, KVM that is not there: never something else in silence."""
    monkeypatch.setattr(qemuline, "_UEFI", ((str(tmp_path / "a"), str(tmp_path / "b")),))
    monkeypatch.setattr(qemuline, "_KVM", tmp_path / "kvm")
    with pytest.raises(NotFoundError, match="apt-get install ovmf"):
        line_of(replace(MACHINE, firmware="uefi"), tmp_path / "d.img")
    with pytest.raises(RefusedError, match='cannot use .*kvm; .*accel = "tcg"'):
        accelerators(replace(MACHINE, accel="kvm"))
    assert accelerators(replace(MACHINE, accel="auto")) == ("tcg",)
    (tmp_path / "kvm").touch()
    assert accelerators(replace(MACHINE, accel="auto")) == ("kvm", "tcg")
    assert accelerators(MACHINE) == ("tcg",)
