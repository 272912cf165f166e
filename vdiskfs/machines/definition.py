"""The definition of a machine as a text (TOML) and as a table (JSON), read strictly.

It may come from a vault that somebody else can write to: everything is bounded and checked
here, and nothing in it is believed beyond that (see ``permission``). Errors name the first
thing that is wrong: what, where, what to do.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from vdiskfs.config import is_attachment
from vdiskfs.errors import UsageError
from vdiskfs.machines.machine import (
    ACCELERATORS,
    BUSES,
    CHECKS,
    FIRMWARES,
    FORMATS,
    HEALTH_LIMIT_S,
    MODELS,
    RUNNERS,
    DirectBoot,
    HealthCheck,
    Hooks,
    Machine,
    MachineDisk,
    Network,
)
from vdiskfs.units import parse_size

TEXT_LIMIT = 64 << 10
"""Bytes of a definition; a machine with 64 disks has some 8 KiB."""
MIB = 1 << 20
_HINT = "see MACHINES in vdiskfs(1)"
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
_REQUIRED = object()
T = TypeVar("T")


def parse_machine(text: str, *, name: str | None = None, where: str = "machine") -> Machine:
    """Read a definition.

    Args:
        text: TOML, as vdiskfs(1) describes it under MACHINES.
        name: the machine's name where the text has none; one that differs is an error.
        where: names the text in errors.

    Raises:
        UsageError: it is no such definition; one line.
    """
    if len(text) > TEXT_LIMIT:
        raise UsageError(f"{where}: longer than {TEXT_LIMIT} bytes", hint=_HINT)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not TOML: {error}"[:300], hint=_HINT) from None
    if name is not None and table.setdefault("name", name) != name:
        raise UsageError(f"{where}: name: it is another machine's: {str(table['name'])[:60]!r}",
                         hint=f"set it to {name!r}, or leave it out")  # fmt: skip
    return from_dict(table, where=where)


def from_dict(table: Mapping[str, Any], *, where: str) -> Machine:
    """Check a table of keys and build the machine.

    Raises:
        UsageError: a key is unknown or missing, or a value cannot be used.
    """
    top = _Table(table, where, "")
    machine = Machine(
        name=top.take("name", check_name),
        memory=top.take("memory", _memory),
        processors=top.take("processors", _count(1, 288), 1),
        firmware=top.take("firmware", _one_of(FIRMWARES), "bios"),
        runner=top.take("runner", _one_of(RUNNERS), "qemu"),
        accel=top.take("accel", _one_of(ACCELERATORS), "auto"),
        disks=top.tables("disks", _disk, 64),
        networks=top.tables("networks", _network, 8),
        boot=top.table("boot", _boot),
        hooks=top.table("hooks", _hooks),
        health=top.table("health", _health),
    )
    top.end()
    _check_whole(machine, top)
    return machine


def to_dict(machine: Machine) -> dict[str, Any]:
    """Return the table that ``from_dict`` reads back to an equal machine; sizes in bytes."""
    return {key: _plain(value) for key, value in asdict(machine).items() if value not in (None, ())}


def to_toml(machine: Machine) -> str:
    """Write a definition for people; ``parse_machine`` reads it back to an equal machine."""
    table = to_dict(machine) | {"memory": f"{machine.memory // MIB}MiB"}
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if _is_plain(value)]
    for key, value in table.items():
        rows = value if isinstance(value, list) and not _is_plain(value) else [value]
        heading = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
        for row in rows if not _is_plain(value) else []:
            lines += ["", heading, *(f"{name} = {_value(item)}" for name, item in row.items())]
    return "\n".join(lines) + "\n"


def check_name(value: Any) -> str:
    """Return the name of a machine, or of a disk, checked.

    Raises:
        ValueError: it is none.
    """
    name = _text(240)(value)
    if not name or "/" in name:
        raise ValueError("must be a name: 1 to 240 bytes without a slash")
    return name


class _Table:
    """One table of a definition: keys are taken by rules, and none may be left over."""

    def __init__(self, values: Any, where: str, path: str) -> None:
        self.where, self.path = where, path
        if not isinstance(values, Mapping):
            raise self.error(None, "must be a table")
        self._left = dict(values)

    def error(self, key: str | None, text: str) -> UsageError:
        """Return the error of a key, or of the table."""
        place = ".".join(part for part in (self.path, key) if part)
        return UsageError(f"{self.where}: {place}: {text}" if place else f"{self.where}: {text}",
                          hint=_HINT)  # fmt: skip

    def take(self, key: str, rule: Callable[[Any], Any], default: Any = _REQUIRED) -> Any:
        """Return a key's value, checked."""
        value = self._left.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise self.error(key, "is missing")
            return default
        try:
            return rule(value)
        except (ValueError, OverflowError) as error:
            raise self.error(key, str(error)) from None

    def table(self, key: str, build: Callable[[_Table], T]) -> T | None:
        """Return what the table under a key builds, or None."""
        value = self._left.pop(key, None)
        return None if value is None else self._built(value, key, build)

    def tables(self, key: str, build: Callable[[_Table], T], most: int) -> tuple[T, ...]:
        """Return what each table in the list under a key builds."""
        rows = self._left.pop(key, [])
        if not isinstance(rows, list) or len(rows) > most:
            raise self.error(key, f"must be a list of at most {most} tables")
        return tuple(self._built(row, f"{key}[{i}]", build) for i, row in enumerate(rows))

    def _built(self, value: Any, key: str, build: Callable[[_Table], T]) -> T:
        inner = _Table(value, self.where, ".".join(part for part in (self.path, key) if part))
        built = build(inner)
        inner.end()
        return built

    def end(self) -> None:
        """Refuse the keys that nobody took."""
        for key in self._left:
            raise self.error(None, f"unknown key {str(key)[:60]!r}")


def _disk(table: _Table) -> MachineDisk:
    return MachineDisk(
        disk=table.take("disk", check_name),
        bus=table.take("bus", _one_of(BUSES), "virtio"),
        boot=table.take("boot", _count(1, 64), None),
        format=table.take("format", _one_of(FORMATS), None),
    )


def _network(table: _Table) -> Network:
    return Network(
        name=table.take("name", check_name),
        attach=table.take("attach", _attachment, "none"),
        mac=table.take("mac", _mac, None),
        address=table.take("address", _address, None),
        model=table.take("model", _one_of(MODELS), "virtio"),
    )


def _boot(table: _Table) -> DirectBoot:
    return DirectBoot(
        kernel=table.take("kernel", _file),
        initrd=table.take("initrd", _file, None),
        append=table.take("append", _text(2000), ""),
    )


def _hooks(table: _Table) -> Hooks:
    return Hooks(**{key: table.take(key, _command) for key in ("start", "stop", "kill", "status")})


def _health(table: _Table) -> HealthCheck:
    kind = table.take("kind", _one_of(CHECKS))
    limit_s = table.take("limit_s", _seconds, HEALTH_LIMIT_S)
    if kind == "tcp":
        return HealthCheck(kind, limit_s, port=table.take("port", _count(1, 65535)))
    if kind == "serial":
        return HealthCheck(kind, limit_s, text=table.take("text", _serial_text))
    if kind == "command":
        return HealthCheck(kind, limit_s, command=table.take("command", _command))
    return HealthCheck(kind, limit_s)


def _check_whole(machine: Machine, top: _Table) -> None:
    """Refuse what contradicts itself."""
    names = [disk.disk for disk in machine.disks]
    orders = [disk.boot for disk in machine.disks if disk.boot is not None]
    ide = sum(disk.bus == "ide" for disk in machine.disks)
    cards = [network.name for network in machine.networks]
    problems = (
        (not names, "disks", "a machine has at least one disk"),
        (len(set(names)) < len(names), "disks", "a disk is listed twice"),
        (len(set(orders)) < len(orders), "disks", "two have the same place in the boot order"),
        (ide > 4, "disks", "at most 4 on the bus ide"),
        (len(set(cards)) < len(cards), "networks", "a network is listed twice"),
        (machine.runner == "hooks" and machine.hooks is None, "hooks",
         'is missing: runner = "hooks" needs it'),
        (machine.boot is not None and machine.firmware == "uefi", "boot",
         "a kernel is started without firmware: leave out one of them"),
    )  # fmt: skip
    for wrong, key, text in problems:
        if wrong:
            raise top.error(key, text)


# ---- rules: each returns the value, or raises ValueError with what it must be ------------


def _text(most: int) -> Callable[[Any], str]:
    def rule(value: Any) -> str:
        if not isinstance(value, str) or len(value.encode(errors="replace")) > most:
            raise ValueError(f"must be a text of at most {most} bytes")
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
            raise ValueError("must be a text without control characters")
        return value

    return rule


def _serial_text(value: Any) -> str:
    text = _text(500)(value)
    if not text:
        raise ValueError("must not be empty")
    return text


def _one_of(values: tuple[str, ...]) -> Callable[[Any], str]:
    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return value

    return rule


def _count(low: int, high: int) -> Callable[[Any], int]:
    def rule(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return rule


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 86400:
        raise ValueError("must be a number of seconds from 1 to 86400")
    return float(value)


def _memory(value: Any) -> int:
    size = parse_size(value) if isinstance(value, str) and len(value) <= 40 else value
    if type(size) is not int or not 16 * MIB <= size <= 1 << 44 or size % MIB:
        raise ValueError('must be a size in whole MiB such as "2GiB", from 16MiB to 16TiB')
    return size


def _file(value: Any) -> str:
    if not isinstance(value, str) or _FILE.fullmatch(value) is None:
        raise ValueError("must be the name of a file in this host's boot_directory, not a path")
    return value


def _command(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 64:
        raise ValueError('must be a list of words such as ["start-vm", "web01"]')
    if not isinstance(value[0], str) or _FILE.fullmatch(value[0]) is None:
        raise ValueError("must begin with the name of a file in this host's hooks_directory")
    return (value[0], *(_text(1000)(word) for word in value[1:]))


def _attachment(value: Any) -> str:
    if not is_attachment(value):
        raise ValueError("must be none, user, bridge:NAME or tap:NAME")
    return str(value)


def _mac(value: Any) -> str:
    if not isinstance(value, str) or _MAC.fullmatch(value.lower()) is None:
        raise ValueError('must be the address of one card such as "52:54:00:12:34:56"')
    return value.lower()


def _address(value: Any) -> str:
    try:
        if not isinstance(value, str):
            raise TypeError
        found = ipaddress.ip_interface(value)
    except (TypeError, ValueError):
        raise ValueError('must be an address such as "192.0.2.10/24"') from None
    return str(found) if "/" in value else str(found.ip)


# ---- writing ---------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return a value without what is not said, tuples as lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v not in (None, "", (), 0)}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _is_plain(value: Any) -> bool:
    """Tell whether a value stands in one line."""
    if isinstance(value, list):
        return not any(isinstance(item, dict) for item in value)
    return not isinstance(value, dict)


def _value(value: Any) -> str:
    """Write one value of TOML; what a terminal would obey is escaped."""
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if not isinstance(value, str):
        return str(value)
    return '"' + "".join(_escaped(char) for char in value) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"
