"""The table of faults, tests/faults.toml: all of them are in it, and all that it names exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.soak.scenarios import SCENARIOS

TOP = Path(__file__).resolve().parents[1]
TABLE: dict[str, dict[str, dict[str, Any]]] = tomllib.loads((TOP / "tests/faults.toml").read_text())
KINDS = {
    "property": ["local", "tracking", "prefix", "immutable", "fence", "report"],
    "trap": [str(number) for number in range(1, 8)],
    "feature": ["application", "policies", "rpo", "retry", "enabling", "encryption-cost"],
    "class": [str(number) for number in range(1, 27)],
}
ROWS = {f"{kind} {name}": row for kind, rows in TABLE.items() for name, row in rows.items()}
KEYS = {"what", "tests", "soak", "commands", "lacks"}


@cache
def functions(file: str) -> frozenset[str]:
    """Return the names of a file's test functions; of one in C, of its static functions."""
    if file.startswith("native/"):
        text = (TOP / file).read_text()
        found = set(re.findall(r"^static \w+ \**(\w+)\(", text, re.MULTILINE))
        return frozenset(name for name in found if text.count(f"{name}(") > 1)
    tree = ast.parse((TOP / "tests" / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = (node.name for node in tree.body if isinstance(node, kinds))
    return frozenset(name for name in names if name.startswith("test_"))


def missing(row: dict[str, Any]) -> Iterator[str]:
    """Yield what a row names and is not there."""
    for test in row["tests"]:
        file, _, name = test.partition("::")
        place = TOP / file if file.startswith("native/") else TOP / "tests" / file
        if not place.is_file() or name not in functions(file):
            yield test
    yield from set(row.get("soak", ())) - set(SCENARIOS)
    for module in row.get("commands", ()):
        if importlib.util.find_spec(module) is None:
            yield module


def test_each_property_trap_feature_and_class_of_faults_is_in_the_table() -> None:
    assert {kind: list(rows) for kind, rows in TABLE.items()} == KINDS


@pytest.mark.parametrize("name", ROWS)
def test_what_the_table_names_exists(name: str) -> None:
    """Tests by file and function, scenarios of the soak, and modules that are programs."""
    row = ROWS[name]
    assert row.keys() <= KEYS
    assert row["what"]
    assert row["tests"]
    assert len(set(row["tests"])) == len(row["tests"])
    assert list(missing(row)) == []


def test_each_scenario_of_the_soak_is_in_the_table() -> None:
    assert {one for row in ROWS.values() for one in row.get("soak", ())} == set(SCENARIOS)


def test_what_the_page_on_security_names_exists() -> None:
    text = (TOP / "SECURITY.md").read_text()
    named = re.findall(r"`((?:\w+/)*test_\w+\.py(?:::\w+)?)`", text)
    assert len(named) > 40
    wrong = [one for one in named if not (TOP / "tests" / one.partition("::")[0]).is_file()]
    whole = {"tests": [one for one in named if "::" in one and one not in wrong]}
    assert [*wrong, *missing(whole)] == []
