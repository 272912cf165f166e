"""The names of crash hooks: those of the source, and who passes which (hooks.toml)."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]


@cache
def table() -> dict[str, dict[str, Any]]:
    """Return hooks.toml."""
    return tomllib.loads((TOP / "tests/crash/hooks.toml").read_text())


def unpassed(walk: str, passed: Iterable[str]) -> list[str]:
    """Return the hooks that a walk is said to pass, by the file of its test, and did not."""
    names = set(passed)
    return [
        one for one in table()["walks"][walk] if not any(fnmatchcase(name, one) for name in names)
    ]


def hooks_of_source() -> set[str]:
    """Return the name of each hook in Python and in C, with * for what is put in.

    Raises:
        ValueError: a hook whose name cannot be read in the source.
    """
    found: set[str] = set()
    for path in sorted((TOP / "vdiskfs").rglob("*.py")):
        if path.name != "crash.py":
            found.update(_in_python(path))
    for path in sorted((TOP / "native/src").glob("*.c")):
        if path.name != "crash.c":
            found.update(_in_c(path))
    return found


def _in_python(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "id", "") or getattr(function, "attr", "")
        if name == "hook":
            yield _name(path, node.args[0])


def _name(path: Path, argument: ast.expr) -> str:
    match argument:
        case ast.Constant(value=str(name)):
            return name
        case ast.JoinedStr(values=parts):
            return "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in parts)
    raise ValueError(f"{path}:{argument.lineno}: a hook without a name")


def _in_c(path: Path) -> Iterator[str]:
    for argument in re.findall(r"\bvdf_crash\(([^)]*)\)", path.read_text()):
        if not re.fullmatch(r'"[\w.-]+"', argument):
            raise ValueError(f"{path}: a hook without a name: {argument}")
        yield argument.strip('"')
