"""Each crash hook of the source is one that somebody is killed at, or is excused (hooks.toml)."""

from __future__ import annotations

from collections import Counter

from tests.crash.hooknames import TOP, hooks_of_source, table, unpassed
from tests.test_faults import functions


def test_each_hook_is_walked_tried_or_excused_and_no_other() -> None:
    listed = Counter(name for names in table()["walks"].values() for name in names)
    listed.update(table()["tests"].keys())
    listed.update(table()["excused"].keys())
    assert [name for name, count in listed.items() if count > 1] == []
    source = hooks_of_source()
    assert source - listed.keys() == set(), "new: walk it, or excuse it in hooks.toml"
    assert listed.keys() - source == set(), "there is no such hook any more"


def test_each_test_that_a_hook_is_tried_by_exists_and_knows_its_step() -> None:
    for hook, test in table()["tests"].items():
        file, _, name = test.partition("::")
        assert name in functions(file), test
        path = TOP / file if file.startswith("native/") else TOP / "tests" / file
        words = (hook, hook.partition(".")[2])
        assert any(word in path.read_text() for word in words), (hook, test)
    assert all(table()["excused"].values())


def test_a_walk_that_passes_less_is_noticed() -> None:
    (some, *rest) = table()["walks"]["e2e/test_moves_walk.py"]
    assert unpassed("e2e/test_moves_walk.py", [one.replace("*", "x") for one in rest]) == [some]
