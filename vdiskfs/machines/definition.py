"""The definition of a machine as a text (TOML) and as a table (JSON), read strictly.

It may come from a vault that somebody else can write to: everything is bounded and checked
here, and nothing in it is believed beyond that (see ``permission``). Errors name the first
thing that is wrong: what, where, what to do.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from vdiskfs.errors import UsageError
from vdiskfs.machines import rules
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

TEXT_LIMIT = 64 << 10
"""Bytes of a definition; a machine with 64 disks has some 8 KiB."""
_HINT = "see MACHINES in vdiskfs(1)"
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
        name=top.take("name", rules.check_name),
        memory=top.take("memory", rules.memory),
        processors=top.take("processors", rules.count(1, 288), 1),
        firmware=top.take("firmware", rules.one_of(FIRMWARES), "bios"),
        runner=top.take("runner", rules.one_of(RUNNERS), "qemu"),
        accel=top.take("accel", rules.one_of(ACCELERATORS), "auto"),
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
    table = to_dict(machine) | {"memory": f"{machine.memory // rules.MIB}MiB"}
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if _is_plain(value)]
    for key, value in table.items():
        rows = value if isinstance(value, list) and not _is_plain(value) else [value]
        heading = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
        for row in rows if not _is_plain(value) else []:
            lines += ["", heading, *(f"{name} = {_value(item)}" for name, item in row.items())]
    return "\n".join(lines) + "\n"


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
        disk=table.take("disk", rules.check_name),
        bus=table.take("bus", rules.one_of(BUSES), "virtio"),
        boot=table.take("boot", rules.count(1, 64), None),
        format=table.take("format", rules.one_of(FORMATS), None),
    )


def _network(table: _Table) -> Network:
    return Network(
        name=table.take("name", rules.check_name),
        attach=table.take("attach", rules.attachment, "none"),
        mac=table.take("mac", rules.mac, None),
        address=table.take("address", rules.address, None),
        model=table.take("model", rules.one_of(MODELS), "virtio"),
    )


def _boot(table: _Table) -> DirectBoot:
    return DirectBoot(
        kernel=table.take("kernel", rules.file),
        initrd=table.take("initrd", rules.file, None),
        append=table.take("append", rules.text(2000), ""),
    )


def _hooks(table: _Table) -> Hooks:
    return Hooks(
        **{key: table.take(key, rules.command) for key in ("start", "stop", "kill", "status")}
    )


def _health(table: _Table) -> HealthCheck:
    kind = table.take("kind", rules.one_of(CHECKS))
    limit_s = table.take("limit_s", rules.seconds, HEALTH_LIMIT_S)
    if kind == "tcp":
        return HealthCheck(kind, limit_s, port=table.take("port", rules.count(1, 65535)))
    if kind == "serial":
        return HealthCheck(kind, limit_s, text=table.take("text", rules.text(500, least=1)))
    if kind == "command":
        return HealthCheck(kind, limit_s, command=table.take("command", rules.command))
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
