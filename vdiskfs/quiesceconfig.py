"""The ``[quiesce.DISK]`` tables of vdiskfs.conf(5): how a disk is brought to rest for a point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vdiskfs.tablerules import Rule, read_table, truth

HOOK_S = 30.0


@dataclass(frozen=True)
class QuiesceConfig:
    """How one disk is brought to rest.

    ``agent`` is the Unix socket of a QEMU guest agent, ``libvirt`` the domain whose agent
    libvirt reaches, ``filesystem`` freezes what is mounted from the disk on this host.
    ``before`` and ``after`` are commands, each ended after ``hook_limit_s`` seconds.
    """

    agent: str | None = None
    libvirt: str | None = None
    filesystem: bool = False
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    hook_limit_s: float = HOOK_S


def parse_quiesce(value: Any) -> dict[str, QuiesceConfig]:
    """Read the table of tables.

    Raises:
        ValueError: it is not one; the text says which key.
    """
    if not isinstance(value, dict):
        raise ValueError("must be a table of disks")
    return {name: _parse_one(name, table) for name, table in value.items()}


def quiesce_table(disks: Mapping[str, QuiesceConfig]) -> dict[str, Any]:
    """Return the table that `parse_quiesce` reads back."""
    return {
        name: {key: item for key, item in asdict(one).items() if item is not None}
        for name, one in disks.items()
    }


def _parse_one(name: str, table: Any) -> QuiesceConfig:
    try:
        one = QuiesceConfig(**read_table(table, _KEYS))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if one.agent is not None and one.libvirt is not None:
        raise ValueError(f"{name}: agent and libvirt exclude each other")
    if not (one.agent or one.libvirt or one.filesystem or one.before):
        raise ValueError(f"{name}: one of agent, libvirt, filesystem, before is needed")
    return one


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a text that is not empty")
    return value


def _absolute(value: Any) -> str:
    if not _text(value).startswith("/"):
        raise ValueError("must be an absolute path")
    return str(value)


def _domain(value: Any) -> str:
    if _text(value).startswith("-"):
        raise ValueError("must be the name of a domain")
    return str(value)


def _command(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError("must be a list: a program, by its path, and its arguments")
    if value:
        _absolute(value[0])
    if any("\0" in one for one in value):
        raise ValueError("a word cannot hold a NUL character")
    return tuple(value)


def _limit(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.1 <= value <= 3600:
        raise ValueError("must be seconds, from 0.1 to 3600")
    return float(value)


_KEYS: dict[str, Rule] = {
    "agent": _absolute,
    "libvirt": _domain,
    "filesystem": truth,
    "before": _command,
    "after": _command,
    "hook_limit_s": _limit,
}
