"""Commands that messages offer: what is put into them is quoted, as a name may be ``a b'c``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FILES = sorted(
    path for part in ("vdiskfs", "tools/vdiskfs_tools") for path in (TOP / part).rglob("*.py")
)

COMMAND = re.compile(r"\bvdiskfs [a-z][a-z-]* (?:(?!; |, |: |`|\n).)*$")
"""The end of a text, in a command: what follows is one of its words."""

PLAIN = {
    # Failovers: `failover.record.check_name` lets them have letters, digits, and ``._-``.
    "failover.record.name", "record.name in vdiskfs/failover", "document['name'] in tools",
    "name in tools/vdiskfs_tools/relocate.py", "name in vdiskfs/failover/choose.py",
    "name in vdiskfs/failover/states.py", "name in vdiskfs/jobcontrol.py",
    # Jobs, steps, process numbers; and a mail's last line, which is no command.
    "job.id", "end", "self._way_back(failover)", "holder", "site in vdiskfs/sinks/mail.py",
}  # fmt: skip
"""What needs no quotes, and where."""


def unquoted(source: str, where: str) -> Iterator[str]:
    """Give what is put into a command of this source without quotes."""
    tree = ast.parse(source)
    quoted: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, text = node.targets[0].id, ast.unparse(node.value)
            quoted[name] = quoted.get(name, True) and ("shlex." in text or "vdiskfs " in text)

    def is_fine(value: ast.expr) -> bool:
        text = ast.unparse(value)
        if text.startswith(("shlex.quote(", "shlex.join(")):
            return True
        names = {one.id for one in ast.walk(value) if isinstance(one, ast.Name)}
        if names and all(quoted.get(one) for one in names):
            return True
        places = (one.partition(" in ") for one in PLAIN)
        return any(what == text and where.startswith(part) for what, _, part in places)

    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            said = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    said += str(part.value)
                elif isinstance(part, ast.FormattedValue):
                    if COMMAND.search(said) and not is_fine(part.value):
                        yield f"{where}:{node.lineno}: {said[-40:]}{{{ast.unparse(part.value)}}}"
                    said += "X"
        elif isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant):
            said = node.left.value if isinstance(node.left.value, str) else ""
            if COMMAND.search(said) and not is_fine(node.right):
                yield f"{where}:{node.lineno}: {said[-40:]}{ast.unparse(node.right)}"


def test_what_is_put_into_a_command_is_quoted() -> None:
    found = [
        line for path in FILES
        for line in unquoted(path.read_text(encoding="utf-8"), str(path.relative_to(TOP)))
    ]  # fmt: skip
    assert found == []


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ('f"vdiskfs disk retry {name}"', True),
        ('f"a; then: " f"vdiskfs disk resync {disk.name} --now"', True),
        ('word = disk\nf"vdiskfs vault check; vdiskfs disk retry {word}"', True),
        ('"vdiskfs point create " + " ".join(names)', True),
        ('f"vdiskfs disk retry {shlex.quote(name)}"', False),
        ('word = shlex.quote(disk)\nf"vdiskfs disk retry {word}"', False),
        ('"vdiskfs point create " + shlex.join(names)', False),
        ('f"vdiskfs job list: {why}"', False),
    ],
)
def test_what_is_not_quoted_is_found(source: str, is_found: bool) -> None:
    assert bool(list(unquoted(source, "x.py"))) is is_found
