"""What holds for the tree as a whole: names in the tour, dependencies, lock files, pages."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import vdiskfs

TOP = Path(__file__).resolve().parents[1]
# Tools that read the tree; whatever they leave behind is not part of it.
_LEFT_OUT = {".git", ".venv", "build", "dist", "node_modules", "__pycache__", ".hypothesis"}


def text_files() -> Iterator[Path]:
    """Yield every file of the project that is text."""
    for path in sorted(TOP.rglob("*")):
        parts = path.relative_to(TOP).parts
        if _LEFT_OUT.intersection(parts) or any(part.endswith("_cache") for part in parts):
            continue
        if path.is_file() and b"\0" not in path.read_bytes()[:4096]:
            yield path


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((TOP / folder).rglob("*.py"))


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((TOP / "pyproject.toml").read_text())


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


# ---- the tour -------------------------------------------------------------------------


def resolve(name: str) -> object:
    """Return what a dotted name in the tour names.

    Raises:
        AttributeError, ImportError: nothing.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(["vdiskfs", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def tour_names() -> list[str]:
    """Return the dotted Python names in double backquotes, without the arguments of calls."""
    tour = vdiskfs.__doc__ or ""
    modules = "|".join(m.name for m in pkgutil.iter_modules(vdiskfs.__path__))
    return re.findall(rf"``((?:{modules})(?:\.\w+)+)(?:\([^)]*\))?``", tour)


def test_every_python_name_in_the_tour_exists() -> None:
    """``module.function`` in the docstring of vdiskfs is a function of that module."""
    names = tour_names()
    assert len(names) >= 10
    missing = []
    for name in names:
        try:
            resolve(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


def test_every_native_name_in_the_tour_is_in_the_header() -> None:
    """``vdf_...`` in the docstring of vdiskfs is declared in vdf.h."""
    header = (TOP / "native/include/vdf.h").read_text()
    names = re.findall(r"``(vdf_\w+)", vdiskfs.__doc__ or "")
    assert names
    assert [name for name in names if not re.search(rf"\b{name}\b", header)] == []


def test_the_tour_names_every_module() -> None:
    """A newcomer finds each module of vdiskfs in the tour."""
    modules = {m.name for m in pkgutil.iter_modules(vdiskfs.__path__)} - {"_native"}
    words = set(re.findall(r"\w+", vdiskfs.__doc__ or ""))
    assert modules - words == set()


# ---- the order of modules and what they use -------------------------------------------


def test_each_module_imports_only_those_below_it() -> None:
    """The import contracts of pyproject.toml are kept, and name every module."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [tool, "--no-cache"], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_native_imports_the_extension() -> None:
    """vdiskfs.native is the only package that touches ffi."""
    users = [p for p in python_files("vdiskfs", "tools") if "vdiskfs._native" in imported(p)]
    assert {path.parent for path in users} == {TOP / "vdiskfs/native"}


def test_every_function_of_the_header_is_in_the_extension() -> None:
    """What vdf.h and its parts declare can be called from Python."""
    from vdiskfs._native import lib

    headers = "".join(path.read_text() for path in sorted((TOP / "native/include").iterdir()))
    header = re.sub(r"/\*.*?\*/", "", headers, flags=re.DOTALL)
    names = re.findall(r"^[\w ]+[ *](vdf_\w+)\(", header, re.MULTILINE)
    assert len(names) > 40
    assert [name for name in names if not hasattr(lib, name)] == []


def distributions(requirements: list[str]) -> set[str]:
    """Return the normalized names of requirements."""
    return {normalized(re.split(r"[<>=\[; ]", item)[0]) for item in requirements}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def used_distributions(*folders: str) -> set[str]:
    """Return the distributions whose modules these folders import."""
    owners = importlib.metadata.packages_distributions()
    modules = set().union(*(imported(path) for path in python_files(*folders)))
    found: set[str] = set()
    for module in modules:
        names = owners.get(module.split(".")[0], [])
        if len(names) > 1:  # namespaces such as azure: the one that has the module's file
            names = [name for name in names if _has(name, module)]
        found.update(normalized(name) for name in names)
    return found - {"vdiskfs", "pip", "setuptools"}


@cache
def _files(distribution: str) -> frozenset[str]:
    return frozenset(str(file) for file in importlib.metadata.files(distribution) or [])


def _has(distribution: str, module: str) -> bool:
    path = module.replace(".", "/")
    return bool({f"{path}.py", f"{path}/__init__.py"} & _files(distribution))


# What is used without being imported by us, and by what.
_INDIRECT = {
    "cffi": "the extension's runtime",
}


def test_the_dependencies_are_those_that_are_imported() -> None:
    """Every requirement is imported, and everything imported is a requirement."""
    required = distributions(project()["project"]["dependencies"])
    optional = project()["project"]["optional-dependencies"]
    extras = distributions([item for items in optional.values() for item in items])
    used = used_distributions("vdiskfs", "tools/vdiskfs_tools")
    assert used - required - extras - _INDIRECT.keys() == set(), "imported and not required"
    assert required - used - _INDIRECT.keys() == set(), "required and not imported"


def test_every_dependency_has_a_lower_bound() -> None:
    """Versions are bounded below in pyproject.toml; the lock files pin them."""
    unbounded = [item for item in project()["project"]["dependencies"] if ">=" not in item]
    assert unbounded == []


# ---- lock files and names that must not stand anywhere ----------------------------------


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_the_python_lock_pins_every_package_by_hash(name: str) -> None:
    """Each entry of a lock file has one version and at least one SHA-256."""
    text = (TOP / "tools" / name).read_text().replace("\\\n", " ")
    entries = [line for line in text.split("\n") if line.strip()]
    loose = [x for x in entries if "==" not in x.split(";")[0] or "--hash=sha256:" not in x]
    assert loose == []
    locked = {normalized(entry.split("==")[0]) for entry in entries}
    wanted = distributions(project()["project"]["dependencies"])
    assert wanted - locked == set()


def test_both_python_locks_have_the_same_versions() -> None:
    """What the demo runs with is what the tests ran with."""
    versions = [
        dict(re.findall(r"^([\w.-]+)==(\S+)", (TOP / "tools" / name).read_text(), re.MULTILINE))
        for name in ("requirements.lock", "requirements-dev.lock")
    ]
    assert versions[0].items() <= versions[1].items()


def test_the_node_lock_pins_azurite_and_names_no_host() -> None:
    """package-lock.json has the version of package.json, hashes, and no download addresses."""
    lock = json.loads((TOP / "tests/node/package-lock.json").read_text())
    wanted = json.loads((TOP / "tests/node/package.json").read_text())["dependencies"]["azurite"]
    packages = {path: entry for path, entry in lock["packages"].items() if path}
    assert packages["node_modules/azurite"]["version"] == wanted
    assert [path for path, entry in packages.items() if "resolved" in entry] == []
    assert [path for path, entry in packages.items() if "integrity" not in entry] == []


def test_no_file_names_a_package_registry() -> None:
    """Where packages come from is the matter of whoever installs them."""
    # Put together here, so that this file does not name them either.
    hosts = [".".join(words) for words in (
        ("pypi", "org"), ("files", "pythonhosted", "org"), ("registry", "npmjs", "org"),
        ("deb", "debian", "org"), ("archive", "ubuntu", "com"), ("registry", "yarnpkg", "com"),
    )]  # fmt: skip
    found = [
        f"{path.relative_to(TOP)}: {host}"
        for path in text_files()
        for host in hosts
        if host in path.read_text(errors="replace")
    ]
    assert found == []


def test_the_top_of_the_tree_is_what_the_design_says() -> None:
    """Nothing else lies at the top than the design's list, dotfiles, and what git ignores."""
    expected = {"pyproject.toml", "vdiskfs", "native", "tools", "tests", "man", "README.md",
                "LICENSE", "CHANGELOG.md", "SECURITY.md", "run"}  # fmt: skip
    ignored = {"build", "dist", "bench-results"}
    found = {path.name for path in TOP.iterdir() if not path.name.startswith(".")}
    assert found - ignored == expected


def test_no_module_is_longer_than_five_hundred_lines() -> None:
    """A module is one noun; at 500 lines it is split."""
    long = [
        f"{path.relative_to(TOP)}: {count}"
        for path in [*python_files("vdiskfs", "tools", "tests"), *(TOP / "native").rglob("*.[ch]")]
        if (count := path.read_text().count("\n")) > 500
    ]
    assert long == []


# ---- pages and words ------------------------------------------------------------------


PAGES = ["vdiskfs.1", "vdiskfs.conf.5", "vdiskfs-format.5", "vdiskfs-internals.7"]


@pytest.mark.parametrize("page", PAGES)
def test_every_man_page_is_there_and_well_formed(page: str) -> None:
    """A page has the sections that pages have, and groff has nothing to say about it."""
    path = TOP / "man" / page
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    headings = re.findall(r"^\.SH +\"?([A-Z ]+)", path.read_text(), re.MULTILINE)
    assert headings[0] == "NAME"
    assert "SEE ALSO" in headings


def test_the_exit_codes_in_the_page_are_those_of_the_errors() -> None:
    """vdiskfs(1) lists every exit code that an error has."""
    from vdiskfs import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.VdiskfsError)} | {0, 130}
    page = (TOP / "man/vdiskfs.1").read_text()
    section = re.split(r"(?m)^\.SH ", page.split("EXIT STATUS", 1)[1])[0]
    assert {int(number) for number in re.findall(r"(?<![\w.])\d{1,3}(?![\w.])", section)} >= codes


def test_the_format_page_has_the_constants_of_the_code() -> None:
    """vdiskfs-format(5) names the sizes of pages and chunks as the code has them."""
    from vdiskfs import units

    page = (TOP / "man/vdiskfs-format.5").read_text().replace(",", "")
    for number in (units.PAGE_SIZE, units.CHUNK_SIZE):
        assert str(number) in page or f"{number // 1024} KiB" in page


def test_the_header_and_the_library_have_the_same_sizes() -> None:
    """vdf.h and units agree on pages, chunks and regions."""
    from vdiskfs import units
    from vdiskfs._native import lib

    assert (lib.VDF_PAGE_SIZE, lib.VDF_CHUNK_SIZE, lib.VDF_REGION_SIZE) == (
        units.PAGE_SIZE,
        units.CHUNK_SIZE,
        units.REGION_SIZE,
    )


def test_the_commands_of_the_readme_exist() -> None:
    """Every `vdiskfs COMMAND` of the README is a command, and every `./run NAME` too."""
    import click

    from vdiskfs_tools.main import cli

    text = (TOP / "README.md").read_text()
    for words in re.findall(r"^ {4}vdiskfs ((?:[a-z]+ ?)+)", text, re.MULTILINE):
        group: click.Command | None = cli
        for word in words.split():
            if not isinstance(group, click.Group):
                break
            group = group.get_command(click.Context(group), word)
            assert group is not None, words
    script = (TOP / "run").read_text()
    for name in re.findall(r"\./run ([a-z]+)", text):
        assert re.search(rf"^{name}[ |)]", script, re.MULTILINE), name
