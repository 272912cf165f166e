"""definition: TOML and tables, there and back; what is wrong is one clear line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.errors import UsageError
from vdiskfs.machines import Machine, MachineDisk, Network, parse_machine
from vdiskfs.machines.definition import TEXT_LIMIT, from_dict, to_dict
from vdiskfs.machines.machine import (
    ACCELERATORS,
    BUSES,
    FORMATS,
    MODELS,
    DirectBoot,
    HealthCheck,
    Hooks,
)

SMALL = 'name = "web01"\nmemory = "64MiB"\n[[disks]]\ndisk = "web01"\n'

texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40)
names = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"),
                min_size=1, max_size=60)  # fmt: skip
files = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True)
commands = st.builds(lambda first, rest: (first, *rest), files, st.lists(texts, max_size=3))
limits = st.floats(1, 86400)
checks = st.one_of(
    st.builds(HealthCheck, st.just("agent"), limits),
    st.builds(HealthCheck, st.just("tcp"), limits, port=st.integers(1, 65535)),
    st.builds(HealthCheck, st.just("serial"), limits, text=texts.filter(bool)),
    st.builds(HealthCheck, st.just("command"), limits, command=commands),
)
machines = st.builds(
    Machine,
    name=names,
    memory=st.integers(16, 1 << 20).map(lambda mib: mib << 20),
    processors=st.integers(1, 288),
    disks=st.lists(
        st.builds(
            MachineDisk, names, st.sampled_from(["virtio", "scsi"]),
            format=st.none() | st.sampled_from(FORMATS),
        ), min_size=1, max_size=4, unique_by=lambda disk: disk.disk,
    ).map(tuple),
    networks=st.lists(
        st.builds(
            Network, names, st.sampled_from(["none", "user", "bridge:br0", "tap:tap3"]),
            mac=st.none() | st.just("52:54:00:aa:bb:cc"),
            address=st.none() | st.sampled_from(["192.0.2.7", "192.0.2.7/28", "2001:db8::7/64"]),
            model=st.sampled_from(MODELS),
        ), max_size=3, unique_by=lambda card: card.name,
    ).map(tuple),
    boot=st.none() | st.builds(DirectBoot, files, st.none() | files, texts),
    hooks=st.none() | st.builds(Hooks, commands, commands, commands, commands),
    health=st.none() | checks,
    accel=st.sampled_from(ACCELERATORS),
)  # fmt: skip


@given(machines)
def test_a_machine_survives_toml_and_json(machine: Machine) -> None:
    """What is written is read back equal, as a text for people and as the vault's document."""
    assert parse_machine(machine.to_toml()) == machine
    table = json.loads(json.dumps(to_dict(machine)))
    assert from_dict(table, where="test") == machine


@given(machines)
def test_a_definition_s_text_does_nothing_to_a_terminal(machine: Machine) -> None:
    """Whatever a name holds, all that is written can be printed."""
    assert all(line.isprintable() for line in machine.to_toml().split("\n"))


def test_the_smallest_machine_has_the_defaults() -> None:
    """A name, memory and a disk are enough; the name may come from the caller."""
    machine = parse_machine(SMALL)
    assert machine == Machine("web01", 64 << 20, (MachineDisk("web01"),))
    assert parse_machine(SMALL.replace('name = "web01"\n', ""), name="web01") == machine
    with pytest.raises(UsageError, match="another machine's: 'web01'"):
        parse_machine(SMALL, name="web02")


WRONG = {
    "": "name: is missing",
    "name = 'a": "not TOML",
    "memory = 3": "name: is missing",
    SMALL + "colour = 'red'": r"disks\[0\]: unknown key 'colour'",
    "colour = 'red'\n" + SMALL: "unknown key 'colour'",
    SMALL.replace("web01", "a/b", 1): "name: must be a name",
    SMALL.replace("web01", r"a\u001b", 1): "name: must be a text without control",
    SMALL.replace("web01", "a" * 241, 1): "name: must be a text of at most 240 bytes",
    SMALL.replace("64MiB", "1MiB"): "memory: must be a size in whole MiB",
    SMALL.replace("64MiB", "64.5MiB"): "memory: must be a size in whole MiB",
    SMALL.replace('"64MiB"', "true"): "memory: must be a size",
    SMALL.replace("64MiB", "9" * 39): "memory: must be a size",
    SMALL.replace("64MiB", "much"): "memory: not a size",
    'name = "a"\nmemory = "1GiB"': "disks: a machine has at least one disk",
    'name = "a"\nmemory = "1GiB"\ndisks = 3': "disks: must be a list",
    'name = "a"\nmemory = "1GiB"\ndisks = [3]': r"disks\[0\]: must be a table",
    SMALL + "bus = 'sata'": r"disks\[0\].bus: must be one of virtio, ide, scsi",
    SMALL + "bus = ['ide']": r"disks\[0\].bus: must be one of",
    SMALL + "format = 'vmdk'": r"disks\[0\].format: must be one of raw, qcow2",
    SMALL + "boot = 0": r"disks\[0\].boot: must be a whole number from 1 to 64",
    SMALL + "boot = true": r"disks\[0\].boot: must be a whole number",
    SMALL + '[[disks]]\ndisk = "web01"': "disks: a disk is listed twice",
    SMALL + 'boot = 1\n[[disks]]\ndisk = "b"\nboot = 1': "disks: two have the same place",
    SMALL + "bus = 'ide'\n" + "".join(f"[[disks]]\ndisk='{i}'\nbus='ide'\n" for i in range(4)):
        "disks: at most 4 on the bus ide",
    SMALL + "[[networks]]\nname = 'lan'\nattach = 'bridge:../x'": r"networks\[0\].attach: must be",
    SMALL + "[[networks]]\nname = 'lan'\nattach = 'bridge:a,script=/x'": "attach: must be none",
    SMALL + "[[networks]]\nname = 'lan'\nmac = '01:00:00:00:00:00'": r"networks\[0\].mac: must be",
    SMALL + "[[networks]]\nname = 'lan'\naddress = 'localhost'": "address: must be an address",
    SMALL + "[[networks]]\nname = 'lan'\n[[networks]]\nname = 'lan'": "networks: a network is",
    SMALL + "[boot]\ninitrd = 'x'": "boot.kernel: is missing",
    SMALL + "[boot]\nkernel = '/etc/shadow'": "boot.kernel: must be the name of a file",
    SMALL + "[boot]\nkernel = '..'": "boot.kernel: must be the name of a file",
    "firmware='uefi'\n" + SMALL + "[boot]\nkernel = 'k'": "boot: a kernel is started without",
    SMALL + "[health]\nkind = 'tcp'": "health.port: is missing",
    SMALL + "[health]\nkind = 'tcp'\nport = 22\ntext = 'x'": "health: unknown key 'text'",
    SMALL + "[health]\nkind = 'serial'\ntext = ''": "health.text: must not be empty",
    SMALL + "[health]\nkind = 'agent'\nlimit_s = 0": "health.limit_s: must be a number of seconds",
    SMALL + "[health]\nkind = 'agent'\nlimit_s = nan": "health.limit_s: must be a number",
    SMALL + "[health]\nkind = 'command'\ncommand = 'rm -rf /'": "health.command: must be a list",
    SMALL + "[health]\nkind = 'command'\ncommand = ['/bin/sh', '-c', 'x']": "must begin with the",
    "runner = 'hooks'\n" + SMALL: 'hooks: is missing: runner = "hooks" needs it',
    SMALL + "[hooks]\nstart = ['a']\nstop = ['b']\nkill = ['c']": "hooks.status: is missing",
    SMALL + "[hooks]\nstart = ['../a']\nstop = ['b']\nkill = ['c']\nstatus = ['d']":
        "hooks.start: must begin with the name of a file in this host's hooks_directory",
    "qemu_arguments = ['-S']\n" + SMALL: "unknown key 'qemu_arguments'",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: WRONG[text][:40])
def test_what_is_wrong_is_one_line_that_says_where(text: str) -> None:
    """Each error names the file, the key and what it must be, and where to read on."""
    with pytest.raises(UsageError, match=WRONG[text]) as caught:
        parse_machine(text, where="web01.toml")
    line = str(caught.value)
    assert line.startswith("web01.toml: ")
    assert "\n" not in line
    assert "vdiskfs(1)" in line


@pytest.mark.parametrize(
    "text",
    ["a" * (TEXT_LIMIT + 1), "a=" + "[" * 20000, "a." * 5000 + "b=1", SMALL + "x=" + "9" * 5000,
     "name=1979-05-27\nmemory=1"],
    ids=["long", "deep", "dotted", "digits", "date"],
)  # fmt: skip
def test_a_hostile_text_is_an_error_and_no_more(text: str) -> None:
    """Size, depth and types are bounded: nothing but a UsageError comes out."""
    with pytest.raises(UsageError) as caught:
        parse_machine(text)
    assert len(str(caught.value)) < 500


values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
keys = ["name", "memory", "disks", "networks", "boot", "health", "hooks", "firmware", "runner"]


@given(st.dictionaries(st.sampled_from(keys), values))
def test_any_table_is_a_machine_or_an_error(table: dict[str, Any]) -> None:
    """No value of any type gets through unchecked, or raises anything else."""
    try:
        machine = from_dict(table, where="vault")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert from_dict(to_dict(machine), where="again") == machine


def test_cards_have_addresses_of_their_own_that_stay() -> None:
    """Two cards, and two machines, never share a MAC; the same card has the same one anywhere."""
    cards = (Network("lan"), Network("dmz"), Network("own", mac="52:54:00:00:00:01"))
    found = [Machine(name, 1 << 30, (MachineDisk("d"),), networks=cards) for name in ("a", "b")]
    macs = [machine.mac(number) for machine in found for number in range(2)]
    assert len(set(macs)) == 4
    assert all(re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac) for mac in macs)
    assert found[0].mac(2) == "52:54:00:00:00:01"
    assert found[0].id != found[1].id
    assert BUSES == ("virtio", "ide", "scsi")
