"""What the values of a definition must be.

Each rule returns the value, or raises ValueError with what it must be; some take bounds and
return the rule.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any

from vdiskfs.config import is_attachment
from vdiskfs.units import parse_size

MIB = 1 << 20
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def check_name(value: Any) -> str:
    """Return the name of a machine, a disk or a network."""
    name = text(240)(value)
    if not name or "/" in name:
        raise ValueError("must be a name: 1 to 240 bytes without a slash")
    return name


def text(most: int, least: int = 0) -> Callable[[Any], str]:
    """Make the rule of a text of so many bytes, on one line."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or len(value.encode(errors="replace")) > most:
            raise ValueError(f"must be a text of at most {most} bytes")
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
            raise ValueError("must be a text without control characters")
        if len(value) < least:
            raise ValueError("must not be empty")
        return value

    return rule


def one_of(values: tuple[str, ...]) -> Callable[[Any], str]:
    """Make the rule of a word out of a list."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return value

    return rule


def count(low: int, high: int) -> Callable[[Any], int]:
    """Make the rule of a whole number."""

    def rule(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return rule


def seconds(value: Any) -> float:
    """Return a span of time, up to a day."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 86400:
        raise ValueError("must be a number of seconds from 1 to 86400")
    return float(value)


def memory(value: Any) -> int:
    """Return the memory of a machine in bytes; QEMU counts it in MiB."""
    size = parse_size(value) if isinstance(value, str) and len(value) <= 40 else value
    if type(size) is not int or not 16 * MIB <= size <= 1 << 44 or size % MIB:
        raise ValueError('must be a size in whole MiB such as "2GiB", from 16MiB to 16TiB')
    return size


def file(value: Any) -> str:
    """Return the bare name of a file: no path, no hidden file, nothing that is an option."""
    if not isinstance(value, str) or _FILE.fullmatch(value) is None:
        raise ValueError("must be the name of a file in this host's boot_directory, not a path")
    return value


def command(value: Any) -> tuple[str, ...]:
    """Return the bare name of a program, and its arguments."""
    if not isinstance(value, list) or not 1 <= len(value) <= 64:
        raise ValueError('must be a list of words such as ["start-vm", "web01"]')
    if not isinstance(value[0], str) or _FILE.fullmatch(value[0]) is None:
        raise ValueError("must begin with the name of a file in this host's hooks_directory")
    return (value[0], *(text(1000)(word) for word in value[1:]))


def attachment(value: Any) -> str:
    """Return what a network is: see ``config.is_attachment``."""
    if not is_attachment(value):
        raise ValueError("must be none, user, bridge:NAME or tap:NAME")
    return str(value)


def mac(value: Any) -> str:
    """Return the address of one card, in small letters; not one of many cards."""
    if not isinstance(value, str) or _MAC.fullmatch(value.lower()) is None:
        raise ValueError('must be the address of one card such as "52:54:00:12:34:56"')
    return value.lower()


def address(value: Any) -> str:
    """Return an IP address, with its prefix where that was given."""
    try:
        if not isinstance(value, str):
            raise TypeError
        found = ipaddress.ip_interface(value)
    except (TypeError, ValueError):
        raise ValueError('must be an address such as "192.0.2.10/24"') from None
    return str(found) if "/" in value else str(found.ip)
