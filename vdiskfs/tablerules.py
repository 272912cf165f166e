"""Rules for tables of the configuration: which keys there may be, and what each may be.

A rule takes what TOML gave and returns what is kept, or raises ValueError, whose text says what it
must be, without the key: `read_table` puts that before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], Any]


def read_table(value: Any, rules: Mapping[str, Rule], where: str = "") -> dict[str, Any]:
    """Return what a table's rules make of it; keys that are not there are not in it.

    Args:
        value: what is to be a table.
        rules: of each key that there may be.
        where: names the table where a key is unknown, such as " in [mail]".

    Raises:
        ValueError: it is no table, a key is unknown, or a rule does not take what it is.
    """
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    unknown = sorted(set(value) - set(rules))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}{where}")
    checked = {}
    for key, item in value.items():
        try:
            checked[key] = rules[key](item)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return checked


def number(low: float, high: float, what: str = "a number") -> Callable[[Any], float]:
    """Return the rule of a number between two, both included; ``what`` names it."""

    def rule(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be {what}")
        if not low <= value <= high:
            raise ValueError(f"must be from {low:g} to {high:g}")
        return float(value)

    return rule


def truth(value: Any) -> bool:
    """Take true or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value
